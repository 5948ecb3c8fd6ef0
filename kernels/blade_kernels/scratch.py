"""Reusable scratch memory: touching fresh pages costs as much as the computation itself."""

from __future__ import annotations

import math
import threading
from collections import defaultdict

import torch
from torch import Tensor

KEPT_BYTES = 2**20
"""Bytes per thread up to which a tensor is kept for later calls."""


class Scratch:
    """Named tensors of any shape, valid until the same name is requested again on the same thread.

    Small tensors are kept for later calls; large ones are freed with the scratch, to bound the process's memory.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """Create a scratch for tensors of one dtype on one device."""
        self._dtype, self._device = dtype, device
        self._large: dict[str, Tensor] = {}
        self._small = {} if torch.compiler.is_compiling() else _thread_tensors.tensors[dtype, device]

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return an uninitialised tensor of this shape; it invalidates the previous one of the same name."""
        if torch.compiler.is_compiling():  # the compiler plans memory itself
            return torch.empty(shape, dtype=self._dtype, device=self._device)
        size = math.prod(shape)
        is_small = size * self._dtype.itemsize <= KEPT_BYTES * torch.get_num_threads()
        tensors = self._small if is_small else self._large
        if name not in tensors or tensors[name].numel() < size:
            with torch.inference_mode(False):  # an inference tensor could not be written to outside inference mode
                tensors[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return tensors[name][:size].view(shape)


class _ThreadTensors(threading.local):
    """Small tensors of a thread, by dtype and device."""

    def __init__(self) -> None:
        self.tensors: defaultdict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = defaultdict(dict)


_thread_tensors = _ThreadTensors()
