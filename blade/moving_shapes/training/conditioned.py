"""Text encoder and transformer as they are trained together, and their loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from .components import FLOW_SHIFT, TransformerSize, build_pipeline, build_text_encoder, build_transformer
from .padding import PaddedCrossAttention, padding_bias

CAPTION_TOKENS = 24
"""The longest caption has 22 tokens; at least one of padding must be left."""


class TextConditionedTransformer(nn.Module):
    """Text encoder and transformer as they are trained: captions in, velocity out."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, size: TransformerSize | None = None) -> None:
        super().__init__()
        self.tokenizer, self.size = tokenizer, size or TransformerSize()
        self.text_encoder: UMT5EncoderModel = build_text_encoder()
        self.transformer: WanTransformer3DModel = build_transformer(self.size)
        _initialise(self.transformer)
        self._cross_attention = PaddedCrossAttention()
        for block in self.transformer.blocks:
            block.attn2.set_processor(self._cross_attention)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predict the velocity.

        Args:
            latents: (B, C, F, H, W) noisy latents.
            timestep: (B,) in [0, 1000].
            ids: (B, `CAPTION_TOKENS`) tokens of the captions; see `tokenise`.

        Returns:
            (B, C, F, H, W).
        """
        real = ids != self.tokenizer.pad_token_id
        # given whole, since Transformers would look at a mask of (B, tokens) on the host
        mask = torch.where(real, 0.0, torch.finfo(torch.float32).min)[:, None, None]
        text = self.text_encoder(ids, mask.expand(-1, 1, ids.shape[1], -1)).last_hidden_state * real[..., None]
        self._cross_attention.bias = padding_bias(real.sum(dim=1), CAPTION_TOKENS)
        velocity: torch.Tensor = self.transformer(latents, timestep, text, return_dict=False)[0]
        return velocity

    def pipeline(self, vae: AutoencoderKLWan) -> WanPipeline:
        """An ordinary pipeline of copies of the present weights."""
        text_encoder, transformer = build_text_encoder(), build_transformer(self.size)
        text_encoder.load_state_dict(self.text_encoder.state_dict())
        transformer.load_state_dict(self.transformer.state_dict())
        return build_pipeline(vae, text_encoder.eval(), transformer.eval())


def tokenise(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> torch.Tensor:
    """Return the tokens of captions, (B, `CAPTION_TOKENS`) int64 on the CPU; the empty one stands for no caption."""
    ids: torch.Tensor = tokenizer(
        list(captions), padding="max_length", max_length=CAPTION_TOKENS, return_tensors="pt"
    ).input_ids
    return ids


def shifted_sigmas(u: torch.Tensor, shift: float | torch.Tensor = FLOW_SHIFT) -> torch.Tensor:
    """The sampler's noise levels for u in [0, 1]: sigma = s u / (1 + (s - 1) u)."""
    return shift * u / (1 + (shift - 1) * u)


def velocity_loss(
    model: TextConditionedTransformer,
    latents: torch.Tensor,
    ids: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity noise - latents.

    Args:
        model: Text encoder and transformer.
        latents: (B, C, F, H, W) normalised latents.
        ids: (B, `CAPTION_TOKENS`) tokens of their captions.
        sigma: (B,) noise levels in [0, 1].
        noise: As `latents`.
    """
    noisy = latents + sigma[:, None, None, None, None] * (noise - latents)
    velocity: torch.Tensor = model(noisy, 1000 * sigma, ids)
    return (velocity.float() - (noise - latents)).square().mean()


def flow_matching_loss(
    model: TextConditionedTransformer,
    latents: torch.Tensor,
    captions: list[str],
    rng: np.random.Generator,
    generator: torch.Generator,
    caption_dropout: float,
    shift: float = FLOW_SHIFT,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity noise - latents, at noise levels spread as a sampler's."""
    batch_size = len(captions)
    u = torch.from_numpy((rng.permutation(batch_size) + rng.random(batch_size)) / batch_size).float()
    sigma = shifted_sigmas(u, shift).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    kept = ["" if rng.random() < caption_dropout else caption for caption in captions]
    return velocity_loss(model, latents, tokenise(model.tokenizer, kept).to(latents.device), sigma, noise)


def descend(model: nn.Module, loss: torch.Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Take one step down the gradient of a loss."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()


def _initialise(transformer: WanTransformer3DModel) -> None:
    """Start from a zero prediction, and from cross-attention that can see the caption among the padding."""
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    for linear in (
        transformer.condition_embedder.text_embedder.linear_1,
        transformer.condition_embedder.text_embedder.linear_2,
    ):
        nn.init.zeros_(linear.bias)
    for block in transformer.blocks:
        nn.init.zeros_(block.attn2.to_k.bias)
        nn.init.constant_(block.attn2.norm_q.weight, 2.0)
        nn.init.constant_(block.attn2.norm_k.weight, 2.0)
