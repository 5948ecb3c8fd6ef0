"""Search for the highest sparsity whose videos stay close enough to those of dense attention."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from blade.attention.config import BladeConfig
from blade.common.files import folder_updated
from blade.common.locks import folder_locked
from blade.evaluation.plan import Evaluation, EvaluationPlan, plan_evaluation
from blade.evaluation.records import read_records
from blade.evaluation.runs import RunSettings
from blade.evaluation.worker import Progress, VideoMaker, VideoWorker
from blade.metrics.estimates import mean_of_worst
from blade.metrics.similarity import MAX_PSNR
from blade.models.source import BUNDLED

GRID = tuple(round(0.05 * number, 2) for number in range(1, 20))
"""Sparsities that are tried, ascending."""

FOLDER = "found"
"""Folder of the configuration that was found, in the evaluation's folder."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A sparsity, and how close its videos are to dense; `print` it."""

    sparsity: float
    """One of `GRID`."""
    psnr: float
    """Mean PSNR to dense over videos, in dB."""
    worst_tenth: float
    """Mean of the worst tenth of the videos, at least one, in dB."""
    run_density: float
    """Mean density over all layers and steps."""
    videos: int
    """Number of videos."""
    is_enough: bool
    """True if the mean reaches the target."""

    def __str__(self) -> str:
        return (
            f"sparsity {self.sparsity:.2f}: PSNR to dense {self.psnr:.2f} dB, worst tenth {self.worst_tenth:.2f} dB, "
            f"run density {self.run_density:.3f}, {self.videos} videos: {'enough' if self.is_enough else 'too far'}"
        )


@dataclass(frozen=True, kw_only=True)
class FoundSparsity:
    """The result of a search; `print` it."""

    target: float
    """PSNR to dense that was asked for, in dB."""
    candidates: tuple[Candidate, ...]
    """The sparsities that were tried, in this order."""
    plan: EvaluationPlan
    """The evaluation of the dense run and of those that were tried, for its report; the baseline is the best."""
    run: RunSettings
    """The run whose sparsity was searched."""

    @property
    def best(self) -> Candidate:
        """The highest sparsity that is enough."""
        return max((one for one in self.candidates if one.is_enough), key=lambda one: one.sparsity)

    @property
    def config(self) -> BladeConfig:
        """The configuration at that sparsity."""
        config = self.plan.requests[_at(self.run, self.best.sparsity).name].blade_config
        assert config is not None  # sparse, as `plan_search` checks
        return config

    @property
    def usage(self) -> tuple[str, str]:
        """The command and the Python call that make videos at this sparsity."""
        run, evaluation = self.run, self.plan.evaluation
        command = ["blade-generate", *([] if evaluation.model == BUNDLED else ["--model", evaluation.model])]
        command += [] if run.student is None else ["--student", run.student]
        command += [] if run.lora is None else ["--lora", run.lora]
        command += [] if run.steps is None else ["--steps", f"{run.steps}"]
        command += [] if run.guidance is None else ["--guidance-scale", f"{run.guidance:g}"]
        if run != RunSettings(
            name=run.name, attention="preset", preset=run.preset, steps=run.steps, guidance=run.guidance
        ):
            folder = str(evaluation.folder / FOLDER)
            return (
                shlex.join([*command, "--config", folder]),
                f"apply_blade(pipe, BladeConfig.from_pretrained({folder!r}))",
            )
        sparsity, kind = f"{self.best.sparsity:g}", "" if run.preset is None else f'kind="{run.preset}", '
        command += [] if run.preset is None else ["--preset", run.preset]
        return shlex.join([*command, "--sparsity", sparsity]), f"apply_blade(pipe, {kind}sparsity={sparsity})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        command, call = self.usage
        candidates = [asdict(candidate) for candidate in self.candidates]
        return {"target": self.target, "run": self.run.name, "command": command, "call": call} | {
            "best": asdict(self.best),
            "candidates": candidates,
        }

    def save_config(self) -> Path:
        """Write the configuration that was found, and return its folder."""
        folder = self.plan.evaluation.folder / FOLDER
        with folder_updated(folder) as temporary:
            self.config.save_pretrained(temporary)
        return folder

    def __str__(self) -> str:
        command, call = self.usage
        return f"found       {self.best}\ncommand     {command}\nPython      {call}"


def plan_search(evaluation: Evaluation) -> EvaluationPlan:
    """Plan the dense run, the run as it is, and the run at every sparsity of `GRID`.

    Args:
        evaluation: Its one run is the one whose sparsity is searched.

    Raises:
        ValueError: If the run is not one of adaptive attention without a sparsity of its own, or an option of the
            evaluation makes no sense in a search.
    """
    if len(evaluation.runs) != 1 or evaluation.runs[0].is_dense or evaluation.runs[0].sparsity is not None:
        names = ", ".join(run.name for run in evaluation.runs)
        raise ValueError(
            "`run` must be one sparse run without `sparsity`, which is searched (the dense one is added by itself), "
            f"got {names}."
        )
    if evaluation.shard != (1, 1):
        raise ValueError(
            "`shard` must be 1/1: what a search tries next depends on all videos, got {}/{}.".format(*evaluation.shard)
        )
    if evaluation.baseline is not None:
        raise ValueError(
            f"`baseline` must not be given: it is the sparsity that is found, got {evaluation.baseline!r}."
        )
    if evaluation.measures is not None and "psnr" not in evaluation.measures:
        raise ValueError(f"`measure` must include psnr, by which is searched, got {', '.join(evaluation.measures)}.")
    (run,) = evaluation.runs
    dense = RunSettings(
        name="dense",
        attention="dense",
        **{name: getattr(run, name) for name in ("steps", "guidance", "student", "noise_kept", "lora")},
    )
    plan = plan_evaluation(replace(evaluation, runs=(dense, run, *(_at(run, sparsity) for sparsity in GRID))))
    config = plan.requests[run.name].blade_config
    if config is None or config.attention != "asa":
        method = "dense" if config is None else config.attention
        raise ValueError(
            f"`run` must be of adaptive attention, whose sparsity can be set, got {method} of {run.name}."
        )
    return plan


def find_sparsity(
    evaluation: Evaluation,
    psnr: float,
    *,
    on_video: Callable[[Progress], None] | None = None,
    on_candidate: Callable[[Candidate], None] | None = None,
    maker: Callable[[EvaluationPlan], VideoMaker] | None = None,
) -> FoundSparsity:
    """Find the highest sparsity of `GRID` whose videos have a PSNR to dense of at least so much in the mean.

    Bisection from the run's own sparsity, which takes it that PSNR falls as sparsity rises. Videos that are in the
    folder are not made again, so that a stopped search resumes, and one for another target begins with them.

    Args:
        evaluation: The options, with one run; see `plan_search`.
        psnr: In dB.
        on_video: Called after each video.
        on_candidate: Called after each sparsity.
        maker: See `blade.evaluation.worker.evaluate_videos`.

    Raises:
        ValueError: If an option makes no sense, or no sparsity reaches the target.
        ModelError: If the model does not exist.
        InUseError: If another process makes videos in the folder.
        OutputError: If a file cannot be written.
    """
    check_target(psnr)
    plan = plan_search(evaluation)
    with folder_locked(evaluation.folder):
        return _found(evaluation, plan, (maker or VideoWorker)(plan), psnr, on_video, on_candidate)


def _found(
    evaluation: Evaluation,
    plan: EvaluationPlan,
    worker: VideoMaker,
    psnr: float,
    on_video: Callable[[Progress], None] | None,
    on_candidate: Callable[[Candidate], None] | None,
) -> FoundSparsity:
    """Search, in a folder that no other process uses."""
    (run,), runs = evaluation.runs, {one.name: one for one in plan.evaluation.runs}
    dense = runs["dense"]
    candidates: list[Candidate] = []
    reached, missed, number = -1, len(GRID), _start(plan, run)
    while missed - reached > 1:
        name = _at(run, GRID[number]).name
        for error in worker.make_missing((dense, runs[name]), on_video).values():
            raise error
        candidates.append(_measured(plan, name, GRID[number], psnr))
        if on_candidate is not None:
            on_candidate(candidates[-1])
        reached, missed = (number, missed) if candidates[-1].is_enough else (reached, number)
        number = (reached + missed) // 2
    if reached < 0:
        lowest = min(candidates, key=lambda one: one.sparsity)
        raise ValueError(
            f"`psnr` {psnr:g} dB is not reached: at {lowest.sparsity:g}, the lowest sparsity tried, the videos have "
            f"{lowest.psnr:.2f} dB in the mean, and {lowest.worst_tenth:.2f} dB in the worst tenth."
        )
    tried = sorted(candidate.sparsity for candidate in candidates)
    names = [_at(run, sparsity).name for sparsity in tried]
    shown = replace(
        plan.evaluation,
        runs=(dense, *(runs[name] for name in names)),
        baseline=_at(run, GRID[reached]).name,
    )
    return FoundSparsity(target=psnr, candidates=tuple(candidates), plan=replace(plan, evaluation=shown), run=run)


def check_target(psnr: float) -> None:
    """Raise a `ValueError` unless a PSNR in dB can be searched for."""
    if not 0 < psnr < MAX_PSNR:
        raise ValueError(
            f"`psnr` must be above 0 and below {MAX_PSNR:g} dB, which identical videos have, got {psnr:g}."
        )


def _at(run: RunSettings, sparsity: float) -> RunSettings:
    """Return a run at a sparsity, under a name of its own."""
    return replace(run, name=f"{run.name}-{sparsity:.2f}", sparsity=sparsity)


def _start(plan: EvaluationPlan, run: RunSettings) -> int:
    """Return the place in `GRID` that is nearest to the sparsity of a run as it is."""
    own = plan.requests[run.name].sparsity or 0.0
    return min(range(len(GRID)), key=lambda number: abs(GRID[number] - own))


def _measured(plan: EvaluationPlan, name: str, sparsity: float, target: float) -> Candidate:
    """Return what the records say of a run."""
    records = [record for (run, *_), record in read_records(plan).items() if run == name]
    values = [record["psnr"] for record in records if record.get("psnr") is not None]
    if len(values) < len(records):
        raise ValueError(
            f"{len(records) - len(values)} videos lack `psnr` in the records of run `{name}` in "
            f"{plan.evaluation.folder}; take another folder."
        )
    return Candidate(
        sparsity=sparsity,
        psnr=fmean(values),
        worst_tenth=mean_of_worst(values),
        run_density=fmean(record["run_density"] for record in records),
        videos=len(values),
        is_enough=fmean(values) >= target,
    )
