"""The commands and the code of docs/many-videos.md are understood."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blade.cli import evaluate, generate, profile
from blade.fleet import evaluation, generation, profiling
from blade.fleet.options import FleetOptions
from blade.generation.outputs import ListReport

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "many-videos.md"
BLOCKS = re.findall(r'^```(\w+)(?: title="(\S+)")?\n(.*?)^```', GUIDE.read_text(encoding="utf-8"), re.M | re.S)
SHELL = [line for language, title, code in BLOCKS if language == "bash" and not title for line in code.splitlines()]
COMMANDS = [shlex.split(line) for line in SHELL if line.startswith("blade-")]
MAINS: dict[str, tuple[Callable[..., Any], Any, str]] = {
    "blade-generate": (generate.main, generation, "generate_many"),
    "blade-evaluate": (evaluate.main, evaluation, "evaluate_many"),
    "blade-profile": (profile.main, profiling, "profile_many"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a list of prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red ball moving right\n")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=[" ".join(command) for command in COMMANDS])
def test_a_command_calls_its_function_with_workers(command: list[str], folder, monkeypatch) -> None:
    main, module, name = MAINS[command[0]]
    function, called = getattr(module, name), list[FleetOptions]()

    def take(*arguments: Any, **options: Any) -> None:
        called.append(inspect.signature(function).bind(*arguments, **options).arguments["options"])
        raise ValueError("enough")

    monkeypatch.setattr(module, name, take)
    with pytest.raises(SystemExit) as end:
        main(command[1:])
    assert end.value.code == 2
    (options,) = called
    assert options == FleetOptions(workers=8) or options.ray_address == "10.0.0.1:6379"


def test_the_guide_has_a_command_for_each(folder) -> None:
    assert {command[0] for command in COMMANDS} == set(MAINS)


def test_the_python_example_calls_what_there_is(folder, monkeypatch, capsys) -> None:
    (code,) = [code for language, _, code in BLOCKS if language == "python"]
    bind = inspect.signature(generation.generate_many).bind
    called = []

    def take(*arguments: Any, **options: Any) -> ListReport:
        called.append(bind(*arguments, **options))
        return ListReport(made=(), skipped=(), failed={})

    monkeypatch.setattr(generation, "generate_many", take)
    exec(compile(code, "many-videos.md", "exec"), {})
    (call,) = called
    assert call.arguments["options"].workers == 2 and len(call.arguments["prompts"]) == 2
    assert "0 made, 0 there before, 0 failed" in capsys.readouterr().out


def test_ray_has_the_options_of_its_commands() -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    known = {name for parameter in scripts.start.params for name in (*parameter.opts, *parameter.secondary_opts)}
    used = set()
    for _, _, code in BLOCKS:
        for line in code.splitlines():
            if "ray start" in line:
                used |= set(re.findall(r"--[a-z-]+", line.partition("ray start")[2]))
    assert {"--head", "--address", "--port"} <= used <= known


def test_the_script_of_slurm_is_one_for_bash(tmp_path: Path) -> None:
    (script,) = [code for _, title, code in BLOCKS if title == "many-videos.sbatch"]
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
