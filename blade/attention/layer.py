"""What BLADE keeps for one self-attention layer."""

from __future__ import annotations

import torch

from blade.attention.adaptive import AdaptivePlan, adaptive_attention, draw_table
from blade.config import BladeConfig


class SparseLayer:
    """One self-attention layer: whether it is sparse in this forward pass, and the tensors that it reads and writes.

    Everything that differs from layer to layer or step to step is a tensor or the one bool `sparse`, so that all
    layers and steps share two compiled graphs.
    """

    def __init__(
        self, index: int, config: BladeConfig, heads: int, step: torch.Tensor, dense_reason: str | None
    ) -> None:
        """Make the layer's tables.

        Args:
            index: number of the layer in the transformer.
            config: the configuration.
            heads: number of attention heads.
            step: (1,) int64, the current step as an index into `draws`; shared by all layers.
            dense_reason: why the layer always stays dense, or None.
        """
        self.index = index
        self.dense_reason = dense_reason
        self.sparse = False
        self.running = False
        self.plan: AdaptivePlan | None = None
        self.step = step
        self.implementation: str | None = None
        self.draws = draw_table(config, index, heads) if dense_reason is None else torch.empty(0)
        # sum of densities over sparse calls, number of sparse calls, number of dense calls
        self.tally = torch.zeros(3, dtype=torch.float32)

    def move(self, device: torch.device, step: torch.Tensor) -> None:
        """Bring the layer's tensors to a device, where they aren't there yet."""
        self.step = step
        if self.tally.device != device:
            with torch.inference_mode(False):
                self.draws, self.tally = self.draws.to(device), self.tally.to(device)

    def count_dense(self) -> None:
        """Note a dense forward pass."""
        self.tally[2:].add_(1)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend sparsely and note the density.

        Args:
            query: (B, S, H, D), in token order, rotated.
            key: (B, S, H, D).
            value: (B, S, H, D).
            key_lengths: (B,) integers: the keys from there on, which are text, are absent. None: all are there.

        Returns:
            (B, S, H, D).

        Raises:
            RuntimeError: if BLADE's hook on the transformer did not run, so that the tokens are in no known order.
        """
        plan = self.plan
        # A backward pass that recomputes the layer (gradient checkpointing) comes after the transformer has ended.
        if plan is None or not (self.running or torch.is_grad_enabled()):
            raise RuntimeError(
                "BLADE's hook on the transformer did not run: something replaced the transformer's forward after "
                "`apply_blade`. Call `apply_blade` again."
            )
        draw = self.draws.index_select(0, self.step).squeeze(0)
        output, density, self.implementation = adaptive_attention(query, key, value, plan, draw, key_lengths)
        self.tally[0:1].add_(density)
        self.tally[1:2].add_(1)
        return output
