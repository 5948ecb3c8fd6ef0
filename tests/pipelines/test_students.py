"""Published students of several families make whole small videos: their files, times and guidance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import MiniMaxH3ModularPipeline, MiniMaxH3Scheduler, WanPipeline
from safetensors.torch import save_file

from blade import load_student, unload_student
from blade.attention.config import AdaptiveConfig, BladeConfig
from blade.families.registry import released_students
from blade.generation.request import GenerationRequest
from blade.generation.resolve import resolve_request
from blade.generation.run import run_request
from blade.models.loaded import LoadedModel
from blade.students import lookup

CONFIG = BladeConfig(sparsity=0.5, dense_steps=1, asa=AdaptiveConfig(block_size=8, probe_tokens=4))
VIDEO = {"prompt": "a cat", "height": 128, "width": 128, "frames": 13, "fps": 24, "blade_config": CONFIG}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published students fit models of their class and number of transformers, whatever the size."""
    kept = ("class", "transformers", "gated_attn")
    students = [
        replace(student, fits={name: student.fits[name] for name in kept if name in student.fits})
        for student in released_students()
    ]
    monkeypatch.setattr(lookup, "released_students", lambda: students)


def comfy_lora(path, *modules: str, size: int = 32) -> str:
    """Write a LoRA by the authors' names, and return its path."""
    tensors = {}
    for module in modules:
        tensors[f"diffusion_model.{module}.lora_A.weight"] = torch.randn(2, size)
        tensors[f"diffusion_model.{module}.lora_B.weight"] = torch.randn(size, 2)
    save_file(tensors, path)
    return str(path)


@pytest.mark.slow
def test_the_distilled_lora_of_ltx_2_is_sampled_at_its_levels(small_pipelines, tmp_path) -> None:
    """Which its family hands to the pipeline by itself, as those of distilled releases."""
    pipe = small_pipelines["LTX2Pipeline"]()
    path = comfy_lora(tmp_path / "ltx-2-19b-distilled-lora-384.safetensors", "transformer_blocks.0.attn1.to_q")
    student = load_student(pipe, path)
    assert (student.steps, student.guidance_scale) == (8, 1.0)
    model = LoadedModel(pipe)
    request = GenerationRequest(**VIDEO)
    resolved = resolve_request(replace(request, model="unused"), model)
    assert (resolved.steps, resolved.guidance_scale) == (8, 1.0)
    made = run_request(model, replace(request, steps=8, guidance_scale=1.0))
    assert made.video.isfinite().all() and made.sound.samples.isfinite().all()
    assert pipe.scheduler.timesteps.tolist() == pytest.approx(
        [1000, 993.75, 987.5, 981.25, 975, 909.375, 725, 421.875]
    )
    layers = made.summary.transformers[0].layers
    assert all((layer.dense_calls, layer.sparse_calls) == (1, 7) for layer in layers)


@pytest.mark.slow
def test_a_file_for_each_expert_of_wan_is_sampled_without_guidance(small_pipelines, make_wan, tmp_path) -> None:
    first = small_pipelines["WanPipeline"]()
    pipe = WanPipeline(**first.components | {"transformer_2": make_wan(seed=1)}, boundary_ratio=0.9)
    pipe.encode_prompt = first.encode_prompt
    paths = [
        comfy_lora(tmp_path / f"{part}_noise_model.safetensors", "blocks.0.self_attn.q") for part in ("high", "low")
    ]
    student = load_student(pipe, ":".join(paths))
    assert student.reach == {"transformer": 1, "transformer_2": 1} and student.steps == 4
    made = run_request(LoadedModel(pipe), GenerationRequest(**VIDEO, steps=4, guidance_scale=1.0))
    assert made.video.isfinite().all()
    assert pipe.scheduler.timesteps.tolist() == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert [len(part.layers) for part in made.summary.transformers] == [3, 3]


def test_the_turbo_lora_of_minimax_h3_brings_the_videos_shift(make_minimax_h3, tmp_path) -> None:
    """Its steps are points of the schedule; the sound's schedule is left."""
    pipe = MiniMaxH3ModularPipeline()
    schedulers = {"scheduler": MiniMaxH3Scheduler(shift=12.0), "audio_scheduler": MiniMaxH3Scheduler(shift=3.0)}
    pipe.update_components(transformer=make_minimax_h3(), **schedulers)
    path = tmp_path / "minimax_h3_fl2v_turbo_4step_v1.1_768p_comfyui_bf16.safetensors"
    rows, columns = pipe.transformer.transformer_blocks[0].attn.to_out[0].weight.shape
    tensors = {"blocks.0.attn.out_proj.lora_A.weight": torch.ones(2, columns)}
    save_file(tensors | {"blocks.0.attn.out_proj.lora_B.weight": torch.ones(rows, 2)}, path)
    student = load_student(pipe, path)
    assert (student.steps, student.guidance_scale, student.reach) == (5, 1.0, {"transformer": 1})
    pipe.scheduler.set_timesteps(5)
    levels = [6 * level / (1 + 5 * level) for level in (1.0, 0.75, 0.5, 0.25)]
    assert pipe.scheduler.sigmas.tolist()[:4] == pytest.approx(levels) and pipe.audio_scheduler.config.shift == 3.0
    unload_student(pipe)
    assert pipe.scheduler is schedulers["scheduler"]
