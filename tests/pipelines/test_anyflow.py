"""AnyFlow under BLADE: both timesteps of every frame follow its tokens, wherever they go."""

import diffusers
import pytest
import torch

from blade import BladeConfig, apply_blade
from blade.attention.applied import applied_to
from blade.attention.budget import BlockBudget
from blade.attention.config import AdaptiveConfig
from blade.generation.request import GenerationRequest
from blade.generation.run import run_request
from blade.models.loaded import LoadedModel

if not hasattr(diffusers, "AnyFlowTransformer3DModel"):
    pytest.skip("this Diffusers lacks the model", allow_module_level=True)

DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)


@pytest.fixture
def make(make_like_wan):
    """Return a function that makes a tiny transformer."""
    return lambda: make_like_wan(diffusers.AnyFlowTransformer3DModel)


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs).sample


@pytest.mark.parametrize("changed", ["timestep", "r_timestep"])
def test_timesteps_of_frames_follow_their_tokens(make, anyflow_inputs, monkeypatch, changed):
    """The order runs across frames; with the embedded timesteps left in raster order the error is large."""
    monkeypatch.setattr(BlockBudget, "is_full", False)
    inputs = anyflow_inputs((4, 3, 5))
    inputs[changed] = torch.tensor([[0.0, 900.0, 100.0, 500.0]])
    plain = run(make(), inputs)
    transformer = apply_blade(make(), BladeConfig(sparsity=0.0, asa=DETAILS))
    torch.testing.assert_close(run(transformer, inputs), plain, rtol=1e-4, atol=1e-5)
    assert not applied_to(transformer).grid.frames_apart
    applied_to(transformer)._handles[1].remove()
    assert (run(transformer, inputs) - plain).abs().max() > 1e-2


def test_a_latent_of_another_rank_is_refused(make, anyflow_inputs):
    transformer = apply_blade(make(), BladeConfig(asa=DETAILS))
    inputs = anyflow_inputs()
    inputs["hidden_states"] = inputs["hidden_states"][0]
    with pytest.raises(ValueError, match=r"`hidden_states` must be \(B, F, C, H, W\), got shape \(3, 4, 10, 14\)"):
        run(transformer, inputs)


def test_a_video_is_no_condition_of_the_command_line(small_pipelines):
    request = GenerationRequest(prompt="a cat", steps=3, height=128, width=128, frames=13, video="cat.mp4", fps=8)
    with pytest.raises(ValueError, match="`video` must not be given: an AnyFlowPipeline keeps it as the first frames"):
        run_request(LoadedModel(small_pipelines["AnyFlowPipeline"]()), request)
