"""First stage: the VAE, trained to reconstruct small canvases, then whole ones."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

from ..captions import sample_caption
from ..world import render, sample_scene
from .checkpoint import TrainingLog, load_checkpoint, numpy_rng, save_checkpoint, torch_rng
from .components import build_vae
from .muon import muon_and_adamw, set_learning_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAETraining:
    """How the VAE is trained."""

    steps: int = 2500
    full_size_steps: int = 100
    """The last steps, which see whole canvases, so that borders and long clips are as they will be."""
    batch_size: int = 3
    frames: int = 9
    size: int = 56
    """Canvas edge in pixels of all but the last steps."""
    full_batch_size: int = 1
    full_frames: int = 33
    full_size: int = 96
    learning_rate: float = 4e-3
    """Of Muon (convolutions) and, times 0.3, of AdamW (the rest)."""
    warmup_steps: int = 50
    kl_weight: float = 1e-5
    edge_weight: float = 0.5
    """Weight of the error of differences between neighbouring pixels, which keeps outlines sharp."""
    ema_decay: float = 0.995
    seed: int = 0
    checkpoint_every: int = 100
    log_every: int = 20


SQUARED_WEIGHT = 4.0
"""Weight of the squared error: the absolute one alone is first content with the background."""
INITIAL_LOG_VARIANCE = -5.0
"""Of the posterior, so that the first steps see the latents through little noise."""


def video_batch(rng, *, batch_size: int, frames: int, size: int) -> torch.Tensor:
    """Random training videos, half with one object and half with two.

    Returns:
        (batch_size, 3, frames, size, size) float32 in [-1, 1].
    """
    videos = []
    for _ in range(batch_size):
        caption = sample_caption(rng, objects=int(rng.integers(1, 3)))
        scene = sample_scene(caption, rng, frames=frames, height=size, width=size)
        videos.append(render(scene, frames=frames, height=size, width=size))
    return torch.stack(videos).transpose(1, 2) * 2 - 1


def reconstruction_loss(predicted: torch.Tensor, target: torch.Tensor, edge_weight: float) -> torch.Tensor:
    """Mean absolute error, plus that of the differences between neighbouring pixels."""
    loss = F.l1_loss(predicted, target) + SQUARED_WEIGHT * F.mse_loss(predicted, target)
    for dim in (-1, -2):
        loss = loss + edge_weight * F.l1_loss(predicted.diff(dim=dim), target.diff(dim=dim))
    return loss


def train_vae(run: Path, config: VAETraining, device: str = "cpu") -> AutoencoderKLWan:
    """Train, or go on training, the VAE of a run; returns it with averaged weights and latent statistics.

    Args:
        run: Folder of the run; `vae.pt` and `log.jsonl` are written there.
        config: How to train.
        device: Where to train.
    """
    torch.manual_seed(config.seed)
    vae = build_vae().to(device)
    torch.nn.init.constant_(vae.quant_conv.bias[vae.config.z_dim :], INITIAL_LOG_VARIANCE)
    optimizers = muon_and_adamw(vae, _hidden_weights(vae), config.learning_rate, 0.3 * config.learning_rate)
    ema = EMAModel(vae.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    start = 0
    if (state := load_checkpoint(run / "vae.pt")) is not None:
        start = state["step"]
        vae.load_state_dict(state["vae"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema.load_state_dict(state["ema"])
    ema.to(device)
    log = TrainingLog(run / "log.jsonl", stage="vae", start=start, total=config.steps)
    for step in range(start, config.steps):
        set_learning_rate(optimizers, _schedule(step, config))
        losses = _step(vae, step, config, device)
        vae.zero_grad(set_to_none=True)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.step(vae.parameters())
        done = step + 1
        if done % config.checkpoint_every == 0 or done == config.steps:
            save_checkpoint(
                run / "vae.pt",
                {
                    "step": done,
                    "vae": vae.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "ema": ema.state_dict(),
                },
            )
        if done % config.log_every == 0 or done == config.steps:
            log.write(done, **{name: value.item() for name, value in losses.items()})
    ema.copy_to(vae.parameters())
    vae.eval().requires_grad_(False)
    _measure_latents(vae, config, device)
    return vae


def _step(vae: AutoencoderKLWan, step: int, config: VAETraining, device: str) -> dict[str, torch.Tensor]:
    full = step >= config.steps - config.full_size_steps
    videos = video_batch(
        numpy_rng(config.seed, 0, step),
        batch_size=config.full_batch_size if full else config.batch_size,
        frames=config.full_frames if full else config.frames,
        size=config.full_size if full else config.size,
    ).to(device)
    posterior = vae.encode(videos).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch_rng(config.seed, 1, step)).to(device)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    reconstruction = reconstruction_loss(decoded, videos, config.edge_weight)
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    error = (decoded.detach() - videos).square().mean() / 4
    return {"loss": reconstruction + config.kl_weight * kl, "kl": kl, "psnr": -10 * torch.log10(error)}


def _hidden_weights(vae: AutoencoderKLWan) -> list[torch.nn.Parameter]:
    outer = {id(vae.encoder.conv_in.weight), id(vae.decoder.conv_out.weight)}
    return [weight for weight in vae.parameters() if weight[0].numel() > 1 and id(weight) not in outer]


def _schedule(step: int, config: VAETraining) -> float:
    warm = min((step + 1) / config.warmup_steps, 1.0)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))


@torch.no_grad()
def _measure_latents(vae: AutoencoderKLWan, config: VAETraining, device: str, videos: int = 64) -> None:
    """Store each latent channel's mean and standard deviation in the config, as `WanPipeline` expects."""
    rng = numpy_rng(config.seed, 2)
    latents = torch.cat(
        [
            vae.encode(
                video_batch(rng, batch_size=1, frames=config.full_frames, size=config.full_size).to(device)
            ).latent_dist.mean
            for _ in range(videos)
        ]
    )
    vae.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=latents.std(dim=(0, 2, 3, 4)).tolist()
    )
