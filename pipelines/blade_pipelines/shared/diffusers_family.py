"""The base of the adapters of Diffusers' transformers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from blade.families.data import FamilyData
from blade.families.protocol import Condition, SparseAttention
from blade.families.sampling_defaults import SamplingDefaults
from blade_pipelines.shared.diffusers_module import DiffusersModule
from blade_pipelines.shared.processor import SparseProcessor


class DiffusersFamily:
    """Base of the adapters: the classes of Diffusers that a family is made of, and where its self-attention is.

    The family's data stands beside its module, in a YAML file of the same name.
    """

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
    condition_pipelines: ClassVar[Mapping[tuple[str, Condition], str]] = {}
    """By a pipeline's class and a condition, the class of the same weights that takes the condition."""
    size_multiple: int = 16
    """Pixels that the pipelines want heights and widths to be whole multiples of."""

    @property
    def data(self) -> FamilyData:
        """Presets, released students and sizes for benchmarks."""
        return _read_data(Path(str(sys.modules[type(self).__module__].__file__)).with_suffix(".yaml"))

    def recognises(self, transformer: nn.Module) -> bool:
        """Return whether the transformer is of this family."""
        return isinstance(transformer, self.transformers)

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return what is recommended for a pipeline's model; here, nothing beyond Diffusers' own defaults."""
        return SamplingDefaults()

    def condition_pipeline(self, pipe: Any, condition: Condition) -> str | None:
        """Return the class that takes a condition with the same weights, from `condition_pipelines`."""
        return self.condition_pipelines.get((type(pipe).__name__, condition))

    def cache_problem(self, transformer: nn.Module, cache: str) -> str | None:
        """Return None: every cache may be used."""
        return None

    def without_values(self) -> AbstractContextManager[Any]:
        """Return a context that changes nothing: the forward pass does not ask about values."""
        return nullcontext()

    def blocks(self, transformer: DiffusersModule) -> Sequence[nn.Module]:
        """Return the transformer's blocks."""
        return list(transformer.transformer_blocks)

    def attention_layers(self, transformer: nn.Module) -> Sequence[nn.Module]:
        """Return the self-attention of every block."""
        return [getattr(block, self.attention_name) for block in self.blocks(transformer)]

    def time_embedding(self, transformer: nn.Module) -> nn.Module:
        """Return the module that makes the embedding of the time."""
        return transformer.get_submodule(self.time_embedding_name)

    def heads(self, attention: DiffusersModule) -> int:
        """Return the number of heads."""
        heads: int = attention.heads
        return heads

    def output_projection(self, attention: DiffusersModule) -> torch.Tensor | None:
        """Return the weights of the first of `to_out`, where there are any in floating point."""
        weight = getattr(attention.to_out[0], "weight", None) if getattr(attention, "to_out", None) else None
        return weight if isinstance(weight, torch.Tensor) and weight.is_floating_point() else None

    def dense_reason(self, attention: DiffusersModule) -> str | None:
        """Return why the module cannot be made sparse: a processor that does something else than Diffusers' own."""
        if type(attention.processor) in self.processors:
            return None
        return f"its processor is a {type(attention.processor).__name__}, not Diffusers' {self.processors[0].__name__}"

    def make_processor(self, layer: SparseAttention, previous: Any) -> SparseProcessor:
        """Return the processor for a layer."""
        return self.sparse_processor(layer, previous)


@cache
def _read_data(path: Path) -> FamilyData:
    return FamilyData.from_yaml(path)
