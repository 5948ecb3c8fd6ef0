"""An evaluation and its plan, in which unset values are resolved and checked without loading weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from blade.attention.applied import AppliedBlade
from blade.common.checks import meant
from blade.evaluation.prompts import EvaluationPrompt
from blade.evaluation.runs import RunSettings
from blade.families.data import ComparisonProtocol
from blade.families.registry import available_kind
from blade.generation.fingerprint import model_fingerprint
from blade.generation.request import GenerationRequest, ResolvedRequest, refused_prompts
from blade.generation.resolve import resolve_request
from blade.metrics.measures import Measure
from blade.metrics.registry import choose_measures
from blade.models.choices import SEPARATOR, parse_lora
from blade.models.devices import resolve_device, resolve_dtype
from blade.models.loaded import LoadedModel
from blade.models.loading import load_empty_model
from blade.models.source import BUNDLED
from blade.moving_shapes.bundled import BUNDLED_DEFAULTS
from blade.students.description import preset_kind
from blade.students.loading import read_student
from blade.students.source import student_settings


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Options of an evaluation. Every run generates every prompt with the same noise."""

    runs: tuple[RunSettings, ...]
    """Runs, in the order of the report."""
    prompts: tuple[EvaluationPrompt, ...]
    """Prompts of all shards, in the order of the report."""
    folder: Path
    """Folder of records, videos and report; existing videos are not made again."""
    model: str = BUNDLED
    """`BUNDLED`, a folder in Diffusers format, or a Hub id."""
    of_shapes: bool = False
    """If true, the model shows the moving-shapes world, so that the scorer can judge its videos; always true for the
    bundled model."""
    baseline: str | None = None
    """Name of the run that the others are compared with, video by video; None takes the first that is not dense, or
    the first of all if every run is dense."""
    measures: tuple[str, ...] | None = None
    """Names of the measures to take and to report, in addition to densities and times; None takes all."""
    shard: tuple[int, int] = (1, 1)
    """(i, n): take every n-th prompt from the i-th, so that n processes share the work."""
    height: int | None = None
    """Pixels; None takes the model's default."""
    width: int | None = None
    """Pixels; None takes the model's default."""
    frames: int | None = None
    """Number of frames; None takes the model's default."""
    device: str | None = None
    """See `blade.models.devices.resolve_device`."""
    dtype: str | None = None
    """See `blade.models.devices.resolve_dtype`."""
    vae_tiling: bool = False
    """Decode in tiles, which takes less memory."""
    protocol: ComparisonProtocol | None = None
    """The protocol that the evaluation follows, by which the report has rows of the common table; values of its own
    that differ from the protocol's are named in them."""

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        if not names:
            raise ValueError("`runs` must hold at least one run.")
        folders: dict[str, str] = {}  # capitals make no difference on some systems
        for name in names:
            other = folders.setdefault(name.casefold(), name)
            if other != name or names.count(name) > 1:
                twice = f"{name!r} twice" if other == name else f"{other!r} and {name!r}"
                raise ValueError(f"`runs` must have different names, got {twice}.")
        if not self.prompts:
            raise ValueError("`prompts` must hold at least one prompt.")
        if len({prompt.key for prompt in self.prompts}) < len(self.prompts):
            raise ValueError("`prompts` must be different in text or seed, got the same twice.")
        if self.baseline is not None and self.baseline not in names:
            listed = ", ".join(names)
            raise ValueError(
                f"`baseline` must be one of the runs {listed}, got {self.baseline!r}{meant(self.baseline, names)}"
            )
        choose_measures(self.measures)
        number, count = self.shard
        if not 1 <= number <= count:
            raise ValueError(f"`shard` must be i/n with 1 <= i <= n, got {number}/{count}.")
        object.__setattr__(self, "of_shapes", self.of_shapes or self.model == BUNDLED)

    @property
    def chosen_measures(self) -> tuple[Measure, ...]:
        """The measures to take and to report, in the order of the report's columns."""
        return choose_measures(self.measures)

    @property
    def own_prompts(self) -> tuple[EvaluationPrompt, ...]:
        """The prompts of this shard."""
        number, count = self.shard
        return self.prompts[number - 1 :: count]

    @property
    def baseline_run(self) -> RunSettings:
        """The run that the others are compared with, video by video."""
        if self.baseline is not None:
            return next(run for run in self.runs if run.name == self.baseline)
        return next((run for run in self.runs if not run.is_dense), self.runs[0])

    def reference_of(self, run: RunSettings) -> RunSettings | None:
        """Return the dense run that a sparse one is measured against, if it is part of the evaluation."""
        if run.is_dense:
            return None
        return next((other for other in self.runs if other.is_reference_of(run)), None)


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """An evaluation with all settings resolved, ready to run."""

    evaluation: Evaluation
    """The evaluation, with the steps, guidance and share of kept noise of every run filled in."""
    requests: dict[str, ResolvedRequest]
    """Request of each run by name; prompt and seed are replaced for every video."""
    fingerprint: str | None
    """Fingerprint of the model's weights; see `blade.generation.fingerprint.model_fingerprint`."""
    student_fingerprints: dict[str, str | None]
    """Fingerprints of the students' weights, by run."""
    lora_fingerprints: dict[str, str]
    """Fingerprints of the LoRAs' weights, with their strengths, by run."""

    @property
    def reference_run(self) -> RunSettings:
        """The run that distributions are compared with: the dense run with the most steps and without a student."""
        dense_runs = [run for run in self.evaluation.runs if run.is_dense and run.student is None]
        return max(dense_runs or self.evaluation.runs[:1], key=lambda run: run.steps or 0)

    @property
    def size(self) -> dict[str, Any]:
        """Height and width in pixels, number of frames, and frames per second."""
        first = next(iter(self.requests.values()))
        return {name: getattr(first, name) for name in ("height", "width", "frames", "fps")}


def plan_evaluation(evaluation: Evaluation) -> EvaluationPlan:
    """Resolve the unset values of an evaluation from the model's configuration files, and check all of its runs.

    Args:
        evaluation: The options.

    Raises:
        ValueError: If runs are impossible, such as one with a pattern table that was made for other settings, or with
            steps that its student is not trained for; names them all. Or if the bundled model cannot draw a prompt, or
            the model is of another family than the protocol's.
        ModelError: If the model does not exist.
    """
    device = resolve_device(evaluation.device)
    model = load_empty_model(evaluation.model, dtype=resolve_dtype(evaluation.dtype, device))
    _check_protocol(evaluation, model)
    requests: dict[str, ResolvedRequest] = {}
    problems: dict[str, list[str]] = {}
    for run in evaluation.runs:
        try:
            requests[run.name] = replace(_resolve(evaluation, run, model), device=str(device))
        except ValueError as error:
            problems.setdefault(str(error), []).append(run.name)
    lines = [f"run `{names[0]}`{_others(names)}: {problem}" for problem, names in problems.items()]
    if lines := [*lines, *_prompt_problems(evaluation)]:
        raise ValueError("\n".join(lines))
    runs = [
        replace(
            run,
            steps=requests[run.name].steps,
            guidance=requests[run.name].guidance_scale,
            noise_kept=requests[run.name].noise_kept,
        )
        for run in evaluation.runs
    ]
    return EvaluationPlan(
        evaluation=replace(evaluation, runs=tuple(runs)),
        requests=requests,
        fingerprint=next(iter(requests.values())).revision or model_fingerprint(evaluation.model),
        student_fingerprints={run.name: model_fingerprint(run.student) for run in runs if run.student is not None},
        lora_fingerprints={run.name: _lora_fingerprint(run.lora) for run in runs if run.lora is not None},
    )


def _resolve(evaluation: Evaluation, run: RunSettings, model: LoadedModel) -> ResolvedRequest:
    """Return the request of a run, checked as far as that takes no weights."""
    request, student = _request(evaluation, run, model), None
    if run.student is not None:
        student = read_student(model.pipe, run.student, noise_kept=run.noise_kept)
    resolved = resolve_request(request, model, student=student)
    _check(resolved, model)
    if run.student is None:
        return resolved
    noise_kept = student_settings(run.student).noise_kept if run.noise_kept is None else run.noise_kept
    return replace(resolved, student=run.student, noise_kept=noise_kept)


def _lora_fingerprint(text: str) -> str:
    """Return what tells a LoRA from others, wherever its files are: fingerprints, or Hub ids, and strengths."""
    lora = parse_lora(text)
    strengths = SEPARATOR.join(f"{strength:g}" for strength in lora.strengths)
    return f"{SEPARATOR.join(model_fingerprint(source) or source for source in lora.sources)}={strengths}"


def _others(names: list[str]) -> str:
    """Say of how many other runs a problem is."""
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""


def _prompt_problems(evaluation: Evaluation) -> list[str]:
    """Return why the model cannot draw prompts, of the first one that it cannot."""
    texts = {prompt.text: None for prompt in evaluation.prompts}
    refused = refused_prompts(GenerationRequest(prompt=next(iter(texts)), model=evaluation.model), texts)
    more = f" ({len(refused)} such prompts)" if len(refused) > 1 else ""
    return [f"{problem}{more}" for problem in refused.values()][:1]


def _request(evaluation: Evaluation, run: RunSettings, model: LoadedModel) -> GenerationRequest:
    settings = None if run.student is None else student_settings(run.student)
    suited = "training-free" if settings is None else available_kind(model.preset_name, preset_kind(settings.config))
    config, steps, guidance = run.blade_config(lambda: model.preset_of(run.preset or suited)), run.steps, run.guidance
    if settings is not None:
        steps = steps or (max(settings.step_counts) if settings.step_counts else None)
        guidance = 1.0 if guidance is None else guidance
    values = {
        "steps": steps,
        "guidance_scale": guidance,
        **{name: getattr(evaluation, name) for name in ("height", "width", "frames")},
    }
    if evaluation.of_shapes:
        values = {name: BUNDLED_DEFAULTS[name] if value is None else value for name, value in values.items()}
    return GenerationRequest(
        prompt=evaluation.prompts[0].text,
        # the grammar has no words for what a video should not show
        negative_prompt="" if evaluation.of_shapes else None,
        model=evaluation.model,
        attention="dense" if config is None else None,
        blade_config=config,
        loras=() if run.lora is None else (run.lora,),
        vae_tiling=evaluation.vae_tiling,
        **values,
    )


def _check_protocol(evaluation: Evaluation, model: LoadedModel) -> None:
    """Raise a `ValueError` if the protocol is of another family than the model, or the model needs more than text."""
    protocol = evaluation.protocol
    if protocol is None:
        return
    if protocol.name not in model.family.data.protocols:
        raise ValueError(
            f"`model` must be of the family of `protocol` {protocol.name}, such as {protocol.model}; "
            f"{evaluation.model} is a {model.family.name}."
        )
    image = model.parameters.get("image")
    if image is not None and image.default is image.empty:
        raise ValueError(
            f"`model` must make videos from text alone with `protocol` {protocol.name}, such as {protocol.model}; "
            f"{evaluation.model} is a {type(model.pipe).__name__}, which needs an image."
        )


def _check(request: ResolvedRequest, model: LoadedModel) -> None:
    """Raise a `ValueError` if BLADE would refuse the request at run time."""
    if request.blade_config is None:
        return
    grid = model.token_grid(model.latent_size(*request.size))
    for transformer in model.transformers.values():
        applied = AppliedBlade(transformer, model.family, request.blade_config)
        applied.method.rows(request.steps)
        plan = applied.method.plan(grid, torch.device("cpu"))
        if request.blade_config.strict:
            applied.judge(plan)
