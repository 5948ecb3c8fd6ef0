"""Workflow of `blade-distill`: from a configuration to the student's folder."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from blade.attention.config import BladeConfig
from blade.common.files import check_writable
from blade.common.machine import describe_machine, describe_versions
from blade.common.names import check_no_input
from blade.common.terminal import logger, print_line
from blade.common.training_log import TrainingLog, save_checkpoint
from blade.distillation.conditioning import (
    ExampleConditions,
    PromptEmbeddings,
    check_text_alone,
    encode_prompts,
    fingerprint,
)
from blade.distillation.config import DistillationConfig, student_attention
from blade.distillation.dry_run import estimate
from blade.distillation.output_files import (
    EMBEDDINGS,
    LOG_NAME,
    TRAJECTORIES,
    VALIDATION,
    check_output_files,
    teacher_request,
)
from blade.distillation.parallel import Processes
from blade.distillation.reports import PACKAGES, DistillationReport, Estimate
from blade.distillation.resuming import check_resumable, checkpoint_path, flat, newest_checkpoint, remove_checkpoints
from blade.distillation.student_files import read_weights, write_student
from blade.distillation.teacher_trajectories import TeacherTrajectories
from blade.distillation.trainer import Trainer
from blade.distillation.trajectory import make_sampler
from blade.distillation.validation import validate
from blade.generation.prompts import read_prompts
from blade.generation.resolve import resolve_request
from blade.models.devices import DTYPES, resolve_device
from blade.models.loaded import LoadedModel
from blade.models.loading import load_empty_model, load_model
from blade.models.parallel import check_splits
from blade.models.source import BUNDLED
from blade.students.scheduler import FewStepScheduler

BUNDLED_PROMPTS, BUNDLED_SEED = 4096, 606
"""Number of captions with which the bundled model is distilled by default, and the seed of their sampling."""

LAG_UPDATES = 25
"""Updates over which the fake score's error is compared with the teacher's."""

DISTILLED_WORDS = ("distill", "lightning", "turbo", "lcm", "causvid", "lightx2v", "fast", "few-step")
"""Words in a model's name that suggest that it is a few-step model already."""


def distill(
    config: DistillationConfig,
    *,
    dry_run: bool = False,
    random_weights: bool = False,
    on_progress: Callable[[str], None] = lambda text: None,
    on_update: Callable[[str], None] = print_line,
) -> DistillationReport | Estimate:
    """Train a student, or resume an interrupted training bit-exactly.

    Several processes, started by `accelerate launch` or torchrun, share the work, and with `run.sequence_parallel` the
    tokens of each sample.

    Args:
        config: the configuration.
        dry_run: only measure the cost with two updates; nothing is written.
        random_weights: do that with random weights of the model's size, from its configuration files alone.
        on_progress: called with the progress of the preparations as text.
        on_update: called with the losses of every update as text, in the first process; by default they are printed.

    Returns:
        The result, or with `dry_run` the estimated cost.

    Raises:
        ValueError: for an impossible configuration, embeddings of another model, or a checkpoint of another
            configuration.
        ArithmeticError: if training diverges.
        InUseError: if another training writes to the same `output`.
        OSError: if a file cannot be written; the last checkpoint then stays intact.
    """
    from accelerate import PartialState

    device = resolve_device(config.run.device)
    state = PartialState(cpu=device.type == "cpu")
    processes = Processes(
        state, config.run.parallel, device if state.num_processes == 1 else None, config.run.sequence_parallel
    )
    output = Path(config.output).expanduser()
    _check_trackers(config.trackers)
    if random_weights and not dry_run:
        raise ValueError("`random_weights` requires `dry_run`.")
    prompts = ["none"] if random_weights else training_prompts(config)
    _check_output(config, output)
    if not dry_run:
        check_writable(output / LOG_NAME)
    with ExitStack() as stack:
        found = None
        if not dry_run:
            stack.enter_context(processes.locked(output, "output"))
            found = newest_checkpoint(output)
            if found is not None:
                check_resumable(found[1], config, processes, found[0])
            check_output_files(config, output, prompts[0], processes.device, found)
        folder = Path(config.embeddings).expanduser() if config.embeddings else output / EMBEDDINGS
        if dry_run:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        job = _Job(config, processes, prompts, folder, on_progress, dry_run=dry_run, random_weights=random_weights)
        if dry_run:
            return estimate(job.trainer, 0 if random_weights else len(prompts))
        if found is not None:
            saved = found[1]
            job.trainer.load_state_dict(saved["trainer"])
            job.hours_before, job.scores = saved["hours"], saved.get("scores", {})
        job.make_trajectories(output, on_progress)
        return job.run(output, on_update)


def training_prompts(config: DistillationConfig) -> list[str]:
    """Return the prompts that a configuration names, or captions of the bundled model's own world.

    Raises:
        ValueError: if the file has no prompts, or if another model has no file.
    """
    if config.prompts is not None:
        return read_prompts(config.prompts)
    if config.model != BUNDLED:
        raise ValueError(f"`prompts` must be a file with prompts for {config.model}, one a line; got none.")
    from blade.moving_shapes.captions import sample_caption

    rng = np.random.default_rng(BUNDLED_SEED)
    return [str(sample_caption(rng, objects=1 + number % 2)) for number in range(BUNDLED_PROMPTS)]


def _check_output(config: DistillationConfig, output: Path) -> None:
    """Raise a `ValueError` if the student would replace the model or the student that it is made from."""
    sources = {"model": config.model, "weights.start_from": config.weights.start_from}
    check_no_input([output], {Path(source).expanduser(): field for field, source in sources.items() if source})


class _Job:
    """A training with its model, prompts, checkpoints and files."""

    def __init__(
        self,
        config: DistillationConfig,
        processes: Processes,
        prompts: Sequence[str],
        embeddings: Path,
        on_progress: Callable[[str], None],
        *,
        dry_run: bool,
        random_weights: bool,
    ) -> None:
        self.config, self.processes, self.prompts = config, processes, prompts
        self.hours_before, self.scores = 0.0, dict[str, float]()
        precision = config.run.precision or ("bf16" if processes.device.type == "cuda" else "fp32")
        self.base_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model = self._load(random_weights)
        transformer = self.model.transformer
        self.request = resolve_request(teacher_request(config, prompts[0], processes.device), self.model)
        self.sampler = self._make_sampler(config.trajectory.noise_kept)
        noise_kept = config.trajectory.sampling_noise_kept
        self.student_sampler = self.sampler if noise_kept is None else self._make_sampler(noise_kept)
        self.attention = student_attention(config.attention, _student_preset(self.model))
        conditions: PromptEmbeddings | ExampleConditions
        if random_weights:
            conditions = ExampleConditions(transformer, self.model.latent_size(*self.request.size))
        else:
            conditions = self._embeddings(embeddings, on_progress, dry_run=dry_run)
        self._place_others(torch.device("cpu"))
        self.guidance_scale = self.request.guidance_scale
        self.teacher = fingerprint({"transformer": transformer})
        self.trainer = Trainer(
            self.model,
            config,
            conditions,
            self.sampler,
            self.attention,
            processes,
            guidance_scale=self.guidance_scale,
            dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
        )
        if config.weights.start_from is not None:
            source = Path(config.weights.start_from).expanduser()
            self.trainer.start_from(read_weights(source, config.weights))

    def _load(self, random_weights: bool) -> LoadedModel:
        """Load the base onto the device."""
        config, device = self.config, self.processes.device
        options: dict[str, Any] = {"revision": config.revision, "dtype": self.base_dtype}
        if config.run.sequence_parallel > 1:  # before weights are loaded
            check_splits(load_empty_model(config.model, **options).transformer, "run.sequence_parallel", trained=True)
        if random_weights:
            model = load_empty_model(config.model, **options, random_weights_on=device)
        else:
            model = load_model(config.model, **options, device=device)
        model.pipe.set_progress_bar_config(disable=True)
        if len(model.transformers) > 1:
            raise ValueError(f"`model` must have one transformer to be distilled, but {config.model} has two.")
        check_text_alone(model)
        _warn_of_distilled(config.model, model.transformer)
        return model

    def _make_sampler(self, noise_kept: float) -> FewStepScheduler:
        """Make a sampler of the student's times; an unset flow shift takes the recommended one for the video size."""
        trajectory, flow_shift = self.config.trajectory, self.config.trajectory.flow_shift
        if flow_shift is None and trajectory.times is None:
            flow_shift = self.request.flow_shift
        return make_sampler(
            self.model.pipe.scheduler,
            trajectory.steps,
            flow_shift=flow_shift,
            times=trajectory.times,
            noise_kept=noise_kept,
        )

    def _embeddings(self, folder: Path, on_progress: Callable[[str], None], *, dry_run: bool) -> PromptEmbeddings:
        """Encode the prompts, in a dry run only as many as it needs."""
        config, processes = self.config, self.processes
        prompts = list(self.prompts)
        if dry_run:
            batch = config.run.batch_size * config.run.accumulation * processes.groups
            prompts = prompts[: 2 * batch]
        # in a dry run every process has a folder of its own
        share = (0, 1) if dry_run else (processes.index, processes.count)
        # trainings with other outputs may share the folder
        with processes.locked(folder, "embeddings", wait=True):
            encode_prompts(self.model, self.request, prompts, folder, share=share, on_progress=on_progress)
            processes.wait()
        return PromptEmbeddings(folder, prompts)

    def make_trajectories(self, output: Path, on_progress: Callable[[str], None]) -> None:
        """Make the teacher's trajectories if updates that use them are still to come."""
        config, generator = self.config, self.config.generator
        if self.trainer.update >= generator.ode_updates and generator.objective != "imitation":
            return
        folder = Path(config.trajectories).expanduser() if config.trajectories else output / TRAJECTORIES
        facts = {
            "teacher": self.teacher,
            "guidance_scale": self.guidance_scale,
            "negative_prompt": self.request.negative_prompt,
            "size": [self.request.height, self.request.width, self.request.frames],
        }
        trajectories = TeacherTrajectories(folder, self.prompts, generator.trajectories)
        with self.processes.locked(folder, "trajectories", wait=True):
            self.trainer.make_trajectories(trajectories, facts, on_progress)

    def run(self, output: Path, on_update: Callable[[str], None]) -> DistillationReport:
        """Train to the end."""
        config, trainer, processes = self.config, self.trainer, self.processes
        run, began = config.run, time.perf_counter()
        trackers = self._trackers(output)
        log = None
        if processes.is_first:
            log = TrainingLog(
                output / LOG_NAME, stage="distillation", start=trainer.update, total=run.updates, show=on_update
            )
        ratios: list[float] = []
        if trainer.update >= run.updates:
            self._write_student(output, self.hours_before)  # its sampling noise may have been changed
        while trainer.update < run.updates:
            record = trainer.train_update()
            done = trainer.update
            ratios = [*ratios, record.get("critic_ratio", 0.0)][-LAG_UPDATES:]
            if len(ratios) == LAG_UPDATES and sum(ratios) / len(ratios) > 1 and done % LAG_UPDATES == 0:
                logger.warning(
                    f"The fake score lags: in the last {LAG_UPDATES} updates its error for the student's samples was "
                    f"{sum(ratios) / len(ratios):.2f} times the teacher's. Raise `fake.learning_rate` or "
                    "`fake.updates`, or lower `generator.learning_rate`."
                )
            if config.validation.every and (done % config.validation.every == 0 or done == run.updates):
                self.scores = self._validate(output / VALIDATION / f"{done:06d}")
                record |= self.scores
            if log is not None:
                log.write(done, **record)
            if trackers is not None:
                trackers.log(record, step=done)
            if done % run.checkpoint_every == 0 or done == run.updates:
                hours = self.hours_before + (time.perf_counter() - began) / 3600
                self._save(output, hours)
        if trackers is not None:
            trackers.end_training()
        processes.wait()
        return DistillationReport(
            output=output,
            updates=trainer.update,
            seconds=time.perf_counter() - began,
            skipped={role: optimizer.skipped for role, optimizer in trainer.optimizers.items()},
            scores=self.scores,
        )

    def _validate(self, folder: Path) -> dict[str, float]:
        config, device = self.config.validation, self.processes.device
        prompts = config.prompts or list(self.prompts[: config.count])
        self._place_others(device)
        try:
            return validate(self.trainer, self.student_sampler, self.request, prompts, folder, self.processes)
        finally:
            self._place_others(torch.device("cpu"))

    def _place_others(self, device: torch.device) -> None:
        """Move text encoders and VAE to a device; they are needed only before training and for validation."""
        for name, part in self.model.pipe.components.items():
            if not isinstance(part, nn.Module) or name.startswith("transformer"):
                continue
            if not any(parameter.is_meta for parameter in part.parameters()):  # not loaded with random weights
                part.to(device)

    def _save(self, output: Path, hours: float) -> None:
        """Write a checkpoint and the current student."""
        trainer, config = self.trainer, self.config
        state = trainer.state_dict()
        if self.processes.is_first:
            content = {
                "trainer": state,
                "hours": hours,
                "scores": self.scores,
                "config": config.to_dict(),
                "batch_size": trainer.batch_size,
            }
            save_checkpoint(checkpoint_path(output, trainer.update), content)
            remove_checkpoints(output, trainer.update, config.run.checkpoints_kept)
        self._write_student(output, hours)

    def _write_student(self, output: Path, hours: float) -> None:
        """Write the current student."""
        trainer, config = self.trainer, self.config
        weights = trainer.student_weights()
        if self.processes.is_first:
            machine = describe_machine(self.processes.device)
            versions = describe_versions(PACKAGES)
            facts = {
                "base": "the bundled moving-shapes model" if config.model == BUNDLED else config.model,
                "source": output.name,
                "updates": trainer.update,
                "batch": trainer.batch_size,
                "prompts": f"{len(self.prompts):,}",
                "video": {
                    "height": self.request.height,
                    "width": self.request.width,
                    "num_frames": self.request.frames,
                },
                "fps": self.request.fps,
                "guidance_scale": self.guidance_scale,
                "trained": "all weights" if config.weights.full else f"a LoRA of rank {config.weights.rank}",
                "scores": ", ".join(f"{name.replace('_', ' ')}: {value:.3f}" for name, value in self.scores.items()),
                "machine": f"{machine['device']} ({self.processes.count} process(es))",
                "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
                "hours": hours,
            }
            write_student(
                output,
                transformer=self.model.transformer,
                weights=weights,
                config=config,
                sampler=self.student_sampler,
                attention=self.attention,
                facts=facts,
                dtype=DTYPES[config.weights.saved_as] if config.weights.saved_as else self.base_dtype,
            )
        self.processes.wait()

    def _trackers(self, output: Path) -> Any:
        if not self.config.trackers:
            return None
        from accelerate import Accelerator

        accelerator = Accelerator(log_with=list(self.config.trackers), project_dir=str(output))
        accelerator.init_trackers(
            "blade-distill", config={key: str(value) for key, value in flat(self.config).items()}
        )
        return accelerator


def _student_preset(model: LoadedModel) -> BladeConfig:
    """Return the model's preset for students; if it has none, its other preset with the paper's sparsity."""
    if model.student_preset is not None:
        return model.student_preset
    return replace(model.preset, kind="student", sparsity=0.8, pooled_tokens="all", dense_steps=0, dense_layers=())


def _warn_of_distilled(model: str, transformer: nn.Module) -> None:
    if getattr(transformer.config, "guidance_embeds", False):
        logger.warning(
            f"{model} is guidance-distilled already: the guidance scale is an input, which stays the same for "
            "teacher and student."
        )
    words = [word for word in DISTILLED_WORDS if word in model.lower()]
    if words:
        logger.warning(
            f'`model` {model} seems to be distilled for few steps already ("{words[0]}" in its name). A teacher '
            "should be a many-step model: from a few-step model, a student inherits only the mistakes."
        )


def _check_trackers(names: Sequence[str]) -> None:
    """Raise a `ValueError` for trackers that Accelerate would ignore."""
    from accelerate.tracking import get_available_trackers

    available = [str(name) for name in get_available_trackers()]
    missing = [name for name in names if name not in available]
    if missing:
        listed = ", ".join(available) or "none"
        raise ValueError(f"`trackers` must be installed ones ({listed}), got {missing[0]}; the log is written anyway.")
