"""Videos by workers of Ray are those of one process, each once, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from small_videos import SMALL

from blade.common.leftovers import is_temporary
from blade.fleet.generation import generate_many
from blade.fleet.options import FleetOptions
from blade.generation.outputs import generate_list
from blade.generation.request import GenerationRequest

pytest.importorskip("ray")

PROMPTS = [
    f"a {colour} {shape} moving {way}"
    for colour in ("red", "blue")
    for shape in ("ball", "square", "triangle")
    for way in ("left", "right", "up", "down")
]
"""24 of the bundled model's world."""

REQUEST = GenerationRequest(prompt=PROMPTS[0], **SMALL)

COMMAND = "from blade.cli.generate import main; main()"

PATIENCE_SECONDS = 180


def videos(folder: Path) -> dict[str, bytes]:
    """Return the MP4s of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.mp4"))}


def strays(folder: Path) -> list[str]:
    """Return the names in a folder that are no videos or records."""
    return [path.name for path in folder.iterdir() if path.suffix not in (".mp4", ".json") or is_temporary(path.name)]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Wait until something is so."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def children(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the processes below another one."""
    return psutil.Process(process.pid).children(recursive=True)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the actors of a command, which Ray names after their method while that runs."""
    found = []
    for child in children(process):
        try:
            title = " ".join(child.cmdline())
        except psutil.Error:  # it has just ended
            continue
        if title.startswith("ray::Worker"):
            found.append(child)
    return found


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread of PyTorch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def expected(one_thread, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The videos of one process with one thread, by name."""
    folder = tmp_path_factory.mktemp("one-process")
    report = generate_list(REQUEST, PROMPTS, folder)
    assert len(report.made) == len(PROMPTS) == 24
    assert {report.record["machine"]["threads"] for report in report.made} == {1}
    return videos(folder)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts `blade-generate` with workers; what still runs is killed."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    settings = [f"--{name}={value}" for name, value in SMALL.items()]
    started = []

    def run(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", COMMAND, f"--prompts={prompts}", *settings, "--cpus-per-worker=1", *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_killed_workers_and_a_killed_command_lose_nothing(expected, start, tmp_path: Path) -> None:
    """Both workers are killed, then the command itself; started again, it makes the rest."""
    output = tmp_path / "out"
    command = start(f"--output={output}", "--workers=2")
    killed = []
    for count in (2, 5):
        wait_for(lambda count=count: output.is_dir() and len(videos(output)) >= count, f"{count} videos")
        (victim, *_) = [worker for worker in workers(command) if worker.pid not in killed]
        killed.append(victim.pid)
        os.kill(victim.pid, signal.SIGKILL)
    reached = len(videos(output))
    wait_for(lambda: len(videos(output)) >= reached + 3, "videos of workers that were started again")
    below = children(command)
    os.kill(command.pid, signal.SIGKILL)
    _, error = command.communicate(timeout=60)
    made = videos(output)
    assert len(made) < 24, "the command was too quick to be killed"
    lost = [line for line in error.splitlines() if "was lost (" in line and line.endswith("it is done again")]
    assert len(lost) == 2, error
    _, alive = psutil.wait_procs(below, timeout=30)
    # two small ones of Ray look for what they have lost for a while
    assert {" ".join(process.cmdline()).strip() for process in alive} <= {
        "ray::DashboardAgent",
        "ray::RuntimeEnvAgent",
    }

    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.mp4")}
    report = generate_many(REQUEST, PROMPTS, output, options=FleetOptions(workers=2, cpus_per_worker=1))
    assert (len(report.made), len(report.skipped), report.failed) == (24 - len(made), len(made), {})
    assert videos(output) == expected
    assert all(path.stat().st_mtime_ns == before.get(path.name, path.stat().st_mtime_ns) for path in output.glob("*"))
    assert sorted(path.stem for path in output.glob("*.json")) == sorted(Path(name).stem for name in expected)
    assert strays(output) == []
    records = [json.loads(path.read_text()) for path in output.glob("*.json")]
    assert {record["machine"]["threads"] for record in records} == {1}


@pytest.mark.slow
def test_a_bucket_is_filled_and_completed(expected, store, tmp_path: Path) -> None:
    """Ended by Ctrl-C on the way; what is there is skipped, and the rest is made."""
    client = store("videos")
    prompts, options = PROMPTS[:6], FleetOptions(workers=1, cpus_per_worker=1)
    stopped = {"after": 3}

    def stop(progress) -> None:
        if progress.done >= stopped["after"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_many(REQUEST, prompts, "s3://videos/list", options=options, on_progress=stop)
    names = [Path(name).name for name in client.ls("videos/list")]
    assert sorted(name for name in names if name.endswith(".json"))  # records have videos
    assert {name.replace(".json", ".mp4") for name in names if name.endswith(".json")} <= set(names)
    report = generate_many(REQUEST, prompts, "s3://videos/list", options=options)
    assert len(report.made) + len(report.skipped) == 6 and len(report.skipped) >= 3 and not report.failed
    assert all(str(made.video_path).startswith("s3://videos/list/") for made in report.made)
    there = {Path(name).name: client.cat_file(name) for name in client.ls("videos/list")}
    assert {name: content for name, content in there.items() if name.endswith(".mp4")} == {
        name: content for name, content in expected.items() if name in there
    }
    assert len(there) == 12
    again = generate_many(REQUEST, prompts, "s3://videos/list", options=options)
    assert (len(again.made), len(again.skipped)) == (0, 6)


SLEEPERS = """
import time
from blade.cli.command import run_command
from blade.fleet.connection import connected
from blade.fleet.options import FleetOptions
from blade.fleet.pool import Pool, Task

class Driver:
    def begin(self, task):
        return 0.1
    def done(self, task, value):
        print(task.key, flush=True)
    def failed(self, task, error):
        raise error

class Job:
    def load(self, device):
        return time.sleep

def main(debug: bool = False) -> None:
    with connected(FleetOptions(workers=2, cpus_per_worker=1), "cpu") as connection:
        Pool(connection, Job()).run([Task(key=number, name=str(number)) for number in range(1000)], Driver())

run_command(main, [])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code", "said"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_ends_the_command_and_its_ray(sent: str, code: int, said: str, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group of processes, as from a terminal; SIGTERM to the command alone."""
    command = subprocess.Popen(
        [sys.executable, "-c", SLEEPERS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    assert command.stdout is not None and command.stdout.readline() == "0\n", command.communicate()
    below = children(command)
    assert any("raylet" in " ".join(process.cmdline()) for process in below)
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in below
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    arguments = [part for process in below for part in process.cmdline()]
    temporary = Path(next(part for part in arguments if part.startswith("--temp-dir=")).partition("=")[2])
    (os.killpg if sent == "SIGINT" else os.kill)(command.pid, getattr(signal, sent))
    _, error = command.communicate(timeout=60)
    assert command.returncode == code, error
    assert error.splitlines()[-1] == f"error: {said}" and "Traceback" not in error and "(raylet)" not in error
    _, alive = psutil.wait_procs(below, timeout=20)
    assert alive == []
    assert not temporary.exists() and not (tmp_path / ".ray").exists()
