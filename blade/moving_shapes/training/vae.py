"""First stage: the VAE, trained to reconstruct small canvases, then whole ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.training_utils import EMAModel
from torch.nn import functional as F

from blade.common.training_log import TrainingLog, load_checkpoint, numpy_rng, save_checkpoint, torch_rng

from ..captions import sample_caption
from ..world import render, sample_scene
from .components import build_vae
from .muon import muon_and_adamw, set_learning_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAETraining:
    """Settings of the training of the VAE."""

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


def video_batch(rng: np.random.Generator, *, batch_size: int, frames: int, size: int) -> torch.Tensor:
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
    outer = (vae.encoder.conv_in.weight, vae.decoder.conv_out.weight)
    fit(run, "vae", vae, outer, lambda step: _losses(vae, step, config, device), config)
    vae.eval().requires_grad_(False)
    _measure_latents(vae, config, device)
    return vae


def fit(
    run: Path,
    stage: str,
    module: torch.nn.Module,
    outer: Collection[torch.nn.Parameter],
    losses: Callable[[int], dict[str, torch.Tensor]],
    config: VAETraining,
) -> None:
    """Train a module, or go on training it, and leave it with averaged weights.

    Args:
        run: Folder of the run; a checkpoint and `log.jsonl` are written there.
        stage: Name of the checkpoint and in the log.
        module: What to train.
        outer: Weights of its first and last layers, which take AdamW as all vectors do; the others take Muon.
        losses: The losses of a step, by name; `loss` is the one that is followed.
        config: How to train.
    """
    others = {id(weight) for weight in outer}
    hidden = [weight for weight in module.parameters() if weight[0].numel() > 1 and id(weight) not in others]
    optimizers = muon_and_adamw(module, hidden, config.learning_rate, 0.3 * config.learning_rate)
    ema = EMAModel(module.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)
    checkpoint = run / f"{stage}.pt"
    start = 0
    if (state := load_checkpoint(checkpoint)) is not None:
        start = state["step"]
        module.load_state_dict(state["weights"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        ema.load_state_dict(state["ema"])
    ema.to(next(module.parameters()).device)
    log = TrainingLog(run / "log.jsonl", stage=stage, start=start, total=config.steps)
    for step in range(start, config.steps):
        set_learning_rate(optimizers, _schedule(step, config))
        found = losses(step)
        module.zero_grad(set_to_none=True)
        found["loss"].backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.step(module.parameters())
        done = step + 1
        if done % config.checkpoint_every == 0 or done == config.steps:
            save_checkpoint(
                checkpoint,
                {
                    "step": done,
                    "weights": module.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "ema": ema.state_dict(),
                },
            )
        if done % config.log_every == 0 or done == config.steps:
            log.write(done, **{name: value.item() for name, value in found.items()})
    ema.copy_to(module.parameters())


def training_videos(step: int, stream: int, config: VAETraining) -> torch.Tensor:
    """The videos of a step: short clips of small canvases, and whole ones in the last steps."""
    full = is_full_size(step, config)
    return video_batch(
        numpy_rng(config.seed, stream, step),
        batch_size=config.full_batch_size if full else config.batch_size,
        frames=config.full_frames if full else config.frames,
        size=config.full_size if full else config.size,
    )


def is_full_size(step: int, config: VAETraining) -> bool:
    """Return whether a step sees whole canvases."""
    return step >= config.steps - config.full_size_steps


def measured(decoded: torch.Tensor, videos: torch.Tensor, config: VAETraining) -> dict[str, torch.Tensor]:
    """Loss and peak signal-to-noise ratio in dB of a reconstruction."""
    error = (decoded.detach() - videos).square().mean() / 4
    return {"loss": reconstruction_loss(decoded, videos, config.edge_weight), "psnr": -10 * torch.log10(error)}


def _losses(vae: AutoencoderKLWan, step: int, config: VAETraining, device: str) -> dict[str, torch.Tensor]:
    videos = training_videos(step, 0, config).to(device)
    posterior = vae.encode(videos).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch_rng(config.seed, 1, step)).to(device)
    found = measured(vae.decode(posterior.mean + posterior.std * noise).sample, videos, config)
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return {**found, "loss": found["loss"] + config.kl_weight * kl, "kl": kl}


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
