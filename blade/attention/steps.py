"""The denoising step of a forward pass, found without waiting for the device where that is possible.

A step is numbered by its place in the scheduler's whole schedule, and so by its noise, also in a run that begins
later: video to video with a strength below 1 leaves the first steps out, and begins with step 4 of 8, say.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, StateManager

from blade.common.turns import Turn

SHARED_TRANSFORMER = (
    "Another thread is running this transformer, on which BLADE keeps the step and the token order of one run. Give "
    "each thread a pipeline with a transformer of its own, or let them take turns: a `threading.Lock` around the "
    "pipeline's call."
)
"""Error of two threads that run a transformer at the same time."""

ASSUMED_STEPS = 50
"""Length of a run whose length is nowhere to be read (Diffusers' default for Wan)."""

ROUNDING = 2**-8
"""Relative error of a timestep that a pipeline has cast to bfloat16."""


class ContextRecorder(StateManager):  # type: ignore[misc]  # Diffusers has no types
    """Listens to `transformer.cache_context(...)`, in which newer pipelines name the step of every forward pass.

    Diffusers hands the context to each `StateManager` that an attribute of a stateful hook holds; before version 0.37
    it is only a name.
    """

    def __init__(self) -> None:
        super().__init__(BaseState)
        self.latest: Any = None
        self._turn = Turn(SHARED_TRANSFORMER)

    def set_context(self, context: Any) -> None:
        """Remember the context, or None after its end.

        Raises:
            RuntimeError: if another thread is in a context.
        """
        if context is not None:
            self._turn.take()
        elif not self._turn.leave():
            return
        super().set_context(context)
        self.latest = context

    def reset(self, *args: Any, **kwargs: Any) -> None:
        """Forget the context."""
        super().reset(*args, **kwargs)
        self.latest = None


class StepResolver:
    """Resolves the step of each forward pass: from the cache context, else the scheduler, else the timestep.

    Only the last way looks at a value on the device, once a forward pass: while the timestep stays (classifier-free
    guidance runs the transformer twice) so does the step; a lower one is the next step, a higher one a new run (or
    the other way round, where timesteps rise). A run that leaves steps out, without telling the scheduler, is looked
    at before its first step.
    """

    def __init__(self, pipe: Any = None, *, rising: bool = False) -> None:
        """Make a resolver.

        Args:
            pipe: the pipeline whose scheduler drives the transformer, if there is one. It is not kept alive.
            rising: whether timesteps rise from step to step, as the noise falls.
        """
        self.context = ContextRecorder()
        self.fixed: tuple[int, int | None] | None = None
        """Answer of `resolve` whatever else there is, set by a caller that runs the transformer by itself."""
        self._pipe: Callable[[], Any] = weakref.ref(pipe) if pipe is not None else lambda: None
        self._step = 0
        self._noise: float | None = None
        self._rising = rising

    def resolve(self, timestep: torch.Tensor, *, counts_itself: bool = True) -> tuple[int, int | None]:
        """Return the step of this forward pass, from 0, and the number of steps of the schedule, None if unknown.

        Args:
            timestep: the timesteps of the video that is made, of any shape; only the largest counts, or the smallest
                where they rise.
            counts_itself: False if the pipeline steps copies of its scheduler, so that only the timestep tells.
        """
        if self.fixed is not None:
            return self.fixed
        if not counts_itself and (scheduler := self._scheduler()) is not None:
            return self._nearest_step(timestep), len(scheduler.timesteps)
        scheduler_step, scheduler_total = self._from_scheduler(timestep)
        step = getattr(self.context.latest, "step_index", None)
        if step is not None:
            total = getattr(self.context.latest, "num_inference_steps", None)
            return step, total if total is not None else scheduler_total
        if scheduler_step is not None:
            return scheduler_step, scheduler_total
        return self._from_timestep(timestep, scheduler_total is not None), scheduler_total

    def schedule(self) -> torch.Tensor | None:
        """Return the scheduler's timesteps, a tensor that every run makes anew; None if there is none."""
        timesteps = getattr(self._scheduler(), "timesteps", None)
        return timesteps if isinstance(timesteps, torch.Tensor) else None

    def reset(self) -> None:
        """Start over: the next forward pass is the first of a run."""
        self.context.reset()
        self._noise = None

    def _from_scheduler(self, timestep: torch.Tensor) -> tuple[int | None, int | None]:
        scheduler = self._scheduler()
        if scheduler is None:
            return None, None
        total = len(scheduler.timesteps)
        if not hasattr(scheduler, "step_index"):
            return None, total  # CogVideoX's schedulers do not count
        step = scheduler.step_index
        if step is None:  # known from the first `scheduler.step` on
            step = self._first_step(timestep)
        # A finished run leaves the scheduler past its end: then something else calls the transformer.
        return (step, total) if step < total else (None, None)

    def _from_timestep(self, timestep: torch.Tensor, is_scheduled: bool) -> int:
        noise = float((-timestep if self._rising else timestep).max())
        if self._noise is None or noise > self._noise:
            self._step = self._first_step(timestep) if is_scheduled else 0
        elif noise < self._noise:
            self._step += 1
        self._noise = noise
        return self._step

    def _scheduler(self) -> Any:
        """The scheduler that drives the transformer; None if there is none, or it is not in use."""
        scheduler: Any = getattr(self._pipe(), "scheduler", None)
        return scheduler if getattr(scheduler, "num_inference_steps", None) is not None else None

    def _first_step(self, timestep: torch.Tensor) -> int:
        """The place in the schedule of a run's first step."""
        scheduler = self._scheduler()
        if (begin := getattr(scheduler, "begin_index", None)) is not None:
            return int(begin)
        if getattr(self._pipe(), "num_timesteps", None) == len(scheduler.timesteps):
            return 0  # the pipeline's loop takes all
        return self._nearest_step(timestep)

    def _nearest_step(self, timestep: torch.Tensor) -> int:
        """The place in the schedule of the timestep nearest to the noisiest; 0 if none is near."""
        times = self._scheduler().timesteps
        value = float(timestep.min() if self._rising else timestep.max())
        differences = (times.float() - value).abs()
        place = int(differences.argmin())
        # some pipelines tell the transformer another number than the scheduler's
        return place if float(differences[place]) <= ROUNDING * value else 0
