"""Two processes on one folder: one clear sentence, or shared work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blade.cli import distill, evaluate, profile
from blade.common.locks import InUseError

SIZE = ("--height=64", "--width=64", "--frames=9", "--device=cpu")
DISTILLATION = (
    "video.height=64", "video.width=64", "video.frames=9", "generator.ode_updates=0", "trajectory.steps=[2]",
    "weights.rank=4", "weights.alpha=4", "run.updates=2", "run.batch_size=1", "run.device=cpu", "validation.every=0",
    "generator.guidance_scale=3", "run.checkpoint_every=1",
)  # fmt: skip


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"a red ball moving {way}\n" for way in ("left", "right", "up", "down")))
    return path


@pytest.fixture
def commands(saved_tiny_pipeline: Path, prompt_file: Path, tmp_path: Path) -> dict[str, tuple[Callable, list[str]]]:
    """By name, a command's main function and its arguments; all write to `tmp_path / "out"`."""
    out, model = tmp_path / "out", str(saved_tiny_pipeline)
    common = [f"--model={model}", f"--prompts={prompt_file}", f"--output={out}", *SIZE, "--steps=2"]
    settings = ["shapes", f"model={model}", f"prompts={prompt_file}", f"output={out}", *DISTILLATION]
    return {
        "distill": (distill.main, settings),
        "profile": (profile.main, [*common, "--target-density=0.6", "--influence-prompts=0", "--verify-prompts=0"]),
        "evaluate": (evaluate.main, [*common, "--run=dense"]),
        "search": (evaluate.main, [*common, "--run=preset", "--find-sparsity", "--psnr=10"]),
    }


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return a function that starts a command; what still runs is killed."""
    started = []

    def run(command: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", f"from blade.cli.{command} import main; main()", *arguments],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("command", ["distill", "profile", "evaluate", "search"])
def test_a_folder_in_use_is_refused_in_one_sentence(command, commands, hold, tmp_path, capsys) -> None:
    other = hold(tmp_path / "out")
    main, arguments = commands[command]
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert ended.value.code == 1
    place = re.escape(str(tmp_path / "out"))
    said = rf"error: `output` {place} is in use by process {other.pid} on \S+ since [-0-9]+ [:0-9]+; "
    assert re.fullmatch(said + "wait for it or choose another folder.", line), line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def test_a_run_of_the_shapes_training_in_use_is_refused(hold, tmp_path) -> None:
    from blade.models.source import bundled_model_path
    from blade.moving_shapes.training.shapes_model import train_shapes_model
    from blade.moving_shapes.training.timed import TimedTraining

    other = hold(tmp_path / "run")
    with pytest.raises(InUseError, match=f"`run` .*run is in use by process {other.pid} on"):
        train_shapes_model(
            tmp_path / "run", tmp_path / "model", timed=TimedTraining(minutes=1), start_from=bundled_model_path()
        )
    assert not (tmp_path / "model").exists() and not (tmp_path / "run" / "log.jsonl").exists()


def test_the_same_shard_is_refused_and_another_is_not(commands, hold, tmp_path, capsys) -> None:
    hold(tmp_path / "out", (1, 2))
    main, arguments = commands["evaluate"]
    for shard, message in (("1/2", "is in use by process"), ("1/1", "which makes share 1/2"), ("2/4", "share 1/2")):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, f"--shard={shard}"])
        assert ended.value.code == 1 and message in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--shard=2/2"])
    assert ended.value.code == 0 and "2 videos of other shards are still missing" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_share_a_list_of_prompts(saved_tiny_pipeline, prompt_file, start, tmp_path) -> None:
    options = [f"--model={saved_tiny_pipeline}", f"--prompts={prompt_file}", "--output=out", *SIZE, "--steps=40"]
    both = [start("generate", *options) for _ in range(2)]
    counts = []
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        counts.append([int(number) for number in re.findall(r"(\d+) made, (\d+) there before, (\d+) failed", out)[0]])
    assert [made + there for made, there, _ in counts] == [4, 4]
    assert sum(made for made, _, _ in counts) == 4 and sum(failed for *_, failed in counts) == 0
    assert len(list((tmp_path / "out").iterdir())) == 8  # videos and records, and no lock


@pytest.mark.slow
def test_shards_that_end_together_leave_a_whole_report(commands, start, tmp_path) -> None:
    _, arguments = commands["evaluate"]
    both = [start("evaluate", *arguments, "--run=x=preset,dense_steps=0", f"--shard={n}/2") for n in (1, 2)]
    for process in both:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["missing"] == 0 and report["prompts"] == {"all": 4}
    assert len(list((tmp_path / "out" / "compare").iterdir())) == 4
    assert not list((tmp_path / "out").rglob(".blade-*"))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["distill", "profile", "evaluate", "search"])
def test_one_of_two_commands_works_and_the_other_is_refused(command, commands, start, tmp_path) -> None:
    _, arguments = commands[command]
    name = "evaluate" if command == "search" else command
    both = [start(name, *arguments) for _ in range(2)]
    ends = [(*process.communicate(timeout=300), process.returncode) for process in both]
    codes = sorted(code for *_, code in ends)
    # where the first has ended before the second begins, that has nothing to do
    assert codes in ([0, 1], [0, 0]), ends
    refused = [err for _, err, code in ends if code]
    assert all(f"`output` {tmp_path / 'out'} is in use by process" in err for err in refused), refused
    if command == "evaluate":  # no work is done twice
        assert len((tmp_path / "out" / "records-1-of-1.jsonl").read_text().splitlines()) == 4
    if command == "distill":
        lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert not list((tmp_path / "out").rglob(".blade-*"))
