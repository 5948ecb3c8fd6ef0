"""FramePack under BLADE: earlier frames are kept whole, and texts end where they end."""

import pytest
import torch
from PIL import Image

from blade import BladeConfig, apply_blade, blade_summary
from blade.attention import adaptive
from blade.attention.applied import applied_to
from blade.attention.config import AdaptiveConfig
from blade.models.loaded import LoadedModel

DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4)


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs).sample


def test_earlier_frames_image_and_text_are_kept_by_every_query(framepack, monkeypatch):
    masks, attend = [], adaptive.block_sparse_attention

    def spy(query, key, value, mask, **options):
        masks.append(mask.keep)
        return attend(query, key, value, mask, **options)

    monkeypatch.setattr(adaptive, "block_sparse_attention", spy)
    grid = (4, 5, 7)
    transformer = apply_blade(framepack.make(), BladeConfig(sparsity=0.6, asa=DETAILS))
    run(transformer, framepack.inputs(grid))
    video, tokens = 4 * 5 * 7, applied_to(transformer).grid.sequence_length
    assert tokens == video + framepack.history(grid) + 2 + 4  # the first text has 4 tokens of 6
    for mask in masks:
        assert mask[..., video // 8 :].all() and mask[..., video // 8 :, :].all()
        assert not mask.all()


@pytest.mark.parametrize("length", [1, 4, 6])
def test_a_single_text_is_cut_off_where_it_ends(framepack, length):
    """As in Diffusers: what the padding holds changes nothing."""
    inputs = framepack.inputs((4, 5, 7))
    inputs["encoder_attention_mask"] = (torch.arange(6) < length).to(torch.int64)[None]
    transformer = apply_blade(framepack.make(), BladeConfig(sparsity=0.5, asa=DETAILS))
    expected = run(transformer, inputs)
    assert applied_to(transformer).grid.text_tokens == framepack.history((4, 5, 7)) + 2 + length
    inputs["encoder_hidden_states"][:, length:] = 100.0
    torch.testing.assert_close(run(transformer, inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_dry_run_is_refused(small_pipelines):
    model = LoadedModel(small_pipelines["HunyuanVideoFramepackPipeline"]())
    assert "in sections of frames" in model.family.plan_problem(model.pipe)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["inverted_anti_drifting", "vanilla"])
def test_a_video_of_two_sections_is_made(small_pipelines, sampling):
    torch.manual_seed(0)
    pipe = small_pipelines["HunyuanVideoFramepackPipeline"]()
    apply_blade(pipe, BladeConfig(sparsity=0.5, asa=AdaptiveConfig(block_size=16)), dense_steps=1)
    image = Image.new("RGB", (128, 128), "red")
    video = pipe(image=image, prompt="a cat", latent_window_size=3, sampling_type=sampling, output_type="pt").frames[0]
    assert video.shape == (25, 3, 128, 128) and video.isfinite().all()  # two sections of 12, and the image
    layers = blade_summary(pipe).transformers[0].layers
    assert [(layer.dense_calls, layer.sparse_calls) for layer in layers] == [(2, 4)] * 2
