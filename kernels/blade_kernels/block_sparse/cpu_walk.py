"""Iteration of the `cpu` implementation over heads, grouped where possible, and over pieces of their rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse.pooled import PooledTokens
from blade_kernels.scratch import Scratch

_THREAD_ELEMENTS = 2**18  # gathered numbers, or logits, of a thread at a time: fastest while they fit a core's cache


class Piece(NamedTuple):
    """A range of rows with a part of what they attend to: keys of kept blocks, or all pooled tokens.

    Attributes:
        rows: range of m rows, in the head's order. For pooled tokens of a group it covers whole heads.
        blocks: (m * width,) int64, the key blocks to gather, row by row; None for pooled tokens.
        absent: (m, 1, width * bk or P) bool, keys that a row does not see: beyond its count, past the end of the
            sequence, or pooled from a block that it keeps. None if it sees all.
        first: true if these rows are in no earlier piece.
    """

    rows: slice
    blocks: Tensor | None
    absent: Tensor | None
    first: bool


@dataclass
class Head:
    """One head of one batch item, in the accumulation dtype, its rows sorted by the number of kept blocks.

    Or a group of N heads whose rows all keep the same number of full blocks: then there are R = N * QB rows, in the
    order of the heads and of the sequence.

    Attributes:
        heads: N.
        order: (R,) int64, the query block of each row; None for the order of the sequence.
        counts: number of key blocks that each row keeps, non-increasing.
        partial: for each row, whether it keeps a block that is not full of keys.
        q: (R, bq, D), times `factor`; the last block of the sequence is padded with zeros.
        k: (N * KB, bk, D), zeros from `keys` on.
        v: (N * KB, bk, D), zeros from `keys` on.
        keys: number of valid keys of each head.
        kept: (R, capacity) int64, the key blocks of `k` that each row keeps; slots beyond a row's count repeat its
            first block, so that no other block is read.
        pooled_k: (N, P, D).
        pooled_v: (N, P, D).
        pooled_bias: (P,), log2(tokens in each window).
        hidden: (R, 1, P) bool, windows that a row does not see; None if every row sees all.
        scratch: memory for copies of heads and pieces.
    """

    heads: int
    order: Tensor | None
    counts: list[int]
    partial: list[bool]
    q: Tensor
    k: Tensor
    v: Tensor
    keys: int
    kept: Tensor
    pooled_k: Tensor
    pooled_v: Tensor
    pooled_bias: Tensor
    hidden: Tensor | None
    scratch: Scratch

    def pieces(self) -> Iterator[Piece]:
        """Yield all that the rows attend to, in pieces that fit the bounds but have at least one row and one block.

        Every operation is parallelised over a piece's rows, so with a row per thread a thread's output stays in cache.
        """
        _, key_block, size = self.k.shape
        threads = torch.get_num_threads()
        widest = max(1, _THREAD_ELEMENTS // (key_block * max(size, self.q.shape[1])))  # key blocks in a one-row piece
        start, occupied = 0, self.occupied
        while start < occupied:
            width = min(self.counts[start], widest)
            stop = min(start + threads * (widest // width), occupied)
            for slot in range(0, self.counts[start], width):
                yield self._piece(slice(start, stop), slice(slot, min(slot + width, self.counts[start])))
            start = stop
        if pooled := self.pooled_k.shape[1]:
            at_once = max(1, threads * _THREAD_ELEMENTS // (self.q.shape[1] * pooled))
            if self.heads > 1:  # whole heads
                rows_per_head = len(self.counts) // self.heads
                at_once = max(1, at_once // rows_per_head) * rows_per_head
            for start in range(0, len(self.counts), at_once):
                rows = slice(start, min(start + at_once, len(self.counts)))
                yield Piece(rows, None, None if self.hidden is None else self.hidden[rows], first=False)

    def _piece(self, rows: slice, slots: slice) -> Piece:
        kept = self.kept[rows, slots]
        absent = None
        if self.counts[rows.stop - 1] < slots.stop or any(self.partial[rows]):
            slot_numbers = torch.arange(slots.start, slots.stop, device=kept.device)
            unused = slot_numbers >= kept.new_tensor(self.counts[rows]).unsqueeze(-1)
            positions = kept.unsqueeze(-1) * self.k.shape[1] + torch.arange(self.k.shape[1], device=kept.device)
            absent = (unused.unsqueeze(-1) | (positions >= self.keys)).view(len(kept), 1, -1)
        return Piece(rows, kept.reshape(-1), absent, first=slots.start == 0)

    @property
    def occupied(self) -> int:
        """Number of rows that keep at least one block; they come first."""
        return sum(count > 0 for count in self.counts)

    def gather_k(self, piece: Piece) -> Tensor:
        """Gather a piece's keys, (m, width * bk, D) or, if pooled, (n, P, D); valid until the next gather."""
        if piece.blocks is None:
            return self.pooled_k[self.heads_of(piece)]
        return self._gather(self.k, piece.blocks, piece.rows)

    def gather_v(self, piece: Piece) -> Tensor:
        """Gather a piece's values, like `gather_k` and into the same memory, so that a cache need not hold both."""
        if piece.blocks is None:
            return self.pooled_v[self.heads_of(piece)]
        return self._gather(self.v, piece.blocks, piece.rows)

    def heads_of(self, piece: Piece) -> slice:
        """Return the range of heads whose rows are in a piece of pooled tokens."""
        if self.heads == 1:
            return slice(0, 1)
        rows_per_head = len(self.counts) // self.heads
        return slice(piece.rows.start // rows_per_head, piece.rows.stop // rows_per_head)

    def by_head(self, x: Tensor, piece: Piece) -> Tensor:
        """View (m, bq, n) of a piece of pooled tokens as (its heads, ..., n)."""
        heads = self.heads_of(piece)
        return x.view(heads.stop - heads.start, -1, x.shape[-1])

    def _gather(self, source: Tensor, blocks: Tensor, rows: slice) -> Tensor:
        gathered = self.scratch("gathered", len(blocks), *source.shape[1:])
        torch.index_select(source, 0, blocks, out=gathered)
        return gathered.view(rows.stop - rows.start, -1, source.shape[-1])

    def logits(self, piece: Piece) -> Tensor:
        """Compute a piece's base-2 logits, (m, bq, keys), -inf for unseen keys; valid until the next call."""
        q, k = self.q[piece.rows], self.gather_k(piece)
        logits = self.scratch("logits", *q.shape[:2], k.shape[-2])
        if piece.blocks is None:
            torch.baddbmm(self.pooled_bias, self.by_head(q, piece), k.mT, out=self.by_head(logits, piece))
        else:
            torch.bmm(q, k.mT, out=logits)
        return logits if piece.absent is None else logits.masked_fill_(piece.absent, -torch.inf)

    def in_order(self, x: Tensor) -> Tensor:
        """Rearrange (S, N, n) in sequence order to (R, bq, n) in the head's order."""
        blocks = x.new_empty(self.q.shape[0], self.q.shape[1], x.shape[2], dtype=self.q.dtype)
        filled = _fill(blocks, x)
        return filled if self.order is None else filled.index_select(0, self.order)

    def in_sequence(self, rows: Tensor, tokens: int) -> Tensor:
        """Rearrange (R, bq, n) in the head's order to (tokens, N, n) in sequence order; valid until the next call."""
        if self.order is not None:
            rows = self.scratch("head in sequence", *rows.shape).index_copy_(0, self.order, rows)
        return rows.view(self.heads, -1, rows.shape[-1])[:, :tokens].transpose(0, 1)


@dataclass
class Heads:
    """The arguments of an attention call; iterating yields a batch item and a group of heads at a time.

    Attributes:
        q: (B, S, H, D).
        k: (B, T, H, D).
        v: (B, T, H, D).
        mask: the kept blocks.
        pooled: the pooled tokens, possibly none.
        key_lengths: (B,), number of valid keys; None if all are valid.
        factor: multiplies the queries, so that their products with the keys are base-2 logits.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockMask
    pooled: PooledTokens
    key_lengths: Tensor | None
    factor: float
    dtype: torch.dtype = field(init=False)
    scratch: Scratch = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = torch.promote_types(self.q.dtype, torch.float32)
        self.scratch = Scratch(self.dtype, self.q.device)

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Yield every batch item with all of its heads, a group at a time."""
        count = self.q.shape[2]
        for item in range(self.q.shape[0]):
            size = self._group_size(item)
            yield from ((item, slice(first, min(first + size, count))) for first in range(0, count, size))

    def __getitem__(self, index: tuple[int, slice]) -> Head:
        """Return a head or a group of heads of a batch item; its tensors are valid until the next call."""
        item, heads = index
        return self._group(item, heads) if heads.stop - heads.start > 1 else self._single(item, heads.start)

    def _group_size(self, item: int) -> int:
        """Return how many heads of a batch item to process together: as many as fit the bound, if they are uniform."""
        head_elements = max(self.q[0, :, 0].numel(), self.k[0, :, 0].numel())
        fitting = torch.get_num_threads() * _THREAD_ELEMENTS // head_elements
        if fitting < 2 or self._keys(item) < self.mask.key_blocks * self.mask.block_size[1]:
            return 1
        counts = self.mask.counts[min(item, len(self.mask.counts) - 1)]
        count = int(counts[0, 0])
        return fitting if count and bool((counts == count).all()) else 1

    def _keys(self, item: int) -> int:
        """Count the valid keys of a batch item."""
        keys = self.k.shape[1]
        return keys if self.key_lengths is None else min(max(int(self.key_lengths[item]), 0), keys)

    def _group(self, item: int, heads: slice) -> Head:
        """Prepare heads whose rows all keep the same number of full blocks."""
        mask, pooled, keys = self.mask, self.pooled, self._keys(item)
        number, rows, key_blocks = heads.stop - heads.start, mask.query_blocks, mask.key_blocks
        row = min(item, mask.keep.shape[0] - 1)  # a size of 1 is broadcast
        shared = mask.keep.shape[1] == 1
        mask_heads = slice(0, 1) if shared else heads
        count = int(mask.counts[row, mask_heads.start, 0])
        kept = mask.indices[row, mask_heads, :, :count].long()
        first = torch.arange(0, number * key_blocks, key_blocks, device=kept.device)
        hidden = None
        if pooled.key_block is not None:
            hidden = mask.keep[row, mask_heads].index_select(-1, pooled.key_block).expand(number, -1, -1).flatten(0, 1)
        shape = (number * rows, mask.block_size[0], self.q.shape[-1])
        key_shape = (number * key_blocks, mask.block_size[1], self.k.shape[-1])
        return Head(
            heads=number,
            order=None,
            counts=[count] * (number * rows),
            partial=[False] * (number * rows),
            q=_fill(self.scratch("head q", *shape), self.q[item, :, heads], self.factor),
            k=_fill(self.scratch("head k", *key_shape), self.k[item, :keys, heads]),
            v=_fill(self.scratch("head v", *key_shape), self.v[item, :keys, heads]),
            keys=keys,
            kept=(kept + first.view(-1, 1, 1)).flatten(0, 1),
            pooled_k=pooled.k[item, :, heads].transpose(0, 1).to(self.dtype),
            pooled_v=pooled.v[item, :, heads].transpose(0, 1).to(self.dtype),
            pooled_bias=pooled.log_weight.to(self.dtype) / math.log(2.0),
            hidden=None if hidden is None else hidden.unsqueeze(1),
            scratch=self.scratch,
        )

    def _single(self, item: int, index: int) -> Head:
        """Prepare a single head, its rows sorted by the number of kept blocks."""
        mask, pooled, keys = self.mask, self.pooled, self._keys(item)
        row = (min(item, mask.keep.shape[0] - 1), min(index, mask.keep.shape[1] - 1))  # a size of 1 is broadcast
        counts, kept = mask.counts[row].long(), mask.indices[row].long()
        used = torch.arange(mask.capacity, device=kept.device) < counts.unsqueeze(-1)
        kept = torch.where(used, kept, kept[:, :1])
        partial = ((kept + 1) * mask.block_size[1] > keys).any(-1)
        order = (2 * counts - partial.long()).argsort(descending=True, stable=True)
        hidden = None
        if pooled.key_block is not None:
            hidden = mask.keep[row].index_select(-1, pooled.key_block).index_select(0, order).unsqueeze(1)
        shape = (mask.query_blocks, mask.block_size[0], self.q.shape[-1])
        key_shape = (mask.key_blocks, mask.block_size[1], self.k.shape[-1])
        head = slice(index, index + 1)
        in_sequence = _fill(self.scratch("head in sequence", *shape), self.q[item, :, head], self.factor)
        return Head(
            heads=1,
            order=order,
            counts=counts.index_select(0, order).tolist(),
            partial=partial.index_select(0, order).tolist(),
            q=torch.index_select(in_sequence, 0, order, out=self.scratch("head q", *shape)),
            k=_fill(self.scratch("head k", *key_shape), self.k[item, :keys, head]),
            v=_fill(self.scratch("head v", *key_shape), self.v[item, :keys, head]),
            keys=keys,
            kept=kept.index_select(0, order),
            pooled_k=pooled.k[item, :, head].transpose(0, 1).to(self.dtype),
            pooled_v=pooled.v[item, :, head].transpose(0, 1).to(self.dtype),
            pooled_bias=pooled.log_weight.to(self.dtype) / math.log(2.0),
            hidden=hidden,
            scratch=self.scratch,
        )


def _fill(blocks: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
    """Write (n, N, D), times `factor`, into (N * blocks, size, D), head by head, each padded with zeros."""
    tokens = blocks.view(x.shape[1], -1, x.shape[2])
    torch.mul(x.to(blocks.dtype).transpose(0, 1), factor, out=tokens[:, : len(x)])
    if len(x) < tokens.shape[1]:
        tokens[:, len(x) :] = 0.0
    return blocks
