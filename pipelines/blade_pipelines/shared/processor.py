"""Base class of the families' attention processors."""

from __future__ import annotations

from typing import Any

import torch
from blade_kernels.qk_norm_rope import qk_norm_rope
from diffusers.models.attention_dispatch import dispatch_attention_fn

from blade.families.protocol import SparseAttention
from blade_pipelines.shared.diffusers_module import DiffusersModule


class SparseProcessor:
    """Self-attention of one layer with BLADE; dense layers and steps use the replaced processor."""

    def __init__(self, layer: SparseAttention, previous: Any) -> None:
        """Create a processor.

        Args:
            layer: the layer, as set up by the method.
            previous: the processor to replace, used as the dense fallback.
        """
        self.layer = layer
        self.previous = previous
        layer.dense_attention = self._attend_densely

    @property
    def _attention_backend(self) -> Any:
        """Diffusers' attention backend, used by the dense fallback."""
        return self.previous._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.previous._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        """Diffusers' parallelism, as the replaced processor has it; BLADE reads the transformer's."""
        return getattr(self.previous, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        if hasattr(self.previous, "_parallel_config"):
            self.previous._parallel_config = config

    def _attend_densely(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_lengths: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend by Diffusers' attention backend from (B, S, H, D) to all keys that are there."""
        there = None
        if key_lengths is not None:
            there = torch.arange(key.shape[1], device=key.device) < key_lengths[:, None]
            there = there[:, None, None]  # (B, 1, 1, S)
        output: torch.Tensor = dispatch_attention_fn(
            query, key, value, attn_mask=there, backend=getattr(self.previous, "_attention_backend", None)
        )
        return output


def norm_and_rope(
    tensor: torch.Tensor,
    norm: DiffusersModule | None,
    kind: str,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    places: torch.Tensor | None,
) -> torch.Tensor:
    """Normalise queries or keys with a module's weights, rotate them and reorder each head's tokens.

    Args:
        tensor: (B, S, H, D).
        norm: the normalisation module; None for no normalisation.
        kind: the module's norm, as named by `qk_norm_rope`.
        cos: see `qk_norm_rope`.
        sin: see `qk_norm_rope`.
        places: see `qk_norm_rope`.
    """
    if norm is None:
        return qk_norm_rope(tensor, cos=cos, sin=sin, places=places)
    if "forward" in norm.__dict__:  # hooked, for instance by offloading, which loads the weights on each call
        heads = tensor.shape[2:]
        tensor = norm(tensor.flatten(2)).unflatten(2, heads) if kind == "rms-all-heads" else norm(tensor)
        return qk_norm_rope(tensor, cos=cos, sin=sin, places=places)
    bias = getattr(norm, "bias", None)
    return qk_norm_rope(
        tensor, norm=kind, weight=norm.weight, bias=bias, eps=norm.eps, cos=cos, sin=sin, places=places
    )
