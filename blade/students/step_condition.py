"""Telling a network which of several trajectories, or which step, it is on: a vector added to the time's embedding.

Source: TDM, arXiv 2503.06674, steps as a condition. The vectors begin at zero, so that the network begins as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

ATTRIBUTE = "step_condition"
"""Name under which it is a part of the module that embeds the time."""


class StepCondition(nn.Module):
    """Vectors of each role, and the hook that adds the one in force."""

    def __init__(self, time_embedding: nn.Module, sizes: dict[str, int]) -> None:
        """Make the vectors and put them into a transformer.

        Args:
            time_embedding: the module that makes the embedding of the time, (B, channels).
            sizes: number of vectors of each role.
        """
        super().__init__()
        like = next(weight for weight in reversed(list(time_embedding.parameters())))
        channels: int = time_embedding.get_submodule("linear_2").out_features  # type: ignore[assignment]  # nn.Linear
        self.vectors = nn.ModuleDict({role: nn.Embedding(size, channels) for role, size in sizes.items()})
        for weight in self.vectors.parameters():
            nn.init.zeros_(weight)
        self.to(like.device)
        self.choose: Callable[[], tuple[str, torch.Tensor] | None] = lambda: None
        """Says which role's vectors are added, and which of them, (B,) or (1,) int64; None: none."""
        time_embedding.add_module(ATTRIBUTE, self)
        handle = time_embedding.register_forward_hook(self._add)

        def remove() -> None:
            handle.remove()
            delattr(time_embedding, ATTRIBUTE)

        self.remove = remove
        """Takes it out of the transformer."""

    def _add(self, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor | None:
        chosen = self.choose()
        if chosen is None or chosen[0] not in self.vectors:
            return None
        role, index = chosen
        added: torch.Tensor = self.vectors[role](index.to(output.device))
        # with a time for each token, the rows of the embedding are tokens
        return output + added.repeat_interleave(len(output) // len(added), dim=0).to(output.dtype)
