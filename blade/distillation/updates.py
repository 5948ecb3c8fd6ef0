"""The losses of one batch: rollout of the student, then the fake score's or the generator's.

Source: TDM, arXiv 2503.06674, and BLADE, arXiv 2508.10774.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from blade.attention.adaptive import DRAWN_STEPS
from blade.distillation.conditioning import Conditions
from blade.distillation.config import FakeConfig, GeneratorConfig
from blade.distillation.draws import FRESH_NOISE, NOISE, ROLLOUT, SAMPLE, START, STEPS, Draws
from blade.distillation.losses import (
    clean_between,
    denoising_loss,
    diffuse_further,
    equivalent_noise,
    error_weight,
    generator_loss,
    guide,
    importance_weight,
)
from blade.distillation.roles import FAKE, STUDENT, TEACHER, Roles
from blade.distillation.trajectory import Trajectory
from blade.students.prediction import mix, renew_noise, split_prediction


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some samples of an update."""

    samples: Sequence[int]
    """Places in the whole batch of all processes, from 0."""
    conditions: Conditions
    """Of their prompts."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a rollout has ended, or the teacher has come to: the inputs of the steps that are trained."""

    noisy: torch.Tensor
    """(B, ...) float32."""
    steps: Sequence[int]
    """Step of each sample."""
    end: torch.Tensor | None = None
    """(B, ...) float32, where the guided teacher goes from there: in that step for ODE initialization, in all of them
    for imitation. None where it has not been asked."""


@dataclass(frozen=True, kw_only=True)
class NoisyPoint:
    """A point of the student's trajectory with noise added to it, and what it was made of."""

    clean: torch.Tensor
    """x0, the student's prediction, (B, ...) float32."""
    noisy: torch.Tensor
    """x_t, without gradient."""
    times: Sequence[float]
    """t of each sample."""
    steps: Sequence[int]
    """Step of each sample."""
    levels: tuple[torch.Tensor, torch.Tensor]
    """Alpha and sigma at t, (B, 1, ...)."""
    weight: torch.Tensor
    """(B,), the importance of each sample."""


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """What the generator's update has found out."""

    loss: torch.Tensor
    difference: torch.Tensor
    """Mean |mu_teacher - mu_fake|."""
    fake_error: torch.Tensor
    """Mean squared error of the fake score for what the student made."""
    teacher_error: torch.Tensor
    """That of the teacher without guidance, which a fake score that keeps up is below."""


class Updates:
    """The losses, for one number of steps."""

    def __init__(
        self,
        roles: Roles,
        trajectory: Trajectory,
        negative: Conditions | None,
        fake: FakeConfig,
        generator: GeneratorConfig,
        *,
        guidance_scale: float,
        device: torch.device,
        dtype: torch.dtype,
        together: bool = False,
        trajectory_number: int = 0,
        first_step_number: int = 0,
    ) -> None:
        """Take what stays the same from update to update.

        Args:
            roles: who plays which role.
            trajectory: the student's.
            negative: what guidance leads away from; None: the teacher is guided by itself.
            fake: how the fake score is trained.
            generator: how the student is.
            guidance_scale: of the teacher.
            device: where to compute.
            dtype: what in.
            together: all samples of an update take the same step.
            trajectory_number: number of this trajectory among those of the student.
            first_step_number: number of its first step among the steps of all of them.
        """
        self.roles, self.trajectory, self.negative = roles, trajectory, negative
        self.fake, self.generator, self.guidance_scale = fake, generator, guidance_scale
        self.device, self.dtype, self.together = device, dtype, together
        self._trajectory_number, self._first_step_number = trajectory_number, first_step_number

    def steps(self, samples: Sequence[int], draws: Draws) -> list[int]:
        """The step that each sample is trained at.

        Args:
            samples: places in the whole batch of all processes.
            draws: chance of the rollout.
        """
        return draws.steps(samples, self.trajectory.steps, together=self.together)

    def rollout(self, batch: Batch, draws: Draws, passes: int | None = None) -> Start:
        """Let the student run down the trajectory, without gradient, each sample to the step that it is trained at.

        Args:
            batch: the samples.
            draws: chance of this update.
            passes: how many passes to run, the last ones for nothing if need be; None: no more than it takes.
        """
        trajectory, shape = self.trajectory, batch.conditions.latent_shape
        steps = self.steps(batch.samples, draws)
        x = draws.noise(START, batch.samples, shape).to(self.device)
        for step in range(max(steps) if passes is None else passes):
            going = [place for place, own in enumerate(steps) if own > step]
            if not going:
                with torch.no_grad(), self.roles.acting(STUDENT, (step, trajectory.steps)):
                    self._estimate(STUDENT, batch.conditions.at([0]), x[:1], self._times([step]), [step])
                continue
            samples, conditions = [batch.samples[place] for place in going], batch.conditions.at(going)
            now = [step] * len(going)
            with torch.no_grad(), self.roles.acting(STUDENT, (step, trajectory.steps)):
                clean, noise = self._estimate(STUDENT, conditions, x[going], self._times(now), now)
            if trajectory.sampler.config.noise_kept < 1:
                fresh = draws.noise(ROLLOUT, samples, shape, step).to(x)
                noise = renew_noise(noise, fresh, trajectory.sampler.config.noise_kept)
            x[going] = mix(clean, noise, *trajectory.levels([trajectory.next_time(step)] * len(going), clean))
        return Start(noisy=x, steps=steps)

    def noisy_point(self, batch: Batch, start: Start, draws: Draws) -> NoisyPoint:
        """Let the student take a step from where its rollout has ended, and add noise to where it leads.

        The student must be acting; gradients flow into `clean` where they are enabled.
        """
        trajectory, samples, shape = self.trajectory, batch.samples, batch.conditions.latent_shape
        noisy, steps = start.noisy, start.steps
        clean, noise = self._estimate(STUDENT, batch.conditions, noisy, self._times(steps), steps)
        shares = draws.shares(SAMPLE, samples)
        times = [trajectory.draw_time(step, share) for step, share in zip(steps, shares)]
        with torch.no_grad():
            if trajectory.sampler.config.noise_kept < 1:
                fresh = draws.noise(FRESH_NOISE, samples, shape).to(noisy)
                noise = renew_noise(noise, fresh, trajectory.sampler.config.noise_kept)
            added = draws.noise(NOISE, samples, shape).to(noisy)
            middle = trajectory.levels([trajectory.next_time(step) for step in steps], noisy)
            levels = trajectory.levels(times, noisy)
            weight = noisy.new_ones(len(noisy))
            noisy = diffuse_further(mix(clean, noise, *middle), added, middle, levels)
            if self.fake.importance:
                weight = importance_weight(equivalent_noise(noise, added, middle, levels), added)
        return NoisyPoint(clean=clean, noisy=noisy, times=times, steps=steps, levels=levels, weight=weight)

    def fake_loss(self, batch: Batch, start: Start, draws: Draws) -> torch.Tensor:
        """How far the fake score is from what the student makes.

        Args:
            batch: the samples.
            start: of their steps.
            draws: chance of this update.

        Returns:
            A scalar with gradient for the fake score, which must be acting around this and the backward pass.
        """
        with torch.no_grad(), self.acting(STUDENT, start, draws):
            point = self.noisy_point(batch, start, draws)
        weight = error_weight(self.fake.weighting, *point.levels)
        estimate, _ = self._estimate(FAKE, batch.conditions, point.noisy, point.times, point.steps)
        loss = denoising_loss(estimate, point.clean, weight * point.weight)
        if self.fake.regularization:
            with torch.no_grad(), self.roles.acting(TEACHER):
                teacher, _ = self._estimate(TEACHER, batch.conditions, point.noisy, point.times, point.steps)
            loss = loss + self.fake.regularization * denoising_loss(estimate, teacher, weight)
        return loss

    def generator_loss(self, batch: Batch, start: Start, draws: Draws) -> Estimates:
        """What leads the student toward the teacher.

        Args:
            batch: the samples.
            start: of their steps.
            draws: chance of this update.

        Returns:
            A loss with gradient for the student, which must be acting around this and the backward pass.
        """
        point = self.noisy_point(batch, start, draws)
        arguments = (point.noisy, point.times, point.steps)
        with torch.no_grad():
            with self.roles.acting(TEACHER):
                conditional, teacher = self._guided(batch.conditions, *arguments)
            with self.acting(FAKE, start, draws):
                fake, _ = self._estimate(FAKE, batch.conditions, *arguments)
            clean = point.clean.detach()
            weight = error_weight(self.fake.weighting, *point.levels)
            errors = [denoising_loss(estimate, clean, weight) for estimate in (fake, conditional)]
        config = self.generator
        loss = generator_loss(
            point.clean,
            teacher,
            fake,
            huber=config.huber if config.loss == "huber" else None,
            normalize=config.normalize,
            cap=config.normalize_cap,
        )
        difference = (teacher - fake).abs().mean()
        return Estimates(loss=loss, difference=difference, fake_error=errors[0], teacher_error=errors[1])

    def teacher_way(self, conditions: Conditions, noise: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
        """Where the guided teacher goes from noise.

        Args:
            conditions: of the prompts.
            noise: (B, ...), at the first time.
            times: falling; between two of them the teacher takes `generator.substeps` steps.

        Returns:
            (B, times, ...) float32, the noise first.
        """
        trajectory, substeps, x, points = self.trajectory, self.generator.substeps, noise, [noise]
        with self.roles.acting(TEACHER):
            for high, low in itertools.pairwise(times):
                way = [high + (low - high) * substep / substeps for substep in range(substeps + 1)]
                if trajectory.kind == "v_prediction":  # which knows whole times only
                    way = [float(round(time)) for time in way]
                for now, then in itertools.pairwise(way):
                    nows, thens = [now] * len(x), [then] * len(x)
                    _, clean = self._guided(conditions, x, nows, [0] * len(x))
                    alpha, sigma = trajectory.levels(nows, x)
                    x = mix(clean, (x - alpha * clean) / sigma, *trajectory.levels(thens, x))
                points.append(x)
        return torch.stack(points, 1)

    def ode_loss(self, batch: Batch, start: Start, draws: Draws) -> torch.Tensor:
        """How far a step of the student leads from where the guided teacher goes in several.

        Args:
            batch: the samples.
            start: of their steps, on the teacher's way, and where it goes.
            draws: chance of this update.

        Returns:
            A scalar with gradient for the student, which must be acting around this and the backward pass.
        """
        assert start.end is not None
        trajectory, times = self.trajectory, self._times(start.steps)
        levels = trajectory.levels(times, start.noisy)
        ends = trajectory.levels([trajectory.next_time(step) for step in start.steps], start.noisy)
        target = clean_between(start.noisy, start.end, levels, ends)
        clean, _ = self._estimate(STUDENT, batch.conditions, start.noisy, times, start.steps)
        return denoising_loss(clean, target, error_weight("velocity", *levels))

    def imitation_loss(self, batch: Batch, start: Start, draws: Draws) -> torch.Tensor:
        """How far the student's prediction is from the teacher's without guidance, for noisy videos of the teacher's.

        Args:
            batch: the samples.
            start: their steps, and the teacher's videos.
            draws: chance of this update.

        Returns:
            A scalar with gradient for the student, which must be acting around this and the backward pass.
        """
        assert start.end is not None
        shares = draws.shares(SAMPLE, batch.samples)
        times = [self.trajectory.draw_time(step, share) for step, share in zip(start.steps, shares)]
        levels = self.trajectory.levels(times, start.end)
        added = draws.noise(NOISE, batch.samples, batch.conditions.latent_shape).to(start.end)
        arguments = (batch.conditions, mix(start.end, added, *levels), times, start.steps)
        with torch.no_grad(), self.roles.acting(TEACHER):
            teacher, _ = self._estimate(TEACHER, *arguments)
        student, _ = self._estimate(STUDENT, *arguments)
        return denoising_loss(student, teacher, error_weight("velocity", *levels))

    def acting(self, role: str, start: Start, draws: Draws) -> AbstractContextManager[Any]:
        """Let a role act in an update, around its forward and its backward pass.

        Samples are at several steps at once, and BLADE takes the step for nothing but the draws of its probe, so that
        it is told any; unless it matters, and all samples take the same.
        """
        any_step = draws.integer(STEPS, DRAWN_STEPS), None
        return self.roles.acting(role, (start.steps[0], self.trajectory.steps) if self.together else any_step)

    def _guided(
        self, conditions: Conditions, x: torch.Tensor, times: Sequence[float], steps: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean samples that the teacher sees, without guidance and with it; see `_estimate`."""
        conditional, _ = self._estimate(TEACHER, conditions, x, times, steps)
        if self.negative is None or self.guidance_scale == 1:
            return conditional, conditional
        unconditional, _ = self._estimate(TEACHER, self.negative, x, times, steps)
        return conditional, guide(conditional, unconditional, self.guidance_scale)

    def _times(self, steps: Sequence[int]) -> list[float]:
        return [self.trajectory.times[step] for step in steps]

    def _estimate(
        self, role: str, conditions: Conditions, x: torch.Tensor, times: Sequence[float], steps: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean sample and noise that a role sees in noisy samples, float32."""
        whole = self.trajectory.kind == "v_prediction"
        asked = torch.tensor(list(times), dtype=torch.int64 if whole else torch.float32)
        number = self._trajectory_number
        numbers = [number] * len(steps)
        if role == FAKE and self.trajectory.intervals == "shared":
            numbers = [self._first_step_number + step for step in steps]
        inputs = conditions.inputs(x.to(self.dtype), asked)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            prediction = self.roles.predict(role, inputs, torch.tensor(numbers))
        return split_prediction(self.trajectory.kind, prediction, x, *self.trajectory.levels(times, x))
