"""One sparse self-attention layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from blade.attention.frame_keys import FrameKeys
from blade.attention.reuse import Kept, PassChoices
from blade.attention.sequence_parallel import HeadShare
from blade.token_grid import TokenGrid


class Plan(Protocol):
    """Plan that all layers share for one shape of latent, worked out once."""

    @property
    def grid(self) -> TokenGrid:
        """The tokens."""
        ...

    @property
    def token_order(self) -> str:
        """The model's token order."""
        ...

    @property
    def is_full(self) -> bool:
        """True if nothing is ever left out."""
        ...

    @property
    def moves_heads(self) -> bool:
        """True if a head may have a token order of its own."""
        ...

    def head_places(self, rows: tuple[torch.Tensor, ...]) -> torch.Tensor | None:
        """Return the place of each token of each head at this step, (H, S) int64; None: in the model's order."""
        ...

    def rows_of_heads(self, rows: tuple[torch.Tensor, ...], heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what some heads, (heads,) int64, read of a layer's rows."""
        ...

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: tuple[torch.Tensor, ...],
        key_lengths: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        kept: Kept | None = None,
        beside: FrameKeys | None = None,
        share: HeadShare | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, str]:
        """Attend.

        Args:
            query: (B, S, H, D), in the model's token order, after position embeddings.
            key: (B, S, H, D).
            value: (B, S, H, D).
            rows: what the layer reads at this step.
            key_lengths: (B,) integers: the keys from there on, which are text, are absent.
            places: `head_places`, if queries and keys are there already.
            kept: where the plan chooses blocks, the mask of an earlier step; see `Kept`.
            beside: keys for the queries of single frames, all of which are kept. The density does not count them.
            share: where these are the heads of one rank, and `rows` theirs, the heads of each.

        Returns:
            (B, S, H, D) output, the density, a float32 tensor of no dimensions, and what computed the output.
        """
        ...


class SparseLayer:
    """One self-attention layer: whether it is sparse in this forward pass, and the tensors that it reads and writes.

    Everything that differs from layer to layer or step to step is a tensor or the one bool `sparse`, so that all
    layers and steps share two compiled graphs.
    """

    def __init__(self, index: int, step: torch.Tensor, dense_reason: str | None) -> None:
        """Make a layer without tables.

        Args:
            index: number of the layer in the transformer.
            step: (1,) int64, the current step as a row of `tables`; shared by all layers.
            dense_reason: why the layer always stays dense, or None.
        """
        self.index = index
        self.dense_reason = dense_reason
        self.sparse = False
        # where several ranks compute the video of this forward pass together
        self.share: HeadShare | None = None
        self.dense_attention: Callable[..., torch.Tensor] | None = None
        self.running = False
        self.plan: Plan | None = None
        self.step = step
        # of this forward pass; None where blocks are chosen at every step
        self.choices: PassChoices | None = None
        self.implementation: str | None = None
        # what the method reads at every step, a row each
        self.tables: tuple[torch.Tensor, ...] = ()
        # sum of densities over sparse calls, number of sparse calls, number of dense calls
        self.tally = torch.zeros(3, dtype=torch.float32)
        # this rank's part of the sum of densities of the pass
        self.density_part = torch.zeros(1, dtype=torch.float32)

    def move(self, device: torch.device, step: torch.Tensor) -> None:
        """Bring the layer's tensors to a device, where they aren't there yet."""
        self.step = step
        if any(tensor.device != device for tensor in (self.tally, *self.tables)):
            with torch.inference_mode(False):
                self.tally, self.density_part, *tables = (
                    tensor.to(device) for tensor in (self.tally, self.density_part, *self.tables)
                )
                self.tables = tuple(tables)

    @property
    def grid(self) -> TokenGrid:
        """The tokens in a sparse forward pass."""
        assert self.plan is not None
        return self.plan.grid

    @property
    def attends(self) -> bool:
        """True if `attend` computes this pass, and not the processor that was there before."""
        return self.sparse or self.share is not None

    def count_dense(self) -> None:
        """Note a dense forward pass."""
        self.tally[2:].add_(1)

    def video_tokens(self, tokens: int) -> int:
        """Return the video tokens of all ranks, of which this one has `tokens`."""
        return tokens if self.share is None else self.share.shards.video

    def places(self) -> torch.Tensor | None:
        """Return the place that the method wants each token of each head at, (H, S) int64; None: as they are."""
        if self.plan is None or not self.plan.moves_heads or self.share is not None:  # asked in every layer
            return None
        return self.plan.head_places(self._rows())

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_lengths: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        frame_keys: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend sparsely, or densely where a dense layer's heads are shared out to ranks, and note the density.

        Args:
            query: (B, S, H, D), in token order, rotated; S are the tokens of this rank, the video's first.
            key: (B, S, H, D).
            value: (B, S, H, D).
            key_lengths: (B,) integers: the keys from there on, which are text, are absent. None: all are there.
            places: what `places` says, if queries and keys are there already.
            frame_keys: keys and values, (B, F, R, H, D) each, for the queries of each of the last F frames.

        Returns:
            (B, S, H, D).

        Raises:
            RuntimeError: if BLADE's hook on the transformer did not run, so that the tokens are in no known order.
        """
        plan, share = self.plan, self.share
        if not self.sparse:
            self.count_dense()
            assert share is not None and self.dense_attention is not None
            query, key, value = share.to_heads(query, key, value)
            if len(share.heads):  # some ranks may have none
                query = self.dense_attention(query, key, value, key_lengths)
            return share.to_tokens(query)
        # A backward pass that recomputes the layer (gradient checkpointing) comes after the transformer has ended.
        if plan is None or not (self.running or torch.is_grad_enabled()):
            raise RuntimeError(
                "BLADE's hook on the transformer did not run: something replaced the transformer's forward after "
                "`apply_blade`. Call `apply_blade` again."
            )
        kept: Kept | None = None
        if not torch.compiler.is_compiling() and self.choices is not None:
            kept = partial(self.choices.mask, self.index)
        beside = None if frame_keys is None else FrameKeys(*frame_keys)
        rows = self._rows()
        if share is None:
            output, density, self.implementation = plan.attend(
                query, key, value, rows, key_lengths, places, kept, beside
            )
            self.tally[0:1].add_(density)
            self.tally[1:2].add_(1)
            return output
        assert beside is None
        query, key, value = share.to_heads(query, key, value)
        rows = plan.rows_of_heads(rows, share.heads)
        output, density, self.implementation = plan.attend(
            query, key, value, rows, key_lengths, kept=kept, share=share
        )
        if self.running:  # a backward pass that recomputes the layer is not counted, as ranks have summed by then
            self.density_part.add_(density * (len(share.heads) / sum(share.counts)))
            self.tally[1:2].add_(1)
        return share.to_tokens(output)

    def _rows(self) -> tuple[torch.Tensor, ...]:
        return tuple(table.index_select(0, self.step).squeeze(0) for table in self.tables)
