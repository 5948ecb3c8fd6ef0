"""Description of how a transformer's tokens are split among the ranks that compute one video together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Shards(Protocol):
    """The tokens of this rank, as a plan's functions see them."""

    def local_count(self, count: int) -> int:
        """Return how many of the first `count` video tokens, in token order, this rank has."""
        ...


class CutKeyAttention(Protocol):
    """Attention of queries that every rank has to keys and values that are cut."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: (B, Q, H, D), the same on all ranks.
            key: (B, video tokens of this rank, H, D).
            value: (B, video tokens of this rank, H, D).
            attend: attention over whole sequences of some heads.

        Returns:
            (B, Q, H, D), the same on all ranks.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SplitModule:
    """A module of the transformer whose inputs are cut, or whose output is cut or put together."""

    name: str
    """Its name; "" for the transformer itself, and `*` in place of a number for every module of a list."""
    inputs: Mapping[str, int | Callable[[Any, Shards], Any]] = field(default_factory=dict)
    """By argument, the dimension along which a tensor, or each of several, is cut; or what the argument becomes. One
    whose dimension counts no tokens of the whole sequence is left as it is."""
    cut_output: int | None = None
    """Dimension along which its output, a tensor or several, is cut."""
    gathered_output: int | None = None
    """Dimension along which its output is put together again, of all video tokens."""


@dataclass(frozen=True, kw_only=True)
class SequenceSplit:
    """Places where a transformer's sequence is cut and put together, for Ulysses sequence parallelism.

    Between them, every rank has a part of the tokens. Self-attention gathers all of them for a share of the heads.
    """

    modules: tuple[SplitModule, ...]
    """Modules where something is cut or put together."""
    text_apart: bool = False
    """True if text takes part in self-attention as a tensor of its own beside the video's, which is cut by itself."""
    cut_keys: Mapping[str, Callable[[CutKeyAttention, Any], Any]] = field(default_factory=dict)
    """By the name of attention modules, in the form of `SplitModule.name`, that attend from whole queries to keys that
    are cut: makes a processor of such attention and of the processor that it stands in for. Such a model cannot be
    trained while it is split: what every rank computes whole would have the gradient of all ranks' copies."""
