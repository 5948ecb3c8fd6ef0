"""What a killed process leaves half-written is taken for nothing, and is removed once the process is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from blade.common import leftovers
from blade.common.files import check_writable, folder_updated, write_files
from blade.common.leftovers import files_in, is_temporary, sweep_leftovers, temporary_path

KILLED = """
import os, signal, sys
from pathlib import Path
from blade.common import files
folder = Path(sys.argv[1])

def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

os.{function} = kill
if sys.argv[2] == "file":
    files.write_files({{folder / "a": b"new", folder / "b": b"new"}})
elif sys.argv[2] == "folder":
    with files.replaced_whole(folder / "model") as temporary:
        temporary.mkdir()
        (temporary / "pytorch_lora_weights.safetensors").touch()
elif sys.argv[2] == "update":
    with files.folder_updated(folder) as temporary:
        (temporary / "pytorch_lora_weights.safetensors").touch()
else:
    files.append_json_line(folder / "log.jsonl", {{"step": 2}})
"""


def gone_process() -> int:
    """Return the number of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def named(path: Path, process: int, host: str | None = None) -> Path:
    """Return a temporary path of another process."""
    name = temporary_path(path).name.replace(f"-{os.getpid()}-", f"-{process}-")
    return path.with_name(name if host is None else name.replace(f"-{leftovers._host()}-", f"-{host}-"))


def test_names_are_short_and_never_the_same() -> None:
    names = {temporary_path(Path("folder") / name).name for name in ("a", "a", "x" * 250, "中" * 80)}
    assert len(names) == 4
    assert all(len(name) <= 50 and is_temporary(name) for name in names)
    for length in (100, 255):
        assert len(temporary_path(Path("a"), length).name) == length


def test_what_is_temporary() -> None:
    """Names of earlier versions are known too."""
    names = (".student.123.tmp", ".a.mp4.77.tmp", ".tmp", f"{temporary_path(Path('a')).name}/weights.safetensors")
    assert all(is_temporary(name) for name in names)
    assert not any(is_temporary(name) for name in ("a.mp4", ".hidden", "a.tmp", "student/weights.safetensors"))


def test_leftovers_of_processes_that_are_gone_are_swept(tmp_path: Path) -> None:
    gone, living = gone_process(), os.getppid()
    kept = [tmp_path / "a", tmp_path / ".b.tmp", named(tmp_path / "a", living), temporary_path(tmp_path / "a")]
    for path in (*kept, named(tmp_path / "a", gone)):
        path.write_text("half")
    named(tmp_path / "student", gone).mkdir()
    (named(tmp_path / "student", gone)).mkdir()
    (next(path for path in tmp_path.iterdir() if path.is_dir()) / "weights").touch()
    sweep_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    sweep_leftovers(tmp_path / "missing")


def test_a_number_that_another_process_has_now_protects_nothing(tmp_path: Path) -> None:
    """As after a restart of a machine, or in a container whose first process is always number 1."""
    path = temporary_path(tmp_path / "a")
    path.touch()
    before = psutil.Process().create_time() - 2 * leftovers.CLOCK_SECONDS
    os.utime(path, (before, before))
    sweep_leftovers(tmp_path)
    assert not path.exists()


def test_what_other_machines_write_is_left_for_a_week(tmp_path: Path) -> None:
    fresh, old = (named(tmp_path / name, gone_process(), host="zzzz".replace("z", "f")) for name in ("a", "b"))
    for path, days in ((fresh, 6), (old, 8)):
        path.touch()
        os.utime(path, (time.time() - 86400 * days,) * 2)
    sweep_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [fresh]


def test_what_cannot_be_removed_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = named(tmp_path / "a", gone_process())
    path.touch()

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(leftovers, "remove", denied)
    sweep_leftovers(tmp_path)
    assert path.exists()


def test_a_process_of_another_user_is_living(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden:
        def __init__(self, number: int) -> None:
            raise psutil.AccessDenied(number)

    path = temporary_path(tmp_path / "a")
    path.touch()
    monkeypatch.setattr(psutil, "Process", Hidden)
    sweep_leftovers(tmp_path)
    assert path.exists()


@pytest.mark.parametrize(
    ("what", "function"),
    [("file", "fsync"), ("file", "replace"), ("folder", "replace"), ("update", "replace"), ("line", "fsync")],
)
def test_a_kill_inside_a_write_leaves_the_old_and_nothing_after_the_next_start(
    tmp_path: Path, what: str, function: str
) -> None:
    (tmp_path / "model").mkdir()
    old = {"a": "old", "b": "old", "model/weights": "old", "log.jsonl": '{"step": 1}\n'}
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    code = KILLED.format(function=function)
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path), what], check=False)
    assert killed.returncode == -signal.SIGKILL
    if what != "line":
        assert any(is_temporary(path.name) for path in tmp_path.iterdir())
        del old["log.jsonl"]
    shown = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in files_in(tmp_path)}
    assert {name: text for name, text in shown.items() if name in old and name != "log.jsonl"} == {
        name: text for name, text in old.items() if name != "log.jsonl"
    }
    assert set(shown) == {"a", "b", "model/weights", "log.jsonl"}
    check_writable(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "log.jsonl", "model"]


def test_the_writer_itself_does_not_sweep_what_it_writes(tmp_path: Path) -> None:
    with folder_updated(tmp_path) as temporary:
        (temporary / "a").touch()
        check_writable(tmp_path / "b")
        sweep_leftovers(tmp_path)
        write_files({tmp_path / "b": b""})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
