"""Base class of the adapters for Diffusers' transformers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import nn

from blade.families.data import FamilyData
from blade.families.protocol import Condition, SparseAttention
from blade.families.sampling_defaults import SamplingDefaults
from blade_pipelines.shared.diffusers_module import DiffusersModule
from blade_pipelines.shared.processor import SparseProcessor


class DiffusersFamily:
    """Base class of the adapters: Diffusers' classes of a family, and the location of its self-attention.

    The family's data is in a YAML file next to its module, with the same name.
    """

    transformers: ClassVar[tuple[type[nn.Module], ...]]
    """Transformer classes of the family."""
    processors: ClassVar[tuple[type, ...]]
    """Diffusers' own processors for their self-attention."""
    sparse_processor: ClassVar[type[SparseProcessor]]
    """Replacement for those processors."""
    attention_name: ClassVar[str]
    """Attribute of a block that holds its self-attention."""
    time_embedding_name: ClassVar[str]
    """Name of the submodule that computes the time embedding, (B, channels)."""
    condition_pipelines: ClassVar[Mapping[tuple[str, Condition], str]] = {}
    """Pipeline class that accepts a condition with the same weights, by the pipeline's class and the condition."""
    guidance_as_batch: bool = False
    """Whether guidance takes a batch of two; here two calls, or none."""
    size_multiple: int = 16
    """Pixels of which the pipelines require heights and widths to be multiples."""
    tiny_decoders: Mapping[int, tuple[str, ...]] = MappingProxyType({})
    """Published tiny decoders of the pipelines' latents by the number of latent channels; here none."""

    original_names: Sequence[tuple[str, str]] = ()
    """Replacements that turn Diffusers' names of modules into the authors' own; here none, where they are the same."""

    @property
    def data(self) -> FamilyData:
        """Presets, released students and benchmark sizes."""
        return _read_data(Path(str(sys.modules[type(self).__module__].__file__)).with_suffix(".yaml"))

    def recognises(self, transformer: nn.Module) -> bool:
        """Return whether the transformer belongs to this family."""
        return isinstance(transformer, self.transformers)

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return the recommended sampling settings of a pipeline's model; here only Diffusers' own defaults."""
        return SamplingDefaults()

    def condition_pipeline(self, pipe: Any, condition: Condition) -> str | None:
        """Return the pipeline class that accepts a condition with the same weights, from `condition_pipelines`."""
        return self.condition_pipelines.get((type(pipe).__name__, condition))

    def cache_problem(self, transformer: nn.Module, cache: str) -> str | None:
        """Return None: all caches work."""
        return None

    def without_values(self) -> AbstractContextManager[Any]:
        """Return a context that changes nothing: the forward pass does not depend on values."""
        return nullcontext()

    def blocks(self, transformer: DiffusersModule) -> Sequence[nn.Module]:
        """Return the transformer's blocks."""
        return list(transformer.transformer_blocks)

    def attention_layers(self, transformer: nn.Module) -> Sequence[nn.Module]:
        """Return the self-attention of every block."""
        return [getattr(block, self.attention_name) for block in self.blocks(transformer)]

    def time_embedding(self, transformer: nn.Module) -> nn.Module:
        """Return the module that computes the time embedding."""
        return transformer.get_submodule(self.time_embedding_name)

    def heads(self, attention: DiffusersModule) -> int:
        """Return the number of heads."""
        heads: int = attention.heads
        return heads

    def output_projection(self, attention: DiffusersModule) -> torch.Tensor | None:
        """Return the weight of the first layer of `to_out`, or None if there is no floating-point one."""
        weight = getattr(attention.to_out[0], "weight", None) if getattr(attention, "to_out", None) else None
        return weight if isinstance(weight, torch.Tensor) and weight.is_floating_point() else None

    def dense_reason(self, attention: DiffusersModule) -> str | None:
        """Return why the module cannot be made sparse, which is a processor other than Diffusers' own, or None."""
        if type(attention.processor) in self.processors:
            return None
        return f"its processor is a {type(attention.processor).__name__}, not Diffusers' {self.processors[0].__name__}"

    def make_processor(self, layer: SparseAttention, previous: Any) -> SparseProcessor:
        """Return the processor for a layer."""
        return self.sparse_processor(layer, previous)


@cache
def _read_data(path: Path) -> FamilyData:
    return FamilyData.from_yaml(path)
