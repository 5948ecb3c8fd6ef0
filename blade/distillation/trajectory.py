"""The times at which a student is trained and sampled.

A trajectory of K steps follows a descending grid of times g_1 > ... > g_K. The prediction at g_i leads to the next
time of the grid, m_i = g_(i+1), or 0 after the last: the trajectory's point x_m. Training uses noisier points x_t,
with t from an interval that begins at m_i, made by adding noise to x_m.

Source: TDM, arXiv 2503.06674, and BLADE, arXiv 2508.10774.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blade.common.checks import check_choice
from blade.students.scheduler import FewStepScheduler

INTERVALS = ("separate", "shared")
"""Kinds of intervals: up to the step's own time, so that a time determines its step, or up to the highest time for all
steps."""

SMALLEST = 0.999
"""Share of the noise, before the shift, at which the sampler begins."""


def flow_times(steps: int, shift: float) -> tuple[float, ...]:
    """Return the times of a flow-matching sampler: 1000 s u / (1 + (s - 1) u) at evenly spaced, descending u.

    They equal those of Diffusers' DPM-Solver scheduler with `use_flow_sigmas`, which begins at u = 0.999, so that it
    can sample a student too.

    Args:
        steps: number of steps.
        shift: the shift s toward high noise; 1 is none.
    """
    shares = [SMALLEST * step / steps for step in range(steps, 0, -1)]
    return tuple(1000 * shift * share / (1 + (shift - 1) * share) for share in shares)


def trailing_times(steps: int, train_steps: int = 1000) -> tuple[float, ...]:
    """Return the integer times of a sampler with trailing spacing: 999, 874, ... for 8 of 1000.

    They equal those of Diffusers' CogVideoX schedulers with `timestep_spacing="trailing"`.

    Args:
        steps: number of steps.
        train_steps: number of times that the model was trained at.
    """
    return tuple(round(train_steps - train_steps * step / steps) - 1.0 for step in range(steps))


def make_sampler(
    scheduler: Any,
    steps: Sequence[int],
    *,
    flow_shift: float | None = None,
    times: Sequence[Sequence[float]] | None = None,
    noise_kept: float = 1.0,
) -> FewStepScheduler:
    """Make the sampler with which a student is trained, used and saved.

    Args:
        scheduler: the model's scheduler.
        steps: the student's numbers of steps.
        flow_shift: shift of a flow-matching model's times; None takes the scheduler's own.
        times: explicit grids of times, one for each of `steps`, instead of the usual ones.
        noise_kept: see `FewStepScheduler`.

    Raises:
        ValueError: if the model predicts neither a flow nor v, or the values contradict each other.
    """
    if not steps or len(set(steps)) < len(steps) or min(steps) < 1:
        raise ValueError(f"`steps` must be one or several different numbers of at least 1, got {list(steps)}.")
    if times is not None:
        if flow_shift is not None:
            raise ValueError("`flow_shift` must not be given with `times`, which it would change.")
        if [len(grid) for grid in times] != list(steps):
            raise ValueError(
                f"`times` must hold one grid for each of `steps` {list(steps)}, got {[list(grid) for grid in times]}."
            )
    grids = _usual_times(scheduler, steps, flow_shift) if times is None else times
    sampler: FewStepScheduler = FewStepScheduler.like(scheduler, grids, noise_kept=noise_kept)
    return sampler


def _usual_times(scheduler: Any, steps: Sequence[int], flow_shift: float | None) -> list[tuple[float, ...]]:
    """Return the model's usual grids, one for each number of steps."""
    config = FewStepScheduler.like(scheduler, [[1.0]]).config  # for the type of prediction
    if config.prediction_type == "v_prediction":
        if flow_shift is not None:
            raise ValueError(f"`flow_shift` must not be given: a {type(scheduler).__name__} is not for flow matching.")
        return [trailing_times(count, config.num_train_timesteps) for count in steps]
    own_shift = scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0))
    return [flow_times(count, own_shift if flow_shift is None else flow_shift) for count in steps]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """The times of one number of steps, and the intervals of training."""

    sampler: FewStepScheduler
    """The sampler, whose times and noise schedule are used."""
    steps: int
    """Number of steps K, for which the sampler has a grid."""
    intervals: str = "separate"
    """One of `INTERVALS`."""
    lowest_time: float = 20.0
    """Lowest time in training; below it, hardly any noise is left. Source: TDM's demonstration."""
    highest_time: float = 980.0
    """Highest time in training; above it, hardly any signal is left. Source: BLADE's release."""

    def __post_init__(self) -> None:
        check_choice("intervals", self.intervals, INTERVALS)
        if not 0 < self.lowest_time < self.highest_time <= self.sampler.config.num_train_timesteps:
            raise ValueError(
                f"`lowest_time` must be above 0 and below `highest_time`, got {self.lowest_time} and "
                f"{self.highest_time}."
            )
        for step in range(self.steps):
            low, high = self.interval(step)
            if not low < high:
                raise ValueError(
                    f"`lowest_time` and `highest_time` leave nothing to train step {step} at, whose interval ends "
                    f"at {low:g} and {high:g}; the times are {list(self.times)}."
                )

    @property
    def kind(self) -> str:
        """The type of the model's prediction."""
        return str(self.sampler.config.prediction_type)

    @property
    def times(self) -> tuple[float, ...]:
        """The times g_i, descending."""
        return tuple(next(grid for grid in self.sampler.config.grids if len(grid) == self.steps))

    def next_time(self, step: int) -> float:
        """Return the time m_i to which a step leads; 0 after the last."""
        return self.times[step + 1] if step + 1 < self.steps else 0.0

    def interval(self, step: int) -> tuple[float, float]:
        """Return the lowest and the highest time at which a step is trained."""
        top = self.times[step] if self.intervals == "separate" else self.highest_time
        return max(self.next_time(step), self.lowest_time), min(top, self.highest_time)

    def draw_time(self, step: int, share: float) -> float:
        """Return the time at a share, in [0, 1), of a step's interval; an integer for a v-prediction model."""
        low, high = self.interval(step)
        time = low + share * (high - low)
        return float(math.floor(time)) if self.kind == "v_prediction" else time

    def levels(self, times: Sequence[float], like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return alpha and sigma at a time for each sample; 1 and 0 at time 0.

        Args:
            times: B times.
            like: (B, ...) samples.

        Returns:
            Each (B, 1, ...), float32, on the samples' device.
        """
        sample_times = torch.tensor(list(times))
        alpha, sigma = self.sampler.levels(sample_times, like.ndim)
        clean = (sample_times == 0).view_as(alpha)
        alpha, sigma = alpha.masked_fill(clean, 1.0), sigma.masked_fill(clean, 0.0)
        return alpha.to(like.device), sigma.to(like.device)
