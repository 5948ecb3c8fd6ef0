"""Fixtures that more than one part of the suite uses."""

import importlib.util
import json
import os
from collections.abc import Iterator

import pytest
import small_wan
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: on the CPU they are interpreted


@pytest.fixture(scope="session", autouse=True)
def kernel_memory() -> Iterator[None]:
    """Check what the kernels of all tests touch, wherever they are interpreted."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from kernel_memory import checked_kernels

    with checked_kernels():
        yield


@pytest.fixture
def make_wan():
    """Return a function that makes a tiny `WanTransformer3DModel` with random weights."""
    return small_wan.make_wan


@pytest.fixture
def wan_inputs():
    """Return a function that makes the inputs of a tiny Wan transformer for a grid of tokens."""
    return small_wan.wan_inputs


_SMALL = {"height": 128, "width": 128, "num_frames": 13, "num_inference_steps": 3}
_LARGER = {"height": 512, "width": 512}
"""Of LTX-Video, whose patches are 32 pixels wide."""
_BLOCKS = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}


def _small(pipeline_class, **parts):
    """A pipeline whose text is random and whose videos are small, whatever is asked for."""
    name = pipeline_class.__name__

    class Small(pipeline_class):
        def __call__(self, *args, **options):
            small = {**_SMALL, **(_LARGER if name.startswith("LTX") and not name.startswith("LTX2") else {})}
            if name == "LTX2DFRPipeline":  # its steps are given
                small["num_frames"] = 17
                small.pop("num_inference_steps")
            if name == "LTXI2VLongMultiPromptPipeline":
                small |= {"height": 256, "width": 256, "num_frames": 33}
            if "video" in options or "latents" in options:  # as large as it is
                small.pop("num_frames")
            if name == "Kandinsky5I2VPipeline":  # which compares the first four latent frames with later ones
                small["num_frames"] = 17
            if name == "WanAnimatePipeline":  # as long as that of the poses
                small["segment_frame_length"] = small.pop("num_frames")
            return super().__call__(*args, **{**options, **small})

        def encode_image(self, *args, **options):
            return torch.randn(1, 3, 8)

        def encode_prompt(self, *args, **options):
            if name in (
                "WanAnimatePipeline",
                "ChronoEditPipeline",
                "SkyReelsV2ImageToVideoPipeline",
            ):  # whose processors know where an image ends
                return torch.randn(1, 512, 8), torch.randn(1, 512, 8)
            if name.startswith("Kandinsky5"):
                return torch.randn(1, 6, 8), torch.randn(1, 8), torch.tensor([0, 6])
            if name in ("HunyuanVideoPipeline", "HunyuanVideoFramepackPipeline"):
                return torch.randn(1, 6, 8), torch.randn(1, 8), torch.ones(1, 6)
            if name.startswith("HunyuanVideo15"):
                return torch.randn(1, 6, 8), torch.ones(1, 6), torch.randn(1, 3, 8), torch.ones(1, 3)
            if name == "LTX2DFRPipeline":  # without guidance
                return torch.randn(1, 6, 8), torch.ones(1, 6)
            if name.startswith("LTX"):
                return torch.randn(1, 6, 8), torch.ones(1, 6), torch.randn(1, 6, 8), torch.ones(1, 6)
            return torch.randn(1, 6, 8), torch.randn(1, 6, 8)

    return Small(text_encoder=None, tokenizer=None, **parts)


def _wan_vae():
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


_LIKE_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 8,
    "freq_dim": 16, "ffn_dim": 24, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
_SEES_IMAGES = {"in_channels": 12, "image_dim": 8, "added_kv_proj_dim": 32}


def _like_wan(name, scheduler="UniPCMultistepScheduler", **options):
    """A pipeline of a class that is built as Wan's: `name` is that of its transformer without its ending."""
    import diffusers

    transformer = getattr(diffusers, f"{name}Transformer3DModel")(**{**_LIKE_WAN, **options})
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if scheduler.startswith("Uni") else {}
    return {"vae": _wan_vae(), "transformer": transformer, "scheduler": getattr(diffusers, scheduler)(**flow)}


def _wan_animate():
    from diffusers import WanAnimatePipeline

    parts = _like_wan(
        "WanAnimate", **_SEES_IMAGES, latent_channels=4, motion_encoder_size=16, motion_style_dim=8, motion_dim=4,
        motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4}, motion_encoder_dim=8, face_encoder_hidden_dim=8,
        face_encoder_num_heads=2, inject_face_latents_blocks=1,
    )  # fmt: skip
    return _small(WanAnimatePipeline, image_encoder=None, image_processor=None, **parts)


def _chronoedit():
    from diffusers import ChronoEditPipeline

    return _small(
        ChronoEditPipeline, image_encoder=None, image_processor=None, **_like_wan("ChronoEdit", **_SEES_IMAGES)
    )


def _skyreels_v2(task="SkyReelsV2Pipeline"):
    import diffusers

    if task == "SkyReelsV2ImageToVideoPipeline":
        parts = _like_wan("SkyReelsV2", **_SEES_IMAGES)
        return _small(getattr(diffusers, task), image_encoder=None, image_processor=None, **parts)
    return _small(getattr(diffusers, task), **_like_wan("SkyReelsV2", inject_sample_info="Forcing" in task))


def _anyflow():
    from diffusers import AnyFlowPipeline

    return _small(AnyFlowPipeline, **_like_wan("AnyFlow", "FlowMapEulerDiscreteScheduler"))


def _framepack():
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoFramepackPipeline,
        HunyuanVideoFramepackTransformer3DModel,
    )

    transformer = HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
        has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True,
    )  # fmt: skip
    return _small(
        HunyuanVideoFramepackPipeline, vae=AutoencoderKLHunyuanVideo(**_BLOCKS), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), text_encoder_2=None, tokenizer_2=None,
        image_encoder=None, feature_extractor=None,
    )  # fmt: skip


def _kandinsky5(task="Kandinsky5T2VPipeline"):
    import diffusers
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel

    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=24,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond="I2V" in task,
    )  # fmt: skip
    return _small(
        getattr(diffusers, task), vae=AutoencoderKLHunyuanVideo(**_BLOCKS), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip


def _wan(make_wan, task="WanPipeline"):
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler

    vae = _wan_vae()
    # an image-to-video transformer also sees which frames are given, and their latents
    transformer = make_wan(in_channels=12) if "Image" in task else make_wan()
    return _small(
        getattr(diffusers, task), vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler()
    )


def _cogvideox(task="CogVideoXPipeline"):
    import diffusers
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8 if "Image" in task else 4, out_channels=4,
        time_embed_dim=8, text_embed_dim=8, num_layers=2, max_text_seq_length=6, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(**_BLOCKS)
    return _small(getattr(diffusers, task), vae=vae, transformer=transformer, scheduler=CogVideoXDPMScheduler())


def _hunyuan_video():
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return _small(
        HunyuanVideoPipeline, vae=AutoencoderKLHunyuanVideo(**_BLOCKS), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip


def _hunyuan_video_15():
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from diffusers.guiders import ClassifierFreeGuidance

    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_refiner_layers=1, patch_size=1, text_embed_dim=8, text_embed_2_dim=8, image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(32,) * 5, layers_per_block=1)
    return _small(
        HunyuanVideo15Pipeline, vae=vae, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder_2=None, tokenizer_2=None, guider=ClassifierFreeGuidance(guidance_scale=6.0),
    )  # fmt: skip


def _ltx_video(task="LTXPipeline"):
    import diffusers
    from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel

    transformer = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=8,
    )  # fmt: skip
    # the condition pipeline makes its noise levels by itself
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=task != "LTXConditionPipeline")
    if task == "LTXI2VLongMultiPromptPipeline":
        scheduler = diffusers.LTXEulerAncestralRFScheduler()
    vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, encoder_causal=True,
    )  # fmt: skip
    return _small(getattr(diffusers, task), vae=vae, transformer=transformer, scheduler=scheduler)


def make_ltx2_parts(**config):
    """The parts of a small LTX-2 pipeline by name: 16 pixels and 4 frames make a token, text has 8 channels."""
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        FlowMatchEulerDiscreteScheduler,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    torch.manual_seed(0)
    vae = AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1,) * 3,
        decoder_layers_per_block=(1,) * 3, spatio_temporal_scaling=(True,) * 2,
        decoder_spatio_temporal_scaling=(True,) * 2, decoder_inject_noise=(False,) * 3,
        down_block_types=("LTX2VideoDownBlock3D",) * 2, downsample_type=("spatiotemporal",) * 2,
        upsample_type=("spatiotemporal",) * 2, upsample_residual=(False,) * 2, upsample_factor=(1,) * 2,
    )  # fmt: skip
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
    )
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=8, upsample_kernel_sizes=[20, 16], upsample_factors=[10, 8],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=8000,
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=8, text_proj_in_factor=1, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32,
    )  # fmt: skip
    transformer = LTX2VideoTransformer3DModel(
        **{
            "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16,
            "cross_attention_dim": 32, "vae_scale_factors": (4, 16, 16), "audio_in_channels": 4,
            "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16, "num_layers": 2, "caption_channels": 8, "perturbed_attn": True, **config,
        }
    )  # fmt: skip
    return {
        "vae": vae,
        "audio_vae": audio_vae,
        "vocoder": vocoder,
        "connectors": connectors,
        "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1),
    }


def _ltx2(task="LTX2Pipeline", **config):
    import diffusers

    parts = make_ltx2_parts(**config)
    if task == "LTX2DFRPipeline":  # of a distilled model, whose noise levels are taken as they are
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    return _small(getattr(diffusers, task), **parts)


def _qwen3_vl():
    """A tiny text encoder of Qwen3-VL's with the 51 layers that MiniMax-H3 needs, its tokenizer and processor."""
    from transformers import (
        Qwen2Tokenizer,
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
    )
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    class WithoutVideo(Qwen3VLProcessor):
        """Its part for video needs torchvision, and is for references alone."""

        def check_argument_for_proper_class(self, name, value):
            pass

        def save_pretrained(self, folder, **options):
            self.image_processor.save_pretrained(folder)

    special = ["<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    vocabulary = {token: number for number, token in enumerate(bytes_to_unicode().values())}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], additional_special_tokens=special)
    _, start, end, image, video = tokenizer.convert_tokens_to_ids(special)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 51,
            "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "patch_size": 16,
            "spatial_merge_size": 2, "out_hidden_size": 8, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    images = Qwen2VLImageProcessor(patch_size=16, merge_size=2, size={"shortest_edge": 32**2, "longest_edge": 64**2})
    return {
        "text_encoder": Qwen3VLForConditionalGeneration(config).eval(),
        "tokenizer": tokenizer,
        "processor": WithoutVideo(image_processor=images, tokenizer=tokenizer, video_processor=None),
    }


def _minimax_h3(*, small=False):
    """A small random `MiniMaxH3ModularPipeline`, whose sound is of 8 kHz; `small` makes small videos of it."""
    from diffusers import (
        AutoencoderKLMiniMaxH3,
        AutoencoderKLMiniMaxH3Audio,
        MiniMaxH3ModularPipeline,
        MiniMaxH3Scheduler,
        MiniMaxH3Transformer3DModel,
    )

    torch.manual_seed(0)
    vae = AutoencoderKLMiniMaxH3(
        latent_channels=2, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        spatial_downsample_factors=(2, 2, 2, 2), temporal_downsample_factors=(1, 2, 2, 1), norm_num_groups=4,
        decoder_num_layers=1, decoder_num_attention_heads=2, decoder_attention_head_dim=8,
        decoder_num_register_tokens=2, decoder_ffn_mult=2, latents_mean=(0.0,) * 2, latents_std=(1.0,) * 2,
    )  # fmt: skip
    audio_vae = AutoencoderKLMiniMaxH3Audio(
        encoder_dim=4, encoder_rates=(2, 5, 20), latent_dim=8, latent_channels=4, num_attention_heads=2,
        decoder_dim=16, decoder_rates=(20, 5, 2), decoder_kernel_sizes=(40, 9, 4), resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),), sampling_rate=8000, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip

    class Small(MiniMaxH3ModularPipeline):
        def __call__(self, *args, **options):
            return super().__call__(*args, **{**options, "height": 128, "width": 128, "num_inference_steps": 4})

    transformer = MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=2, num_refiner_layers=1, ffn_dim=32,
        in_channels=2, audio_in_channels=4, text_dim=8, freq_dim=16, time_embed_hidden_dim=16, time_embed_dim=8,
        rope_freq_dim=2,
    ).eval()  # fmt: skip
    pipe = Small() if small else MiniMaxH3ModularPipeline()
    pipe.update_components(
        transformer=transformer,
        vae=vae,
        audio_vae=audio_vae,
        scheduler=MiniMaxH3Scheduler(),
        audio_scheduler=MiniMaxH3Scheduler(shift=3.0),
        **_qwen3_vl(),
    )
    return pipe


@pytest.fixture
def make_minimax_h3_pipeline():
    """Return a function that makes a small random pipeline for video with sound."""
    return _minimax_h3


@pytest.fixture
def make_wan_vae():
    """Return a function that makes a small random VAE of Wan's."""
    return _wan_vae


@pytest.fixture
def small_pipelines(make_wan):
    """Functions that make a small random pipeline of every family, by the name of its class."""
    return {
        "WanPipeline": lambda: _wan(make_wan),
        "WanImageToVideoPipeline": lambda: _wan(make_wan, "WanImageToVideoPipeline"),
        "CogVideoXPipeline": _cogvideox,
        "CogVideoXImageToVideoPipeline": lambda: _cogvideox("CogVideoXImageToVideoPipeline"),
        "CogVideoXVideoToVideoPipeline": lambda: _cogvideox("CogVideoXVideoToVideoPipeline"),
        "HunyuanVideoPipeline": _hunyuan_video,
        "HunyuanVideo15Pipeline": _hunyuan_video_15,
        "LTXPipeline": _ltx_video,
        "LTXImageToVideoPipeline": lambda: _ltx_video("LTXImageToVideoPipeline"),
        "MiniMaxH3ModularPipeline": lambda: _minimax_h3(small=True),
        "LTXConditionPipeline": lambda: _ltx_video("LTXConditionPipeline"),
        "LTXI2VLongMultiPromptPipeline": lambda: _ltx_video("LTXI2VLongMultiPromptPipeline"),
        "LTX2Pipeline": _ltx2,
        "LTX2ImageToVideoPipeline": lambda: _ltx2("LTX2ImageToVideoPipeline"),
        "LTX2ConditionPipeline": lambda: _ltx2("LTX2ConditionPipeline"),
        "LTX2InContextPipeline": lambda: _ltx2("LTX2InContextPipeline"),
        "LTX2DFRPipeline": lambda: _ltx2("LTX2DFRPipeline", use_keyframes_abs_pos_embedding=True),
        "WanAnimatePipeline": _wan_animate,
        "ChronoEditPipeline": _chronoedit,
        "SkyReelsV2Pipeline": _skyreels_v2,
        "SkyReelsV2ImageToVideoPipeline": lambda: _skyreels_v2("SkyReelsV2ImageToVideoPipeline"),
        "SkyReelsV2DiffusionForcingPipeline": lambda: _skyreels_v2("SkyReelsV2DiffusionForcingPipeline"),
        "SkyReelsV2DiffusionForcingImageToVideoPipeline": lambda: _skyreels_v2(
            "SkyReelsV2DiffusionForcingImageToVideoPipeline"
        ),
        "AnyFlowPipeline": _anyflow,
        "HunyuanVideoFramepackPipeline": _framepack,
        "Kandinsky5T2VPipeline": _kandinsky5,
        "Kandinsky5I2VPipeline": lambda: _kandinsky5("Kandinsky5I2VPipeline"),
    }


@pytest.fixture
def configurations(small_pipelines, tmp_path):
    """Return a function that writes the configuration files of a small pipeline, and no weights."""

    def write(name, second_transformer=False):
        pipe, folder = small_pipelines[name](), tmp_path / name
        index = {"_class_name": name, "text_encoder": [None, None], "tokenizer": [None, None]}
        parts = {"transformer": pipe.transformer, "vae": pipe.vae, "scheduler": pipe.scheduler}
        if second_transformer:
            parts["transformer_2"] = pipe.transformer
        for part, module in sorted(parts.items()):
            module.save_config(folder / part)
            index[part] = ["diffusers", type(module).__name__]
        if name == "WanAnimatePipeline":
            index |= {"image_encoder": [None, None], "image_processor": [None, None]}
        if name.startswith("HunyuanVideo"):
            index |= {"text_encoder_2": [None, None], "tokenizer_2": [None, None]}
        if name.startswith("LTX2"):
            index |= {part: [None, None] for part in ("audio_vae", "connectors", "vocoder")}
        if name == "HunyuanVideo15Pipeline":
            pipe.guider.save_config(folder / "guider")
            index["guider"] = ["diffusers", "ClassifierFreeGuidance"]
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return write
