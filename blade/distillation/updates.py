"""The losses of one batch: a rollout of the student, then the loss of the fake score or of the generator.

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
    """Samples of an update."""

    samples: Sequence[int]
    """Indices in the whole batch of all processes, from 0."""
    conditions: Conditions
    """Conditions of their prompts."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Inputs of the trained steps: the ends of rollouts, or points of the teacher's trajectories."""

    noisy: torch.Tensor
    """Noisy samples, (B, ...) float32."""
    steps: Sequence[int]
    """Step of each sample."""
    end: torch.Tensor | None = None
    """(B, ...) float32, the point that the guided teacher reaches from there: after that step for ODE initialization,
    after all steps for imitation. None in a rollout."""


@dataclass(frozen=True, kw_only=True)
class NoisyPoint:
    """A point of the student's trajectory with added noise, and its origin."""

    clean: torch.Tensor
    """x0, the student's prediction, (B, ...) float32."""
    noisy: torch.Tensor
    """x_t, (B, ...) float32, without gradient."""
    times: Sequence[float]
    """Time t of each sample."""
    steps: Sequence[int]
    """Step of each sample."""
    levels: tuple[torch.Tensor, torch.Tensor]
    """Alpha and sigma at t, (B, 1, ...)."""
    weight: torch.Tensor
    """(B,), the importance of each sample."""


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Loss and diagnostics of the generator's update."""

    loss: torch.Tensor
    """The generator's loss."""
    difference: torch.Tensor
    """Mean |mu_teacher - mu_fake|."""
    fake_error: torch.Tensor
    """Mean squared error of the fake score on the student's samples."""
    teacher_error: torch.Tensor
    """Mean squared error of the teacher without guidance, which a fake score that keeps up stays below."""


class Updates:
    """The losses for one number of steps."""

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
        """Take everything that stays the same from update to update.

        Args:
            roles: the networks of the roles.
            trajectory: the student's trajectory.
            negative: conditions of the negative prompt; None: guidance is an input of the teacher.
            fake: options of the fake score's updates.
            generator: options of the student's updates.
            guidance_scale: guidance scale of the teacher.
            device: the device of all tensors.
            dtype: type of the networks' inputs.
            together: train the same step for all samples of an update.
            trajectory_number: index of this trajectory among the student's.
            first_step_number: index of its first step among the steps of all trajectories.
        """
        self.roles, self.trajectory, self.negative = roles, trajectory, negative
        self.fake, self.generator, self.guidance_scale = fake, generator, guidance_scale
        self.device, self.dtype, self.together = device, dtype, together
        self._trajectory_number, self._first_step_number = trajectory_number, first_step_number

    def steps(self, samples: Sequence[int], draws: Draws) -> list[int]:
        """Draw the step at which each sample is trained.

        Args:
            samples: indices in the whole batch of all processes.
            draws: random draws of the rollout.
        """
        return draws.steps(samples, self.trajectory.steps, together=self.together)

    def rollout(self, batch: Batch, draws: Draws, passes: int | None = None) -> Start:
        """Let the student follow the trajectory without gradient, each sample to the step at which it is trained.

        Args:
            batch: the samples.
            draws: random draws of the rollout.
            passes: number of passes to run, of which the last may be idle; None: as many as needed.
        """
        trajectory, shape = self.trajectory, batch.conditions.latent_shape
        steps = self.steps(batch.samples, draws)
        x = draws.noise(START, batch.samples, shape).to(self.device)
        for step in range(max(steps) if passes is None else passes):
            active = [index for index, last in enumerate(steps) if last > step]
            if not active:
                with torch.no_grad(), self.roles.acting(STUDENT, (step, trajectory.steps)):
                    self._estimate(STUDENT, batch.conditions.at([0]), x[:1], self._times([step]), [step])
                continue
            samples, conditions = [batch.samples[index] for index in active], batch.conditions.at(active)
            active_steps = [step] * len(active)
            with torch.no_grad(), self.roles.acting(STUDENT, (step, trajectory.steps)):
                clean, noise = self._estimate(STUDENT, conditions, x[active], self._times(active_steps), active_steps)
            if trajectory.sampler.config.noise_kept < 1:
                fresh = draws.noise(ROLLOUT, samples, shape, step).to(x)
                noise = renew_noise(noise, fresh, trajectory.sampler.config.noise_kept)
            x[active] = mix(clean, noise, *trajectory.levels([trajectory.next_time(step)] * len(active), clean))
        return Start(noisy=x, steps=steps)

    def noisy_point(self, batch: Batch, start: Start, draws: Draws) -> NoisyPoint:
        """Let the student take a step from the end of its rollout, and add noise to the result.

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
            next_levels = trajectory.levels([trajectory.next_time(step) for step in steps], noisy)
            levels = trajectory.levels(times, noisy)
            weight = noisy.new_ones(len(noisy))
            noisy = diffuse_further(mix(clean, noise, *next_levels), added, next_levels, levels)
            if self.fake.importance:
                weight = importance_weight(equivalent_noise(noise, added, next_levels, levels), added)
        return NoisyPoint(clean=clean, noisy=noisy, times=times, steps=steps, levels=levels, weight=weight)

    def fake_loss(self, batch: Batch, start: Start, draws: Draws) -> torch.Tensor:
        """Return the fake score's error on the student's samples.

        Args:
            batch: the samples.
            start: inputs of their steps.
            draws: random draws of this update.

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
        """Return the loss that moves the student toward the teacher.

        Args:
            batch: the samples.
            start: inputs of their steps.
            draws: random draws of this update.

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

    def teacher_trajectory(self, conditions: Conditions, noise: torch.Tensor, times: Sequence[float]) -> torch.Tensor:
        """Compute the guided teacher's trajectory from noise.

        Args:
            conditions: conditions of the prompts.
            noise: (B, ...), at the first time.
            times: descending times; between two of them the teacher takes `generator.substeps` steps.

        Returns:
            (B, times, ...) float32, the noise first.
        """
        trajectory, substeps, x, points = self.trajectory, self.generator.substeps, noise, [noise]
        with self.roles.acting(TEACHER):
            for high, low in itertools.pairwise(times):
                subtimes = [high + (low - high) * substep / substeps for substep in range(substeps + 1)]
                if trajectory.kind == "v_prediction":  # trained at integer times only
                    subtimes = [float(round(time)) for time in subtimes]
                for time, next_time in itertools.pairwise(subtimes):
                    sample_times, next_times = [time] * len(x), [next_time] * len(x)
                    _, clean = self._guided(conditions, x, sample_times, [0] * len(x))
                    alpha, sigma = trajectory.levels(sample_times, x)
                    x = mix(clean, (x - alpha * clean) / sigma, *trajectory.levels(next_times, x))
                points.append(x)
        return torch.stack(points, 1)

    def ode_loss(self, batch: Batch, start: Start, draws: Draws) -> torch.Tensor:
        """Return the error of a student's step, which the guided teacher takes in several steps.

        Args:
            batch: the samples.
            start: points of the teacher's trajectories, and the points that follow.
            draws: random draws of this update; not used.

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
        """Return the difference of the student's and the teacher's predictions on the teacher's noisy videos.

        The teacher predicts without guidance.

        Args:
            batch: the samples.
            start: the steps, and the teacher's videos.
            draws: random draws of this update.

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
        """Let a role act in an update, around its forward pass and its backward pass.

        BLADE needs the step for the draws of its probe only, so that any step will do for samples of several steps.
        Where the step matters, all samples are trained at the same one.
        """
        any_step = draws.integer(STEPS, DRAWN_STEPS), None
        return self.roles.acting(role, (start.steps[0], self.trajectory.steps) if self.together else any_step)

    def _guided(
        self, conditions: Conditions, x: torch.Tensor, times: Sequence[float], steps: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the teacher's clean estimates without and with guidance; see `_estimate`."""
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
        """Estimate the clean samples and the noise in noisy samples with a role: each float32."""
        integer = self.trajectory.kind == "v_prediction"
        sample_times = torch.tensor(list(times), dtype=torch.int64 if integer else torch.float32)
        number = self._trajectory_number
        numbers = [number] * len(steps)
        if role == FAKE and self.trajectory.intervals == "shared":
            numbers = [self._first_step_number + step for step in steps]
        inputs = conditions.inputs(x.to(self.dtype), sample_times)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            prediction = self.roles.predict(role, inputs, torch.tensor(numbers))
        return split_prediction(self.trajectory.kind, prediction, x, *self.trajectory.levels(times, x))
