"""The largest of non-negative numbers, with ties in a fixed order."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(x: Tensor, count: int, *, ordered: bool = False) -> Tensor:
    """Find the `count` largest along the last dimension, (.., count) int64; ties by increasing index.

    Args:
        x: non-negative float32. Their bits, read as integers, are ordered as they are and leave room for the index.
        count: at most the size of the last dimension.
        ordered: return them in decreasing order.
    """
    size = x.shape[-1]
    tie_break = torch.arange(size - 1, -1, -1, device=x.device)
    return (x.abs().view(torch.int32).long() * size + tie_break).topk(count, sorted=ordered).indices
