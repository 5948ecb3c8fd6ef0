"""The noise schedule of v-prediction models: signal and noise at every time."""

from __future__ import annotations

import torch
from diffusers.schedulers.scheduling_ddim import betas_for_alpha_bar

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
"""Diffusers' names of the ways from the first beta to the last."""


def cumulative_alphas(
    count: int,
    *,
    beta_start: float,
    beta_end: float,
    beta_schedule: str,
    snr_shift_scale: float,
    rescale_betas_zero_snr: bool,
) -> torch.Tensor:
    """Return alpha^2 at every time, as Diffusers' schedulers of CogVideoX compute it.

    Args:
        count: number of times.
        beta_start: first beta.
        beta_end: last beta.
        beta_schedule: one of `BETA_SCHEDULES`.
        snr_shift_scale: factor by which the ratio of noise to signal grows; 1 leaves it.
        rescale_betas_zero_snr: whether the last time is noise alone.

    Returns:
        (count,), float64 for "scaled_linear" and float32 otherwise.

    Raises:
        ValueError: if there is no such `beta_schedule`.

    Source: the shift, Esser et al., arXiv 2403.03206; zero terminal signal, Lin et al., arXiv 2305.08891, algorithm 1.
    """
    if beta_schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, count, dtype=torch.float32)
    elif beta_schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, count, dtype=torch.float64) ** 2
    elif beta_schedule == "squaredcos_cap_v2":
        betas = betas_for_alpha_bar(count)
    else:
        raise ValueError(f"`beta_schedule` must be one of {', '.join(BETA_SCHEDULES)}, got {beta_schedule!r}.")
    alphas = torch.cumprod(1.0 - betas, dim=0)
    alphas = alphas / (snr_shift_scale + (1 - snr_shift_scale) * alphas)
    if not rescale_betas_zero_snr:
        return alphas
    roots = alphas.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return ((roots - last) * (first / (first - last))) ** 2
