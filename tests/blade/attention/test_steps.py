"""The step of a forward pass is found whichever way it is told, or not told."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from blade.attention.steps import StepResolver


class Context:
    """What newer versions of Diffusers hand to cache hooks."""

    def __init__(self, step_index=None, num_inference_steps=None):
        self.step_index = step_index
        self.num_inference_steps = num_inference_steps


def unipc():
    """As Wan pipelines are released with."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


class Pipe:
    def __init__(self, scheduler):
        self.scheduler = scheduler


def at(value):
    return torch.full((2,), float(value))


def test_the_cache_context_comes_first():
    pipe = Pipe(unipc())
    pipe.scheduler.set_timesteps(8)
    steps = StepResolver(pipe)
    steps.context.set_context(Context(step_index=5, num_inference_steps=30))
    assert steps.resolve(at(100)) == (5, 30)
    steps.context.set_context(Context(step_index=6))
    assert steps.resolve(at(100)) == (6, 8)
    steps.context.set_context(None)
    assert steps.resolve(at(100)) == (0, 8)


def test_a_context_that_is_only_a_name_leaves_it_to_the_scheduler():
    pipe = Pipe(unipc())
    pipe.scheduler.set_timesteps(4)
    steps = StepResolver(pipe)
    steps.context.set_context("cond")  # as before Diffusers 0.37
    assert steps.resolve(at(999)) == (0, 4)


@pytest.mark.parametrize("make_scheduler", [unipc, FlowMatchEulerDiscreteScheduler])
def test_the_schedulers_steps_are_followed_with_guidance(make_scheduler):
    pipe = Pipe(make_scheduler())
    steps = StepResolver(pipe)
    for _ in range(2):  # a second run starts over
        pipe.scheduler.set_timesteps(4)
        sample, seen = torch.zeros(1, 2), []
        for timestep in pipe.scheduler.timesteps:
            seen += [steps.resolve(timestep[None]), steps.resolve(timestep[None])]
            sample = pipe.scheduler.step(torch.ones(1, 2), timestep, sample, return_dict=False)[0]
        assert seen == [(step, 4) for step in (0, 0, 1, 1, 2, 2, 3, 3)]


def test_a_run_may_begin_in_the_middle_of_the_schedule():
    pipe = Pipe(unipc())
    pipe.scheduler.set_timesteps(10)
    pipe.scheduler.set_begin_index(6)
    assert StepResolver(pipe).resolve(at(400)) == (6, 10)


class Uncounted:
    """A scheduler without `step_index`, as those of CogVideoX."""

    order = 1

    def set_timesteps(self, count):
        self.num_inference_steps, self.timesteps = count, torch.linspace(999, 999 / count, count).round()

    def step(self, output, timestep, sample, return_dict=False):
        return (sample,)


@pytest.mark.parametrize("make_scheduler", [unipc, FlowMatchEulerDiscreteScheduler, Uncounted])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_leaves_steps_out_begins_at_its_place_in_the_schedule(make_scheduler, dtype):
    """As video to video: the scheduler isn't told, and the pipeline's loop begins in the middle."""
    pipe = Pipe(make_scheduler())
    steps = StepResolver(pipe)
    for first in (4, 6, 0):
        pipe.scheduler.set_timesteps(8)
        timesteps = pipe.scheduler.timesteps[first:]
        pipe.num_timesteps = len(timesteps)
        sample, seen = torch.zeros(1, 2), []
        for timestep in timesteps:
            seen += [steps.resolve(timestep[None].to(dtype)), steps.resolve(timestep[None].to(dtype))]
            sample = pipe.scheduler.step(torch.ones(1, 2), timestep, sample, return_dict=False)[0]
        assert seen == [(step, 8) for step in range(first, 8) for _ in range(2)]
        steps.reset()


def test_timesteps_that_the_scheduler_does_not_have_begin_at_the_first_step():
    pipe = Pipe(unipc())
    pipe.scheduler.set_timesteps(8)
    assert StepResolver(pipe).resolve(at(0.5)) == (0, 8)  # given as a share


def test_a_run_of_all_steps_does_not_look_at_the_timestep():
    pipe = Pipe(unipc())
    pipe.scheduler.set_timesteps(8)
    pipe.num_timesteps = 8
    assert StepResolver(pipe).resolve(torch.empty(2, device="meta")) == (0, 8)


def test_without_a_scheduler_in_use_timesteps_are_compared():
    for pipe in (None, Pipe(unipc())):
        steps = StepResolver(pipe)
        seen = [steps.resolve(at(value)) for value in (900, 900, 600, 600, 300, 900, 600)]
        assert seen == [(step, None) for step in (0, 0, 1, 1, 2, 0, 1)]


def test_after_the_pipelines_run_timesteps_are_compared():
    pipe = Pipe(FlowMatchEulerDiscreteScheduler())
    pipe.scheduler.set_timesteps(2)
    for timestep in pipe.scheduler.timesteps:
        pipe.scheduler.step(torch.ones(1, 2), timestep, torch.zeros(1, 2))
    steps = StepResolver(pipe)
    assert [steps.resolve(at(value)) for value in (501, 500)] == [(0, None), (1, None)]


def test_timesteps_of_tokens_count_by_the_largest():
    """The first frame of image to video stands at 0 throughout."""
    steps = StepResolver()
    seen = [steps.resolve(torch.tensor([[0.0, value, value]])) for value in (900.0, 600.0)]
    assert seen == [(0, None), (1, None)]


def test_a_scheduler_of_which_copies_are_stepped_is_read_at_the_largest_timestep():
    pipe = Pipe(unipc())
    pipe.num_timesteps = 5
    pipe.scheduler.set_timesteps(5)
    steps = StepResolver(pipe)
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        frames = torch.stack((timestep, timestep // 2, torch.tensor(0)))[None].to(torch.bfloat16)
        assert steps.resolve(frames, counts_itself=False) == (step, 5)
        assert steps.resolve(frames) == (0, 5)  # it is thought to be at its first step
    pipe.scheduler.num_inference_steps = None
    compared = [steps.resolve(at(value), counts_itself=False) for value in (900, 900, 500)]
    assert compared == [(0, None), (0, None), (1, None)]


def test_a_reset_begins_a_new_run():
    steps = StepResolver()
    steps.resolve(at(900))
    steps.resolve(at(500))
    steps.reset()
    assert steps.resolve(at(400)) == (0, None)


def test_the_pipeline_is_not_kept_alive():
    pipe = Pipe(unipc())
    pipe.scheduler.set_timesteps(4)
    steps = StepResolver(pipe)
    del pipe
    assert steps.resolve(at(900)) == (0, None)


def test_timesteps_may_rise_as_the_noise_falls():
    steps = StepResolver(rising=True)
    found = [steps.resolve(torch.tensor([value]))[0] for value in (0.0, 0.0, 0.2, 0.9, 0.1)]
    assert found == [0, 0, 1, 2, 0]
    scheduler = SimpleNamespace(timesteps=torch.tensor([0.0, 0.2, 0.9]), num_inference_steps=3, step_index=None)
    pipe = Pipe(scheduler)
    assert StepResolver(pipe, rising=True).resolve(torch.tensor([0.2, 0.999])) == (1, 3)
