"""Second stage: a wider decoder for the latents of a trained VAE."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from blade.common.training_log import torch_rng

from .components import DECODER_WIDTHS, build_vae
from .vae import VAETraining, fit, is_full_size, measured, training_videos


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderTraining(VAETraining):
    """Settings of the training of the wider decoder."""

    steps: int = 3200
    full_size_steps: int = 150
    latent_noise: float = 0.15
    """Largest noise that the decoder learns to see through, in standard deviations of a latent: a generated latent is
    never exactly what the encoder would have said."""
    autocast: bool = False
    """Compute in bfloat16 where that is safe, but for the last steps."""


def needs_wider_decoder(vae: AutoencoderKLWan) -> bool:
    """Return whether a VAE still has the decoder that it was trained with."""
    return bool(vae.config.decoder_base_dim != DECODER_WIDTHS[1])


def train_decoder(run: Path, vae: AutoencoderKLWan, config: DecoderTraining, device: str = "cpu") -> AutoencoderKLWan:
    """Train, or go on training, a wider decoder on the latents of a VAE, which stay what they are.

    Args:
        run: Folder of the run; `decoder.pt` and `log.jsonl` are written there.
        vae: Trained VAE, whose encoder and latent statistics are kept.
        config: How to train.
        device: Where to train.

    Returns:
        A VAE of the same encoder with the averaged weights of the new decoder.
    """
    torch.manual_seed(config.seed)
    wide = build_vae(DECODER_WIDTHS[1]).to(device)
    wide.register_to_config(latents_mean=vae.config.latents_mean, latents_std=vae.config.latents_std)
    for kept in ("encoder", "quant_conv"):
        getattr(wide, kept).load_state_dict(getattr(vae, kept).state_dict())
        getattr(wide, kept).requires_grad_(False)
    trained = torch.nn.ModuleDict({"decoder": wide.decoder, "post_quant_conv": wide.post_quant_conv})
    outer = [wide.decoder.conv_out.weight]
    fit(run, "decoder", trained, outer, lambda step: _losses(wide, step, config, device), config)
    return wide.eval().requires_grad_(False)


def _losses(vae: AutoencoderKLWan, step: int, config: DecoderTraining, device: str) -> dict[str, torch.Tensor]:
    videos = training_videos(step, 3, config).to(device)
    generator = torch_rng(config.seed, 4, step)
    with torch.no_grad():
        latents = vae.encode(videos).latent_dist.mean
    scale = config.latent_noise * torch.rand(len(latents), 1, 1, 1, 1, generator=generator)
    noise = scale * torch.randn(latents.shape, generator=generator)
    latents = latents + noise.to(device) * torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    in_half = config.autocast and not is_full_size(step, config)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=in_half):
        decoded = vae.decode(latents).sample
    return measured(decoded.float(), videos, config)
