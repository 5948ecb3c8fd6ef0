"""Whole small pipelines with conditions in the sequence: LTX-Video's and LTX-2's, each with BLADE and without."""

import numpy as np
import pytest
import torch
from PIL import Image

from blade import BladeConfig, TokenGrid, apply_blade, blade_summary, remove_blade
from blade.attention.applied import applied_to
from blade.attention.config import AdaptiveConfig

DETAILS = AdaptiveConfig(block_size=16)
DENSE = BladeConfig(sparsity=0.0, asa=DETAILS)
HALF = BladeConfig(sparsity=0.5, dense_steps=1, asa=DETAILS)


def image(size, seed=0):
    values = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def ltx_conditions(*indices):
    from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

    return [LTXVideoCondition(image=image(512, index), frame_index=index, strength=0.8) for index in indices]


def ltx2_conditions(*indices):
    from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition

    return [LTX2VideoCondition(frames=image(128, abs(index)), index=index, strength=0.8) for index in indices]


def reference():
    from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

    return LTX2ReferenceCondition(frames=[image(128, seed) for seed in range(5)])


VIDEO, TALL = TokenGrid(4, 8, 8), TokenGrid(2, 16, 16)
RUNS = {
    "LTXConditionPipeline": [
        ({}, TALL),
        ({"conditions": lambda: ltx_conditions(0)}, TALL),
        ({"conditions": lambda: ltx_conditions(0, 8)}, TokenGrid(2, 16, 16, text_before=256)),
    ],
    "LTXI2VLongMultiPromptPipeline": [
        # windows of two frames, the later ones with one of the window before, and all with the first image
        ({"temporal_tile_size": 16, "temporal_overlap": 8}, TokenGrid(2, 8, 8, text_after=64)),
        (
            {"temporal_tile_size": 16, "temporal_overlap": 8, "cond_image": lambda: image(256), "guidance_scale": 2.0},
            TokenGrid(2, 8, 8, text_after=128),
        ),
    ],
    "LTX2ConditionPipeline": [
        ({}, VIDEO),
        ({"conditions": lambda: ltx2_conditions(0)}, VIDEO),
        ({"conditions": lambda: ltx2_conditions(0, -1)}, TokenGrid(4, 8, 8, text_after=64)),
    ],
    "LTX2InContextPipeline": [
        ({}, VIDEO),
        ({"reference_conditions": reference}, TokenGrid(4, 8, 8, text_after=128)),
        (
            {"reference_conditions": reference, "conditions": lambda: ltx2_conditions(2)},
            TokenGrid(4, 8, 8, text_after=192),
        ),
        (
            {"reference_conditions": reference, "reference_downscale_factor": 2},
            TokenGrid(4, 8, 8, text_after=32),
        ),
    ],
    "LTX2DFRPipeline": [({}, None), ({"conditions": lambda: ltx2_conditions(0, 2)}, None)],
}
"""Calls, and the grid of the last forward pass; None: padded by the pipeline."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name, runs in RUNS.items() for number in range(len(runs))]
)
def test_a_video_is_made(name, number, small_pipelines):
    """At sparsity 0 it is bitwise Diffusers' own, with its sound; at 0.5 layers are sparse from the second step on."""
    options, grid = RUNS[name][number]
    options = {key: value() if callable(value) else value for key, value in options.items()}
    pipe = small_pipelines[name]()
    pipe.set_progress_bar_config(disable=True)

    def make():
        torch.manual_seed(0)
        made = pipe(prompt="a cat", output_type="pt", **options)
        return [made.frames, *([made.audio] if name.startswith("LTX2") else [])]

    plain = make()
    apply_blade(pipe, DENSE, dense_steps=0)
    assert all(map(torch.equal, make(), plain))
    apply_blade(pipe, HALF)
    sparse = make()
    assert all(part.isfinite().all() for part in sparse) and not torch.equal(sparse[0], plain[0])
    used = applied_to(pipe.transformer).grid
    assert used == grid if grid is not None else used.video_tokens > used.text_tokens > 0
    layers = blade_summary(pipe).transformers[0].layers
    assert all(layer.sparse_calls > 0 and layer.dense_calls > 0 for layer in layers)
    remove_blade(pipe)
    assert all(map(torch.equal, make(), plain))


@pytest.mark.slow
def test_references_of_less_than_full_strength_are_as_without_blade(small_pipelines):
    pipe = small_pipelines["LTX2InContextPipeline"]()

    def make():
        torch.manual_seed(0)
        return pipe(
            prompt="a cat",
            output_type="pt",
            reference_conditions=reference(),
            conditioning_attention_strength=0.5,
        ).frames

    plain = make()
    apply_blade(pipe, HALF)
    assert torch.equal(make(), plain) and blade_summary(pipe).run_density == 1.0


@pytest.mark.slow
def test_two_stages_with_upsampled_latents(small_pipelines):
    """The second stage is twice as high and wide, and begins with the first's video and audio."""
    from diffusers import LTX2LatentUpsamplePipeline
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    pipe = apply_blade(small_pipelines["LTX2Pipeline"](), HALF)
    torch.manual_seed(0)
    upsampler = LTX2LatentUpsamplerModel(
        in_channels=4, mid_channels=32, num_blocks_per_stage=1, use_rational_resampler=False
    )
    first = pipe(prompt="a cat", output_type="latent")
    assert applied_to(pipe.transformer).grid == VIDEO
    upsample = LTX2LatentUpsamplePipeline(vae=pipe.vae, latent_upsampler=upsampler)
    latents = upsample(latents=first.frames, output_type="latent").frames
    second = pipe(
        prompt="a cat",
        latents=latents,
        audio_latents=first.audio,
        noise_scale=0.9,
        guidance_scale=1.0,
        output_type="pt",
    )
    assert applied_to(pipe.transformer).grid == TokenGrid(4, 16, 16)
    assert second.frames.shape == (1, 13, 3, 256, 256) and second.frames.isfinite().all()
    assert second.audio.shape[1] == 2 and second.audio.isfinite().all()
    assert all(layer.sparse_calls > 0 for layer in blade_summary(pipe).transformers[0].layers)
