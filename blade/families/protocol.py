"""The protocol of a model family: everything that BLADE asks an adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import nn

from blade.families.data import FamilyData
from blade.families.sampling_defaults import SamplingDefaults
from blade.families.sequence_split import SequenceSplit
from blade.families.video_lengths import VideoLengths
from blade.token_grid import TokenGrid

Inputs = dict[str, Any]
"""The arguments of a transformer's forward pass by name."""

Permutation = Callable[[], torch.Tensor | None]
"""Answers with the token order in force, an int64 permutation of the video tokens, or of the whole sequence with
`ModelFamily.whole_sequence`; None for raster order."""


Condition = Literal["image", "video"]
"""An input beside the prompt that a video is made from."""


RowOrder = Literal["swapped-halves", "by-head"]
"""How the rows of a module of the authors' stand: its halves are the other way round than in Diffusers, or those of
queries, keys and values alternate head by head, in files that keep them so (DiffSynth)."""

GuidanceBatch = Literal["BCFHW", "BFCHW", "tokens"]
"""Layout of a batch of latents: batch, channels, frames, height and width, or packed tokens."""


class SparseAttention(Protocol):
    """One self-attention layer, as the processor of a family sees it."""

    sparse: bool
    """True in a sparse forward pass."""
    dense_attention: Callable[..., torch.Tensor] | None
    """Dense attention over (B, S, H, D) queries, keys and values, and (B,) key lengths or None, for layers whose heads
    are shared out to ranks; set by the processor."""

    @property
    def attends(self) -> bool:
        """True if `attend` computes this pass, and not the processor that was there before."""
        ...

    @property
    def grid(self) -> TokenGrid:
        """The tokens in a sparse forward pass."""
        ...

    def count_dense(self) -> None:
        """Count a dense forward pass."""
        ...

    def video_tokens(self, tokens: int) -> int:
        """Return the video tokens of all ranks, of which this one has `tokens`."""
        ...

    def places(self) -> torch.Tensor | None:
        """Return the place that the method wants each token of each head at, (H, S) int64; None: as they are."""
        ...

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_lengths: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        frame_keys: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend sparsely.

        Args:
            query: (B, S, H, D), in token order, rotated.
            key: (B, S, H, D).
            value: (B, S, H, D).
            key_lengths: (B,) integers: the keys from there on, which are text, are absent. None: all are there.
            places: the result of `places`, if queries and keys are there already.
            frame_keys: keys and values, (B, F, R, H, D) each, for the queries of each of the last F frames, of a grid
                whose frames are apart. They share the softmax with the sequence's, and all are kept.

        Returns:
            (B, S, H, D).
        """
        ...


class ModelFamily(Protocol):
    """One family of video transformers.

    Its adapter knows the architecture and nothing of methods: where the self-attention layers are, how a latent is
    cut into tokens, and what has to be permuted for the tokens to pass through the blocks in another order.
    """

    name: str
    """The family's name, for messages."""
    guidance_takes_two_passes: bool
    """True if the pipelines' `guidance_scale` is classifier-free guidance, and no input of the transformer."""
    batched_guidance: GuidanceBatch | None
    """Layout of the latents where the pipelines run the passes of guidance as one batch; None: one after the other."""
    timesteps_rise: bool
    """True if timesteps rise from step to step, as the noise falls."""
    guidance_passes: int
    """Forward passes of a step with guidance, each batch item of the same video being one."""
    guidance_batch: int
    """Most of them that the pipelines run as one batch."""
    whole_sequence: bool
    """True if one input holds the tokens that the grid calls text beside its video tokens. A token order is then a
    permutation of the whole sequence, in which they stay where they are."""
    size_multiple: int
    """Pixels that the pipelines want heights and widths to be whole multiples of, whatever the VAE."""
    tiny_decoders: Mapping[int, tuple[str, ...]]
    """Names of the published tiny decoders (TAEHV) that take latents as the pipelines return them, with
    `output_type="latent"`, by the number of latent channels; none where no published one does."""

    original_names: Sequence[tuple[str, str]]
    """Regular expressions and what replaces them, in order, by which a module's name in Diffusers becomes its name in
    the authors' own code, as trainers write it into LoRA files. Modules that get the same name are rows of a fused
    one, in the order of the expressions that match them."""

    row_orders: Sequence[tuple[str, RowOrder]]
    """Regular expressions of names in the authors' own code whose rows stand in another order than in Diffusers."""

    @property
    def data(self) -> FamilyData:
        """Presets, released students and sizes for benchmarks."""
        ...

    def recognises(self, transformer: nn.Module) -> bool:
        """Return whether the transformer is of this family."""
        ...

    def preset_name(self, transformer: nn.Module) -> str:
        """Return the name of the preset that suits the transformer."""
        ...

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return what is recommended for a pipeline's model.

        Args:
            pipe: the pipeline.
            height: pixels that were asked for, if any.
            width: pixels that were asked for, if any.
        """
        ...

    def video_lengths(self, pipe: Any) -> VideoLengths | None:
        """Return the numbers of frames that a pipeline makes; None: what its VAE's compression of time says."""
        ...

    def evaluations(self, steps: int) -> int:
        """Return how often a schedule of so many steps, as the pipelines' call counts them, computes a step."""
        ...

    def call_options(self, pipe: Any, request: Any) -> Mapping[str, Any]:
        """Return the arguments of a pipeline's call that a request entails, beside those of its own fields' names.

        Args:
            pipe: the pipeline.
            request: the resolved request; `frames`, `fps`, `steps`, `guidance_scale` and `video` may be read.

        Raises:
            ValueError: if the pipeline would take a field for something else.
        """
        ...

    def plan_problem(self, pipe: Any) -> str | None:
        """Return why a run's operations cannot be planned from its size and steps, or None if they can."""
        ...

    def sound_rate(self, pipe: Any) -> int | None:
        """Return the samples a second of the sound that a pipeline makes beside its video; None: it makes none.

        The pipeline's output then holds the sound as `audio`, (B, channels, samples).
        """
        ...

    def condition_pipeline(self, pipe: Any, condition: Condition) -> str | None:
        """Return the class of Diffusers that makes a video from a condition with a pipeline's weights.

        Args:
            pipe: a pipeline whose own call does not take the condition.
            condition: the input.

        Returns:
            The name of the class, or None if these weights cannot take the condition.
        """
        ...

    def cache_problem(self, transformer: nn.Module, cache: str) -> str | None:
        """Return why one of Diffusers' caches must not be used with a transformer, or None if it may be.

        Args:
            transformer: the transformer.
            cache: the name of the cache, such as "first-block".
        """
        ...

    def without_values(self) -> AbstractContextManager[Any]:
        """Return a context in which the transformer runs on the meta device, where its inputs have no values."""
        ...

    def attention_layers(self, transformer: nn.Module) -> Sequence[nn.Module]:
        """Return the self-attention modules of the main blocks, in the order in which they run."""
        ...

    def blocks(self, transformer: nn.Module) -> Sequence[nn.Module]:
        """Return the main blocks, one for each of `attention_layers`."""
        ...

    def time_embedding(self, transformer: nn.Module) -> nn.Module:
        """Return the module that makes the embedding of the time, (B, channels)."""
        ...

    def heads(self, attention: nn.Module) -> int:
        """Return the number of heads of a self-attention module."""
        ...

    def head_dim(self, transformer: nn.Module) -> int:
        """Return the numbers in one head of one token."""
        ...

    def output_projection(self, attention: nn.Module) -> torch.Tensor | None:
        """Return the weights (channels, H * D) that a self-attention module's output is multiplied with.

        None where there are none of its own, or they are stored in fewer bits.
        """
        ...

    def dense_reason(self, attention: nn.Module) -> str | None:
        """Return why the module cannot be made sparse, or None if it can."""
        ...

    def pass_dense_reason(self, transformer: nn.Module, inputs: Inputs) -> str | None:
        """Return why no layer can be sparse in a forward pass with these inputs, or None if layers can."""
        ...

    def scheduler_counts_steps(self, inputs: Inputs) -> bool:
        """Return whether the pipeline's scheduler counts the steps; False where the pipeline steps copies of it."""
        ...

    def make_processor(self, layer: SparseAttention, previous: Any) -> Any:
        """Return the attention processor for a layer; `previous` is the one it stands in for, its dense fallback."""
        ...

    def token_grid(self, transformer: nn.Module, inputs: Inputs) -> TokenGrid:
        """Return the grid of the tokens that these inputs make."""
        ...

    def video_timestep(self, inputs: Inputs) -> torch.Tensor:
        """Return the timesteps of the video that is made, of any shape, out of all that the inputs have."""
        ...

    def example_inputs(
        self,
        transformer: nn.Module,
        latent_size: tuple[int, int, int],
        *,
        batch: int = 1,
        text_tokens: int | None = None,
    ) -> Inputs:
        """Return inputs of a size, all zeros, on the transformer's device and in its type.

        Args:
            transformer: the transformer.
            latent_size: frames, height and width of the latent.
            batch: number of latents.
            text_tokens: length of the text; None takes the length that the family's pipeline pads to.
        """
        ...

    def permute_inputs(self, transformer: nn.Module, inputs: Inputs, permutation: torch.Tensor) -> Inputs:
        """Return the inputs with whatever belongs to single tokens put into token order."""
        ...

    def restore_output(self, transformer: nn.Module, output: Any, inverse: torch.Tensor) -> Any:
        """Return the transformer's output with its patches put back from token order into raster order."""
        ...

    def sequence_split(self, transformer: nn.Module) -> SequenceSplit | None:
        """Return where the sequence is cut for several ranks to compute one video, or None if it cannot be."""
        ...

    def hook_positions(self, transformer: nn.Module, permutation: Permutation) -> Sequence[Any]:
        """Make position embeddings follow the token order; return handles whose `remove()` undoes it."""
        ...
