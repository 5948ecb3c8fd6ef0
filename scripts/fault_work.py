"""What is broken by `scripts/try_faults.py`: commands on the bundled model that take seconds, and what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blade.common.files import read_json_lines
from blade.common.leftovers import is_temporary

SIZE = ("--height=64", "--width=64", "--frames=9", "--device=cpu", "--steps=2")

DISTILLATION = (
    "shapes", "video.height=64", "video.width=64", "video.frames=9", "generator.ode_updates=0", "trajectory.steps=[2]",
    "weights.rank=4", "weights.alpha=4", "run.updates=3", "run.batch_size=1", "run.device=cpu", "validation.every=0",
    "run.checkpoint_every=1",
)  # fmt: skip

PROMPTS = "a red ball moving right\na blue square moving up\n"

COMMANDS = ("generate", "list", "evaluate", "profile", "distill")

PLACED = """
import errno, os, signal, sys
from importlib import import_module

number, function, fault = int(sys.argv.pop(1)), sys.argv.pop(1), sys.argv.pop(1)
calls, real = [], getattr(os, function)

def broken(*arguments, **options):
    calls.append(arguments)
    if fault == "full" and len(calls) >= number:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fault == "kill" and len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **options)

if number:
    setattr(os, function, broken)
import_module(sys.argv.pop(1)).main()
"""
"""A program that runs a command in which the n-th call of a function of `os`, such as `replace`, fails or kills it."""

VOLATILE = (
    "seconds", "hours", "date", "machine", "versions", "command", "peak", "gib", "created", "output", "per_second",
)  # fmt: skip
"""Parts of the names of values that differ from run to run."""


@dataclass
class Work:
    """A folder with the inputs of the commands."""

    folder: Path
    prompts: Path = field(init=False)

    def __post_init__(self) -> None:
        self.prompts = self.folder / "prompts.txt"

    def arguments(self, command: str, output: Path) -> list[str]:
        """Return the module and the arguments of a command that writes to a folder."""
        common = [*SIZE, f"--output={output}"]
        listed = [f"--prompts={self.prompts}", *common]
        return {
            "generate": ["generate", "--prompt=a red ball moving right", *SIZE, "--student=none", "--sparsity=0.5",
                         f"--output={output / 'ball.mp4'}"],
            "list": ["generate", *listed, "--student=none", "--sparsity=0.5"],
            "evaluate": ["evaluate", *listed, "--guidance-scale=1", "--measure=psnr", "--run=dense", "--run=preset"],
            "profile": ["profile", *listed, "--target-density=0.6", "--influence-prompts=0", "--verify-prompts=0"],
            "distill": ["distill", *DISTILLATION, f"prompts={self.prompts}", f"output={output}"],
        }[command]  # fmt: skip

    def start(
        self, command: str, output: Path, number: int = 0, function: str = "replace", fault: str = "kill"
    ) -> subprocess.Popen[str]:
        """Start a command.

        Args:
            command: one of `COMMANDS`.
            output: its folder.
            number: the call of `function` at which it is broken; 0: none.
            function: a function of `os`.
            fault: "kill", or "full" for a full disk from this call on.
        """
        name, *arguments = self.arguments(command, output)
        line = [sys.executable, "-c", PLACED, str(number), function, fault, f"blade.cli.{name}", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    error: str

    @property
    def last_line(self) -> str:
        """The last line that it said on standard error."""
        return self.error.strip().rpartition("\n")[2]


def end(process: subprocess.Popen[str], seconds: float = 600) -> Ended:
    """Wait for a command; one that takes too long is killed."""
    try:
        _, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        _, error = process.communicate()
        error += "\nTraceback: it never ended"
    return Ended(process.returncode, error)


def leftovers(folder: Path) -> list[str]:
    """Return the files in a folder that are there while something is written or locked alone."""
    names = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(name.as_posix() for name in names if is_temporary(name) or name.name.startswith(".blade-"))


def half_written(folder: Path) -> list[str]:
    """Return the files in a folder that are not whole."""
    from safetensors import safe_open

    from blade.media.video import mp4_frames

    broken = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or is_temporary(path.relative_to(folder)):
            continue
        try:
            if path.suffix == ".json" and not path.name.startswith(".blade-"):
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".jsonl":
                read_json_lines(path)
            elif path.suffix == ".mp4":
                sum(1 for _ in mp4_frames(path))
            elif path.suffix == ".safetensors":
                safe_open(path, framework="pt").keys()
        except Exception as error:
            broken.append(f"{path.name}: {error}")
    return broken


def contents(folder: Path) -> dict[str, Any]:
    """Return what is in a folder, but for what differs from run to run: times, and what times are drawn in."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or is_temporary(name) or name.name.startswith(".blade-"):
            continue
        if path.suffix == ".json":
            found[name.as_posix()] = steady(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".jsonl":
            lines = [json.dumps(steady(line), sort_keys=True) for line in read_json_lines(path)]
            found[name.as_posix()] = sorted(lines)
        elif path.suffix in (".mp4", ".safetensors", ".txt") and "checkpoint" not in name.as_posix():
            found[name.as_posix()] = path.read_bytes()
        else:
            found[name.as_posix()] = None
    return found


def steady(value: Any) -> Any:
    """Return a JSON value without what differs from run to run; see `VOLATILE`."""
    if isinstance(value, dict):
        return {key: steady(item) for key, item in value.items() if not any(word in key for word in VOLATILE)}
    return [steady(item) for item in value] if isinstance(value, list) else value


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names of files that differ, or are in one of two folders alone."""
    return sorted(name for name in found | expected if found.get(name, 0) != expected.get(name, 0))
