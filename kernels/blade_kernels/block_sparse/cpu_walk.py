"""The walk of `cpu` over heads, a few together where that is possible, and over a few rows at a time."""

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
    """Some rows of heads with some of what they attend to: keys of kept blocks, or all pooled tokens.

    Attributes:
        rows: the rows' places in the heads' order; m of them, and of pooled tokens those of whole heads or of one.
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

    Or N heads, whose rows all keep as many blocks, each full of keys: then R, the number of rows, is N * QB, and they
    are in the order of the heads and of the sequence.

    Attributes:
        heads: N.
        order: (R,) int64, the query block at each place of that order; None where that is the sequence's.
        counts: kept key blocks of each row, never rising.
        partial: of each row, whether it keeps a block that is not full of keys.
        q: (R, bq, D) in that order, times `factor`; the last block of the sequence is filled up with zeros.
        k: (N * KB, bk, D), zeros from `keys` on.
        v: (N * KB, bk, D), zeros from `keys` on.
        keys: number of keys present, of each head.
        kept: (R, capacity) int64 in that order, the kept key blocks among those of `k`; slots past a row's count
            repeat its first, so that nothing is read that the row does not keep.
        pooled_k: (N, P, D).
        pooled_v: (N, P, D).
        pooled_bias: (P,), log2(tokens in each window).
        hidden: (R, 1, P) bool in that order, windows that a row does not see; None where every row sees all.
        scratch: where the heads and their pieces are copied to.
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
        if pooled := self.pooled_k.shape[1]:
            at_once = max(1, threads * _THREAD_ELEMENTS // (self.q.shape[1] * pooled))
            if self.heads > 1:  # whole heads
                of_head = len(self.counts) // self.heads
                at_once = max(1, at_once // of_head) * of_head
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
        """Keys of a piece, (m, width * bk, D), or (n, P, D) pooled ones of its heads; gone with the next gathering."""
        if piece.blocks is None:
            return self.pooled_k[self.heads_of(piece)]
        return self._gather(self.k, piece.blocks, piece.rows)

    def gather_v(self, piece: Piece) -> Tensor:
        """Values of a piece, as `gather_k`, and in the same place: a cache need not hold both."""
        if piece.blocks is None:
            return self.pooled_v[self.heads_of(piece)]
        return self._gather(self.v, piece.blocks, piece.rows)

    def heads_of(self, piece: Piece) -> slice:
        """The heads that a piece of pooled tokens has rows of."""
        if self.heads == 1:
            return slice(0, 1)
        of_head = len(self.counts) // self.heads
        return slice(piece.rows.start // of_head, piece.rows.stop // of_head)

    def by_head(self, x: Tensor, piece: Piece) -> Tensor:
        """(m, bq, n) of a piece of pooled tokens as (its heads, ..., n)."""
        heads = self.heads_of(piece)
        return x.view(heads.stop - heads.start, -1, x.shape[-1])

    def _gather(self, source: Tensor, blocks: Tensor, rows: slice) -> Tensor:
        gathered = self.scratch("gathered", len(blocks), *source.shape[1:])
        torch.index_select(source, 0, blocks, out=gathered)
        return gathered.view(rows.stop - rows.start, -1, source.shape[-1])

    def logits(self, piece: Piece) -> Tensor:
        """Logits in base 2 of a piece, (m, bq, keys); -inf where a row does not see a key; gone with the next."""
        q, k = self.q[piece.rows], self.gather_k(piece)
        logits = self.scratch("logits", *q.shape[:2], k.shape[-2])
        if piece.blocks is None:
            torch.baddbmm(self.pooled_bias, self.by_head(q, piece), k.mT, out=self.by_head(logits, piece))
        else:
            torch.bmm(q, k.mT, out=logits)
        return logits if piece.absent is None else logits.masked_fill_(piece.absent, -torch.inf)

    def in_order(self, x: Tensor) -> Tensor:
        """(S, N, n) of the sequence as (R, bq, n) in the heads' order."""
        blocks = x.new_empty(self.q.shape[0], self.q.shape[1], x.shape[2], dtype=self.q.dtype)
        filled = _fill(blocks, x)
        return filled if self.order is None else filled.index_select(0, self.order)

    def in_sequence(self, rows: Tensor, tokens: int) -> Tensor:
        """(R, bq, n) in the heads' order, as the (tokens, N, n) of the sequence; gone with the next."""
        if self.order is not None:
            rows = self.scratch("head in sequence", *rows.shape).index_copy_(0, self.order, rows)
        return rows.view(self.heads, -1, rows.shape[-1])[:, :tokens].transpose(0, 1)


@dataclass
class Heads:
    """The arguments of an attention call; iterates over places, which are a batch item and the heads to take together.

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

    def __iter__(self) -> Iterator[tuple[int, slice]]:
        """Every batch item with all of its heads, a few at a time."""
        count = self.q.shape[2]
        for item in range(self.q.shape[0]):
            together = self._together(item)
            yield from ((item, slice(first, min(first + together, count))) for first in range(0, count, together))

    def __getitem__(self, place: tuple[int, slice]) -> Head:
        """The heads of a place; their tensors are written over by the next."""
        item, heads = place
        return self._alike(item, heads) if heads.stop - heads.start > 1 else self._alone(item, heads.start)

    def _together(self, item: int) -> int:
        """How many heads of a batch item are taken together: as many as fit the bound, if they are alike."""
        of_head = max(self.q[0, :, 0].numel(), self.k[0, :, 0].numel())
        fitting = torch.get_num_threads() * _THREAD_ELEMENTS // of_head
        if fitting < 2 or self._keys(item) < self.mask.key_blocks * self.mask.block_size[1]:
            return 1
        counts = self.mask.counts[min(item, len(self.mask.counts) - 1)]
        count = int(counts[0, 0])
        return fitting if count and bool((counts == count).all()) else 1

    def _keys(self, item: int) -> int:
        """Number of keys of a batch item."""
        keys = self.k.shape[1]
        return keys if self.key_lengths is None else min(max(int(self.key_lengths[item]), 0), keys)

    def _alike(self, item: int, heads: slice) -> Head:
        """Heads whose rows all keep as many whole blocks."""
        mask, pooled, keys = self.mask, self.pooled, self._keys(item)
        number, rows, key_blocks = heads.stop - heads.start, mask.query_blocks, mask.key_blocks
        row = min(item, mask.keep.shape[0] - 1)  # a size of 1 is shared
        shared = mask.keep.shape[1] == 1
        own = slice(0, 1) if shared else heads
        count = int(mask.counts[row, own.start, 0])
        kept = mask.indices[row, own, :, :count].long()
        first = torch.arange(0, number * key_blocks, key_blocks, device=kept.device)
        hidden = None
        if pooled.key_block is not None:
            hidden = mask.keep[row, own].index_select(-1, pooled.key_block).expand(number, -1, -1).flatten(0, 1)
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

    def _alone(self, item: int, index: int) -> Head:
        """A head by itself."""
        mask, pooled, keys = self.mask, self.pooled, self._keys(item)
        row = (min(item, mask.keep.shape[0] - 1), min(index, mask.keep.shape[1] - 1))  # a size of 1 is shared
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
    """Write (n, N, D), times `factor`, into (N * blocks, size, D), head after head, with zeros after each."""
    tokens = blocks.view(x.shape[1], -1, x.shape[2])
    torch.mul(x.to(blocks.dtype).transpose(0, 1), factor, out=tokens[:, : len(x)])
    if len(x) < tokens.shape[1]:
        tokens[:, len(x) :] = 0.0
    return blocks
