"""The whole method on Gaussian data, where the teacher's score is known: the student matches mean and variance."""

from contextlib import contextmanager

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from blade.distillation.conditioning import Conditions
from blade.distillation.config import FakeConfig, GeneratorConfig
from blade.distillation.draws import START, Draws
from blade.distillation.trajectory import Trajectory, make_sampler
from blade.distillation.updates import Batch, Start, Updates

MEAN, DEVIATION = 1.5, 0.4
SHAPE, BATCH, UPDATES = (256,), 12, 260


class Gaussian(nn.Module):
    """What a network predicts that takes data for normal: exactly, for a mean and a deviation at each step."""

    def __init__(self, trajectory, mean, deviation):
        super().__init__()
        steps = trajectory.steps
        self.trajectory = trajectory
        self.mean = nn.Parameter(torch.full((steps,), mean))
        self.log_deviation = nn.Parameter(torch.full((steps,), deviation).log())

    def forward(self, noisy, times):
        trajectory = self.trajectory
        floats = [float(time) for time in times]
        lows = [trajectory.next_time(step) for step in range(trajectory.steps)]
        step = torch.tensor([next(i for i, low in enumerate(lows) if time > low or low == 0) for time in floats])
        alpha, sigma = trajectory.levels(floats, noisy)
        mean, variance = self.mean[step][:, None], (2 * self.log_deviation[step][:, None]).exp()
        # E[x0 | x_t], as of two normal distributions
        clean = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (noisy - alpha * mean)
        noise = (noisy - alpha * clean) / sigma
        return noise - clean if trajectory.kind == "flow_prediction" else alpha * noise - sigma * clean


class GaussianRoles:
    """Three such networks as roles; guidance leads nowhere."""

    def __init__(self, trajectory):
        self.networks = {
            "teacher": Gaussian(trajectory, MEAN, DEVIATION).requires_grad_(False),
            "student": Gaussian(trajectory, 0.3, 1.3),
            "fake": Gaussian(trajectory, 0.3, 1.3),
        }
        self.acted = []

    @contextmanager
    def acting(self, role, step=None):
        self.acted.append(role)
        yield
        self.acted.pop()

    def predict(self, role, inputs, numbers):
        assert self.acted[-1] == role
        return self.networks[role](inputs["hidden_states"], inputs["timestep"])


def first_noise(count):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(99))


def sampled(trajectory, student, count=64):
    """Videos of the student, with its own sampler."""
    scheduler = trajectory.sampler
    scheduler.set_timesteps(trajectory.steps)
    x = first_noise(count)
    with torch.no_grad():
        for time in scheduler.timesteps:
            x = scheduler.step(student(x, [float(time)] * count), time, x).prev_sample
    return x


def trajectory_of(kind, steps, noise_kept, intervals="separate"):
    if kind == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        scheduler = CogVideoXDDIMScheduler(
            rescale_betas_zero_snr=True, snr_shift_scale=1.0, prediction_type="v_prediction"
        )
    return Trajectory(
        sampler=make_sampler(scheduler, [steps], noise_kept=noise_kept), steps=steps, intervals=intervals
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "steps", "noise_kept", "fake", "generator"),
    [
        ("flow", 4, 1.0, FakeConfig(), GeneratorConfig()),
        ("flow", 2, 0.9, FakeConfig(weighting="min-snr"), GeneratorConfig(loss="huber", huber=0.05)),
        ("flow", 2, 1.0, FakeConfig(regularization=0.1), GeneratorConfig(normalize=False)),
        ("vp", 4, 1.0, FakeConfig(), GeneratorConfig()),
    ],
)
def test_the_student_matches_mean_and_variance(kind, steps, noise_kept, fake, generator):
    trajectory = trajectory_of(kind, steps, noise_kept)
    roles = GaussianRoles(trajectory)
    updates = Updates(
        roles, trajectory, None, fake, generator, guidance_scale=1.0, device=torch.device("cpu"), dtype=torch.float32
    )  # fmt: skip
    rates = {"student": 0.02, "fake": 0.06}
    optimizers = {name: torch.optim.Adam(roles.networks[name].parameters(), rate) for name, rate in rates.items()}
    batch = Batch(samples=range(BATCH), conditions=Conditions({}, {}, SHAPE))
    before, teacher = (sampled(trajectory, roles.networks[name]) for name in ("student", "teacher"))
    for update in range(UPDATES):
        draws = [Draws(0, update, part) for part in range(3)]
        start = updates.rollout(batch, draws[0])
        share = 1.0 if update < UPDATES // 2 else 0.2
        for name, part in (("fake", 1), ("student", 2)):
            for group in optimizers[name].param_groups:
                group["lr"] = share * rates[name]
            optimizers[name].zero_grad()
            with updates.acting(name, start, draws[part]):
                if name == "fake":
                    loss = updates.fake_loss(batch, start, draws[1])
                else:
                    loss = updates.generator_loss(batch, start, draws[2]).loss
                loss.backward()
            optimizers[name].step()
    after = sampled(trajectory, roles.networks["student"])
    assert float(before.mean()) == pytest.approx(0.3, abs=0.05)
    assert float(teacher.std()) < DEVIATION - 0.05  # at so few steps the teacher itself is too narrow
    assert float(after.mean()) == pytest.approx(MEAN, abs=0.05)
    assert float(after.std()) == pytest.approx(DEVIATION, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flow", "vp"])
def test_ode_initialization_leads_where_many_steps_of_the_teacher_lead(kind):
    """To the same sample, and not only to one of the same distribution."""
    trajectory = trajectory_of(kind, 4, 1.0)
    roles = GaussianRoles(trajectory)
    updates = Updates(
        roles, trajectory, None, FakeConfig(), GeneratorConfig(substeps=40), guidance_scale=1.0,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    optimizer = torch.optim.Adam(roles.networks["student"].parameters(), 0.03)
    batch = Batch(samples=range(BATCH), conditions=Conditions({}, {}, SHAPE))
    for update in range(UPDATES):
        draws = [Draws(0, update, part) for part in range(2)]
        with torch.no_grad():
            noise = draws[0].noise(START, batch.samples, SHAPE)
            way = updates.teacher_trajectory(batch.conditions, noise, [*trajectory.times, 0.0])
        steps, own = updates.steps(batch.samples, draws[0]), range(BATCH)
        start = Start(noisy=way[own, steps], steps=steps, end=way[own, [step + 1 for step in steps]])
        optimizer.param_groups[0]["lr"] = 0.03 if update < UPDATES // 2 else 0.006
        optimizer.zero_grad()
        with updates.acting("student", start, draws[1]):
            updates.ode_loss(batch, start, draws[1]).backward()
        optimizer.step()
    noise = first_noise(64)
    alpha, sigma = trajectory.levels([trajectory.times[0]] * len(noise), noise)
    # the flow of a normal distribution keeps every sample at its place in it
    aim = MEAN + DEVIATION * (noise - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2).sqrt()
    student, teacher = (sampled(trajectory, roles.networks[name]) for name in ("student", "teacher"))
    assert (student - aim).abs().mean() < 0.1 * (teacher - aim).abs().mean()


def test_a_student_that_is_the_teacher_stays_where_it_is():
    """Fake score and teacher agree then: the gradient is zero."""
    trajectory = trajectory_of("flow", 3, 1.0)
    roles = GaussianRoles(trajectory)
    for name in ("student", "fake"):
        roles.networks[name].load_state_dict(roles.networks["teacher"].state_dict())
    updates = Updates(
        roles, trajectory, None, FakeConfig(), GeneratorConfig(), guidance_scale=1.0,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    batch = Batch(samples=range(3), conditions=Conditions({}, {}, SHAPE))
    start = updates.rollout(batch, Draws(0, 0, 0))
    with updates.acting("student", start, Draws(0, 0, 1)):
        estimates = updates.generator_loss(batch, start, Draws(0, 0, 1))
        estimates.loss.backward()
    assert torch.equal(roles.networks["student"].mean.grad, torch.zeros(3))
    assert float(estimates.difference) == 0
    assert float(estimates.fake_error) == float(estimates.teacher_error)
