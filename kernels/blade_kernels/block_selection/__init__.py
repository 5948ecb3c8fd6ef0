"""Block selection, from queries and keys to a `BlockMask`: score pairs of blocks, then select.

The scoring functions return an importance, (B, H, query blocks, key blocks) in float32: the larger it is, the more a
query block needs a key block. `select_blocks` turns any such tensor into a mask. Apart from the implementation
`naive`, nothing here waits for the device.
"""

from blade_kernels.block_selection.importance import (
    STATISTICS,
    largest_key_offsets,
    mean_pooled_importance,
    sampled_importance,
    value_spread,
)
from blade_kernels.block_selection.selection import BUDGETS, local_blocks, random_blocks, select_blocks

__all__ = [
    "BUDGETS",
    "STATISTICS",
    "largest_key_offsets",
    "local_blocks",
    "mean_pooled_importance",
    "random_blocks",
    "sampled_importance",
    "select_blocks",
    "value_spread",
]
