"""A complete `WanPipeline` of a few thousand random weights, saved in Diffusers format."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

TINY_SIZE = {"height": 64, "width": 64, "frames": 9}
"""Makes 3 x 8 x 8 = 192 tokens, six blocks of 32."""


def build_tiny_pipeline(head_dim: int = 16, patch_size: tuple[int, int, int] = (1, 1, 1)):
    """Return the pipeline: two layers of two heads, the grammar's tokenizer."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    from blade.moving_shapes.training.components import TEXT_DIM, build_pipeline, build_text_encoder

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = WanTransformer3DModel(
        patch_size=patch_size,
        num_attention_heads=2,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    return build_pipeline(vae.eval(), build_text_encoder().eval(), transformer.eval())


@pytest.fixture(scope="session")
def saved_tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny pipeline, to be read only."""
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    build_tiny_pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def saved_tiny_ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pipeline that can start from an image, as that of Wan 2.2 TI2V; to be read only."""
    path = tmp_path_factory.mktemp("models") / "tiny-ti2v"
    pipe = build_tiny_pipeline(patch_size=(1, 2, 2))
    pipe.register_to_config(expand_timesteps=True)
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def tiny_pipeline_copy(saved_tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(saved_tiny_pipeline, tmp_path / "tiny-wan"))
