"""What BLADE needs to know of a model family: the protocol that an adapter of `blade_pipelines` fulfils."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from blade.token_grid import TokenGrid

if TYPE_CHECKING:
    from blade.attention.layer import SparseLayer
    from blade.families.sampling_defaults import SamplingDefaults

Inputs = dict[str, Any]
"""The arguments of a transformer's forward pass by name."""

Permutation = Callable[[], torch.Tensor | None]
"""Answers with the token order in force, an int64 permutation of the video tokens, or None for raster order."""


class ModelFamily(Protocol):
    """One family of video transformers.

    Its adapter knows the architecture and nothing of methods: where the self-attention layers are, how a latent is
    cut into tokens, and what has to be permuted for the tokens to pass through the blocks in another order.
    """

    name: str
    """The family's name, for messages."""
    guidance_takes_two_passes: bool
    """Whether the pipelines' `guidance_scale` is classifier-free guidance, and no input of the transformer."""

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

    def output_projection(self, attention: nn.Module) -> torch.Tensor | None:
        """Return the weights (channels, H * D) that a self-attention module's output is multiplied with.

        None where there are none of its own, or they are stored in fewer bits.
        """
        ...

    def dense_reason(self, attention: nn.Module) -> str | None:
        """Return why the module cannot be made sparse, or None if it can."""
        ...

    def make_processor(self, layer: SparseLayer, previous: Any) -> Any:
        """Return the attention processor for a layer; `previous` is the one it stands in for, its dense fallback."""
        ...

    def token_grid(self, transformer: nn.Module, inputs: Inputs) -> TokenGrid:
        """Return the grid of the tokens that these inputs make."""
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

    def hook_positions(self, transformer: nn.Module, permutation: Permutation) -> Sequence[Any]:
        """Make position embeddings follow the token order; return handles whose `remove()` undoes it."""
        ...
