"""How the Triton kernels are launched: tiles, warps and pipeline stages, by architecture and size.

The table was chosen from what the kernels compile to (`blade_kernels.cubin`), not yet from times on a card. Nothing is
timed while a user's program runs.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kernel = Literal["forward", "query_gradient", "key_gradient"]
KERNELS: tuple[Kernel, ...] = ("forward", "query_gradient", "key_gradient")
HEAD_SIZES = (64, 128)
BLOCK_SIZES = (32, 64, 128)
TABLE = Path(__file__).with_name("launch_table.json")


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How one kernel is launched."""

    block_m: int
    """Queries of a tile; divides the query block."""
    block_n: int
    """Keys of a tile; divides the key block."""
    num_warps: int
    num_stages: int
    """Loads in flight, this many iterations ahead."""
    tma: bool = False
    """Load through tensor descriptors, where the tensors' strides allow it."""


def architecture(capability: tuple[int, int]) -> str:
    """The architecture of the table whose configurations fit a device: its own, or one with no more shared memory.

    Args:
        capability: of the device, such as (9, 0).

    Raises:
        ValueError: for a device older than 8.0.
    """
    major, minor = capability
    if major < 8:
        raise ValueError(f"`capability` must be at least (8, 0), got {capability}.")
    if major == 8:
        return "80" if minor == 0 else "89"
    return {9: "90", 10: "100"}.get(major, "120")


def launch_config(
    kernel: Kernel, arch: str, head_size: int, block_size: tuple[int, int], *, half: bool = True
) -> LaunchConfig:
    """The configuration of a kernel.

    Args:
        kernel: which one.
        arch: as `architecture` returns it.
        head_size: 64 or 128.
        block_size: tokens in a (query block, key block).
        half: bfloat16 or float16. The configuration of float32 is the same everywhere and not tuned.
    """
    if not half:
        return LaunchConfig(block_m=32, block_n=32, num_warps=4, num_stages=1)
    own, other = (block_size[1], block_size[0]) if kernel == "key_gradient" else block_size
    row = _table()[arch][kernel][str(head_size)][str(own)]
    tile = (min(row["block_m"], other), row["block_n"]) if kernel == "key_gradient" else (
        row["block_m"], min(row["block_n"], other)
    )  # fmt: skip
    return LaunchConfig(**{**row, "block_m": tile[0], "block_n": tile[1]})


@functools.cache
def _table() -> dict:
    return json.loads(TABLE.read_text(encoding="utf-8"))
