"""The walk of the reference over heads, and over a few rows of a head's mask at a time."""

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

_THREAD_ELEMENTS = 2**18  # keys gathered, or logits, at a time by each thread: what a core's cache holds is fastest


class Piece(NamedTuple):
    """Some rows of a head with some of what they attend to: keys of kept blocks, or all pooled tokens.

    Attributes:
        rows: the rows' places in the head's order; m of them.
        blocks: (m * width,) int64, the key blocks gathered for them, one row after another; None for pooled tokens.
        absent: (m, 1, width * bk or P) bool, keys that a row does not see: past its count, past the end of the
            sequence, or pooled from a block that it keeps. None where it sees all.
        first: whether no piece before has any of these rows.
    """

    rows: slice
    blocks: Tensor | None
    absent: Tensor | None
    first: bool


@dataclass
class Head:
    """One head of one batch item, in the accumulation type, its rows in order of how many blocks they keep.

    Attributes:
        order: (QB,) int64, the query block at each place of that order.
        counts: kept key blocks of each row, never rising.
        partial: of each row, whether it keeps a block that is not full of keys.
        q: (QB, bq, D) in that order, times `factor`; the last block of the sequence is filled up with zeros.
        k: (KB, bk, D), zeros from `keys` on.
        v: (KB, bk, D), zeros from `keys` on.
        keys: number of keys present.
        kept: (QB, capacity) int64 in that order, the kept key blocks; slots past a row's count repeat its first, so
            that nothing is read that the row does not keep.
        pooled_k: (P, D).
        pooled_v: (P, D).
        pooled_bias: (P,), log2(tokens in each window).
        hidden: (QB, 1, P) bool in that order, windows that a row does not see; None where every row sees all.
        scratch: where the head and its pieces are copied to.
    """

    order: Tensor
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
        """All that every row attends to: as much at a time as fits the bounds, one row and block at the least.

        Every operation splits a piece by its rows, so a row for each thread keeps what a thread writes in its cache.
        """
        _, key_block, size = self.k.shape
        threads = torch.get_num_threads()
        widest = max(1, _THREAD_ELEMENTS // (key_block * max(size, self.q.shape[1])))  # key blocks of a single row
        start, occupied = 0, self.occupied
        while start < occupied:
            width = min(self.counts[start], widest)
            stop = min(start + threads * (widest // width), occupied)
            for slot in range(0, self.counts[start], width):
                yield self._piece(slice(start, stop), slice(slot, min(slot + width, self.counts[start])))
            start = stop
        if pooled := len(self.pooled_k):
            at_once = max(1, threads * _THREAD_ELEMENTS // (self.q.shape[1] * pooled))
            for start in range(0, len(self.counts), at_once):
                rows = slice(start, min(start + at_once, len(self.counts)))
                yield Piece(rows, None, None if self.hidden is None else self.hidden[rows], first=False)

    def _piece(self, rows: slice, slots: slice) -> Piece:
        kept = self.kept[rows, slots]
        absent = None
        if self.counts[rows.stop - 1] < slots.stop or any(self.partial[rows]):
            places = torch.arange(slots.start, slots.stop, device=kept.device)
            unused = places >= kept.new_tensor(self.counts[rows]).unsqueeze(-1)
            positions = kept.unsqueeze(-1) * self.k.shape[1] + torch.arange(self.k.shape[1], device=kept.device)
            absent = (unused.unsqueeze(-1) | (positions >= self.keys)).view(len(kept), 1, -1)
        return Piece(rows, kept.reshape(-1), absent, first=slots.start == 0)

    @property
    def occupied(self) -> int:
        """Number of rows that keep a block; they come first."""
        return sum(count > 0 for count in self.counts)

    def gather_k(self, piece: Piece) -> Tensor:
        """Keys of a piece, (m, width * bk, D), or (P, D) pooled ones; gone with the next gathering."""
        return self.pooled_k if piece.blocks is None else self._gather(self.k, piece.blocks, piece.rows)

    def gather_v(self, piece: Piece) -> Tensor:
        """Values of a piece, as `gather_k`, and in the same place: a cache need not hold both."""
        return self.pooled_v if piece.blocks is None else self._gather(self.v, piece.blocks, piece.rows)

    def _gather(self, source: Tensor, blocks: Tensor, rows: slice) -> Tensor:
        gathered = self.scratch("gathered", len(blocks), *source.shape[1:])
        torch.index_select(source, 0, blocks, out=gathered)
        return gathered.view(rows.stop - rows.start, -1, source.shape[-1])

    def logits(self, piece: Piece) -> Tensor:
        """Logits in base 2 of a piece, (m, bq, keys); -inf where a row does not see a key; gone with the next."""
        q, k = self.q[piece.rows], self.gather_k(piece)
        logits = self.scratch("logits", *q.shape[:2], k.shape[-2])
        if piece.blocks is None:
            torch.addmm(self.pooled_bias, q.flatten(0, 1), k.T, out=logits.view(-1, len(k)))
        else:
            torch.bmm(q, k.mT, out=logits)
        return logits if piece.absent is None else logits.masked_fill_(piece.absent, -torch.inf)

    def in_order(self, x: Tensor) -> Tensor:
        """(S, n) of the sequence as (QB, bq, n) in the head's order."""
        blocks = x.new_empty(self.q.shape[0], self.q.shape[1], x.shape[1], dtype=self.q.dtype)
        return _fill(blocks, x).index_select(0, self.order)

    def in_sequence(self, rows: Tensor, tokens: int) -> Tensor:
        """(QB, bq, n) in the head's order, as the (tokens, n) of the sequence; gone with the next."""
        in_sequence = self.scratch("head in sequence", *rows.shape)
        return in_sequence.index_copy_(0, self.order, rows).flatten(0, 1)[:tokens]


@dataclass
class Heads:
    """The arguments of an attention call; iterates over (batch item, head), and `heads[item, head]` is one head.

    Attributes:
        q: (B, S, H, D).
        k: (B, T, H, D).
        v: (B, T, H, D).
        mask: which blocks are kept.
        pooled: the pooled tokens, of which there may be none.
        key_lengths: (B,), number of keys present; None where all are.
        factor: of the queries, so that their products with the keys are the logits in base 2.
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

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Every (batch item, head)."""
        return ((item, index) for item in range(self.q.shape[0]) for index in range(self.q.shape[2]))

    def __getitem__(self, place: tuple[int, int]) -> Head:
        """The head at (batch item, head); its tensors are written over by the next."""
        item, index = place
        mask, pooled = self.mask, self.pooled
        row = (min(item, mask.keep.shape[0] - 1), min(index, mask.keep.shape[1] - 1))  # a size of 1 is shared
        keys = self.k.shape[1]
        if self.key_lengths is not None:
            keys = min(max(int(self.key_lengths[item]), 0), keys)

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
        in_sequence = _fill(self.scratch("head in sequence", *shape), self.q[item, :, index], self.factor)
        return Head(
            order=order,
            counts=counts.index_select(0, order).tolist(),
            partial=partial.index_select(0, order).tolist(),
            q=torch.index_select(in_sequence, 0, order, out=self.scratch("head q", *shape)),
            k=_fill(self.scratch("head k", *key_shape), self.k[item, :keys, index]),
            v=_fill(self.scratch("head v", *key_shape), self.v[item, :keys, index]),
            keys=keys,
            kept=kept.index_select(0, order),
            pooled_k=pooled.k[item, :, index].to(self.dtype),
            pooled_v=pooled.v[item, :, index].to(self.dtype),
            pooled_bias=pooled.log_weight.to(self.dtype) / math.log(2.0),
            hidden=hidden,
            scratch=self.scratch,
        )


def _fill(blocks: Tensor, x: Tensor, factor: float = 1.0) -> Tensor:
    """Write (n, D), times `factor`, into (blocks, size, D), with zeros after it."""
    tokens = blocks.view(-1, x.shape[1])
    torch.mul(x.to(blocks.dtype), factor, out=tokens[: len(x)])
    tokens[len(x) :] = 0.0
    return blocks
