"""The highest sparsity that is close enough to dense is found with few videos, none of which is made twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from blade.attention.config import BladeConfig
from blade.cli.evaluate import main
from blade.evaluation.plan import Evaluation
from blade.evaluation.prompts import prompts_with_seeds
from blade.evaluation.records import Record
from blade.evaluation.runs import parse_run
from blade.evaluation.sparsity_search import GRID, find_sparsity
from blade.evaluation.worker import VideoWorker

PROMPTS = prompts_with_seeds(["a cat", "a dog"], (0,))


@pytest.fixture
def evaluation(saved_tiny_pipeline: Path, tmp_path: Path) -> Evaluation:
    """Two prompts of the tiny pipeline, at 4 steps."""
    return Evaluation(
        runs=(parse_run("preset", steps=4, guidance=1.0),),
        prompts=PROMPTS,
        folder=tmp_path / "search",
        model=str(saved_tiny_pipeline),
        height=64,
        width=64,
        frames=9,
        device="cpu",
    )


class Made(list[tuple[str, str]]):
    """Videos that were made: run and prompt."""

    stops_at: int | None = None


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """Let workers make no videos: their PSNR is 50 dB less half a dB for each 0.01 of sparsity, and 2 dB more for the
    cat and less for the dog.
    """
    made = Made()

    def make(worker: VideoWorker, prompt, run) -> Record:
        config = worker.plan.requests[run.name].blade_config
        if len(made) == made.stops_at:
            raise KeyboardInterrupt
        made.append((run.name, prompt.text))
        sparsity = None if config is None else config.sparsity
        return {
            "run": run.to_dict(),
            "prompt": prompt.text,
            "seed": prompt.seed,
            "fingerprint": worker.plan.fingerprint,
            "student_fingerprint": worker.plan.student_fingerprints.get(run.name),
            **worker.plan.size,
            "blade_config": None if config is None else config.to_dict(),
            "psnr": None if config is None else 50 - 50 * sparsity + (2 if prompt.text == "a cat" else -2),
            "run_density": 1.0 if config is None else 1 - sparsity / 2,
            "seconds": 1.0,
        }

    monkeypatch.setattr(VideoWorker, "make", make)
    return made


@pytest.mark.parametrize(
    ("target", "expected", "tried"),
    [
        (30.0, 0.40, [0.70, 0.35, 0.50, 0.40, 0.45]),
        (15.0, 0.70, [0.70, 0.85, 0.75]),
        (17.5, 0.65, [0.70, 0.35, 0.50, 0.60, 0.65]),
        (2.5, 0.95, [0.70, 0.85, 0.90, 0.95]),
        (47.5, 0.05, [0.70, 0.35, 0.15, 0.05, 0.10]),
    ],
)
def test_the_highest_sparsity_that_is_enough_is_found(evaluation, made, target, expected, tried):
    told = []
    found = find_sparsity(evaluation, target, on_candidate=told.append)
    assert found.best.sparsity == expected and found.candidates == tuple(told)
    assert [candidate.sparsity for candidate in found.candidates] == tried
    assert found.best.psnr == pytest.approx(50 - 50 * expected)
    assert found.best.worst_tenth == pytest.approx(48 - 50 * expected) and found.best.videos == 2
    assert found.best.run_density == pytest.approx(1 - expected / 2)
    assert found.config == replace(BladeConfig.from_preset("shapes"), sparsity=expected)
    assert len(made) == 2 * (1 + len(tried))
    assert [run.sparsity for run in found.plan.evaluation.runs] == [None, *sorted(tried)]
    assert found.plan.evaluation.baseline == f"preset-{expected:.2f}"


def test_a_stopped_search_resumes_and_another_target_begins_with_its_videos(evaluation, made):
    made.stops_at = 5
    with pytest.raises(KeyboardInterrupt):
        find_sparsity(evaluation, 30.0)
    assert made[-1] == ("preset-0.35", "a cat")
    made.stops_at = None
    found = find_sparsity(evaluation, 30.0)
    assert found.best.sparsity == 0.4 and made[5] == ("preset-0.35", "a dog")
    assert len(made) == len(set(made)) == 12
    find_sparsity(evaluation, 30.0)
    assert len(made) == 12
    assert find_sparsity(evaluation, 25.0).best.sparsity == 0.5
    assert [name for name, _ in made[12:]] == ["preset-0.60", "preset-0.60", "preset-0.55", "preset-0.55"]


def test_a_sparsity_that_fails_ends_the_search(evaluation, made, monkeypatch):
    make = VideoWorker.make

    def fails(worker, prompt, run):
        if "0.85" in run.name:
            raise MemoryError("too little memory")
        return make(worker, prompt, run)

    monkeypatch.setattr(VideoWorker, "make", fails)
    with pytest.raises(MemoryError, match="too little memory"):
        find_sparsity(evaluation, 10.0)
    assert made and all("0.85" not in name for name, _ in made)


def test_records_without_psnr_are_refused(evaluation, made):
    find_sparsity(evaluation, 30.0)
    (path,) = evaluation.folder.glob("records-*.jsonl")
    path.write_text(path.read_text().replace('"psnr": ', '"closeness": '))
    with pytest.raises(
        ValueError, match=r"lack `psnr` in the records of run `preset-0\.70` in .*; take another folder"
    ):
        find_sparsity(evaluation, 30.0)


def test_a_target_that_no_sparsity_reaches_is_told_with_the_nearest(evaluation, made):
    with pytest.raises(
        ValueError, match=r"49 dB is not reached: at 0\.05, .*, the videos have 47\.50 dB .* 45\.50 dB"
    ):
        find_sparsity(evaluation, 49.0)
    assert len({name for name, _ in made}) == 1 + 4


@pytest.mark.parametrize(
    ("text", "command", "call"),
    [
        (
            "preset",
            "blade-generate --model {model} --steps 4 --guidance-scale 1 --sparsity 0.4",
            "apply_blade(pipe, sparsity=0.4)",
        ),
        (
            "few=preset=few-step",
            "blade-generate --model {model} --steps 4 --guidance-scale 1 --preset few-step --sparsity 0.4",
            'apply_blade(pipe, kind="few-step", sparsity=0.4)',
        ),
        (
            "near=local,dense_steps=1",
            "blade-generate --model {model} --steps 4 --guidance-scale 1 --config {folder}/found",
            "apply_blade(pipe, BladeConfig.from_pretrained('{folder}/found'))",
        ),
    ],
)
def test_it_says_how_to_use_what_it_found(evaluation, made, text, command, call):
    run = parse_run(text, steps=4, guidance=1.0)
    found = find_sparsity(replace(evaluation, runs=(run,)), 30.0)
    names = {"model": evaluation.model, "folder": evaluation.folder}
    assert found.usage == (command.format(**names), call.format(**names))
    assert all(part in str(found) for part in (*found.usage, "sparsity 0.40: PSNR to dense 30.00 dB"))
    assert BladeConfig.from_pretrained(found.save_config()) == found.config
    assert (found.config.sparsity, found.config.kind) == (0.4, run.preset or "training-free")
    json.dumps(found.to_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": (parse_run("dense"),)}, "`run` must be one sparse run .*, got dense"),
        ({"runs": (parse_run("preset"), parse_run("asa"))}, "`run` must be one sparse run .*, got preset, asa"),
        ({"runs": (parse_run("x=preset,sparsity=0.5"),)}, "`run` must be one sparse run without `sparsity`"),
        ({"shard": (1, 2)}, "`shard` must be 1/1: .*, got 1/2"),
        ({"baseline": "preset"}, "`baseline` must not be given"),
        ({"measures": ("ssim",)}, "`measure` must include psnr, .*, got ssim"),
    ],
)
def test_options_that_make_no_sense_are_refused(evaluation, made, changes, message):
    with pytest.raises(ValueError, match=message):
        find_sparsity(replace(evaluation, **changes), 30.0)
    assert not made


@pytest.mark.parametrize("target", [0.0, -3.0, 100.0, float("nan")])
def test_a_target_that_is_none_is_refused(evaluation, target):
    with pytest.raises(ValueError, match="`psnr` must be above 0 and below 100 dB"):
        find_sparsity(evaluation, target)


def test_patterns_have_no_sparsity_to_search(evaluation, patterns_folder):
    run = parse_run(f"found={patterns_folder}", steps=4, guidance=1.0)
    with pytest.raises(ValueError, match=r"`run` must be of adaptive attention, .*, got patterns of found"):
        find_sparsity(replace(evaluation, runs=(run,)), 30.0)


def command(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code or 0


@pytest.mark.slow
def test_the_command_finds_a_sparsity_with_real_videos(saved_tiny_pipeline, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat\n")
    folder = tmp_path / "out"
    options = ["--find-sparsity", "--prompts", tmp_path / "prompts.txt", "--model", saved_tiny_pipeline]
    options += ["--output", folder, "--height", 64, "--width", 64, "--frames", 9, "--steps", 2, "--guidance", 1]
    options += ["--device", "cpu", "--run", "x=preset,dense_layers=none", "--measure", "psnr"]
    assert command(*options, "--psnr", 99) == 2
    told = capsys.readouterr()
    assert "`psnr` 99 dB is not reached: at 0.05" in told.err
    lowest = [line for line in told.out.splitlines() if line.startswith("sparsity 0.05: PSNR to dense")]
    assert lowest and lowest[0].endswith("1 videos: too far")
    target = float(lowest[0].split()[5]) - 0.01
    records = sorted(path.stat().st_mtime_ns for path in (folder / "videos").rglob("*.mp4"))
    assert command(*options, "--psnr", target) == 0
    assert records == sorted(path.stat().st_mtime_ns for path in (folder / "videos").rglob("*.mp4"))[: len(records)]
    shown = capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())["sparsity_search"]
    best = report["best"]
    assert best["sparsity"] in GRID and best["psnr"] >= target and report["target"] == target
    assert {one["sparsity"] for one in report["candidates"]} >= {0.7, best["sparsity"]}
    assert BladeConfig.from_pretrained(folder / "found").sparsity == best["sparsity"]
    assert f"found       sparsity {best['sparsity']:.2f}" in shown and report["command"] in shown
    assert f"Sparsity search: {best['sparsity']:g} is the highest sparsity" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--find-sparsity"], "`psnr` must be given with `find_sparsity`, such as --psnr 30"),
        (["--psnr", "30"], "`psnr` must not be given without `find_sparsity`"),
        (["--find-sparsity", "--psnr", "-1"], "`psnr` must be above 0"),
        (["--find-sparsity", "--psnr", "30", "--run", "dense", "--run", "preset"], "`run` must be one sparse run"),
        (["--find-sparsity", "--psnr", "30", "--shard", "1/2"], "`shard` must be 1/1"),
    ],
)
def test_bad_input_ends_with_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert command("--shapes", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not list(tmp_path.iterdir())
