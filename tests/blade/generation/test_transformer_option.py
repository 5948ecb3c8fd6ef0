"""`--transformer`: a model's weights from files, in videos, plans, records and summaries."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import GGUFQuantizationConfig, WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file
from weight_files import all_of, write_float8, write_gguf, write_scaled

from blade import BladeConfig, generate
from blade.generation.outputs import generate_files
from blade.generation.plan import plan_run
from blade.generation.prepare import prepare_model
from blade.generation.record import read_request
from blade.generation.request import GenerationRequest
from blade.generation.run import run_request
from blade.models.acceleration import place
from blade.models.choices import parse_transformer
from blade.models.loading import load_model
from blade.models.stored_weights import Float8Linear

SIZE = {"height": 64, "width": 64, "frames": 9, "steps": 2, "device": "cpu", "seed": 1}
SPARSE = BladeConfig(sparsity=0.5, dense_steps=0, dense_layers=())


def tiny(model: Path, **changes) -> GenerationRequest:
    return GenerationRequest(
        **{"prompt": "a red ball moving right", "model": str(model), "attention": "dense", **SIZE, **changes}
    )


def make(request: GenerationRequest, offload: str = "none") -> torch.Tensor:
    model, resolved = prepare_model(request)
    if offload != "none":
        place(model, torch.device("cpu"), offload)
    model.pipe.set_progress_bar_config(disable=True)
    return run_request(model, resolved).video


@pytest.fixture(scope="module")
def folder(tmp_path_factory, saved_tiny_pipeline: Path) -> Path:
    """A pipeline of two transformers, large enough for GGUF, and files of other weights of each."""
    path = tmp_path_factory.mktemp("two")
    pipe = load_model(saved_tiny_pipeline).pipe
    config = {**pipe.transformer.config, "num_attention_heads": 4, "attention_head_dim": 16, "ffn_dim": 64}
    parts = {}
    for seed, name in enumerate(("transformer", "transformer_2", "high", "low")):
        torch.manual_seed(seed)
        parts[name] = WanTransformer3DModel.from_config(config).eval()
    both = {name: parts[name] for name in ("transformer", "transformer_2")}
    WanPipeline(**pipe.components | both, boundary_ratio=0.5).save_pretrained(path / "model")
    for name in ("high", "low"):
        save_file(parts[name].state_dict(), path / f"{name}.safetensors")
        write_scaled(path / f"{name}-fp8.safetensors", parts[name].state_dict())
    return path


def both(folder: Path, ending: str = "safetensors") -> str:
    return f"{folder / f'high{ending}'}:{folder / f'low{ending}'}"


def test_two_files_make_the_video_of_diffusers_own_pipeline(folder: Path) -> None:
    video = make(tiny(folder / "model", transformer=both(folder, ".safetensors")))
    model, resolved = prepare_model(tiny(folder / "model"))
    for name, part in (("high", "transformer"), ("low", "transformer_2")):
        loaded = WanTransformer3DModel.from_single_file(
            str(folder / f"{name}.safetensors"), config=str(folder / "model" / part), torch_dtype=torch.float32
        )
        model.pipe.register_modules(**{part: loaded})
    model.pipe.set_progress_bar_config(disable=True)
    assert torch.equal(video, run_request(model, resolved).video)
    swapped = f"{folder / 'low.safetensors'}:{folder / 'high.safetensors'}"
    for other in ({}, {"transformer": swapped}):
        assert (video - make(tiny(folder / "model", **other))).abs().max() > 1e-4


def test_gguf_in_both_experts_is_bitwise_diffusers_own(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model, resolved = prepare_model(tiny(folder / "model"))
    for name, part in (("high", "transformer"), ("low", "transformer_2")):
        write_gguf(tmp_path / f"{name}.gguf", getattr(model.pipe, part).state_dict(), all_of("Q8_0"))
        loaded = WanTransformer3DModel.from_single_file(
            str(tmp_path / f"{name}.gguf"),
            config=str(folder / "model" / part),
            quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
            torch_dtype=torch.float32,
        )
        model.pipe.register_modules(**{part: loaded})
    model.pipe.set_progress_bar_config(disable=True)
    request = tiny(folder / "model", transformer=both(tmp_path, ".gguf"))
    plain = run_request(model, resolved).video
    assert torch.equal(make(request), plain)
    zero = tiny(
        folder / "model", transformer=request.transformer, attention=None, blade_config=BladeConfig(sparsity=0.0)
    )
    assert torch.equal(make(zero), plain)
    for offload in ("model", "group"):
        torch.testing.assert_close(make(request, offload), plain)


def test_files_are_in_plans_records_and_summaries(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    request = tiny(folder / "model", transformer="high-fp8.safetensors:low-fp8.safetensors")
    plan, whole = plan_run(request), both(folder, "-fp8.safetensors")
    assert plan.request.transformer == whole and f"file        {whole}" in str(plan)
    assert plan.weights_gib["transformer"] < 0.7 * plan_run(tiny(folder / "model")).weights_gib["transformer"]
    report = generate_files(request, tmp_path / "video.mp4")
    assert report.record["transformer"] == whole and f"file        {whole}" in str(report)
    again = read_request(report.record_path)
    assert again.transformer == whole and torch.equal(make(again), make(request))
    before = plan.request.input_state
    weights = WanTransformer3DModel.from_pretrained(folder / "model" / "transformer").state_dict()
    write_float8(folder / "low-fp8.safetensors", weights)
    assert plan_run(request).request.input_state != before


def test_a_lora_of_each_expert_comes_on_top_unmerged(folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("high", "low"):
        write_scaled(tmp_path / f"{name}.safetensors", load_weights(folder / f"{name}.safetensors"))
        key = "diffusion_model.blocks.0.attn1.to_q"
        pair = {"A": torch.randn(2, 64, generator=generator), "B": torch.randn(64, 2, generator=generator)}
        path = tmp_path / f"lora-{name}.safetensors"
        save_file({f"{key}.lora_{letter}.weight": value for letter, value in pair.items()}, path)
    sparse = {"transformer": both(tmp_path, ".safetensors"), "attention": None, "blade_config": SPARSE}
    lora = f"{tmp_path / 'lora-high.safetensors'}:{tmp_path / 'lora-low.safetensors'}=0.5"
    model, resolved = prepare_model(tiny(folder / "model", loras=(lora,), **sparse))
    for part in model.transformers.values():
        layer = part.blocks[0].attn1.to_q
        assert isinstance(layer.base_layer, Float8Linear) and layer.scaling["lora_0"] == 0.5
    model.pipe.set_progress_bar_config(disable=True)
    video = run_request(model, resolved).video
    assert video.isfinite().all()
    assert (video - make(tiny(folder / "model", **sparse))).abs().max() > 1e-4


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_what_does_not_go_together_is_refused(folder: Path, tmp_path: Path) -> None:
    write_scaled(tmp_path / "high.safetensors", load_weights(folder / "high.safetensors"))
    one = str(tmp_path / "high.safetensors")
    with pytest.raises(ValueError, match="a file for each of this model's transformers, FIRST:SECOND for"):
        make(tiny(folder / "model", transformer=one))
    with pytest.raises(ValueError, match="`quantize` must not be given with a `transformer` that is stored"):
        make(tiny(folder / "model", transformer=f"{one}:{one}", quantize="int8"))
    with pytest.raises(ValueError, match="`transformer` must name one file, or FIRST:SECOND"):
        tiny(folder / "model", transformer="a:b:c")
    for text in ("", ":x"):
        with pytest.raises(ValueError, match="`transformer` must name one file"):
            tiny(folder / "model", transformer=text)


def test_colons_are_read_as_those_of_loras(tmp_path: Path) -> None:
    assert parse_transformer("a.gguf") == ("a.gguf",)
    assert parse_transformer("a.gguf:b.gguf") == ("a.gguf", "b.gguf")
    assert parse_transformer(r"C:\a.gguf:D:\b.gguf") == (r"C:\a.gguf", r"D:\b.gguf")


def test_python_takes_it_too(folder: Path) -> None:
    options = {**SIZE, "attention": "dense"}
    made = generate("a ball", model=str(folder / "model"), transformer=both(folder, ".safetensors"), **options)
    assert made.video.isfinite().all()
    with pytest.raises(ValueError, match=re.escape("missing.gguf is no file or folder here")):
        generate("a ball", model=str(folder / "model"), transformer="missing.gguf:missing.gguf", **options)
