"""The times of a student are those of Diffusers' samplers, which therefore can sample it."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)

from blade.distillation.config import DistillationConfig
from blade.distillation.student_files import stock_sampler
from blade.distillation.trajectory import Trajectory, flow_times, make_sampler, trailing_times

FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
COG = CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")


@pytest.mark.parametrize("shift", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_flow_times_are_those_of_dpm_solver(steps, shift):
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(steps)
    assert [time / 1000 for time in flow_times(steps, shift)] == pytest.approx(scheduler.sigmas[:-1].tolist())


@pytest.mark.parametrize("steps", [4, 7, 8])
def test_trailing_times_are_those_of_cogvideox(steps):
    scheduler = CogVideoXDDIMScheduler.from_config(COG.config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert list(trailing_times(steps)) == scheduler.timesteps.tolist()


def velocity(x, time):
    """A made-up network, smooth in both."""
    return 0.7 * torch.sin(x) + 0.2 * x * float(time) / 1000


@pytest.mark.parametrize(("model", "bound"), [(FLOW, 2e-4), (COG, 1e-5)])
@pytest.mark.parametrize("steps", [4, 8])
def test_a_stock_scheduler_samples_nearly_the_same(model, bound, steps):
    """What differs in flow matching: Diffusers' sampler gives the network whole times, and ours the exact ones."""
    ours = make_sampler(model, [steps])
    expression, why_not = stock_sampler(DistillationConfig(), ours, "CogVideoXDDIMScheduler")
    assert why_not is None
    pipe = type("Pipe", (), {"scheduler": model})
    names = {
        "CogVideoXDDIMScheduler": CogVideoXDDIMScheduler,
        "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
    }
    stock = eval(expression, {**names, "pipe": pipe})
    results = []
    for scheduler in (ours, stock):
        scheduler.set_timesteps(steps)
        x = torch.randn(64, generator=torch.Generator().manual_seed(0))
        for time in scheduler.timesteps:
            x = scheduler.step(velocity(x, time), time, x, return_dict=False)[0]
        results.append(x)
    error = float((results[0] - results[1]).abs().max() / results[0].abs().max())
    print(f"{type(model).__name__}, {steps} steps: relative error {error:.1e}")
    assert error < bound


def test_what_no_stock_scheduler_can():
    config = DistillationConfig()
    assert "how many steps" in stock_sampler(config, make_sampler(FLOW, [4, 8]))[1]
    config.trajectory.noise_kept = 0.9
    assert "renews" in stock_sampler(config, make_sampler(FLOW, [4], noise_kept=0.9))[1]
    config.trajectory.noise_kept = 1.0
    config.trajectory.times = [[900.0, 500.0]]
    assert "its own" in stock_sampler(config, make_sampler(FLOW, [2], times=[[900.0, 500.0]]))[1]


def test_intervals():
    sampler = make_sampler(FLOW, [4], times=[[1000.0, 900.0, 750.0, 500.0]])
    separate = Trajectory(sampler=sampler, steps=4)
    assert [separate.interval(step) for step in range(4)] == [(900, 980), (750, 900), (500, 750), (20, 500)]
    shared = Trajectory(sampler=sampler, steps=4, intervals="shared")
    assert [shared.interval(step) for step in range(4)] == [(900, 980), (750, 980), (500, 980), (20, 980)]
    assert separate.draw_time(1, 0.5) == 825
    alpha, sigma = separate.levels([0.0, 250.0], torch.zeros(2, 3, 4))
    assert alpha.flatten().tolist() == [1.0, 0.75] and sigma.flatten().tolist() == [0.0, 0.25]
    assert alpha.shape == (2, 1, 1)


def test_times_of_v_prediction_are_whole_and_at_time_0_everything_is_clean():
    trajectory = Trajectory(sampler=make_sampler(COG, [4]), steps=4)
    assert trajectory.draw_time(0, 0.3) == int(trajectory.draw_time(0, 0.3))
    alpha, sigma = trajectory.levels([0.0, 999.0], torch.zeros(2, 1))
    assert alpha.flatten().tolist() == [1.0, 0.0] and sigma.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": []}, "`steps` must be one or several different numbers of at least 1, got"),
        ({"steps": [4, 4]}, "`steps` must be one or several different numbers"),
        ({"steps": [4], "times": [[900.0, 500.0]]}, "`times` must hold one grid for each of `steps`"),
        ({"steps": [2], "times": [[900.0, 500.0]], "flow_shift": 3.0}, "`flow_shift` must not be given with `times`"),
        ({"steps": [4], "scheduler": COG, "flow_shift": 3.0}, "is not for flow matching"),
        ({"steps": [4], "scheduler": LCMScheduler()}, "must be of a model that predicts a flow or v"),
    ],
)
def test_samplers_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(**{"scheduler": FLOW, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lowest_time": 0.0}, "`lowest_time` must be above 0"),
        ({"lowest_time": 990.0}, "below `highest_time`, got 990"),
        ({"highest_time": 700.0}, "leave nothing to train step 0 at"),
        ({"intervals": "half"}, '`intervals` must be one of "separate", "shared"'),
    ],
)
def test_trajectories_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Trajectory(sampler=make_sampler(FLOW, [4]), steps=4, **options)
