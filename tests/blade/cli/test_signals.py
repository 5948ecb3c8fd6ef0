"""Commands that are killed inside a write or terminated: nothing half-written stays, and the next start resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blade.common.leftovers import files_in, is_temporary
from blade.media.video import read_mp4

KILLED = """
import os, sys
from blade.cli import {name}

number, calls, real = int(sys.argv.pop(1)), [], os.{function}

def kill(*arguments, **options):
    calls.append(arguments)
    if len(calls) == number:
        os.kill(os.getpid(), {signal})
    return real(*arguments, **options)

os.{function} = kill
{name}.main()
"""

SIZE = ("--height", "64", "--width", "64", "--frames", "9", "--steps", "2", "--device", "cpu")


@pytest.fixture
def commands(saved_tiny_pipeline: Path, tmp_path: Path) -> dict[str, tuple[str, ...]]:
    """The arguments of each command but its output."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ball moving right\na blue square moving up\n")
    common = ("--model", str(saved_tiny_pipeline), *SIZE, "--prompts", str(prompts))
    return {
        "generate": (*common, "--sparsity", "0.5"),
        "evaluate": (*common, "--guidance-scale", "1", "--measure", "psnr"),
        "profile": (*common, "--target-density", "0.6", "--influence-prompts", "0", "--verify-prompts", "0"),
    }


def run(name: str, number: int, function: str, sent: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that gets a signal in the n-th call of a function of `os`; 0: never."""
    code = KILLED.format(name=name, function=function, signal=sent)
    command = [sys.executable, "-c", code, str(number), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def results(folder: Path) -> dict[str, object]:
    """Return what a folder holds, without times."""
    found: dict[str, object] = {}
    for path in files_in(folder):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".mp4":
            found[name] = read_mp4(path).sum().item()
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [(line["run"]["name"], line["prompt"], line["seed"], line["psnr"]) for line in lines]
        elif path.name in ("blade_config.json", "pattern_table.json", "attention_profile.safetensors"):
            found[name] = path.read_bytes()
        else:
            found[name] = None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generate", "evaluate", "profile"])
def test_a_command_that_gets_a_signal_inside_a_write(
    commands: dict[str, tuple[str, ...]], tmp_path: Path, name: str
) -> None:
    output = tmp_path / "out"
    whole = run(name, 0, "replace", signal.SIGKILL, *commands[name], "--output", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    left = 0
    for number, function, sent in ((2, "replace", 9), (2, "fsync", 15)):
        ended = run(name, number, function, sent, *commands[name], "--output", str(output))
        assert ended.returncode == (143 if sent == signal.SIGTERM else -sent), ended.stderr
        found = [path for path in output.rglob("*") if is_temporary(path.relative_to(output))]
        if sent == signal.SIGTERM:
            assert ended.stderr.splitlines()[-1] == "error: terminated" and "Traceback" not in ended.stderr
        left += len(found)
    assert left, "no kill left anything"
    ended = run(name, 0, "replace", signal.SIGKILL, *commands[name], "--output", str(output))
    assert ended.returncode == 0, ended.stderr
    assert not [path for path in output.rglob("*") if is_temporary(path.relative_to(output))]
    assert results(output) == results(tmp_path / "whole")


@pytest.mark.slow
def test_sigterm_from_outside_leaves_nothing(commands: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    arguments = [*commands["evaluate"], "--seeds", "0-99", "--output", str(tmp_path / "out")]
    code = "from blade.cli.evaluate import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
    records = tmp_path / "out" / "records-1-of-1.jsonl"
    while not records.exists() and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143 and error.splitlines()[-1] == "error: terminated", error
    assert not list((tmp_path / "out").rglob(".*.tmp"))
    assert records.read_bytes().endswith(b"}\n")
