"""Memory that one piece of work after another writes over: touching fresh pages costs as much as computing."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
            self._held[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return self._held[name][:size].view(shape)
