"""Memory that one call after another writes over: on a CPU, touching fresh pages costs as much as computing."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_kept = threading.local()


class Scratch:
    """Named tensors of any shape, whose contents last until the name is asked for again."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """An empty scratch for tensors of one type on one device."""
        self._dtype, self._device = dtype, device
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape with any contents; what had this name before is lost."""
        size = math.prod(shape)
        if name not in self._held or self._held[name].numel() < size:
            with torch.inference_mode(False):  # so that it can be written to with and without
                self._held[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return self._held[name][:size].view(shape)


def scratch_for(dtype: torch.dtype, device: torch.device) -> Scratch:
    """The scratch of this thread: on a CPU the same in every call, and as large as the largest of them needed."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return Scratch(dtype, device)
    kept: dict[torch.dtype, Scratch] = _kept.__dict__
    return kept.setdefault(dtype, Scratch(dtype, device))
