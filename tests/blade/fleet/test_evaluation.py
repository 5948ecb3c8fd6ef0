"""An evaluation by workers has the files of one process; the workers are in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_ray import Lost, fake_connected

from blade.common.leftovers import files_in
from blade.evaluation.plan import Evaluation, EvaluationPlan, plan_evaluation
from blade.evaluation.prompts import held_out_prompts
from blade.evaluation.records import read_records
from blade.evaluation.runs import RunSettings
from blade.evaluation.sparsity_search import find_sparsity
from blade.evaluation.worker import VideoWorker, evaluate_videos
from blade.fleet import evaluation as fleet_evaluation
from blade.fleet.evaluation import evaluate_many, find_sparsity_many, predicted_work
from blade.fleet.options import FleetOptions

DENSE = RunSettings(name="dense", steps=2, guidance=1.0)
SPARSE = RunSettings(name="asa", steps=2, guidance=1.0, attention="asa", sparsity=0.5, dense_steps=1, dense_layers=())
OPTIONS = FleetOptions(workers=2)
VARYING = ("date", "seconds", "seconds_denoising", "machine")


@pytest.fixture(autouse=True)
def workers_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_evaluation, "connected", fake_connected)


@pytest.fixture
def evaluation(saved_tiny_pipeline: Path, tmp_path: Path) -> Evaluation:
    """Two captions of moving shapes, dense and sparse."""
    return Evaluation(
        runs=(SPARSE, DENSE), prompts=held_out_prompts(1, 1), folder=tmp_path / "workers", device="cpu", frames=9,
        model=str(saved_tiny_pipeline), of_shapes=True, height=64, width=64, measures=("psnr",),
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder but its records."""
    paths = [path for path in files_in(folder) if path.suffix != ".jsonl"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def records(plan: EvaluationPlan) -> dict[Any, Any]:
    """Return the records without times."""
    return {
        key: {name: value for name, value in record.items() if name not in VARYING}
        for key, record in read_records(plan).items()
    }


def alone(evaluation: Evaluation, tmp_path: Path) -> EvaluationPlan:
    """Make the videos of an evaluation by this process, into a folder of its own."""
    plan = plan_evaluation(replace(evaluation, folder=tmp_path / "alone"))
    assert evaluate_videos(plan) == {}
    return plan


def test_the_files_are_those_of_one_process(evaluation: Evaluation, tmp_path: Path) -> None:
    plan, begun = plan_evaluation(evaluation), list[Any]()
    assert evaluate_many(plan, options=OPTIONS, on_progress=begun.append) == {}
    one = alone(evaluation, tmp_path)
    assert contents(evaluation.folder) == contents(one.evaluation.folder)
    assert len(contents(evaluation.folder)) == 4 + 2  # videos and references
    assert records(plan) == records(one) and len(records(plan)) == 4
    assert begun[-1].done == 4
    assert evaluate_many(plan, options=OPTIONS, on_progress=lambda _: pytest.fail("made again")) == {}


def failing(run: str, error: BaseException, times: int = 1000) -> Callable[..., Any]:
    """Return a `VideoWorker.make` that raises for a run, so many times."""
    make, left = VideoWorker.make, [times]

    def fail(worker: VideoWorker, prompt: Any, settings: RunSettings) -> Any:
        if settings.name == run and left[0]:
            left[0] -= 1
            raise error
        return make(worker, prompt, settings)

    return fail


def test_a_run_that_fails_leaves_the_others(evaluation: Evaluation, monkeypatch) -> None:
    monkeypatch.setattr(VideoWorker, "make", failing("asa", ValueError("`sparsity` is too high")))
    plan = plan_evaluation(evaluation)
    failed = evaluate_many(plan, options=FleetOptions(workers=1))
    assert [(name, type(error), str(error)) for name, error in failed.items()] == [
        ("asa", ValueError, "`sparsity` is too high")
    ]
    assert {name for name, *_ in records(plan)} == {"dense"}


def test_a_lost_worker_is_no_failure_of_the_run(evaluation: Evaluation, monkeypatch) -> None:
    monkeypatch.setattr(VideoWorker, "make", failing("dense", Lost(), times=4))
    plan = plan_evaluation(evaluation)
    failed = evaluate_many(plan, options=FleetOptions(workers=1))
    (name,) = failed
    first = evaluation.prompts[0]
    assert name == f"dense: {first.text}, seed {first.seed}" and "was lost 4 times" in str(failed[name])
    assert len(records(plan)) == 3
    reference = evaluation.folder / "references" / "dense" / f"{first.stem}.npz"
    assert reference.is_file()  # which the sparse run made for itself
    monkeypatch.undo()
    monkeypatch.setattr(fleet_evaluation, "connected", fake_connected)
    assert evaluate_many(plan, options=OPTIONS) == {} and len(records(plan)) == 4


def test_a_dense_video_of_the_same_steps_is_more_work(evaluation: Evaluation) -> None:
    longer = replace(DENSE, name="longer", steps=8)
    plan = plan_evaluation(replace(evaluation, runs=(SPARSE, DENSE, longer)))
    work = predicted_work(plan)
    assert work["asa"] < work["dense"] and work["longer"] == 4 * work["dense"]


def test_a_shard_is_not_shared(evaluation: Evaluation) -> None:
    plan = plan_evaluation(replace(evaluation, shard=(1, 2)))
    with pytest.raises(ValueError, match="`shard` must not be given with `workers`, which share all prompts, got 1/2"):
        evaluate_many(plan, options=OPTIONS)


def test_workers_on_gpus_need_one_for_the_plan(evaluation: Evaluation, monkeypatch) -> None:
    from fake_ray import FakeConnection

    from blade.fleet.crew import Crew

    connection = FakeConnection(1)
    connection.crew = Crew(workers=1, cpus=1, gpus=1.0)
    with pytest.raises(ValueError, match="`workers` compute on cuda, but this machine has no GPU to plan for"):
        fleet_evaluation._FleetVideos(plan_evaluation(evaluation), connection, None)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_search_finds_what_one_process_finds(evaluation: Evaluation, tmp_path: Path) -> None:
    searched = replace(evaluation, runs=(replace(SPARSE, sparsity=None),), prompts=held_out_prompts(1, 0))
    found = find_sparsity_many(searched, 20.0, options=OPTIONS)
    one = find_sparsity(replace(searched, folder=tmp_path / "alone"), 20.0)
    assert found.candidates == one.candidates and found.best == one.best
