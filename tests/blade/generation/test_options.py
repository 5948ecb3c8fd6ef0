"""Options are declared once: command, help, completion, requests and records follow from their fields."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import pytest

from blade import BladeConfig
from blade.cli.generate import FIRST, OutputOptions, main
from blade.common.options import OptionGroup, option, option_help, option_names
from blade.generation import options as options_module
from blade.generation.options import GROUPS, added_groups, register_options
from blade.generation.request import GenerationRequest, ResolvedRequest, default_student

ADDED = '''
from dataclasses import dataclass
from typing import ClassVar

from blade.common.options import OptionGroup, option


def mirror(model, text):
    """Mirror the videos of a model, as far as this test can tell."""
    model.pipe.mirrored = text


@dataclass(frozen=True, kw_only=True)
class MirrorOptions(OptionGroup):
    """Mirrors."""

    title: ClassVar[str] = "Mirrors"

    mirror: str | None = option(choices=("left", "right"), prepare="added_options:mirror")
    """The side that the mirror stands at."""

    def check(self) -> None:
        if self.mirror not in (None, "left", "right"):
            raise ValueError(f"`mirror` must be left or right, got {self.mirror!r}.")
'''


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A group of options in a module of its own, registered while the test runs."""
    (tmp_path / "added_options.py").write_text(ADDED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(options_module, "_ADDED", [])
    import added_options

    yield register_options(added_options.MirrorOptions)
    del sys.modules["added_options"]


def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_help_has_every_option_in_its_group(capsys, monkeypatch) -> None:
    shown = help_of(capsys, monkeypatch)
    titles = ["Most used", "Model and LoRA", "Video", "Sampling", "Sparse attention", "Student", "Memory and speed"]
    places = [shown.index(f"─ {title} ─") for title in [*titles, "Output"]]
    assert places == sorted(places)
    flags = [f"--{name.replace('_', '-')} " for name in FIRST]
    assert sorted(flags, key=shown.index) == flags and shown.index(flags[-1]) < places[1]
    for group in (*GROUPS, OutputOptions):
        for item in fields(group):
            assert f"--{(item.metadata['flag'] or item.name).replace('_', '-')} " in shown


def test_every_option_says_what_it_is() -> None:
    for group in (*GROUPS, OutputOptions):
        helps = option_help(group)
        assert set(helps) == set(option_names(group))
        assert all(text.endswith(".") and len(text) < 250 for text in helps.values())


@pytest.mark.parametrize("words", ["evaluate", "profile", "bench attention", "bench generate", "bench tune"])
def test_the_other_commands_are_made_of_groups_too(words: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    module = import_module(f"blade.cli.{words.split()[0]}")
    with pytest.raises(SystemExit) as ended:
        module.main([*words.split()[1:], "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    groups = [group for group in vars(module).values() if isinstance(group, type) and issubclass(group, OptionGroup)]
    own = [group for group in groups if group.__module__ == module.__name__ and f"─ {group.title} ─" in shown]
    assert own
    for group in own:
        for item in fields(group):
            assert f"--{(item.metadata['flag'] or item.name).split('/')[0].replace('_', '-')}" in shown
        assert all(text.endswith((".", "...")) for text in option_help(group).values())


def test_help_and_completion_do_not_wait_for_pytorch() -> None:
    code = "import sys, blade.cli.generate; assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "completed"),
    [("--pre", {"--precision", "--preset"}), ("--offload s", {"sequential"}), ("--dtype b", {"bfloat16"})],
)
def test_the_shell_completes(words: str, completed: set[str], tmp_path: Path) -> None:
    command = tmp_path / "blade-generate"
    command.write_text(f"#!{sys.executable}\nfrom blade.cli.generate import main\nmain()\n")
    command.chmod(0o755)
    environment = {
        **os.environ,
        "_BLADE_GENERATE_COMPLETE": "complete_bash",
        "COMP_WORDS": f"blade-generate {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    done = subprocess.run([str(command)], env=environment, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == completed, done.stderr


def test_zero_and_false_are_values(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--prompt", "a red ball moving right", "--steps", "0"])
    assert "`steps` must be an integer of at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--prompt", "a red ball moving right", "--sparsity", "0", "--attention", "dense"])
    assert '`sparsity` must not be given where `attention` is "dense"' in capsys.readouterr().err


def test_an_option_of_a_module_of_its_own(added, capsys, monkeypatch, tmp_path: Path, saved_tiny_pipeline) -> None:
    """It is in the help, is checked, changes the model, and is in the record, from which it comes again."""
    shown = help_of(capsys, monkeypatch)
    assert "─ Mirrors ─" in shown and "The side that the mirror stands at." in shown
    common = ["--prompt", "a red ball moving right", "--model", str(saved_tiny_pipeline), "--output"]
    with pytest.raises(SystemExit):
        main([*common, str(tmp_path / "a.mp4"), "--mirror", "up"])
    assert "`mirror` must be left or right, got 'up'" in capsys.readouterr().err

    prepared = []
    monkeypatch.setattr("added_options.mirror", lambda model, text: prepared.append((type(model.pipe).__name__, text)))
    tiny = ["--height", "64", "--width", "64", "--frames", "5", "--steps", "1", "--attention", "dense"]
    with pytest.raises(SystemExit) as ended:
        main([*common, str(tmp_path / "a.mp4"), "--mirror", "left", "--device", "cpu", *tiny])
    assert ended.value.code == 0 and prepared == [("WanPipeline", "left")]
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["added"] == {"mirror": "left"}
    with pytest.raises(SystemExit) as ended:
        main(["--from-json", str(tmp_path / "a.json"), "--output", str(tmp_path / "b.mp4")])
    assert ended.value.code == 0 and len(prepared) == 2
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_an_option_that_nobody_adds_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(options_module, "_ADDED", [])
    with pytest.raises(ValueError, match="`mirror` must be an option of a generation"):
        GenerationRequest(prompt="a ball", added={"mirror": "left"})


def test_a_name_that_is_taken_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(options_module, "_ADDED", [])

    @dataclass(frozen=True, kw_only=True)
    class Taken(OptionGroup):
        title: ClassVar[str] = "Taken"
        steps: int | None = option()
        """Taken."""

    with pytest.raises(ValueError, match="`steps` of Taken is an option already"):
        register_options(Taken)
    assert added_groups() == ()


def test_a_resolved_request_has_everything() -> None:
    needed = {"height": 64, "width": 64, "frames": 5, "fps": 16, "steps": 2, "guidance_scale": 1.0}
    placed = {"device": "cpu", "dtype": "float32"}
    request = ResolvedRequest(prompt="a ball", attention="asa", sparsity=0.5, **needed, **placed)
    assert request.size == (64, 64, 5)
    assert (request.dense().attention, request.dense().sparsity, request.dense().steps) == ("dense", None, 2)
    with pytest.raises(ValueError, match="`fps` must be given in a resolved request"):
        ResolvedRequest(prompt="a ball", **{**needed, "fps": None}, **placed)
    with pytest.raises(TypeError, match="fps"):
        ResolvedRequest(prompt="a ball", **{name: value for name, value in needed.items() if name != "fps"}, **placed)


@pytest.mark.parametrize(
    ("given", "student"),
    [
        ({}, "shapes-8-steps"),
        ({"steps": 4, "seed": 3}, "shapes-4-steps"),
        ({"steps": 30}, None),
        ({"sparsity": 0.5}, None),
        ({"blade_config": BladeConfig()}, None),
        ({"loras": ("a",)}, None),
        ({"model": "me/other"}, None),
    ],
)
def test_the_default_student(given, student) -> None:
    assert default_student(given) == student
