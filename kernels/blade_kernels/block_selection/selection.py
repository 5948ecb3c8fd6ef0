"""Selection of blocks by importance, at random or by distance."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from blade_kernels.block_mask import BlockMask
from blade_kernels.block_selection import triton_launch
from blade_kernels.block_selection.layer_budget import keep_over_heads
from blade_kernels.block_selection.naive import naive_selection, naive_selection_over_heads
from blade_kernels.block_selection.ranking import largest
from blade_kernels.implementations import choose_implementation

BUDGETS = ("row", "layer")
"""What a maximum of kept blocks is for."""


def select_blocks(
    importance: Tensor,
    block_size: tuple[int, int] = (64, 64),
    *,
    max_blocks: int | None = None,
    extra_blocks: int = 0,
    min_blocks: int = 1,
    cumulative_mass: float | None = None,
    forced_key_blocks: Tensor | None = None,
    forced_query_blocks: Tensor | None = None,
    local_radius: int | None = None,
    budget: Literal["row", "layer"] = "row",
    implementation: str = "auto",
) -> BlockMask:
    """Keep the most important key blocks of every row.

    The blocks of a row are ranked: forced ones first, then by decreasing importance, ties by increasing index. A row
    keeps the leading blocks up to and including the one at which their importance reaches `cumulative_mass` of the
    row's total, but at least `min_blocks`, at most `max_blocks`, and never fewer than the forced ones. Forced blocks
    thus count towards `max_blocks`; a row exceeds it only if the forced blocks alone do.

    With `budget="layer"` the rows of all heads of an item share their maxima: after the leading `min_blocks` of every
    row, the most important blocks of all rows are kept, until they are as many as the maxima come to.

    Args:
        importance: (B or 1, H or 1, query blocks, key blocks), finite and non-negative. Compared in float32.
        block_size: tokens in a (query block, key block).
        max_blocks: maximum number of key blocks in a row. None: no limit.
        extra_blocks: number of rows, of all n of a head, with a maximum that is larger by one: of row i the maximum is
            larger by floor((i + 1) * extra_blocks / n) - floor(i * extra_blocks / n).
        min_blocks: minimum number of key blocks in a row.
        cumulative_mass: share of the row's importance to reach, in (0, 1]. None: every row keeps `max_blocks`.
        forced_key_blocks: (key blocks,) bool, kept by every row, for instance those with text.
        forced_query_blocks: (query blocks,) bool, rows that keep every block regardless of `max_blocks`.
        local_radius: force the key blocks at the query block's own positions (radius 0) and this many more on either
            side. None: force none.
        budget: "row", a maximum for each row; "layer", one for the rows of all heads of an item together, by which
            importance is compared across heads.
        implementation: "triton", which does not sort; "cpu", plain PyTorch on any device; "naive", the specification,
            which waits for the device; "auto" picks Triton on CUDA where possible, else "cpu". "reference" is an alias
            of "cpu".

    Returns:
        The mask. The capacity of its lists is `max_blocks`, or more if the local blocks need it. With a budget for the
        layer, or forced key or query blocks, which cannot be counted without waiting for the device, it is the number
        of key blocks.

    Raises:
        ValueError: an argument out of range, inconsistent shapes, or an unknown implementation.
        NotImplementedError: the requested implementation cannot compute this.

    Source: BLADE, arXiv 2508.10774: the smallest m whose cumulative mass reaches the threshold, then clamping.
    """
    _check(
        importance, max_blocks, extra_blocks, min_blocks, cumulative_mass, forced_key_blocks, forced_query_blocks,
        local_radius, budget,
    )  # fmt: skip
    key_blocks = importance.shape[3]
    limit = key_blocks if max_blocks is None else min(max_blocks, key_blocks)
    extra_blocks = 0 if limit == key_blocks else extra_blocks
    capacity = limit + (extra_blocks > 0)
    if local_radius is not None:
        capacity = max(capacity, (block_size[0] - 2) // block_size[1] + 2 + 2 * local_radius)
    if forced_key_blocks is not None or forced_query_blocks is not None or capacity > key_blocks:
        capacity = key_blocks
    problem = triton_launch.selection_unsupported(importance)
    chosen = choose_implementation(implementation, importance.device, problem)
    if budget == "layer" and limit < key_blocks:
        return _select_over_heads(
            importance, block_size, limit, extra_blocks, min_blocks, forced_key_blocks, forced_query_blocks,
            local_radius, chosen,
        )  # fmt: skip
    if chosen == "triton":
        return triton_launch.select_blocks(
            importance, block_size, limit, extra_blocks, min_blocks, cumulative_mass, forced_key_blocks,
            forced_query_blocks, local_radius, capacity,
        )  # fmt: skip
    if chosen == "naive":
        keep = naive_selection(
            importance, block_size, limit, extra_blocks, min_blocks, cumulative_mass, forced_key_blocks,
            forced_query_blocks, local_radius,
        )  # fmt: skip
        return BlockMask.from_dense(keep, block_size, capacity)
    return _select_on_cpu(
        importance, block_size, limit, extra_blocks, min_blocks, cumulative_mass, forced_key_blocks,
        forced_query_blocks, local_radius, capacity,
    )  # fmt: skip


def _check(
    importance: Tensor,
    max_blocks: int | None,
    extra_blocks: int,
    min_blocks: int,
    cumulative_mass: float | None,
    forced_key_blocks: Tensor | None,
    forced_query_blocks: Tensor | None,
    local_radius: int | None,
    budget: str,
) -> None:
    """Raise ValueError if an argument of `select_blocks` is out of range or inconsistent with the others."""
    if importance.ndim != 4 or not importance.is_floating_point() or 0 in importance.shape:
        raise ValueError(
            "`importance` must be floating point of shape (batch or 1, heads or 1, query blocks, key blocks), none of "
            f"them 0, got {importance.dtype} of shape {tuple(importance.shape)}."
        )
    query_blocks, key_blocks = importance.shape[2:]
    limit = key_blocks if max_blocks is None else min(max_blocks, key_blocks)
    if not 1 <= min_blocks <= max(limit, 1) or limit < 1:
        raise ValueError(
            "`min_blocks` and `max_blocks` must satisfy 1 <= min_blocks <= max_blocks, and `min_blocks` be at most "
            f"the {key_blocks} key blocks, got {min_blocks} and {max_blocks}."
        )
    if not 0 <= extra_blocks < query_blocks:
        raise ValueError(f"`extra_blocks` must be from 0 to {query_blocks - 1}, less than rows, got {extra_blocks}.")
    if cumulative_mass is not None and not 0.0 < cumulative_mass <= 1.0:
        raise ValueError(f"`cumulative_mass` must be in (0, 1] or None, got {cumulative_mass}.")
    if local_radius is not None and local_radius < 0:
        raise ValueError(f"`local_radius` must be at least 0 blocks or None, got {local_radius}.")
    if budget not in BUDGETS:
        raise ValueError(f"`budget` must be one of {', '.join(BUDGETS)}, got {budget!r}.")
    if budget == "layer" and cumulative_mass is not None:
        raise ValueError(f'`cumulative_mass` must be None with `budget="layer"`, got {cumulative_mass}.')
    for name, flags, blocks in (
        ("forced_key_blocks", forced_key_blocks, key_blocks),
        ("forced_query_blocks", forced_query_blocks, query_blocks),
    ):
        if flags is not None and (flags.shape != (blocks,) or flags.dtype != torch.bool):
            raise ValueError(f"`{name}` must be bool of shape ({blocks},), got {flags.dtype} of {tuple(flags.shape)}.")


def _select_on_cpu(
    importance: Tensor,
    block_size: tuple[int, int],
    limit: int,
    extra: int,
    least: int,
    cumulative_mass: float | None,
    forced_key_blocks: Tensor | None,
    forced_query_blocks: Tensor | None,
    local_radius: int | None,
    capacity: int,
) -> BlockMask:
    """Select with plain PyTorch operations, on any device; for the arguments see `triton_launch.select_blocks`."""
    query_blocks, key_blocks = importance.shape[2:]
    importance = importance.to(torch.float32)
    forced = _forced(query_blocks, key_blocks, block_size, forced_key_blocks, local_radius, importance.device)
    ranked = importance if forced is None else importance.masked_fill(forced, torch.inf)
    most: int | Tensor = limit  # blocks in a row
    if extra:
        rows = torch.arange(query_blocks + 1, device=importance.device) * extra // query_blocks
        most = limit + rows.diff().unsqueeze(-1)
    if cumulative_mass is None and extra:
        best = largest(ranked, limit + 1, ordered=True)  # the last is only for rows with one more
        kept = torch.arange(limit + 1, device=importance.device) < most
        keep = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best, kept.expand_as(best))
    elif cumulative_mass is None:
        best = largest(ranked, limit)
        if forced is None and forced_query_blocks is None:
            return BlockMask.from_lists(best, key_blocks, block_size)
        keep = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, best, True)
    else:
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        mass = importance.gather(-1, order).cumsum(-1)
        counts = (mass < cumulative_mass * mass[..., -1:]).sum(-1, keepdim=True) + 1  # and the block that reaches it
        counts = counts.clamp(min=least).clamp(max=most)
        if forced is not None:
            counts = torch.maximum(counts, forced.sum(-1, keepdim=True))
        ranks = torch.arange(key_blocks, device=order.device).expand_as(order)
        keep = torch.empty_like(order).scatter_(-1, order, ranks) < counts
    if forced is not None:
        keep = keep | forced
    if forced_query_blocks is not None:
        keep = keep | forced_query_blocks.unsqueeze(-1)
    return BlockMask.from_dense(keep, block_size, capacity)


def _select_over_heads(
    importance: Tensor,
    block_size: tuple[int, int],
    limit: int,
    extra: int,
    least: int,
    forced_key_blocks: Tensor | None,
    forced_query_blocks: Tensor | None,
    local_radius: int | None,
    implementation: str,
) -> BlockMask:
    """Select with one budget for the rows of all heads; for the arguments see `triton_launch.select_blocks`."""
    query_blocks, key_blocks = importance.shape[2:]
    forced = _forced(query_blocks, key_blocks, block_size, forced_key_blocks, local_radius, importance.device)
    if implementation == "triton":
        return triton_launch.select_over_heads(
            importance, block_size, limit, extra, least, forced, forced_query_blocks
        )
    select = naive_selection_over_heads if implementation == "naive" else keep_over_heads
    keep = select(importance.to(torch.float32), limit, extra, least, forced, forced_query_blocks)
    return BlockMask.from_dense(keep, block_size)


def _forced(
    query_blocks: int,
    key_blocks: int,
    block_size: tuple[int, int],
    forced_key_blocks: Tensor | None,
    local_radius: int | None,
    device: torch.device,
) -> Tensor | None:
    """Mark the key blocks that a row must keep: bool that broadcasts to (QB, KB); None if there are none."""
    if local_radius is None:
        return forced_key_blocks
    local = _local(query_blocks, key_blocks, block_size, local_radius, device)
    return local if forced_key_blocks is None else local | forced_key_blocks


def random_blocks(
    shape: tuple[int, int, int, int],
    blocks: int,
    block_size: tuple[int, int] = (64, 64),
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    forced_key_blocks: Tensor | None = None,
    forced_query_blocks: Tensor | None = None,
) -> BlockMask:
    """Draw key blocks at random, independently for each row: the baseline that a selector has to beat.

    Args:
        shape: (B or 1, H or 1, query blocks, key blocks).
        blocks: number of key blocks in a row, forced ones included.
        block_size: tokens in a (query block, key block).
        generator: random number generator, on `device`.
        device: device of the mask.
        forced_key_blocks: see `select_blocks`.
        forced_query_blocks: see `select_blocks`.

    Raises:
        ValueError: `blocks` is not positive.
    """
    return select_blocks(
        torch.rand(shape, generator=generator, device=device),
        block_size,
        max_blocks=blocks,
        forced_key_blocks=forced_key_blocks,
        forced_query_blocks=forced_query_blocks,
    )


def local_blocks(
    query_blocks: int,
    key_blocks: int,
    blocks: int,
    block_size: tuple[int, int] = (64, 64),
    *,
    device: torch.device | str | None = None,
    forced_key_blocks: Tensor | None = None,
    forced_query_blocks: Tensor | None = None,
) -> BlockMask:
    """Select the key blocks with the centres nearest to the query block's: a window clamped to the sequence.

    Args:
        query_blocks: number of query blocks.
        key_blocks: number of key blocks.
        blocks: number of key blocks in a row, forced ones included; rows at the ends keep the same number.
        block_size: tokens in a (query block, key block).
        device: device of the mask.
        forced_key_blocks: see `select_blocks`.
        forced_query_blocks: see `select_blocks`.

    Raises:
        ValueError: `blocks` is not positive.
    """
    centres = [
        (torch.arange(count, device=device, dtype=torch.float32) + 0.5) * size
        for count, size in zip((query_blocks, key_blocks), block_size)
    ]
    distance = (centres[0].unsqueeze(-1) - centres[1]).abs()
    return select_blocks(
        (1.0 / (1.0 + distance))[None, None],
        block_size,
        max_blocks=blocks,
        forced_key_blocks=forced_key_blocks,
        forced_query_blocks=forced_query_blocks,
    )


def _local(
    query_blocks: int, key_blocks: int, block_size: tuple[int, int], radius: int, device: torch.device
) -> Tensor:
    """Mark the key blocks at each query block's positions, and `radius` more on either side: (QB, KB) bool."""
    query_size, key_size = block_size
    starts = torch.arange(query_blocks, device=device) * query_size
    first = starts // key_size - radius
    last = (starts + query_size - 1) // key_size + radius
    blocks = torch.arange(key_blocks, device=device)
    return (blocks >= first.unsqueeze(-1)) & (blocks <= last.unsqueeze(-1))
