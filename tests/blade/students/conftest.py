"""A tiny pipeline, and a student of it."""

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import save_file
from tiny_students import CONFIG, TIMES, lora

from blade.students.scheduler import FewStepScheduler


@pytest.fixture(autouse=True)
def quiet(quiet_adapters):
    """Ignore what Diffusers and PEFT say of adapters."""


@pytest.fixture
def pipe(make_wan):
    """The pipeline."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=make_wan(layers=2), scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def two(make_wan, pipe):
    """A pipeline of two transformers."""
    pipe = WanPipeline(**pipe.components | {"transformer_2": make_wan(layers=2, seed=1)}, boundary_ratio=0.5)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def folder(pipe, tmp_path):
    """A student as this project writes it."""
    save_file(lora(pipe.transformer), tmp_path / "pytorch_lora_weights.safetensors")
    CONFIG.save_pretrained(tmp_path)
    FewStepScheduler.like(pipe.scheduler, [TIMES], noise_kept=0.9).save_pretrained(tmp_path / "scheduler")
    return tmp_path
