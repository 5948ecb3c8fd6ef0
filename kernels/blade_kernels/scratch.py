"""Memory that one piece of work after another writes over: touching fresh pages costs as much as computing."""

from __future__ import annotations

import math
import threading
from collections import defaultdict

import torch
from torch import Tensor

KEPT_BYTES = 2**20
"""Of a tensor for each thread, up to which it outlasts the call that it was made for."""


class Scratch:
    """Named tensors of any shape, whose contents last until the name is asked for again on the same thread.

    Small ones stay for the calls that follow; large ones are given back, as they would add to a program's memory.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """A scratch for tensors of one type on one device."""
        self._dtype, self._device = dtype, device
        self._large: dict[str, Tensor] = {}
        self._small = {} if torch.compiler.is_compiling() else _kept.tensors[dtype, device]

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape with any contents; what had this name before is lost."""
        if torch.compiler.is_compiling():  # which plans memory itself
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        size = math.prod(shape)
        is_small = size * self._dtype.itemsize <= KEPT_BYTES * torch.get_num_threads()
        held = self._small if is_small else self._large
        if name not in held or held[name].numel() < size:
            with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside of it
                held[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return held[name][:size].view(shape)


class _Kept(threading.local):
    """The small tensors of a thread, by type and device."""

    def __init__(self) -> None:
        self.tensors: defaultdict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = defaultdict(dict)


_kept = _Kept()
