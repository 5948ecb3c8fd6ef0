"""Sizes of attention layers: given ones, and those of published models."""

from __future__ import annotations

from dataclasses import dataclass

from blade.families.registry import benchmark_layers
from blade.token_grid import TokenGrid


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Size of one attention layer's queries, keys and values."""

    tokens: int
    """Length of the sequence."""
    heads: int = 2
    """Attention heads."""
    head_dim: int = 128
    """Channels of one head."""
    batch: int = 1
    """Number of sequences."""
    model: str | None = None
    """Name of the model with such layers."""
    grid: TokenGrid | None = None
    """Token grid of its videos, which head patterns need."""

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "head_dim", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def __str__(self) -> str:
        return f"{self.model}, {self.tokens:,} tokens" if self.model else f"{self.tokens:,} tokens"


def model_shapes() -> dict[str, AttentionShape]:
    """Return the layers of published models at their usual sizes, by name."""
    return {
        name: AttentionShape(
            model=layer.title,
            tokens=layer.grid.sequence_length,
            heads=layer.heads,
            head_dim=layer.head_dim,
            grid=layer.grid,
        )
        for name, layer in benchmark_layers().items()
    }


def reference_shape() -> AttentionShape:
    """Return the layer that cards are measured at first."""
    name = next(name for name, layer in benchmark_layers().items() if layer.reference)
    return model_shapes()[name]
