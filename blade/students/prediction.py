"""Predictions of diffusion models as clean sample and noise, in float32.

A noisy sample is x = alpha x0 + sigma eps. A model predicts

- `flow_prediction` (Wan, HunyuanVideo): eps - x0, with alpha = 1 - sigma;
- `v_prediction` (CogVideoX): alpha eps - sigma x0, with alpha^2 + sigma^2 = 1.
"""

from __future__ import annotations

from typing import TypeAlias

import torch

PREDICTION_TYPES = ("flow_prediction", "v_prediction")

Level: TypeAlias = torch.Tensor | float
"""Alpha or sigma: a number, or a tensor that broadcasts against the samples."""


def split_prediction(
    kind: str, prediction: torch.Tensor, noisy: torch.Tensor, alpha: Level, sigma: Level
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a prediction into the clean sample and the noise.

    Args:
        kind: one of `PREDICTION_TYPES`.
        prediction: the model's output, of any shape.
        noisy: its input, of the same shape.
        alpha: signal of `noisy`.
        sigma: noise of `noisy`.

    Returns:
        x0 and eps, float32.
    """
    prediction, noisy = prediction.float(), noisy.float()
    if kind == "flow_prediction":
        return noisy - sigma * prediction, noisy + alpha * prediction
    return alpha * noisy - sigma * prediction, sigma * noisy + alpha * prediction


def mix(clean: torch.Tensor, noise: torch.Tensor, alpha: Level, sigma: Level) -> torch.Tensor:
    """Return alpha x0 + sigma eps."""
    return alpha * clean + sigma * noise


def renew_noise(noise: torch.Tensor, fresh: torch.Tensor, kept: float) -> torch.Tensor:
    """Return r eps + sqrt(1 - r^2) z: noise of which a share r is kept.

    Source: the release of BLADE, arXiv 2508.10774, where r is 0.9; 1 is DDIM.
    """
    return kept * noise + float((1 - kept**2) ** 0.5) * fresh
