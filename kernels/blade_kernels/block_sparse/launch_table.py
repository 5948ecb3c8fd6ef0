"""How the Triton kernels are launched: tiles, warps and pipeline stages, by architecture and size.

The shipped table was chosen from what the kernels compile to (`blade_kernels.cubin`), and for blocks of 64 and 128 on
sm_90 mostly from times on an H200. `tuning` measures a card's own. Nothing is timed while a user's program runs.
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
"""KiB that one program may take, by architecture."""
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
    kernel: Kernel,
    arch: str,
    head_size: int,
    block_size: tuple[int, int],
    *,
    half: bool = True,
    device: str | None = None,
) -> LaunchConfig:
    """The configuration of a kernel: the one measured on such a device, if there is one, or the shipped one.

    Args:
        kernel: which one.
        arch: as `architecture` returns it.
        head_size: 64 or 128.
        block_size: tokens in a (query block, key block).
        half: bfloat16 or float16. The configuration of float32 is the same everywhere and not tuned.
        device: the GPU's name, by which measured configurations are looked up.

    Raises:
        ValueError: if the file of measured configurations can not be read.
    """
    tried = _tried.get()
    if tried is not None and tried[0] == kernel:
        return tried[1]
    if not half:
        return LaunchConfig(block_m=min(32, block_size[0]), block_n=min(32, block_size[1]), num_warps=4, num_stages=1)
    own, other = (block_size[1], block_size[0]) if kernel == "key_gradient" else block_size
    measured = measured_configs(override_path()).get(device or "", {})
    row = _lookup(measured, kernel, head_size, own) or _lookup(_table()[arch], kernel, head_size, own)
    assert row is not None
    tile = (min(row["block_m"], other), row["block_n"]) if kernel == "key_gradient" else (
        row["block_m"], min(row["block_n"], other)
    )  # fmt: skip
    return LaunchConfig(**{**row, "block_m": tile[0], "block_n": tile[1]})


def override_path() -> Path:
    """Where measured configurations lie, by name of GPU; there need be no such file."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blade" / "launch_table.json"


@functools.cache
def measured_configs(path: Path) -> dict[str, Any]:
    """Configurations measured on this machine: by GPU, kernel, head size and block size.

    Raises:
        ValueError: if the file can not be read.
    """
    try:
        configs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as problem:
        raise ValueError(f"{path} can not be read ({problem}); delete it or run `blade-bench tune` again.") from None
    return configs


@contextmanager
def trying(kernel: Kernel, config: LaunchConfig) -> Iterator[None]:
    """Launch a kernel with a configuration that is not in the table, on this thread."""
    token = _tried.set((kernel, config))
    try:
        yield
    finally:
        _tried.reset(token)


_tried: ContextVar[tuple[Kernel, LaunchConfig] | None] = ContextVar("tried", default=None)


def _lookup(table: dict[str, Any], kernel: Kernel, head_size: int, block: int) -> dict[str, Any] | None:
    row: dict[str, Any] | None = table.get(kernel, {}).get(str(head_size), {}).get(str(block))
    return row


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table
