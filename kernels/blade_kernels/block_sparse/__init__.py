"""Attention over the blocks kept by a `BlockMask`."""

from blade_kernels.block_sparse.api import IMPLEMENTATIONS, block_sparse_attention, resolve_implementation
from blade_kernels.block_sparse.pooled import PooledTokens, pool_tokens

__all__ = ["IMPLEMENTATIONS", "PooledTokens", "block_sparse_attention", "pool_tokens", "resolve_implementation"]
