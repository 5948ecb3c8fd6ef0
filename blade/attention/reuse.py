"""Choices of blocks that are kept for several denoising steps.

A choice belongs to the tensor of the condition (the embedded prompt) that a pass is given, which a pipeline makes once
a run and hands to the transformer at every step: the passes of guidance, batches of other prompts and other runs have
another one. Where a pipeline makes a new tensor at every step, blocks are chosen at every step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from blade_kernels.block_mask import BlockMask

Kept = Callable[[Callable[[], BlockMask]], BlockMask]
"""Returns the mask that a layer kept of an earlier step, or calls for a new one and keeps it."""


@dataclass(eq=False)
class PassChoices:
    """Choices of blocks of all layers in the passes of one condition."""

    condition: Callable[[], torch.Tensor | None]
    """Weak reference to the condition."""
    schedule: Callable[[], torch.Tensor | None]
    """Weak reference to the scheduler's timesteps, which every run makes anew."""
    plan: object
    """The plan that they were made with."""
    batch: int
    """Latents in a pass."""
    first_step: int
    """Step at which they were made."""
    masks: dict[int, tuple[torch.Tensor, tuple[int, int], int]] = field(default_factory=dict)
    """By layer, bit map, block size, and the capacity of the lists, which take several times as much memory."""

    def is_of(self, condition: torch.Tensor) -> bool:
        """Return whether they are of this condition, or of one that is gone."""
        own = self.condition()
        return own is None or own is condition

    def mask(self, layer: int, choose: Callable[[], BlockMask]) -> BlockMask:
        """Return a layer's mask: that of an earlier step, else a new one, which is kept."""
        if layer in self.masks:
            return BlockMask.from_dense(*self.masks[layer])
        mask = choose()
        self.masks[layer] = mask.keep, mask.block_size, mask.capacity
        return mask


class KeptChoices:
    """Choices of blocks of one transformer, each for a number of steps."""

    def __init__(self, steps: int) -> None:
        """Keep none yet.

        Args:
            steps: see `AdaptiveConfig.reselect_every`.
        """
        self._steps = steps
        self._choices: list[PassChoices] = []

    def begin_step(self, step: int) -> None:
        """Forget what is not for this step: choices whose steps have passed, and those of a later step.

        So is one of an earlier step that is empty, since a cache has skipped every layer: its steps have not begun.
        """
        self._choices = [
            choices
            for choices in self._choices
            if choices.first_step <= step < choices.first_step + self._steps
            and (choices.masks or choices.first_step == step)
        ]

    def of_pass(
        self,
        condition: torch.Tensor | None,
        schedule: torch.Tensor | None,
        plan: object,
        *,
        batch: int,
        step: int,
    ) -> PassChoices | None:
        """Return the choices of a pass, empty where blocks have to be chosen anew; None if they are not kept.

        Args:
            condition: the condition that the pass is given.
            schedule: the scheduler's timesteps.
            plan: the plan in force.
            batch: latents in the pass.
            step: the denoising step.
        """
        if self._steps == 1 or condition is None:
            return None
        for choices in self._choices:
            same_run = choices.condition() is condition and choices.schedule() is schedule
            if same_run and choices.plan is plan and choices.batch == batch and choices.first_step < step:
                return choices
        # a second pass with one condition in the first step replaces the choice
        self._choices = [choices for choices in self._choices if not choices.is_of(condition)]
        kept = PassChoices(weakref.ref(condition), _reference(schedule), plan, batch, step)
        self._choices.append(kept)
        return kept

    def clear(self) -> None:
        """Forget all."""
        self._choices = []


def _reference(tensor: torch.Tensor | None) -> Callable[[], torch.Tensor | None]:
    return (lambda: None) if tensor is None else weakref.ref(tensor)
