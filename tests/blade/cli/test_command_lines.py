"""What a user types: help, version, misspelled names, paths, and the exit codes of what goes wrong."""

from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from blade.cli import bench, distill, evaluate, generate, profile
from blade.cli.command import run_command
from blade.common.files import OutputError
from blade.evaluation.runs import parse_run
from blade.generation.request import read_config
from blade.models.choices import LoraChoice, parse_lora
from blade.models.loading import load_model
from blade.models.source import ModelError, locate

COMMANDS = {
    "generate": generate.main,
    "evaluate": evaluate.main,
    "profile": profile.main,
    "distill": distill.main,
    "bench": bench.main,
}


def ended(main, *arguments: str) -> int:
    """Run a command and return its exit code."""
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_a_short_option_and_there_is_a_version(name: str, capsys) -> None:
    assert ended(COMMANDS[name], "-h") == 0
    assert "Usage:" in capsys.readouterr().out
    assert ended(COMMANDS[name], "--version") == 0
    assert capsys.readouterr().out == f"blade-video {version('blade-video')}\n"


def test_a_command_of_several_has_short_help_for_each(capsys) -> None:
    assert ended(bench.main, "attention", "-h") == 0
    assert "--head-dim" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("`steps` must be less"), 2),
        (ModelError("`model` x is no folder here"), 2),
        (typer.BadParameter("no number"), 2),
        (OutputError("a cannot be written"), 1),
        (FloatingPointError("step 3 is not finite"), 1),
        (MemoryError("too little"), 1),
        (RuntimeError("a bug"), 1),
        (None, 0),
    ],
)
def test_the_exit_code_says_who_has_to_act(error: Exception | None, code: int, capsys) -> None:
    def command() -> None:
        if error is not None:
            raise error

    assert ended(lambda arguments: run_command(command, arguments)) == code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a red ball", "--prompt", "a ball"], "`prompt` must be given once, got 'a red ball' and 'a ball'."),
        (["a red ball", "--seed", "-1"], "`seed` must be an integer from 0 to 2**63 - 1, got -1."),
        (["a red ball", "--seeds", "3-1"], "`seeds` must be numbers from 0 to 2**63 - 1, or ranges of them"),
        (["a red ball", "--seeds", "1,2", "--seed", "0"], "`--seed` must not be given with `--seeds`."),
        (["a red ball", "--student", "shapes-8-step"], "; did you mean shapes-8-steps?"),
        (["a red ball", "--model", "bundeld"], "; did you mean bundled?"),
        (["a red ball", "--cache", "frist-block"], "; did you mean first-block?"),
        (["a red ball", "--preset", "fewstep"], "; did you mean few-step?"),
        (["a red ball", "--seeds", "1,2", "--output", "one.mp4"], "`output` must be a folder where several videos"),
    ],
)
def test_a_mistake_is_told_with_what_would_be_right(arguments: list[str], message: str, capsys) -> None:
    assert ended(generate.main, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_list_is_not_written_into_one_video(tmp_path: Path, capsys) -> None:
    (tmp_path / "list.txt").write_text("a red ball moving right\na blue ball moving left\n")
    assert ended(generate.main, "--prompts", str(tmp_path / "list.txt"), "--output", str(tmp_path / "one.mp4")) == 2
    assert "`output` must be a folder where several videos are made" in capsys.readouterr().err
    assert not (tmp_path / "one.mp4").exists()


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (evaluate.main, ["--shapes", "--run", "a=stepz=3"], "; did you mean steps?"),
        (evaluate.main, ["--shapes", "--run", "dense", "--run", "asa", "--baseline", "as"], "; did you mean asa?"),
        (evaluate.main, ["--shapes", "--run", "a=mean-poled"], "is no folder"),
        (evaluate.main, ["--shapes", "--measure", "pnsr"], "; did you mean psnr?"),
        (evaluate.main, ["--protocol", "wan14b-720"], "; did you mean wan14b-720p?"),
        (distill.main, ["shape"], "; did you mean shapes?"),
        (distill.main, ["shapes", "run.updats=3"], "Did you mean: 'updates'?"),
    ],
)
def test_what_is_misspelled_is_told_what_it_resembles(main, arguments, message, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended(main, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_path_beside_a_misspelled_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "my-student").mkdir()
    with pytest.raises(ModelError, match=r"; did you mean .*my-student\?$"):
        locate(str(tmp_path / "my-studnet"), None)


def test_paths_may_begin_at_home(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "list.txt").write_text("# nothing")
    assert ended(generate.main, "--prompts", "~/list.txt") == 2
    assert "list.txt has none" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "blade_config.json").write_text('{"sparsity": 0.25}')
    assert read_config("~/mine").sparsity == 0.25


def test_a_path_may_have_an_equals_sign(tmp_path: Path) -> None:
    path = tmp_path / "rank=8"
    path.mkdir()
    assert parse_lora(str(path)) == LoraChoice((str(path),), (1.0,))
    assert parse_lora(f"{path}=0.5") == LoraChoice((str(path),), (0.5,))
    assert parse_lora("style.safetensors=0.5") == LoraChoice(("style.safetensors",), (0.5,))
    for wrong in ("style=much", "style=nan", "style=inf", "a:b=1:much", "a:b=1:2:3", "a:b="):
        with pytest.raises(ValueError, match=f"with =STRENGTH or not, got '{wrong}'"):
            parse_lora(wrong)


@pytest.mark.parametrize(
    ("text", "sources", "strengths"),
    [
        ("high:low", ("high", "low"), (1.0, 1.0)),
        ("high.safetensors:low.safetensors=0.8", ("high.safetensors", "low.safetensors"), (0.8, 0.8)),
        ("high:low=0.8:-0.6", ("high", "low"), (0.8, -0.6)),
        ("me/lora/high.safetensors:me/other", ("me/lora/high.safetensors", "me/other"), (1.0, 1.0)),
        (r"C:\loras\high=2", (r"C:\loras\high",), (2.0,)),
        (r"C:\high:D:\low=0.5", (r"C:\high", r"D:\low"), (0.5, 0.5)),
        ("c:/high:low=0.5:1", ("c:/high", "low"), (0.5, 1.0)),
        ("low:c:/high", ("low", "c:/high"), (1.0, 1.0)),
    ],
)
def test_a_lora_may_name_a_source_for_each_of_two_transformers(text, sources, strengths) -> None:
    assert parse_lora(text) == LoraChoice(sources, strengths)
    assert parse_lora(text).name == ":".join(sources)


def test_files_with_colons_and_equals_signs_are_told_apart(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:b", "r=1", "c"):
        (tmp_path / name).touch()
    assert parse_lora("a:b") == LoraChoice(("a:b",), (1.0,))
    assert parse_lora("a:b=0.5") == LoraChoice(("a:b",), (0.5,))
    assert parse_lora("a:b:c=0.5") == LoraChoice(("a:b", "c"), (0.5, 0.5))
    assert parse_lora("c:r=1") == LoraChoice(("c", "r=1"), (1.0, 1.0))
    assert parse_lora("c:r=1=0.5:2") == LoraChoice(("c", "r=1"), (0.5, 2.0))


@pytest.mark.parametrize("text", ["a:", ":b=1", "a:b:c", "=0.5"])
def test_a_lora_of_no_clear_sources_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="`loras` must name one source, or FIRST:SECOND"):
        parse_lora(text)


def test_two_strengths_need_two_sources() -> None:
    with pytest.raises(ValueError, match=r"`loras` must name a source for each strength, .*got 'style=0.8:0.6'"):
        parse_lora("style=0.8:0.6")


def test_weights_that_a_model_lacks_are_named_by_part(monkeypatch) -> None:
    from blade.models import loading

    def without_weights(*arguments, **options):
        pipe = load_pipeline(*arguments, **options)
        pipe.vae.decoder.conv_in.to("meta")
        return pipe

    load_pipeline = loading.load_pipeline
    monkeypatch.setattr(loading, "load_pipeline", without_weights)
    with pytest.raises(ModelError, match=r"`model` bundled lacks 2 of the \d+ weights of its vae, such as decoder"):
        load_model()


@pytest.mark.slow
def test_several_seeds_are_several_videos_of_a_prompt_by_its_place(tmp_path: Path, capsys) -> None:
    arguments = ["a red ball moving right", "--output", str(tmp_path), "--student", "shapes-4-steps"]
    assert ended(generate.main, *arguments, "--seeds", "1-2") == 0
    assert "2 made, 0 there before" in capsys.readouterr().out
    names = [f"a-red-ball-moving-right-{seed}.{kind}" for seed in (1, 2) for kind in ("json", "mp4")]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert ended(generate.main, *arguments, "--seeds", "2,3") == 0
    assert "1 made, 1 there before" in capsys.readouterr().out


def test_a_configurations_folder_may_have_an_equals_sign(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b").mkdir()
    assert parse_run("mine=a=b").config == "a=b"
    assert parse_run("mine=student=a=b").student == "a=b"
