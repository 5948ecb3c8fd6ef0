"""Recommended settings of a model, by family, version and size."""

from types import SimpleNamespace

import pytest
from blade_pipelines.cogvideox import CogVideoXFamily
from blade_pipelines.hunyuan_video import HunyuanVideo15Family, HunyuanVideoFamily
from blade_pipelines.ltx_video import LTXVideoFamily
from blade_pipelines.wan import CAMERA_SHAKE, NEGATIVE_PROMPT, WanFamily


def wan(*, heads=40, inputs=16, **settings):
    config = SimpleNamespace(num_attention_heads=heads, attention_head_dim=128, in_channels=inputs, out_channels=16)
    return SimpleNamespace(
        transformer=SimpleNamespace(config=config),
        config=SimpleNamespace(**{"expand_timesteps": False, "boundary_ratio": None, **settings}),
    )


@pytest.mark.parametrize(
    ("pipe", "size", "expected"),
    [
        (wan(heads=12), (None, None), (480, 832, 81, 50, 5.0, None, 3.0)),
        (wan(), (720, 1280), (720, 1280, 81, 50, 5.0, None, 5.0)),
        (wan(inputs=36), (None, None), (480, 832, 81, 40, 5.0, None, 3.0)),
        (wan(boundary_ratio=0.875), (None, None), (720, 1280, 81, 40, 4.0, 3.0, None)),
        (wan(inputs=36, boundary_ratio=0.9), (None, None), (720, 1280, 81, 40, 3.5, 3.5, None)),
        (wan(heads=24, expand_timesteps=True), (None, None), (704, 1280, 121, 50, 5.0, None, None)),
    ],
    ids=["1.3B", "14B at 720p", "14B image", "2.2 text", "2.2 image", "2.2 TI2V"],
)
def test_wan(pipe, size, expected):
    found = WanFamily().sampling_defaults(pipe, *size)
    names = ("height", "width", "frames", "steps", "guidance_scale", "guidance_scale_2", "flow_shift")
    assert tuple(getattr(found, name) for name in names) == expected
    before = f"{CAMERA_SHAKE}\uff0c" if expected[3] == 40 and expected[-1] is not None else ""  # 2.1 from an image
    assert found.negative_prompt == before + NEGATIVE_PROMPT and NEGATIVE_PROMPT.count("\uff0c") == 27


def test_a_small_model_of_ones_own_keeps_its_scheduler():
    found = WanFamily().sampling_defaults(wan(heads=2), None, None)
    assert set(vars(found).values()) == {None}


def test_other_families():
    for patch, expected in ((None, (480, 720, 49, 8)), (2, (768, 1360, 81, 16))):
        pipe = SimpleNamespace(transformer=SimpleNamespace(config=SimpleNamespace(patch_size_t=patch)))
        found = CogVideoXFamily().sampling_defaults(pipe, None, None)
        assert (found.height, found.width, found.frames, found.fps) == expected
    assert HunyuanVideoFamily().sampling_defaults(None, None, None).fps == 24
    assert LTXVideoFamily().sampling_defaults(None, None, None).fps == 25


def test_hunyuan_video_15_takes_the_guiders_scale():
    from diffusers import ClassifierFreeGuidance
    from diffusers.pipelines.hunyuan_video1_5.image_processor import HunyuanVideo15ImageProcessor

    pipe = SimpleNamespace(
        video_processor=HunyuanVideo15ImageProcessor(vae_scale_factor=16),
        target_size=640,
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        default_aspect_ratio=(16, 9),
    )
    found = HunyuanVideo15Family().sampling_defaults(pipe, None, None)
    assert found.guidance_scale == 6.0
    assert found.width / found.height == pytest.approx(16 / 9, rel=0.1)
    assert found.height * found.width == pytest.approx(640 * 640, rel=0.1)
