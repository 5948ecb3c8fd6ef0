"""An evaluation's videos by many workers: made and measured there, written here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from blade_kernels.crashes import naming_crashes

from blade.common.errors import first_line
from blade.common.files import append_json_line, write_files
from blade.common.leftovers import files_in
from blade.common.terminal import logger
from blade.evaluation.output_files import check_output_files, records_path, reference_path
from blade.evaluation.plan import Evaluation, EvaluationPlan
from blade.evaluation.prompts import EvaluationPrompt
from blade.evaluation.records import Record
from blade.evaluation.runs import RunSettings
from blade.evaluation.sparsity_search import Candidate, FoundSparsity, find_sparsity
from blade.evaluation.worker import Progress, VideoWorker, evaluate_videos, missing_videos
from blade.fleet.connection import Connection, connected
from blade.fleet.options import FleetOptions
from blade.fleet.pool import LEFT_OUT, FleetProgress, LostWorkerError, Pool, Task
from blade.models.costs import ForwardCost, forward_cost, run_cost
from blade.models.loading import load_empty_model


def evaluate_many(
    plan: EvaluationPlan,
    *,
    options: FleetOptions,
    on_progress: Callable[[FleetProgress], None] | None = None,
) -> dict[str, Exception]:
    """Make and measure every video that has no record yet by workers of Ray.

    The workers send videos, frames of references and records here, where they are written.

    Args:
        plan: The evaluation, of one shard.
        options: The workers.
        on_progress: Called about twice a second.

    Returns:
        The errors of the runs that failed, by name, and of videos whose workers were lost, by run and prompt.

    Raises:
        ValueError: For an evaluation that cannot be shared, or workers that cannot be had.
        FleetError: If all workers are lost.
        InUseError: If another process makes videos in the folder.
        OutputError: If a file cannot be written.
    """
    with connected(options, plan.evaluation.device) as connection:
        return evaluate_videos(plan, maker=lambda plan: _FleetVideos(plan, connection, on_progress))


def find_sparsity_many(
    evaluation: Evaluation,
    psnr: float,
    *,
    options: FleetOptions,
    on_progress: Callable[[FleetProgress], None] | None = None,
    on_candidate: Callable[[Candidate], None] | None = None,
) -> FoundSparsity:
    """Find a sparsity as `blade.evaluation.sparsity_search.find_sparsity` does, with workers of Ray.

    Raises:
        ValueError: If an option makes no sense, no sparsity reaches the target, or workers cannot be had.
        RuntimeError: If a video's workers were lost too often, or all are.
    """
    with connected(options, evaluation.device) as connection:
        return find_sparsity(
            evaluation,
            psnr,
            on_candidate=on_candidate,
            maker=lambda plan: _FleetVideos(plan, connection, on_progress),
        )


@dataclass(frozen=True, kw_only=True)
class VideoOrder:
    """A video that a worker is to make and measure."""

    prompt: EvaluationPrompt
    run: RunSettings
    reference: bytes | None
    """The file of the dense video's frames that it is compared with, where that is made."""


@dataclass(frozen=True, kw_only=True)
class MeasuredVideo:
    """A video as a worker sends it."""

    record: Record
    files: dict[str, bytes]
    """Contents by paths in the evaluation's folder."""


class _FleetVideos:
    """The videos of a plan, in the process that hands them out."""

    def __init__(
        self,
        plan: EvaluationPlan,
        connection: Connection,
        on_progress: Callable[[FleetProgress], None] | None,
    ) -> None:
        """Check the plan; no worker is started yet.

        Raises:
            ValueError: If it is one shard of several, a measure is misnamed, or there are no GPUs here.
        """
        evaluation, device = plan.evaluation, connection.crew.device
        if evaluation.shard != (1, 1):
            raise ValueError("`shard` must not be given with `workers`, which share all prompts, got {}/{}.".format(
                *evaluation.shard
            ))  # fmt: skip
        if any(torch.device(request.device).type != device for request in plan.requests.values()):
            raise ValueError(
                f"`workers` compute on {device}, but this machine has no GPU to plan for; start the command on one "
                "that has, or give `device` cpu."
            )
        self.plan, self.connection, self.on_progress = plan, connection, on_progress
        self.compares = VideoWorker(plan).compares
        self.failures: dict[str, Exception] = {}
        self._pool: Pool | None = None
        self._work: dict[str, float] = {}
        self._videos: dict[tuple[str, str, int], tuple[EvaluationPrompt, RunSettings]] = {}

    def make_missing(
        self, runs: Iterable[RunSettings], on_video: Callable[[Progress], None] | None = None
    ) -> dict[str, Exception]:
        """Make and measure every video of runs that has no record yet; `on_video` is not called."""
        missing = missing_videos(self.plan, runs)
        self.failures = {}
        if not missing:
            return self.failures
        check_output_files(self.plan, missing, compares=self.compares)
        self._work = self._work or predicted_work(self.plan)
        self._videos = {(run.name, *prompt.key): (prompt, run) for prompt, run in missing}
        tasks = [self._task(prompt, run) for prompt, run in missing]
        self._pool = self._pool or Pool(self.connection, EvaluationJob(plan=self.plan), self.on_progress)
        self._pool.run(tasks, self)
        return self.failures

    def _task(self, prompt: EvaluationPrompt, run: RunSettings) -> Task:
        reference = self.plan.evaluation.reference_of(run) if self.compares else None
        return Task(
            key=(run.name, *prompt.key),
            name=f"{run.name}: {prompt.text}, seed {prompt.seed}",
            work=self._work[run.name],
            group=(run.lora, run.student, run.noise_kept),
            after=None if reference is None else (reference.name, *prompt.key),
        )

    def begin(self, task: Task) -> Any:
        """Return the order of a video, unless its run has failed."""
        prompt, run = self._videos[task.key]  # type: ignore[index]
        if run.name in self.failures:
            return LEFT_OUT
        reference = self.plan.evaluation.reference_of(run) if self.compares else None
        content = None
        if reference is not None:
            path = reference_path(self.plan.evaluation.folder, reference.name, prompt)
            content = path.read_bytes() if path.is_file() else None
        return VideoOrder(prompt=prompt, run=run, reference=content)

    def done(self, task: Task, value: MeasuredVideo) -> None:
        """Write a video, and then its record."""
        folder = self.plan.evaluation.folder
        write_files({folder / name: content for name, content in value.files.items()})
        append_json_line(records_path(folder, self.plan.evaluation.shard), value.record)

    def failed(self, task: Task, error: Exception) -> None:
        """Take down an error: of a run, whose remaining videos are left out, or of a video whose workers were lost."""
        _, run = self._videos[task.key]  # type: ignore[index]
        if isinstance(error, LostWorkerError):
            self.failures[task.name] = error
            logger.warning(f"failed: {task.name}: {first_line(error)}")
        elif run.name not in self.failures:
            self.failures[run.name] = error
            logger.warning(f"run `{run.name}` failed, and its remaining videos are left out: {first_line(error)}")


@dataclass(frozen=True, kw_only=True)
class EvaluationJob:
    """What the workers of an evaluation have in common."""

    plan: EvaluationPlan

    def load(self, device: str) -> Callable[[VideoOrder], MeasuredVideo]:
        """Return what makes and measures a video; models are loaded as runs need them."""
        return _VideoMaker(self.plan, device).make


class _VideoMaker:
    """A worker's `VideoWorker`, which writes each video into a folder that is then sent."""

    def __init__(self, plan: EvaluationPlan, device: str) -> None:
        requests = {name: replace(request, device=device) for name, request in plan.requests.items()}
        self.plan = replace(plan, requests=requests)
        self.worker = VideoWorker(self.plan)

    def make(self, order: VideoOrder) -> MeasuredVideo:
        """Make and measure a video."""
        prompt, run, given = order.prompt, order.run, set[Path]()
        reference = self.plan.evaluation.reference_of(run)
        with tempfile.TemporaryDirectory(prefix="blade-") as scratch:
            folder = Path(scratch)
            self.worker.write_to(folder)
            if reference is not None and order.reference is not None:
                path = reference_path(folder, reference.name, prompt)
                write_files({path: order.reference})
                given.add(path)
            try:
                with naming_crashes(f"run `{run.name}`", self.worker.device):
                    record = self.worker.make(prompt, run)
            except BaseException:
                self.worker.forget()
                raise
            made = [path for path in files_in(folder) if path not in given]
            return MeasuredVideo(
                record=record, files={path.relative_to(folder).as_posix(): path.read_bytes() for path in made}
            )


def predicted_work(plan: EvaluationPlan) -> dict[str, float]:
    """Return the operations of a video of each run, or its denoising steps where they cannot be counted."""
    first = next(iter(plan.requests.values()))
    model = load_empty_model(plan.evaluation.model, revision=first.revision)
    forward: ForwardCost | None = None
    if model.family.plan_problem(model.pipe) is None:
        forward = forward_cost(model.transformer, model.latent_size(*first.size))
    work = {}
    for name, request in plan.requests.items():
        guidance = request.guidance_scale > 1 and model.family.guidance_takes_two_passes
        if forward is None:
            work[name] = float(request.steps * (2 if guidance else 1))
            continue
        work[name] = run_cost(
            forward,
            model.family.evaluations(request.steps),
            guidance=guidance,
            guidance_passes=model.family.guidance_passes,
            config=request.blade_config,
        ).total
    return work
