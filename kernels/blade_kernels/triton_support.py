"""Availability of Triton, and the device that its kernels launch on."""

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
"""Lowest compute capability that the kernels support."""


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels (`TRITON_INTERPRET=1`): slow, on any device, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache  # called in every layer
def triton_installed() -> bool:
    """Return whether Triton is installed, also by the package for Windows."""
    return importlib.util.find_spec("triton") is not None


@constant_when_compiled  # looks for a compiler
def missing_triton(device: torch.device | str) -> str | None:
    """Return why Triton kernels cannot run on a device, or None if they can."""
    device = torch.device(device)
    if not triton_installed():
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
    """Make the tensor's device the current one, which is where Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
