"""The noise schedule is that of Diffusers' CogVideoX schedulers."""

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler

from blade.students.noise_schedule import BETA_SCHEDULES, cumulative_alphas


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("snr_shift_scale", [1.0, 3.0])
@pytest.mark.parametrize("rescale", [True, False])
def test_it_equals_diffusers_own(beta_schedule, snr_shift_scale, rescale):
    options = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": beta_schedule,
        "snr_shift_scale": snr_shift_scale,
        "rescale_betas_zero_snr": rescale,
    }
    theirs = CogVideoXDDIMScheduler(num_train_timesteps=1000, **options).alphas_cumprod
    assert torch.equal(cumulative_alphas(1000, **options), theirs)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"`beta_schedule` must be one of linear, .*, got 'cosine'"):
        cumulative_alphas(
            10, beta_start=0.1, beta_end=0.2, beta_schedule="cosine", snr_shift_scale=1.0, rescale_betas_zero_snr=True
        )
