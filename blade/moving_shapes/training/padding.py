"""Cross-attention over padded captions without the cost of the padding.

`WanPipeline` pads the text embedding with zeros to 512 tokens and Wan's cross-attention sees them all. Equal keys can
be replaced by fewer with the bias ln(how many each stands for) on their logits, which gives the same output.
"""

from __future__ import annotations

import math
from typing import Any

import torch

TEXT_LENGTH = 512
"""The length to which `WanPipeline` pads."""


def padding_bias(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """The logit bias that makes `width` text tokens stand for `TEXT_LENGTH`.

    Args:
        lengths: (B,) number of real tokens of each caption, less than `width`.
        width: Length of the text embedding that is passed; tokens after the real ones are zeros.

    Returns:
        (B, 1, 1, width) float32: 0 on real tokens, ln((512 - length) / (width - length)) on zeros.
    """
    stands_for = ((TEXT_LENGTH - lengths) / (width - lengths)).log()[:, None]
    real = torch.arange(width, device=lengths.device)[None] < lengths[:, None]
    return torch.where(real, 0.0, stands_for)[:, None, None]


class PaddedCrossAttention:
    """Wan's cross-attention with a bias on its logits; set `bias` before each forward.

    Source: the computation is `diffusers.models.transformers.transformer_wan.WanAttnProcessor`.
    """

    def __init__(self) -> None:
        self.bias: torch.Tensor | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Any = None,
    ) -> torch.Tensor:
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        key = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        value = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        weights = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]) + self.bias, dim=-1)
        output = (weights @ value).transpose(1, 2).flatten(2)
        projected: torch.Tensor = attn.to_out[1](attn.to_out[0](output))
        return projected
