"""Mean-pooled keys and values that share one softmax with the kept blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blade_kernels.block_mask import BlockMask


@dataclass(frozen=True, eq=False)
class PooledTokens:
    """Keys and values averaged over windows of tokens, each representing all real tokens of its window.

    The logarithm of that number is added to a pooled token's logit, as if its mean key occurred once for every token
    of the window.

    Attributes:
        k: (B, P, H, D), mean keys.
        v: (B, P, H, D), mean values.
        log_weight: (P,) float32, ln(real tokens in the window), added to the logits.
        key_block: (P,) int32, the key block of each window: only query blocks whose row of the mask drops that key
            block see the pooled token. None if every query sees every pooled token.
    """

    k: Tensor
    v: Tensor
    log_weight: Tensor
    key_block: Tensor | None = None

    def __post_init__(self) -> None:
        if self.k.ndim != 4 or self.v.shape != self.k.shape:
            raise ValueError(
                "`k` and `v` of pooled tokens must both be (batch, pooled tokens, heads, head size), "
                f"got {tuple(self.k.shape)} and {tuple(self.v.shape)}."
            )
        if self.log_weight.shape != (len(self),) or self.log_weight.dtype != torch.float32:
            raise ValueError(
                f"`log_weight` must be float32 of shape ({len(self)},), "
                f"got {self.log_weight.dtype} of shape {tuple(self.log_weight.shape)}."
            )
        if self.key_block is not None and (
            self.key_block.shape != (len(self),) or self.key_block.dtype != torch.int32
        ):
            raise ValueError(
                f"`key_block` must be None or int32 of shape ({len(self)},), "
                f"got {self.key_block.dtype} of shape {tuple(self.key_block.shape)}."
            )

    def __len__(self) -> int:
        """Number of pooled tokens."""
        return self.k.shape[1]

    def visible(self, mask: BlockMask) -> Tensor:
        """Mark the pooled tokens that each query block sees: (B or 1, H or 1, query blocks, P) bool."""
        if self.key_block is None:
            return mask.keep.new_ones(()).expand(*mask.keep.shape[:3], len(self))
        return ~mask.keep.index_select(-1, self.key_block)

    def pairs(self, mask: BlockMask, query_tokens: int | None = None) -> Tensor | int:
        """Count the (query, pooled token) pairs that attention computes, for `BlockMask.density`.

        Args:
            mask: the mask that the pooled tokens are used with.
            query_tokens: number of queries. None if every query block is full.

        Returns:
            (B or 1, H or 1) int64, or an int if every query sees every pooled token.
        """
        size = mask.block_size[0]
        stop = mask.query_blocks * size if query_tokens is None else query_tokens
        if self.key_block is None:
            return len(self) * stop
        starts = torch.arange(mask.query_blocks, device=mask.device) * size
        return (self.visible(mask).sum(-1) * (stop - starts).clamp(max=size)).sum(-1)


def pool_tokens(
    k: Tensor, v: Tensor, window: int, *, start: int = 0, stop: int | None = None, block_size: int | None = None
) -> PooledTokens:
    """Average keys and values over consecutive windows of tokens; differentiable.

    Args:
        k: (B, S, H, D), keys; consecutive tokens form the blocks.
        v: (B, S, H, D), values.
        window: tokens averaged into one. The last window may be shorter.
        start: first token to pool. Text is not pooled, so this is the number of text tokens before the video.
        stop: token after the last one to pool. None means the end of the sequence.
        block_size: None for windows that run from `start` to `stop` and are seen by every query. Or the tokens in a
            key block, for pooled tokens that are seen by the query blocks that drop their key block: then only blocks
            that lie entirely between `start` and `stop` are pooled, windows restart in each block, and a window is at
            most as long as a block.

    Returns:
        The pooled tokens; none if no token, or no whole block, lies between `start` and `stop`.

    Raises:
        ValueError: mismatched shapes, a window or block size below 1, or a range outside the sequence.

    Source: BLADE, arXiv 2508.10774 (ASA_GT); each window is weighted by its number of tokens.
    """
    if k.ndim != 4 or v.shape != k.shape:
        raise ValueError(
            f"`k` and `v` must both be (batch, tokens, heads, head size), got {tuple(k.shape)} and {tuple(v.shape)}."
        )
    tokens = k.shape[1]
    stop = tokens if stop is None else stop
    if window < 1:
        raise ValueError(f"`window` must be at least 1 token, got {window}.")
    if not 0 <= start <= stop <= tokens:
        raise ValueError(
            f"`start` and `stop` must satisfy 0 <= start <= stop <= {tokens} tokens, got {start} and {stop}."
        )
    if block_size is not None and block_size < 1:
        raise ValueError(f"`block_size` must be at least 1 token or None, got {block_size}.")

    if block_size is None:
        block_size, first_block = max(stop - start, 1), None  # one block that covers everything
    else:
        first_block = -(-start // block_size)
        start = first_block * block_size
        stop = tokens if stop == tokens else stop // block_size * block_size
    window = min(window, block_size)
    windows_per_block = -(-block_size // window)
    whole = max(stop - start, 0) // block_size  # not divmod, which the compiler lacks for symbolic sizes
    remaining = max(stop - start, 0) - whole * block_size
    pooled = whole * windows_per_block + -(-remaining // window)

    index = torch.arange(pooled, device=k.device)
    block, offset = index // windows_per_block, index % windows_per_block * window
    block_tokens = (stop - start - block * block_size).clamp(max=block_size)
    counts = (block_tokens - offset).clamp(max=window)  # real tokens in each window
    return PooledTokens(
        k=_window_means(k[:, start : max(start, stop)], counts, window, block_size),
        v=_window_means(v[:, start : max(start, stop)], counts, window, block_size),
        log_weight=counts.to(torch.float32).log(),
        key_block=None if first_block is None else (block + first_block).to(torch.int32),
    )


def _window_means(x: Tensor, counts: Tensor, window: int, block_size: int) -> Tensor:
    """Average (B, n, H, D) over windows that restart in every block, summed in float32 or wider."""
    batch, _, heads, size = x.shape
    x = _pad_tokens(x, block_size).reshape(-1, block_size, heads, size)  # (B * blocks, ...)
    x = _pad_tokens(x, window).reshape(batch, -1, window, heads, size)
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = x.sum(2, dtype=dtype)[:, : counts.shape[0]]
    return (sums / counts.to(dtype).view(1, -1, 1, 1)).to(x.dtype)


def _pad_tokens(x: Tensor, multiple: int) -> Tensor:
    """Pad dimension 1 with zeros to a multiple of `multiple`."""
    missing = -x.shape[1] % multiple
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
