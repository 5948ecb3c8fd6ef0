"""The machine and the versions of packages that a result was measured with, as plain JSON values."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

GIB = 2**30
"""Bytes in a gibibyte."""


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the operating system, the name of the device and PyTorch's number of threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"system": f"{platform.system()} {platform.machine()}", "device": name, "threads": torch.get_num_threads()}


def describe_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Return the versions of Python and of distributions; None for one that is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that was allocated on a CUDA device so far; of the CPU, that the whole process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    try:
        import resource
    except ImportError:  # Windows
        peak: int = psutil.Process().memory_info().peak_wset
        return peak / GIB
    unit = 1 if platform.system() == "Darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def _processor() -> str:
    """Return the processor's name, which Python itself does not know on Linux."""
    try:
        listing = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        listing = ""
    names = [line.partition(":")[2].strip() for line in listing.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
