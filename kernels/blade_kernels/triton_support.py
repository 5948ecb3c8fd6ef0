"""Can Triton's kernels run here, and where?"""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from blade_kernels.compiler import constant_when_compiled
from blade_kernels.toolchain import missing_c_toolchain

OLDEST = (8, 0)
"""The least compute capability that the kernels are made for."""


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device and slowly: `TRITON_INTERPRET=1`, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache  # it is asked in every layer
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@constant_when_compiled  # it looks for a compiler
def missing_triton(device: torch.device | str) -> str | None:
    """Why no Triton kernel can run on a device; None if they can."""
    device = torch.device(device)
    if not _installed():
        return "Triton is not installed"
    if interpreted():
        return None
    if device.type != "cuda" or torch.version.hip:
        return "the Triton kernels run on NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return "the Triton kernels need compute capability {}.{}, got {}.{}".format(*OLDEST, *capability)
    missing = missing_c_toolchain()
    return missing and f"Triton's launcher has to be compiled, and {missing}"


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of a tensor the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
