"""BlockMask, the key blocks that each query block attends to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Key blocks that each query block attends to, per batch item and head.

    The selection is stored twice: as a bit map, for look-ups by position, and as counted lists, for iterating over
    the kept blocks. `from_dense` builds both without waiting for the device, so every layer can build a new mask. A
    mask that is made of its parts is not checked for what its values say; `check_values` does.

    Attributes:
        keep: (B or 1, H or 1, query blocks, key blocks) bool, true for the pairs of blocks that are computed. A batch
            or head size of 1 is broadcast.
        counts: (.., query blocks) int32, number of key blocks that each row keeps, possibly 0.
        indices: (.., query blocks, capacity) int32, the kept key blocks of each row in ascending order, padded with 0
            beyond the row's count. The capacity is a Python int, so shapes never depend on the data.
        block_size: tokens in a (query block, key block). The last block of a sequence may be shorter.
        order: (.., query blocks) int32, the rows in the order in which to compute them; None for ascending order.
    """

    keep: Tensor
    counts: Tensor
    indices: Tensor
    block_size: tuple[int, int]
    order: Tensor | None = None

    def __post_init__(self) -> None:
        if self.keep.ndim != 4 or self.keep.dtype != torch.bool:
            raise ValueError(
                "`keep` must be bool of shape (batch or 1, heads or 1, query blocks, key blocks), "
                f"got {self.keep.dtype} of shape {tuple(self.keep.shape)}."
            )
        if self.counts.shape != self.keep.shape[:3] or self.counts.dtype != torch.int32:
            raise ValueError(
                f"`counts` must be int32 of shape {tuple(self.keep.shape[:3])} to match `keep`, "
                f"got {self.counts.dtype} of shape {tuple(self.counts.shape)}."
            )
        if self.indices.shape[:-1] != self.keep.shape[:3] or self.indices.dtype != torch.int32:
            raise ValueError(
                f"`indices` must be int32 of shape {(*self.keep.shape[:3], 'capacity')} to match `keep`, "
                f"got {self.indices.dtype} of shape {tuple(self.indices.shape)}."
            )
        if self.order is not None and (self.order.shape != self.counts.shape or self.order.dtype != torch.int32):
            raise ValueError(
                f"`order` must be None or int32 of shape {tuple(self.counts.shape)} to match `keep`, "
                f"got {self.order.dtype} of shape {tuple(self.order.shape)}."
            )
        if len(self.block_size) != 2 or any(not isinstance(size, int) or size < 1 for size in self.block_size):
            raise ValueError(f"`block_size` must be two positive numbers of tokens, got {self.block_size!r}.")

    @classmethod
    def from_dense(
        cls, keep: Tensor, block_size: tuple[int, int] = (64, 64), capacity: int | None = None
    ) -> BlockMask:
        """Build a mask from its bit map, without host synchronisation.

        Args:
            keep: (B or 1, H or 1, query blocks, key blocks) bool.
            block_size: tokens in a (query block, key block).
            capacity: upper bound on the key blocks of a row, if known; it saves memory in the lists. None allows all
                key blocks. A row that exceeds it keeps its first `capacity` blocks, in the bit map as in the list:
                raising an error would require waiting for the device.

        Raises:
            ValueError: `keep` is not a 4-dimensional bool tensor, or `capacity` or `block_size` is not positive.
        """
        if keep.ndim != 4 or keep.dtype != torch.bool:
            raise ValueError(
                "`keep` must be bool of shape (batch or 1, heads or 1, query blocks, key blocks), "
                f"got {keep.dtype} of shape {tuple(keep.shape)}."
            )
        key_blocks = keep.shape[-1]
        rank = keep.cumsum(-1, dtype=torch.int32)  # 1 at the first kept block of a row, 2 at the second, ...
        if capacity is None or capacity >= key_blocks:
            capacity = key_blocks
        elif capacity < 1:
            raise ValueError(f"`capacity` must be at least 1 block or None, got {capacity}.")
        else:
            keep = keep & (rank <= capacity)
        slot = (rank - 1).masked_fill_(~keep, capacity)  # dropped blocks are written one slot past the end
        blocks = torch.arange(key_blocks, device=keep.device, dtype=torch.int32).expand_as(keep)
        indices = torch.zeros((*keep.shape[:-1], capacity + 1), dtype=torch.int32, device=keep.device)
        indices = indices.scatter(-1, slot.long(), blocks)[..., :capacity].contiguous()
        counts = keep.sum(-1, dtype=torch.int32)
        return cls(keep=keep, counts=counts, indices=indices, block_size=(block_size[0], block_size[1]))

    @classmethod
    def from_lists(cls, blocks: Tensor, key_blocks: int, block_size: tuple[int, int] = (64, 64)) -> BlockMask:
        """Build a mask whose rows all keep the same number of blocks, without host synchronisation.

        Args:
            blocks: (B or 1, H or 1, query blocks, count) int64, the distinct key blocks that each row keeps, in any
                order. Values are not validated.
            key_blocks: number of key blocks.
            block_size: tokens in a (query block, key block).
        """
        keep = torch.zeros((*blocks.shape[:-1], key_blocks), dtype=torch.bool, device=blocks.device)
        return cls(
            keep=keep.scatter_(-1, blocks, True),
            counts=torch.full(blocks.shape[:-1], blocks.shape[-1], dtype=torch.int32, device=blocks.device),
            indices=blocks.sort(-1).values.to(torch.int32),
            block_size=(block_size[0], block_size[1]),
        )

    @property
    def query_blocks(self) -> int:
        """Number of query blocks."""
        return self.keep.shape[2]

    @property
    def key_blocks(self) -> int:
        """Number of key blocks."""
        return self.keep.shape[3]

    @property
    def capacity(self) -> int:
        """Largest number of key blocks that a row can keep."""
        return self.indices.shape[3]

    @property
    def device(self) -> torch.device:
        """Device of the mask."""
        return self.keep.device

    def to(self, device: torch.device | str) -> BlockMask:
        """Copy the mask to another device."""
        return replace(
            self,
            keep=self.keep.to(device),
            counts=self.counts.to(device),
            indices=self.indices.to(device),
            order=None if self.order is None else self.order.to(device),
        )

    def check_values(self) -> None:
        """Check that the lists and the bit map say the same, which kernels take for granted. Waits for the device.

        Raises:
            ValueError: a count exceeds the capacity, a list is not ascending or holds a block that does not exist, the
                lists and the bit map differ, or an order does not hold every row once.
        """
        filled = torch.arange(self.capacity, device=self.device) < self.counts.unsqueeze(-1)
        rows = torch.arange(self.query_blocks, device=self.device)
        listed = self.indices.masked_fill(~filled, 0)
        problems = {
            f"`counts` must be from 0 to the capacity, {self.capacity}": (self.counts < 0)
            | (self.counts > self.capacity),
            f"`indices` must be from 0 to {self.key_blocks - 1}": (listed < 0) | (listed >= self.key_blocks),
            "`indices` of a row must ascend": (self.indices.diff(dim=-1) <= 0) & filled[..., 1:],
        }
        if self.order is not None:
            problems["`order` must hold every row once"] = self.order.sort(-1).values != rows
        for problem, places in problems.items():
            if places.any():
                b, h, row = places.nonzero()[0, :3].tolist()
                raise ValueError(f"{problem}, which batch item {b}, head {h}, row {row} does not obey.")
        if differs := (self.to_dense() != self.keep).nonzero().tolist():
            b, h, row, block = differs[0]
            raise ValueError(
                f"`keep` and `indices` must hold the same blocks, but differ in batch item {b}, head {h}, row {row}, "
                f"key block {block}."
            )

    def first_rows(self, count: int) -> BlockMask:
        """Return the mask of the first query blocks.

        Args:
            count: number of query blocks, from 1 to `query_blocks`.

        Raises:
            ValueError: there are fewer query blocks.
        """
        if not 1 <= count <= self.query_blocks:
            raise ValueError(f"`count` must be from 1 to {self.query_blocks} query blocks, got {count}.")
        first = replace(
            self,
            keep=self.keep[:, :, :count].contiguous(),
            counts=self.counts[:, :, :count].contiguous(),
            indices=self.indices[:, :, :count].contiguous(),
            order=None,
        )
        return first if self.order is None else first.longest_rows_first()

    def longest_rows_first(self) -> BlockMask:
        """Order the rows from longest to shortest, so that no long row starts last.

        Worth it for masks that are reused and whose rows keep different numbers of blocks.
        """
        return replace(self, order=self.counts.argsort(dim=-1, descending=True, stable=True).to(torch.int32))

    def to_dense(self) -> Tensor:
        """Rebuild the bit map from the lists: (B or 1, H or 1, query blocks, key blocks) bool."""
        slots = torch.arange(self.capacity, device=self.device)
        filled = slots < self.counts.unsqueeze(-1)
        blocks = torch.where(filled, self.indices, self.key_blocks).long()  # empty slots are written past the end
        dense = torch.zeros((*self.keep.shape[:3], self.key_blocks + 1), dtype=torch.bool, device=self.device)
        return dense.scatter(-1, blocks, True)[..., : self.key_blocks]

    def pairs(self, query_tokens: int | None = None, key_tokens: int | None = None) -> Tensor:
        """Count the (query, key) pairs of real tokens in kept blocks.

        Args:
            query_tokens: number of queries. None if every block is full.
            key_tokens: number of keys. None if every block is full.

        Returns:
            (B or 1, H or 1) int64.

        Raises:
            ValueError: a length does not end in the mask's last block.
        """
        whole = (self.query_blocks * self.block_size[0], self.key_blocks * self.block_size[1])
        if query_tokens in (None, whole[0]) and key_tokens in (None, whole[1]):
            return self.counts.sum(-1) * (self.block_size[0] * self.block_size[1])
        queries = self._tokens("query_tokens", query_tokens, self.query_blocks, self.block_size[0])
        keys = self._tokens("key_tokens", key_tokens, self.key_blocks, self.block_size[1])
        missing = self.block_size[1] - keys[-1]  # only the last block can be short
        return ((self.counts * self.block_size[1] - self.keep[..., -1] * missing) * queries).sum(-1)

    def density(
        self, query_tokens: int | None = None, key_tokens: int | None = None, *, pooled_pairs: Tensor | int = 0
    ) -> Tensor:
        """Compute the share of all token pairs that attention over this mask evaluates, averaged over batch and heads.

        Args:
            query_tokens: number of queries. None if every block is full.
            key_tokens: number of keys. None if every block is full.
            pooled_pairs: (query, pooled token) pairs computed in addition, as counted by `PooledTokens.pairs`: a
                number or (B or 1, H or 1).

        Returns:
            A 0-dimensional float32 tensor on the mask's device: (pairs of real tokens in kept blocks + pooled pairs) /
            all pairs. Reading it on the host waits for the device.

        Raises:
            ValueError: a length does not end in the mask's last block.
        """
        pairs = self.pairs(query_tokens, key_tokens) + pooled_pairs
        queries = self.query_blocks * self.block_size[0] if query_tokens is None else query_tokens
        keys = self.key_blocks * self.block_size[1] if key_tokens is None else key_tokens
        return (pairs / (queries * keys)).mean()

    def _tokens(self, name: str, tokens: int | None, blocks: int, size: int) -> Tensor:
        """Count the real tokens in each block: (blocks,) int64."""
        if tokens is None:
            tokens = blocks * size
        if -(-tokens // size) != blocks:
            raise ValueError(
                f"`{name}` must end in the last of {blocks} blocks of {size} tokens, "
                f"from {(blocks - 1) * size + 1} to {blocks * size}, got {tokens}."
            )
        starts = torch.arange(blocks, device=self.device) * size
        return (tokens - starts).clamp(max=size)
