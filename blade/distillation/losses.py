"""The mathematics of trajectory distribution matching (TDM) as pure functions in float32.

For a noisy sample x_t = alpha x0 + sigma eps, mu is a model's estimate of x0. It determines the score of the noisy
distribution, s = -(x_t - alpha mu) / sigma^2, so that the difference of two scores is alpha / sigma^2 times that of
the estimates. The student follows the difference between the estimates of the teacher and of the fake score, which
models the student's own distribution.

Source: TDM, arXiv 2503.06674; BLADE, arXiv 2508.10774.
"""

from __future__ import annotations

import torch

from blade.students.prediction import Level, mix


def diffuse_further(
    point: torch.Tensor,
    fresh: torch.Tensor,
    start: tuple[Level, Level],
    end: tuple[Level, Level],
) -> torch.Tensor:
    """Add noise to a noisy sample: x_t = r x_m + beta z, r = alpha_t / alpha_m, beta^2 = sigma_t^2 - (r sigma_m)^2.

    Args:
        point: x_m, (B, ...).
        fresh: z, standard normal, of the same shape.
        start: alpha and sigma of x_m.
        end: alpha and sigma at t, no less noisy.

    Returns:
        x_t, distributed as if x0 had been diffused to t in one step. Source: TDM, section 3.
    """
    ratio, beta = _further(start, end)
    return mix(point, fresh, ratio, beta)


def equivalent_noise(
    noise: torch.Tensor,
    fresh: torch.Tensor,
    start: tuple[Level, Level],
    end: tuple[Level, Level],
) -> torch.Tensor:
    """Return the noise n for which `diffuse_further` gives x_t = alpha_t x0 + sigma_t n, where x_m has the noise eps.

    n = (r sigma_m eps + beta z) / sigma_t. Source: TDM, the importance weight of its fake score.
    """
    ratio, beta = _further(start, end)
    return mix(noise, fresh, ratio * start[1], beta) / end[1]


def importance_weight(equivalent: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """Return the likelihood ratio, per dimension, of noise to the drawn noise under the standard normal distribution.

    w = exp(-mean(n^2) / 2) / exp(-mean(z^2) / 2), with means over all dimensions but the batch.

    Args:
        equivalent: n, (B, ...): see `equivalent_noise`.
        fresh: z, as drawn.

    Returns:
        (B,). Source: TDM, the importance weight of its fake score, in its demonstration's form.
    """
    return ((_mean(fresh.square()) - _mean(equivalent.square())) / 2).exp()


def error_weight(kind: str, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return the weight of a squared error of x0.

    Args:
        kind: `velocity`: 1 / sigma^2, which for flow matching gives the squared error of the velocity, and for
            v-prediction 1 / (1 - alpha^2) (BLADE's release); `min-snr`: min(alpha^2 / sigma^2, 5) (TDM's
            demonstration; Min-SNR, arXiv 2303.09556); `none`: 1.
        alpha: (B, 1, ...).
        sigma: (B, 1, ...), above 0.

    Returns:
        (B,).
    """
    alpha, sigma = alpha.flatten(), sigma.flatten()
    if kind == "velocity":
        return 1 / sigma.square()
    if kind == "min-snr":
        return (alpha / sigma).square().clamp(max=5.0)
    return torch.ones_like(sigma)


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Apply classifier-free guidance: mu_u + s (mu_c - mu_u). Source: arXiv 2207.12598."""
    return unconditional + scale * (conditional - unconditional)


def clean_between(
    start: torch.Tensor,
    end: torch.Tensor,
    levels: tuple[torch.Tensor, torch.Tensor],
    end_levels: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Return the x0 with which one deterministic step leads from a noisy sample to another.

    x0 = (x_m - (sigma_m / sigma) x) / (alpha_m - alpha sigma_m / sigma), solved from x = alpha x0 + sigma eps and
    x_m = alpha_m x0 + sigma_m eps. Source: progressive distillation, arXiv 2202.00512, appendix G.

    Args:
        start: x, (B, ...).
        end: x_m, less noisy.
        levels: alpha and sigma of x, (B, 1, ...).
        end_levels: those of x_m.
    """
    share = end_levels[1] / levels[1]
    return (end - share * start) / (end_levels[0] - levels[0] * share)


def denoising_loss(estimate: torch.Tensor, clean: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the batch mean of w mean((mu - x0)^2), the objective of the fake score.

    Args:
        estimate: mu, (B, ...).
        clean: x0, (B, ...), the student's prediction.
        weight: (B,).

    Source: TDM, arXiv 2503.06674, the objective of its fake score.
    """
    return (weight * _mean((estimate - clean).square())).mean()


def generator_loss(
    clean: torch.Tensor,
    teacher: torch.Tensor,
    fake: torch.Tensor,
    *,
    huber: float | None,
    normalize: bool,
    cap: float | None = None,
) -> torch.Tensor:
    """Return a loss whose gradient moves the student's x0 from the fake estimate toward the teacher's.

    The target is y = x0 + mu_teacher - mu_fake, held fixed, so that x0 - y = mu_fake - mu_teacher. Squared: mean of
    (x0 - y)^2 / 2, whose gradient is the difference itself; pseudo-Huber: mean of sqrt((x0 - y)^2 + c^2) - c, whose
    gradient is the sign of a difference much larger than c.

    Args:
        clean: x0, (B, ...), with gradient.
        teacher: the guided teacher's estimate.
        fake: the fake score's estimate.
        huber: c; None: squared.
        normalize: divide by mean |x0 - mu_teacher| of each sample.
        cap: upper limit of that divisor.

    Source: TDM, arXiv 2503.06674, its surrogate; the division is DMD's, arXiv 2311.18828; cap 5 in BLADE's release.
    """
    target = (clean + (teacher - fake)).detach()
    squared = (clean - target).square()
    loss = squared / 2 if huber is None else (squared + huber**2).sqrt() - huber
    if not normalize:
        return loss.mean()
    scale = _mean((clean.detach() - teacher).abs())
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny, max=cap)
    return (_mean(loss) / scale).mean()


def _further(start: tuple[Level, Level], end: tuple[Level, Level]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factor r of x_m and the standard deviation beta of the added noise at t."""
    alpha_start, sigma_start, alpha_end, sigma_end = (torch.as_tensor(level) for level in (*start, *end))
    ratio = alpha_end / alpha_start
    # rounding may make it negative if t = m
    return ratio, (sigma_end.square() - (ratio * sigma_start).square()).clamp(min=0.0).sqrt()


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Average over all dimensions but the batch."""
    return values.flatten(1).mean(dim=1)
