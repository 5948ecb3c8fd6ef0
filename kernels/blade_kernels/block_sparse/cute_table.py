"""What the CuTe kernels of cuDNN and FlashAttention-4 compute, and which of it is known to be right on a card.

Sources: the support tables of nvidia-cudnn-frontend 1.32 (`cudnn.block_sparse_attention`) and the configurations of
flash-attn-4 4.0.0b36 (`flash_attn.cute.interface`). Everything in the table compiles; what was run is `VERIFIED`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

import torch

Direction = Literal["forward", "backward"]
Lengths = Literal["items", "one", "none"]

_HALF = (torch.bfloat16, torch.float16)
_BF16 = (torch.bfloat16,)
_SQUARE = ((128, 128), (64, 64))


@dataclass(frozen=True)
class Row:
    """Calls that one kernel of a library computes."""

    library: Literal["cudnn", "flash"]
    direction: Direction
    architectures: tuple[int, ...]
    """Compute capabilities, such as 90."""
    head_sizes: tuple[int, ...]
    block_sizes: tuple[tuple[int, int], ...]
    """Tokens in a (query block, key block)."""
    dtypes: tuple[torch.dtype, ...] = _HALF
    lengths: Lengths = "items"
    """Numbers of valid keys that it takes: of each item of a batch, one for the whole batch, or none."""
    whole_queries: bool = False
    """Whether the number of queries must fill the last block."""


ROWS = (
    Row("cudnn", "forward", (90,), (64, 128), ((128, 128),)),
    Row("cudnn", "forward", (90,), (64, 128), ((64, 64),), whole_queries=True),
    Row("cudnn", "backward", (90,), (128,), ((128, 128),), _BF16),
    Row("cudnn", "backward", (90,), (128,), ((64, 64),), _BF16, whole_queries=True),
    Row("cudnn", "forward", (100, 103), (64, 128), ((128, 128),), lengths="one"),
    Row("cudnn", "forward", (100, 103), (128,), ((64, 64),), _BF16, lengths="one"),
    Row("cudnn", "backward", (100, 103), (64, 128), ((128, 128),), _BF16, lengths="one"),
    Row("cudnn", "backward", (100, 103), (128,), ((64, 64),), _BF16, lengths="one"),
    Row("cudnn", "forward", (120,), (128,), _SQUARE),
    Row("flash", "forward", (90,), (64, 128), (*_SQUARE, (128, 64), (64, 128)), lengths="none"),
    Row("flash", "backward", (90,), (64, 128), ((128, 128),), lengths="none"),
    Row("flash", "backward", (90,), (128,), ((64, 128),), lengths="none"),
    Row("flash", "forward", (100, 103), (64, 128), ((256, 128),), lengths="none"),
    Row("flash", "backward", (100, 103), (64, 128), ((256, 128),), lengths="none"),
)
"""Of two rows that compute a call, the first is taken."""


@dataclass(frozen=True)
class Kernel:
    """A kernel for a call."""

    row: Row
    architecture: int
    head_size: int
    block_size: tuple[int, int]
    """Blocks of the kernel, which divide those of the call."""

    def __str__(self) -> str:
        queries, keys = self.block_size
        return f"{self.row.library} {self.row.direction} sm_{self.architecture} {self.head_size} {queries}x{keys}"


def kernels(
    direction: Direction,
    architecture: int,
    dtype: torch.dtype,
    head_size: int,
    block_size: tuple[int, int],
    *,
    lengths: bool = False,
) -> list[Kernel]:
    """List the kernels that compute a call: those for its blocks first, then those for parts of its blocks.

    Args:
        direction: "forward" or "backward".
        architecture: compute capability, such as 90.
        dtype: of queries, keys and values.
        head_size: channels of a head.
        block_size: tokens in a (query block, key block) of the call.
        lengths: whether items of the batch have numbers of valid keys.
    """
    fitting = [
        Kernel(row, architecture, head_size, blocks)
        for row in ROWS
        for blocks in row.block_sizes
        if row.direction == direction
        and architecture in row.architectures
        and dtype in row.dtypes
        and head_size in row.head_sizes
        and all(size % part == 0 for size, part in zip(block_size, blocks, strict=True))
        and not (lengths and row.lengths == "none")
    ]
    return sorted(
        fitting, key=lambda kernel: (block_size[0] // kernel.block_size[0], block_size[1] // kernel.block_size[1])
    )


def kernels_of(architecture: int) -> list[Kernel]:
    """List all kernels of an architecture.

    Args:
        architecture: compute capability, such as 90.
    """
    return [
        Kernel(row, architecture, size, blocks)
        for row in ROWS
        for size in row.head_sizes
        for blocks in row.block_sizes
        if architecture in row.architectures
    ]


@functools.cache
def verified() -> frozenset[str]:
    """Return the kernels that a card's report found right, by their names."""
    text = (files("blade_kernels.block_sparse") / "cute_verified.json").read_text(encoding="utf-8")
    return frozenset(json.loads(text)["kernels"])
