"""LTX-Video under BLADE: timesteps of single tokens, and tokens that no grid explains."""

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel

from blade import BladeConfig, apply_blade, remove_blade
from blade.attention.applied import applied_to
from blade.attention.budget import BlockBudget
from blade.attention.config import AdaptiveConfig

DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=8,
    ).eval()  # fmt: skip


def make_inputs(**changes):
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 105, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 6, 8, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_attention_mask": torch.ones(1, 6),
        "num_frames": 3,
        "height": 5,
        "width": 7,
        **changes,
    }


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs).sample


def test_timesteps_of_single_tokens_follow_them(tiny, monkeypatch):
    """In image to video the first frame's are 0."""
    monkeypatch.setattr(BlockBudget, "is_full", False)
    timestep = torch.full((1, 105), 700.0)
    timestep[:, :35] = 0.0
    inputs = make_inputs(timestep=timestep)
    plain = run(tiny, inputs)
    sparse = run(apply_blade(tiny, BladeConfig(sparsity=0.0, asa=DETAILS)), inputs)
    torch.testing.assert_close(sparse, plain, rtol=1e-4, atol=1e-5)
    timestep[:, :35] = 700.0
    assert (run(remove_blade(tiny), inputs) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("changes", [{"num_frames": None}, {"width": 6}])
def test_tokens_that_no_grid_explains_are_refused(tiny, changes):
    apply_blade(tiny, BladeConfig(asa=DETAILS))
    with pytest.raises(ValueError, match=r"must say how 105 tokens lie, got (0, 5, 7|3, 5, 6) and none"):
        run(tiny, make_inputs(**changes))


def test_the_preset_is_found():
    with torch.device("meta"):
        transformer = LTXVideoTransformer3DModel(num_layers=1)
    apply_blade(transformer)
    assert applied_to(transformer).config == BladeConfig.from_preset("ltx-video")
