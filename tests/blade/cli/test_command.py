"""What every command does before its own work."""

import errno
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from blade.cli.command import WAITING, describe, ended_by_sigterm, run_command

TOUCHING = """
import resource
import torch
from blade.cli.command import keep_freed_memory
torch.set_num_threads(1)
if {keeps}:
    keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**23), torch.ones(2**22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_is_freed_is_used_again_without_the_kernel():
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", TOUCHING.format(keeps=keeps)], capture_output=True, check=True
            ).stdout
        )
        for keeps in (False, True)
    ]
    assert faults[1] < faults[0] / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another OpenMP")
@pytest.mark.parametrize(
    ("given", "count"), [({}, "5000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_threads_that_wait_sleep_soon_unless_the_user_says_how_they_wait(given: dict[str, str], count: str | None):
    kept = {name: value for name, value in os.environ.items() if name not in WAITING}
    code = "from blade.cli.command import wait_asleep; wait_asleep(); import torch"
    environment = kept | {"OMP_DISPLAY_ENV": "verbose", **given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    (shown,) = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert shown == count if count else int(shown) > 300_000


@pytest.mark.slow
def test_an_installed_torchao_is_not_heard_of(tmp_path: Path):
    pytest.importorskip("torchao")
    code = "from blade.cli.generate import main; main(['--prompt', 'a red ball moving right', '--dry-run'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "tokens" in done.stdout and "torchao" not in done.stderr and "_pytree" not in done.stderr


WRITING = """
import sys, time
from pathlib import Path
from typer import Typer
from blade.cli.command import run_command, run_script
from blade.common.files import replaced_whole

kind, folder, inside = sys.argv[1:]
sys.argv[1:] = []

def main():
    with replaced_whole(Path(folder) / "a") as temporary:
        temporary.write_text("half")
        print("began", flush=True)
        exec(inside)

app = Typer()
app.command()(main)
run = run_command if "command" in kind else run_script
run(app if "app" in kind else main)
"""


def begin_writing(folder: Path, kind: str, inside: str = "time.sleep(60)") -> subprocess.Popen[str]:
    """Start a command that is in the middle of a file when this returns."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITING, kind, str(folder), inside],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "began\n"
    return process


@pytest.mark.parametrize("kind", ["command", "command of an app", "script", "script of an app"])
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, "error: terminated"), (signal.SIGINT, 130, ("error: interrupted", "Aborted", ""))],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_ends_a_command_without_leaving_anything(
    tmp_path: Path, kind: str, number: int, code: int, said: str | tuple[str, ...]
) -> None:
    (tmp_path / "a").write_text("old")
    process = begin_writing(tmp_path, kind)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == code, error
    lines = error.strip().splitlines() or [""]
    assert lines[-1].startswith(said) and "Traceback" not in error
    if kind.startswith("command"):
        assert lines == [f"error: {'terminated' if code == 143 else 'interrupted'}"]
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_sigterm_that_a_library_turns_into_an_error_is_still_that(tmp_path: Path) -> None:
    inside = "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    raise ValueError('lost')"
    process = begin_writing(tmp_path, "command", inside)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 143 and error.endswith("error: terminated\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_that_a_finalizer_swallows_is_not_lost(
    number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(number)

    reports = sys.unraisablehook
    with pytest.raises(SystemExit) as ended, ended_by_sigterm():
        Finalized()
        time.sleep(20)
        raise AssertionError("the signal is lost")
    assert ended.value.code == code and "Traceback" not in capsys.readouterr().err
    assert sys.unraisablehook is reports


def test_the_handler_is_gone_afterwards() -> None:
    def check() -> None:
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL

    with pytest.raises(SystemExit) as ended:
        run_command(check, [])
    assert ended.value.code == 0 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with pytest.raises(ZeroDivisionError), ended_by_sigterm():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_that_is_ignored_stays_so() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with ended_by_sigterm():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_other_threads_run_commands_without_a_handler() -> None:
    codes = []

    def run() -> None:
        try:
            run_command(lambda: None, [])
        except SystemExit as ended:
            codes.append(ended.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_disk_that_others_filled_is_named() -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/model.safetensors")
    assert describe(error) == "No space left: the disk of /cache/model.safetensors is full."
    assert describe(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))).startswith("No space left: the disk of a folder")
