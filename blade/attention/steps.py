"""The denoising step of a forward pass, found without waiting for the device where that is possible."""

from __future__ import annotations

import weakref
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
    guidance runs the transformer twice) so does the step; a lower one is the next step, a higher one a new run.
    """

    def __init__(self, pipe: Any = None) -> None:
        """Make a resolver.

        Args:
            pipe: the pipeline whose scheduler drives the transformer, if there is one. It is not kept alive.
        """
        self.context = ContextRecorder()
        self.fixed: tuple[int, int | None] | None = None
        """Answer of `resolve` whatever else there is, set by a caller that runs the transformer by itself."""
        self._pipe = weakref.ref(pipe) if pipe is not None else None
        self._step = 0
        self._timestep: float | None = None

    def resolve(self, timestep: torch.Tensor) -> tuple[int, int | None]:
        """Return the step of this forward pass, from 0, and the number of steps of the run, None if unknown.

        Args:
            timestep: the transformer's timesteps, of any shape; only the largest counts.
        """
        if self.fixed is not None:
            return self.fixed
        scheduler_step, scheduler_total = self._from_scheduler()
        step = getattr(self.context.latest, "step_index", None)
        if step is not None:
            total = getattr(self.context.latest, "num_inference_steps", None)
            return step, total if total is not None else scheduler_total
        if scheduler_step is not None:
            return scheduler_step, scheduler_total
        return self._from_timestep(timestep), scheduler_total

    def reset(self) -> None:
        """Start over: the next forward pass is the first of a run."""
        self.context.reset()
        self._timestep = None

    def _from_scheduler(self) -> tuple[int | None, int | None]:
        pipe = self._pipe() if self._pipe is not None else None
        scheduler: Any = getattr(pipe, "scheduler", None)
        if getattr(scheduler, "num_inference_steps", None) is None:
            return None, None  # not in use: the transformer is called by itself
        total = len(scheduler.timesteps)
        if not hasattr(scheduler, "step_index"):
            return None, total  # CogVideoX's schedulers do not count
        step = scheduler.step_index
        if step is None:
            # Known from the first `scheduler.step` on; before it, the run stands at its beginning.
            step = getattr(scheduler, "begin_index", None) or 0
        # A finished run leaves the scheduler past its end: then something else calls the transformer.
        return (step, total) if step < total else (None, None)

    def _from_timestep(self, timestep: torch.Tensor) -> int:
        value = float(timestep.max())
        if self._timestep is None or value > self._timestep:
            self._step = 0
        elif value < self._timestep:
            self._step += 1
        self._timestep = value
        return self._step
