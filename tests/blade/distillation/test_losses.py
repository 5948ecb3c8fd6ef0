"""The mathematics, on cases with a closed form."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blade.distillation.losses import (
    clean_between,
    denoising_loss,
    diffuse_further,
    equivalent_noise,
    error_weight,
    generator_loss,
    guide,
    importance_weight,
)
from blade.students.prediction import mix

LEVELS = {"flow": lambda x: (1 - x, x), "vp": lambda x: (math.cos(x * math.pi / 2), math.sin(x * math.pi / 2))}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", LEVELS)
@given(low=st.floats(0, 0.95), share=st.floats(0, 1))
def test_a_point_is_diffused_as_if_from_the_clean_sample(kind, low, share):
    start, end = LEVELS[kind](low), LEVELS[kind](low + share * (0.99 - low))
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    clean = diffuse_further(start[0] * one, zero, start, end)
    noise, fresh = diffuse_further(start[1] * one, zero, start, end), diffuse_further(zero, one, start, end)
    assert clean == pytest.approx(end[0])
    assert noise.square() + fresh.square() == pytest.approx(end[1] ** 2, abs=1e-6)


@pytest.mark.parametrize("kind", LEVELS)
def test_the_equivalent_noise_leads_to_the_same_point(kind):
    clean, noise, fresh = (normal(3, 5, seed=seed) for seed in range(3))
    start, end = LEVELS[kind](0.3), LEVELS[kind](0.7)
    noisy = diffuse_further(start[0] * clean + start[1] * noise, fresh, start, end)
    again = end[0] * clean + end[1] * equivalent_noise(noise, fresh, start, end)
    assert torch.allclose(noisy, again)


@pytest.mark.parametrize("kind", LEVELS)
@given(low=st.floats(0, 0.9), share=st.floats(0.01, 1))
def test_the_clean_sample_between_two_points_leads_from_one_to_the_other(kind, low, share):
    levels, end_levels = LEVELS[kind](low + share * (0.99 - low)), LEVELS[kind](low)
    clean, noise = normal(3, 5), normal(3, 5, seed=1)
    start, end = (mix(clean, noise, *each) for each in (levels, end_levels))
    assert torch.allclose(clean_between(start, end, levels, end_levels), clean)


def test_importance_is_the_ratio_of_densities_per_dimension():
    equivalent, fresh = normal(4, 2, 3), normal(4, 2, 3, seed=1)
    log_density = torch.distributions.Normal(0.0, 1.0).log_prob
    expected = (log_density(equivalent) - log_density(fresh)).flatten(1).mean(1).exp()
    assert torch.allclose(importance_weight(equivalent, fresh), expected)
    assert torch.equal(importance_weight(fresh, fresh), torch.ones(4, dtype=torch.float64))


def test_weights_of_errors():
    alpha, sigma = torch.tensor([0.9, 0.2])[:, None], torch.tensor([0.1, 0.8])[:, None]
    assert error_weight("velocity", alpha, sigma).tolist() == pytest.approx([100.0, 1.5625])
    assert error_weight("min-snr", alpha, sigma).tolist() == pytest.approx([5.0, 0.0625])
    assert error_weight("none", alpha, sigma).tolist() == [1.0, 1.0]


def test_the_velocity_weight_makes_it_the_error_of_the_velocity():
    clean, noise, velocity = (normal(2, 6, seed=seed) for seed in range(3))
    sigma = torch.tensor([0.2, 0.7], dtype=torch.float64)[:, None]
    noisy = (1 - sigma) * clean + sigma * noise
    weight = error_weight("velocity", 1 - sigma, sigma)
    loss = denoising_loss(noisy - sigma * velocity, clean, weight)
    assert loss == pytest.approx(float((velocity - (noise - clean)).square().mean()))


def test_guidance():
    assert torch.allclose(guide(torch.tensor([3.0]), torch.tensor([1.0]), 2.5), torch.tensor([6.0]))


def test_the_squared_gradient_is_the_difference_of_scores():
    """mu_fake - mu_teacher is sigma^2 / alpha (s_fake - s_teacher)."""
    alpha, sigma = 0.4, 0.6
    noisy, teacher_score, fake_score = (normal(3, 4, seed=seed) for seed in range(3))
    teacher, fake = ((noisy + sigma**2 * score) / alpha for score in (teacher_score, fake_score))
    clean = normal(3, 4, seed=5).requires_grad_()
    generator_loss(clean, teacher, fake, huber=None, normalize=False).backward()
    expected = sigma**2 / alpha * (fake_score - teacher_score) / clean.numel()
    assert torch.allclose(clean.grad, expected)


def test_the_pseudo_huber_gradient():
    clean, teacher, fake = normal(2, 5).requires_grad_(), normal(2, 5, seed=1), normal(2, 5, seed=2)
    generator_loss(clean, teacher, fake, huber=0.3, normalize=False).backward()
    difference = fake - teacher
    assert torch.allclose(clean.grad, difference / (difference.square() + 0.09).sqrt() / 10)


@pytest.mark.parametrize(("cap", "expected"), [(None, [2.0, 8.0]), (5.0, [2.0, 5.0])])
def test_normalized_by_the_distance_of_each_sample(cap, expected):
    clean = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    teacher, fake = torch.tensor([[2.0], [8.0]]).double().expand(2, 3), torch.full((2, 3), 3.0).double()
    generator_loss(clean, teacher, fake, huber=None, normalize=True, cap=cap).backward()
    assert torch.allclose(clean.grad, (fake - teacher) / torch.tensor(expected).double()[:, None] / 6)


def test_nothing_is_divided_by_zero():
    clean = torch.zeros(1, 3, requires_grad=True)
    generator_loss(clean, torch.zeros(1, 3), torch.zeros(1, 3), huber=None, normalize=True).backward()
    assert torch.equal(clean.grad, torch.zeros(1, 3))
