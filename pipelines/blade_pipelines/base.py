"""What the adapters of Diffusers' transformers have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from blade.attention.layer import SparseLayer
from blade.families.sampling_defaults import SamplingDefaults
from blade_pipelines.processor import SparseProcessor


class DiffusersFamily:
    """Base of the adapters: which classes of Diffusers a family is made of, and where its self-attention is."""

    transformers: ClassVar[tuple[type[nn.Module], ...]]
    """Classes of the family."""
    processors: ClassVar[tuple[type, ...]]
    """Diffusers' own processors of their self-attention."""
    sparse_processor: ClassVar[type[SparseProcessor]]
    """What stands in for those."""
    attention_name: ClassVar[str]
    """Name of the self-attention in a block."""
    time_embedding_name: ClassVar[str]
    """Name of the module that makes the embedding (B, channels) of the time."""

    def recognises(self, transformer: nn.Module) -> bool:
        """Return whether the transformer is of this family."""
        return isinstance(transformer, self.transformers)

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return what is recommended for a pipeline's model; here, nothing beyond Diffusers' own defaults."""
        return SamplingDefaults()

    def blocks(self, transformer: nn.Module) -> Sequence[nn.Module]:
        """Return the transformer's blocks."""
        return list(transformer.transformer_blocks)

    def attention_layers(self, transformer: nn.Module) -> Sequence[nn.Module]:
        """Return the self-attention of every block."""
        return [getattr(block, self.attention_name) for block in self.blocks(transformer)]

    def time_embedding(self, transformer: nn.Module) -> nn.Module:
        """Return the module that makes the embedding of the time."""
        return transformer.get_submodule(self.time_embedding_name)

    def heads(self, attention: nn.Module) -> int:
        """Return the number of heads."""
        return attention.heads

    def output_projection(self, attention: nn.Module) -> torch.Tensor | None:
        """Return the weights of the first of `to_out`, where there are any in floating point."""
        weight = getattr(attention.to_out[0], "weight", None) if getattr(attention, "to_out", None) else None
        return weight if isinstance(weight, torch.Tensor) and weight.is_floating_point() else None

    def dense_reason(self, attention: nn.Module) -> str | None:
        """Return why the module cannot be made sparse: a processor that does something else than Diffusers' own."""
        if type(attention.processor) in self.processors:
            return None
        return f"its processor is a {type(attention.processor).__name__}, not Diffusers' {self.processors[0].__name__}"

    def make_processor(self, layer: SparseLayer, previous: Any) -> SparseProcessor:
        """Return the processor for a layer."""
        return self.sparse_processor(layer, previous)
