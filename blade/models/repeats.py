"""Calls of a module on the meta device that repeat: each shape of input is run once, and its cost taken again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn


class Gauge(Protocol):
    """A cost that is followed while calls run on the meta device."""

    def begin(self) -> int:
        """Note that a call begins; return what `end` needs to know."""
        ...

    def end(self, began: int) -> int:
        """Return the cost of the call that began then."""
        ...

    def repeat(self, cost: int) -> None:
        """Add the cost of a call that is not run again."""
        ...


@contextmanager
def once_per_shape(module: nn.Module | None, gauge: Gauge) -> Iterator[None]:
    """Run a module once for each shape of input inside a `with` block, such as a decoder that gets equal tiles.

    Calls with other arguments than one tensor run as always: what they keep elsewhere may matter.

    Args:
        module: the module, on the meta device; None does nothing.
        gauge: what follows the cost.
    """
    if module is None:
        yield
        return
    forward, known = module.forward, dict[tuple[torch.Size, torch.dtype], tuple[torch.Size, torch.dtype, int]]()

    def run(*args: Any, **options: Any) -> Any:
        if options or len(args) != 1 or not isinstance(args[0], torch.Tensor):
            return forward(*args, **options)
        key = args[0].shape, args[0].dtype
        if key in known:
            shape, dtype, cost = known[key]
            gauge.repeat(cost)
            return args[0].new_empty(shape, dtype=dtype)
        began = gauge.begin()
        output = forward(args[0])
        if isinstance(output, torch.Tensor):
            known[key] = output.shape, output.dtype, gauge.end(began)
        return output

    module.forward = run  # until `del` uncovers the method
    try:
        yield
    finally:
        del module.forward
