"""Finding the step and the layer at which values stop being finite, with one look at the device a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from blade.families.registry import find_family
from blade.families.transformers import find_transformers


class NonFiniteError(FloatingPointError):
    """Latents or activations turned infinite or not-a-number."""


class _BlockWatch:
    """A forward hook that remembers on the device whether a block ever gave a non-finite value."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen = torch.zeros((), dtype=torch.bool)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        values = (output[0] if isinstance(output, tuple) else output).detach()
        self.seen = self.seen.to(values.device)  # known only now: offloaded weights are elsewhere
        self.seen.logical_or_(values.isfinite().all().logical_not())


class FiniteWatch:
    """Watches the blocks of a pipeline's transformers. Made by `watch_finite`."""

    def __init__(self, blocks: list[_BlockWatch]) -> None:
        """Read what these hooks remember, first block first."""
        self._blocks = blocks

    def check(self, step: int, latents: torch.Tensor | None = None) -> None:
        """Raise if anything was not finite up to now. This waits for the device.

        Args:
            step: number of the denoising step just taken, for the message.
            latents: the latents after it, looked at as well.

        Raises:
            NonFiniteError: naming the step, and the first block whose output was not finite.
        """
        flags = [block.seen for block in self._blocks]
        if latents is not None:
            flags.append(latents.isfinite().all().logical_not())
        device = flags[-1].device if flags else None
        bad = torch.stack([flag.to(device) for flag in flags]).tolist() if flags else []
        if not any(bad):
            return
        first = bad.index(True)
        where = (
            f"first in the output of {self._blocks[first].name}"
            if first < len(self._blocks)
            else "in the latents that the scheduler made; every layer's output was finite"
        )
        raise NonFiniteError(f"Non-finite values at step {step}, {where}.")

    def on_step_end(self, pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Check after every step: give this to a pipeline as `callback_on_step_end`."""
        self.check(step, inputs.get("latents"))
        return inputs


@contextmanager
def watch_finite(pipe_or_transformer: Any) -> Iterator[FiniteWatch]:
    """Watch the outputs of all main blocks inside a `with` block, BLADE applied or not.

    Args:
        pipe_or_transformer: a Diffusers pipeline or transformer of a family that BLADE knows.
    """
    watches, handles = [], []
    for name, transformer in find_transformers(pipe_or_transformer).items():
        for index, block in enumerate(find_family(transformer).blocks(transformer)):
            watch = _BlockWatch(f"layer {index} of `{name}`")
            watches.append(watch)
            handles.append(block.register_forward_hook(watch))
    try:
        yield FiniteWatch(watches)
    finally:
        for handle in handles:
            handle.remove()
