"""Keys beside the sequence that the queries of single frames attend to, such as those of another video's frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse.api import block_sparse_attention


@dataclass(frozen=True, eq=False)
class FrameKeys:
    """Keys and values for the queries of each of the last frames, which share a softmax with those of the sequence."""

    key: torch.Tensor
    """(B, F, R, H, D): R keys for the queries of each of the last F frames."""
    value: torch.Tensor
    """(B, F, R, H, D)."""

    def join(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        frame: int,
        *,
        block_size: tuple[int, int],
        implementation: str,
    ) -> torch.Tensor:
        """Add these keys to the attention of queries to a sequence, by the log-sum-exps of both. Differentiable.

        Args:
            query: (B, S, H, D), frame by frame.
            output: (B, S, H, D), their attention to the sequence.
            lse: (B, S, H), the log-sum-exp of its logits.
            frame: queries in a frame.
            block_size: queries and keys in a block.
            implementation: see `block_sparse_attention`; all of these keys are kept.

        Returns:
            (B, S, H, D) in the dtype of `output`.
        """
        batch, frames, keys = self.key.shape[:3]
        first = query.shape[1] - frames * frame
        queries = query[:, first:].unflatten(1, (frames, frame)).flatten(0, 1)
        blocks = (-(-frame // block_size[0]), -(-keys // block_size[1]))
        every = BlockMask.from_dense(torch.ones(1, 1, *blocks, dtype=torch.bool, device=query.device), block_size)
        beside, beside_lse = block_sparse_attention(
            queries, self.key.flatten(0, 1), self.value.flatten(0, 1), every, return_lse=True,
            implementation=implementation,
        )  # fmt: skip
        beside, beside_lse = (tensor.unflatten(0, (batch, frames)).flatten(1, 2) for tensor in (beside, beside_lse))
        own_lse = lse[:, first:]
        both = torch.logaddexp(own_lse, beside_lse)
        own_share, share = ((part - both).exp().unsqueeze(-1) for part in (own_lse, beside_lse))
        joined = (own_share * output[:, first:] + share * beside).to(output.dtype)
        return torch.cat((output[:, :first], joined), dim=1)
