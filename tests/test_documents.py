"""The Python examples in the documents run, with small random pipelines in place of the published ones."""

import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    WanPipeline,
)

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in (ROOT / "docs" / "models.md", ROOT / "README.md")
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S))
]
SMALL = {"height": 128, "width": 128, "num_frames": 13, "num_inference_steps": 3}
BLOCKS = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}


def small(pipeline_class, **parts):
    """A pipeline whose text is random and whose videos are small, whatever is asked for."""

    class Small(pipeline_class):
        def __call__(self, *args, **options):
            return super().__call__(*args, **{**options, **SMALL})

        def encode_prompt(self, *args, **options):
            if pipeline_class is HunyuanVideoPipeline:
                return torch.randn(1, 6, 8), torch.randn(1, 8), torch.ones(1, 6)
            return torch.randn(1, 6, 8), torch.randn(1, 6, 8)

    return Small(text_encoder=None, tokenizer=None, **parts)


def wan(make_wan):
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return small(WanPipeline, vae=vae, transformer=make_wan(), scheduler=FlowMatchEulerDiscreteScheduler())


def cogvideox(make_wan):
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=8, num_layers=2, max_text_seq_length=6, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(**BLOCKS)
    return small(CogVideoXPipeline, vae=vae, transformer=transformer, scheduler=CogVideoXDPMScheduler())


def hunyuan_video(make_wan):
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return small(
        HunyuanVideoPipeline, vae=AutoencoderKLHunyuanVideo(**BLOCKS), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("code", EXAMPLES)
def test_the_example_runs(make_wan, monkeypatch, tmp_path, capsys, code):
    makers = {"WanPipeline": wan, "CogVideoXPipeline": cogvideox, "HunyuanVideoPipeline": hunyuan_video}
    for name, make in makers.items():
        monkeypatch.setattr(getattr(diffusers, name), "from_pretrained", lambda *_, make=make, **__: make(make_wan))
    monkeypatch.setattr(AutoencoderKLWan, "from_pretrained", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code.replace('"cuda"', '"cpu"'), "example", "exec"), {})
    shown = capsys.readouterr().out
    assert "layer density 0." in shown and "run density 0." in shown
    if "cat.mp4" in code:
        assert (tmp_path / "cat.mp4").stat().st_size > 0
