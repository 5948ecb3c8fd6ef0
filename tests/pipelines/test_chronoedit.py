"""ChronoEdit under BLADE: an edit is two frames far apart in time, or the last of a video."""

import pytest
import torch
from diffusers import ChronoEditTransformer3DModel

from blade import BladeConfig, apply_blade
from blade.attention.budget import BlockBudget
from blade.attention.config import AdaptiveConfig

DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)


def test_the_two_frames_of_an_edit_keep_their_times(make_like_wan, wan_inputs, monkeypatch):
    """Their times depend on `rope_temporal_skip_len`, and are permuted with their tokens."""
    monkeypatch.setattr(BlockBudget, "is_full", False)
    inputs, outputs = wan_inputs((2, 5, 7)), []
    for skipped in (8, 3):
        config = {"rope_temporal_skip_len": skipped}
        with torch.no_grad():
            plain = make_like_wan(ChronoEditTransformer3DModel, **config)(**inputs).sample
            transformer = make_like_wan(ChronoEditTransformer3DModel, **config)
            sparse = apply_blade(transformer, BladeConfig(sparsity=0.0, asa=DETAILS))(**inputs).sample
        torch.testing.assert_close(sparse, plain, rtol=1e-4, atol=1e-5)
        outputs.append(sparse)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("reasoning", [None, 1, 3])
def test_an_edit_is_made_with_and_without_reasoning(small_pipelines, reasoning):
    """Two frames are left after the steps of reasoning: BLADE follows from one size to the next."""
    torch.manual_seed(0)
    pipe = small_pipelines["ChronoEditPipeline"]()
    apply_blade(pipe, BladeConfig(sparsity=0.5, asa=AdaptiveConfig(block_size=16)), dense_steps=1)
    options = {} if reasoning is None else {
        "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": reasoning,
    }  # fmt: skip
    image = torch.rand(1, 3, 128, 128)
    video = pipe(image=image, prompt="a cat", guidance_scale=2.0, output_type="pt", **options).frames[0]
    assert len(video) == (13 if reasoning == 3 else 5) and video.isfinite().all()
