"""Launch configurations of the Triton kernels (tiles, warps, pipeline stages) by architecture and size.

The shipped table was chosen from the compiled kernels (`blade_kernels.cubin`) and, for blocks of 64 and 128 on sm_90,
mostly from timings on an H200. `tuning` measures the configurations of a given GPU. Nothing is timed while a user's
program runs.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kernel = Literal["forward", "query_gradient", "key_gradient"]
KERNELS: tuple[Kernel, ...] = ("forward", "query_gradient", "key_gradient")
HEAD_SIZES = (64, 128)
BLOCK_SIZES = (16, 32, 64, 128)
SHARED_MEMORY = {"80": 163, "89": 99, "90": 227, "100": 227, "120": 99}
"""Shared memory available to a program in KiB, by architecture."""
TABLE = Path(__file__).with_name("launch_table.json")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Launch configuration of one kernel."""

    block_m: int
    """Queries in a tile; divides the query block."""
    block_n: int
    """Keys in a tile; divides the key block."""
    num_warps: int
    num_stages: int
    """Iterations that loads are issued ahead."""
    tma: bool = False
    """Load through tensor descriptors if the tensors' strides allow it."""


def architecture(capability: tuple[int, int]) -> str:
    """Return the table's architecture for a device: its own, or one with no more shared memory.

    Args:
        capability: compute capability of the device, such as (9, 0).

    Raises:
        ValueError: the compute capability is below 8.0.
    """
    major, minor = capability
    if major < 8:
        raise ValueError(f"`capability` must be at least (8, 0), got {capability}.")
    if major == 8:
        return "80" if minor == 0 else "89"
    return {9: "90", 10: "100"}.get(major, "120")


def launch_config(
    kernel: Kernel,
    arch: str,
    head_size: int,
    block_size: tuple[int, int],
    *,
    half: bool = True,
    device: str | None = None,
) -> LaunchConfig:
    """Return the configuration of a kernel, measured on this device if available, else the shipped one.

    Args:
        kernel: name of the kernel.
        arch: as returned by `architecture`.
        head_size: 64 or 128.
        block_size: tokens in a (query block, key block).
        half: bfloat16 or float16. float32 has one configuration, which is not tuned.
        device: name of the GPU, to look up measured configurations.

    Raises:
        ValueError: the file of measured configurations cannot be read.
    """
    override = _override.get()
    if override is not None and override[0] == kernel:
        return override[1]
    if not half:
        return LaunchConfig(block_m=min(32, block_size[0]), block_n=min(32, block_size[1]), num_warps=4, num_stages=1)
    # the table is indexed by the block that a program works on; tiles of the other side must fit its blocks
    block, other = (block_size[1], block_size[0]) if kernel == "key_gradient" else block_size
    measured = measured_configs(override_path()).get(device or "", {})
    row = _lookup(measured, kernel, head_size, block) or _lookup(_table()[arch], kernel, head_size, block)
    assert row is not None
    tile = (min(row["block_m"], other), row["block_n"]) if kernel == "key_gradient" else (
        row["block_m"], min(row["block_n"], other)
    )  # fmt: skip
    return LaunchConfig(**{**row, "block_m": tile[0], "block_n": tile[1]})


def override_path() -> Path:
    """Return the path of the measured configurations, by GPU name; the file need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blade" / "launch_table.json"


@functools.cache
def measured_configs(path: Path) -> dict[str, Any]:
    """Read the configurations measured on this machine, by GPU, kernel, head size and block size.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        configs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it or run `blade-bench tune` again.") from None
    return configs


@contextmanager
def trying(kernel: Kernel, config: LaunchConfig) -> Iterator[None]:
    """Override a kernel's configuration on this thread."""
    token = _override.set((kernel, config))
    try:
        yield
    finally:
        _override.reset(token)


_override: ContextVar[tuple[Kernel, LaunchConfig] | None] = ContextVar("override", default=None)


def _lookup(table: dict[str, Any], kernel: Kernel, head_size: int, block: int) -> dict[str, Any] | None:
    row: dict[str, Any] | None = table.get(kernel, {}).get(str(head_size), {}).get(str(block))
    return row


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table
