"""Videos made by pipelines of every family, from request to summary."""

from dataclasses import replace

import diffusers
import pytest
import torch
from PIL import Image

from blade import BladeConfig
from blade.attention.config import AdaptiveConfig
from blade.generation.finite import NonFiniteError
from blade.generation.request import GenerationRequest
from blade.generation.run import run_request
from blade.media.video import encode_mp4
from blade.models.loaded import LoadedModel

CONFIG = BladeConfig(sparsity=0.5, dense_steps=1, asa=AdaptiveConfig(block_size=16))

PASSES = {
    "WanPipeline": 6,  # guidance in two calls
    "WanImageToVideoPipeline": 6,
    "CogVideoXPipeline": 3,  # in a batch
    "CogVideoXImageToVideoPipeline": 3,
    "CogVideoXVideoToVideoPipeline": 2,  # `strength` skips the first step
    "HunyuanVideoPipeline": 3,  # within the model
    "HunyuanVideo15Pipeline": 6,
    "LTXPipeline": 3,
    "LTXImageToVideoPipeline": 3,
    "LTX2Pipeline": 9,  # guidance in a batch, self-attention perturbed, both modalities apart
    "LTX2ImageToVideoPipeline": 9,
    "ChronoEditPipeline": 6,
    "SkyReelsV2Pipeline": 6,
    "SkyReelsV2ImageToVideoPipeline": 6,
    "SkyReelsV2DiffusionForcingPipeline": 6,
    "SkyReelsV2DiffusionForcingImageToVideoPipeline": 6,
    "AnyFlowPipeline": 3,
    "HunyuanVideoFramepackPipeline": 3,
    "Kandinsky5T2VPipeline": 6,
    "Kandinsky5I2VPipeline": 6,
}
"""Forward passes of three steps."""


@pytest.fixture
def conditions(tmp_path):
    """An image and a video, as files."""
    frames = torch.rand(13, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    (tmp_path / "video.mp4").write_bytes(encode_mp4(frames, fps=8))
    Image.fromarray((frames[0].permute(1, 2, 0) * 255).byte().numpy()).save(tmp_path / "image.png")
    image = {"image": str(tmp_path / "image.png")}
    return {
        **dict.fromkeys(("Image", "ChronoEdit", "Framepack", "I2V"), image),
        "VideoToVideo": {"video": str(tmp_path / "video.mp4"), "fps": 8},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_a_video_is_made_and_summed_up(small_pipelines, conditions, name):
    if not hasattr(diffusers, name):
        pytest.skip("this Diffusers lacks the pipeline")
    torch.manual_seed(0)
    pipe = small_pipelines[name]()
    size = 512 if name in ("LTXPipeline", "LTXImageToVideoPipeline") else 128
    given = next((options for task, options in conditions.items() if task in name), {})
    request = GenerationRequest(
        prompt="a cat",
        steps=3,
        height=size,
        width=size,
        frames=17 if name == "Kandinsky5I2VPipeline" else 13,
        guidance_scale=3.0,
        blade_config=CONFIG,
        **given,
    )
    model, batches = LoadedModel(pipe), []
    record = model.transformer.register_forward_pre_hook(
        lambda module, args, inputs: batches.append(len(inputs["hidden_states"])), with_kwargs=True
    )
    made = run_request(model, request)
    record.remove()
    assert max(batches) == model.family.guidance_batch
    assert made.video.shape[1:] == (3, size, size) and made.video.isfinite().all()
    assert min(made.seconds_text, made.seconds_denoising, made.seconds_decoding) >= 0
    layers, passes = made.summary.transformers[0].layers, PASSES[name]
    dense = 0 if "VideoToVideo" in name else passes // 3  # the first step of the schedule
    assert all((layer.dense_calls, layer.sparse_calls) == (dense, passes - dense) for layer in layers)
    assert "step" not in vars(pipe.scheduler)
    if name.startswith("LTX2"):  # as long as the video, but for what the tokens of the audio are rounded to
        assert made.sound.rate == 8000 and made.sound.seconds == pytest.approx(13 / 24, abs=1 / 25)
        assert made.sound.samples.abs().max() > 0
    else:
        assert made.sound is None
    if name == "HunyuanVideo15Pipeline":  # whose call takes no `guidance_scale`
        assert pipe.guider.guidance_scale == 3.0


@pytest.mark.slow
def test_a_last_frame_is_taken_beside_the_first(small_pipelines, conditions):
    image = conditions["Image"]["image"]
    request = GenerationRequest(
        prompt="a cat", steps=3, height=128, width=128, frames=13, guidance_scale=3.0, blade_config=CONFIG, image=image
    )

    def video(request):
        torch.manual_seed(0)
        return run_request(LoadedModel(small_pipelines["WanImageToVideoPipeline"]()), request).video

    first, both = video(request), video(replace(request, last_image=image))
    assert both.isfinite().all() and not torch.equal(first, both)
    assert torch.equal(both, video(replace(request, last_image=image)))


def test_a_pipeline_without_a_callback_is_watched_at_its_scheduler(small_pipelines):
    """HunyuanVideo-1.5's: non-finite latents are seen before they are decoded."""
    pipe = small_pipelines["HunyuanVideo15Pipeline"]()
    pipe.transformer.proj_out.bias.data.fill_(float("nan"))
    request = GenerationRequest(prompt="a cat", steps=3, height=128, width=128, frames=13, guidance_scale=3.0)
    with pytest.raises(NonFiniteError, match="step 0"):
        run_request(LoadedModel(pipe), request)
    assert "step" not in vars(pipe.scheduler)
