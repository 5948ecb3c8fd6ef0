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
from blade.families.protocol import Condition, GuidanceBatch, Inputs, RowOrder, SparseAttention
from blade.families.sampling_defaults import SamplingDefaults
from blade.families.sequence_split import SequenceSplit
from blade.families.video_lengths import VideoLengths
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
    batched_guidance: GuidanceBatch | None = None
    """Layout of the latents where the passes of guidance are one batch; here they run one after the other."""
    timesteps_rise: bool = False
    """True if timesteps rise from step to step; here they fall, with the noise."""
    guidance_takes_two_passes: ClassVar[bool]
    """True if guidance is no input of the transformer."""
    whole_sequence: bool = False
    """True if one input holds video tokens and the tokens that the grid calls text."""
    size_multiple: int = 16
    """Pixels of which the pipelines require heights and widths to be multiples."""
    tiny_decoders: Mapping[int, tuple[str, ...]] = MappingProxyType({})
    """Published tiny decoders of the pipelines' latents by the number of latent channels; here none."""

    original_names: Sequence[tuple[str, str]] = ()
    """Replacements that turn Diffusers' names of modules into the authors' own; here none, where they are the same."""
    row_orders: Sequence[tuple[str, RowOrder]] = ()
    """Modules of the authors' code whose rows stand in another order; here none."""

    @property
    def guidance_passes(self) -> int:
        """Forward passes of a step with guidance: one more than without, unless guidance is an input of the model."""
        return 2 if self.guidance_takes_two_passes else 1

    @property
    def guidance_batch(self) -> int:
        """Passes of guidance that are one batch: all of them, or each by itself."""
        return 1 if self.batched_guidance is None else self.guidance_passes

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

    def video_lengths(self, pipe: Any) -> VideoLengths | None:
        """Return None: the VAE's compression says it."""
        return None

    def evaluations(self, steps: int) -> int:
        """Return the steps: every one is computed."""
        return steps

    def call_options(self, pipe: Any, request: Any) -> Mapping[str, Any]:
        """Return no arguments of a call beside those of the request's fields."""
        return {}

    def plan_problem(self, pipe: Any) -> str | None:
        """Return None: a run is as many forward passes as it has steps."""
        return None

    def sound_rate(self, pipe: Any) -> int | None:
        """Return None: the pipelines make no sound."""
        return None

    def condition_pipeline(self, pipe: Any, condition: Condition) -> str | None:
        """Return the pipeline class that accepts a condition with the same weights, from `condition_pipelines`."""
        return self.condition_pipelines.get((type(pipe).__name__, condition))

    def cache_problem(self, transformer: nn.Module, cache: str) -> str | None:
        """Return None: all caches work."""
        return None

    def without_values(self) -> AbstractContextManager[Any]:
        """Return a context that changes nothing: the forward pass does not depend on values."""
        return nullcontext()

    def video_timestep(self, inputs: Inputs) -> torch.Tensor:
        """Return all timesteps: those of conditions, where there are any, are the lower ones."""
        timestep: torch.Tensor = inputs["timestep"]
        return timestep

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

    def head_dim(self, transformer: DiffusersModule) -> int:
        """Return the numbers in one head of one token, as the transformer's configuration says."""
        size: int = transformer.config.attention_head_dim
        return size

    def output_projection(self, attention: DiffusersModule) -> torch.Tensor | None:
        """Return the weight of the first layer of `to_out`, or None if there is no floating-point one."""
        weight = getattr(attention.to_out[0], "weight", None) if getattr(attention, "to_out", None) else None
        return weight if isinstance(weight, torch.Tensor) and weight.is_floating_point() else None

    def dense_reason(self, attention: DiffusersModule) -> str | None:
        """Return why the module cannot be made sparse, which is a processor other than Diffusers' own, or None."""
        if type(attention.processor) in self.processors:
            return None
        return f"its processor is a {type(attention.processor).__name__}, not Diffusers' {self.processors[0].__name__}"

    def pass_dense_reason(self, transformer: DiffusersModule, inputs: Inputs) -> str | None:
        """Return None: layers can be sparse in every forward pass."""
        return None

    def scheduler_counts_steps(self, inputs: Inputs) -> bool:
        """Return True: the pipelines step their scheduler itself."""
        return True

    def sequence_split(self, transformer: DiffusersModule) -> SequenceSplit | None:
        """Return None: the sequence cannot be split among ranks."""
        return None

    def make_processor(self, layer: SparseAttention, previous: Any) -> SparseProcessor:
        """Return the processor for a layer."""
        return self.sparse_processor(layer, previous)


@cache
def _read_data(path: Path) -> FamilyData:
    return FamilyData.from_yaml(path)
