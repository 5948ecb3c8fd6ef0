"""Transformers made of files: 8-bit floats, GGUF and NF4 do what Diffusers' own loaders and formats say, BLADE too."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from small_family import Family
from weight_files import (
    COMFY,
    all_of,
    mixed,
    original_keys,
    write_float8,
    write_gguf,
    write_nf4,
    write_scaled,
)

from blade import BladeConfig, apply_blade, remove_blade
from blade.families.registry import find_family
from blade.models.loaded import LoadedModel
from blade.models.loras import load_loras, merge_loras
from blade.models.source import ModelError
from blade.models.stored_weights import is_packed, packed_layers
from blade.models.transformer_files import load_transformers

_spec = importlib.util.spec_from_file_location("family_tests", Path(__file__).with_name("test_families.py"))
families: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(families)

test_dense = families.test_where_every_layer_is_dense_the_output_is_bitwise_the_same
test_oracle = families.test_sparse_layers_are_diffusers_own_with_the_blocks_as_a_mask
test_removal = families.test_removal_is_exact
test_guidance = families.test_guidance_as_a_batch_and_as_two_calls_is_the_same

SIZES = {"heads": 16, "ffn_dim": 256, "text_dim": 8}
"""Of a transformer whose blocks have rows of 256 weights, the least of Q4_K."""

KINDS = ("fp8", "fp8-scaled", "fp8-rows", "q8_0", "q4_k", "mixed", "nf4")


def load(like, path, device="cpu", dtype=torch.float32):
    model = LoadedModel(SimpleNamespace(transformer=like, components={}))
    return load_transformers(model, str(path), dtype=dtype, device=device)["transformer"]


def write(kind, like, folder, monkeypatch):
    """Write a file of a kind; return it, and the weights that it stands for where another package says so."""
    weights = like.state_dict()
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        return write_nf4(folder, like, monkeypatch), None
    if kind.startswith("fp8"):
        path = folder / "weights.safetensors"
        if kind == "fp8":
            return path, write_float8(path, weights)
        return path, write_scaled(path, weights, newer=kind == "fp8-rows", rows=kind == "fp8-rows")
    pytest.importorskip("gguf")
    path = folder / "weights.gguf"
    return path, write_gguf(path, weights, mixed if kind == "mixed" else all_of(kind.upper()))


@pytest.fixture(params=KINDS)
def family(request, make_wan, wan_inputs, tmp_path, monkeypatch):
    """A transformer of every kind of file in turn, in place of every kind of model."""
    like = make_wan(**SIZES)
    path, _ = write(request.param, like, tmp_path, monkeypatch)
    return Family(lambda: load(like, path), wan_inputs)


def unpacked(layer):
    """Return the weights of a layer as Diffusers or BLADE unpacks them."""
    if hasattr(layer, "full_weight"):
        return layer.full_weight(torch.float32)
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    return dequantize_gguf_tensor(layer.weight).float()


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_file_in_fewer_bits_stays_so_and_computes_what_it_stands_for(
    make_wan, wan_inputs, tmp_path, monkeypatch, kind
):
    """Its weights are those that its own package, or its definition, names, but for Diffusers' rounding to float16."""
    like = make_wan(**SIZES)
    path, exact = write(kind, like, tmp_path, monkeypatch)
    stored = load(like, path)
    packed = {name: unpacked(layer) for name, layer in packed_layers(stored)}
    assert len(packed) == (27 if kind == "mixed" else 30)
    for name, weight in packed.items():
        known = exact[f"{name}.weight"]
        rounding = 0 if kind.startswith("fp8") else 2**-9 * known.abs().max().item()
        assert (weight - known).abs().max() <= rounding
    rounded = make_wan(**SIZES)
    rounded.load_state_dict(exact | {f"{name}.weight": weight for name, weight in packed.items()})
    output = families.run(stored, wan_inputs())
    torch.testing.assert_close(output, families.run(rounded, wan_inputs()), rtol=1e-5, atol=1e-5)
    assert (output - families.run(like, wan_inputs())).abs().max() > 1e-3


def test_a_lora_comes_on_top(family, wan_inputs, tmp_path, make_wan):
    """Beside weights in fewer bits, as the product of its matrices does; it is not merged, and its part is exact."""
    stored, inputs = family.make(), family.inputs()
    generator, name = torch.Generator().manual_seed(1), "blocks.1.ffn.net.0.proj"
    down, up = torch.randn(2, 256, generator=generator), 0.1 * torch.randn(256, 2, generator=generator)
    path = tmp_path / "lora.safetensors"
    keys = {f"diffusion_model.{name}.lora_{letter}.weight": matrix for letter, matrix in (("A", down), ("B", up))}
    save_file(keys | {f"diffusion_model.{name}.diff_b": torch.ones(256)}, path)
    without = families.run(stored, inputs)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=stored
    )
    model = LoadedModel(pipe)
    assert load_loras(model, [f"{path}=0.5"]) == {str(path): {"transformer": 1}}
    layer = stored.get_submodule(name)
    with_lora = families.run(stored, inputs)
    merge_loras(model)
    assert isinstance(stored.get_submodule(name), LoraLayer) and is_packed(layer.base_layer)
    assert torch.equal(families.run(stored, inputs), with_lora)

    other = family.make()
    target = other.get_submodule(name)
    target.bias.data.add_(0.5)
    target.register_forward_hook(lambda module, args, output: output + 0.5 * (args[0] @ down.T @ up.T))
    torch.testing.assert_close(with_lora, families.run(other, inputs), rtol=1e-4, atol=1e-5)
    assert (with_lora - without).abs().max() > 1e-3
    sparse = families.run(apply_blade(stored, BladeConfig(sparsity=0.5, asa=families.DETAILS)), inputs)
    assert not torch.equal(sparse, with_lora)
    assert torch.equal(families.run(remove_blade(stored), inputs), with_lora)


def test_whole_differences_of_packed_weights_are_refused_by_name(make_wan, tmp_path, monkeypatch, caplog):
    like = make_wan(**SIZES)
    path, _ = write("fp8-scaled", like, tmp_path, monkeypatch)
    stored = load(like, path)
    lora = tmp_path / "lora.safetensors"
    key = "blocks.0.attn1.to_q"
    save_file({f"diffusion_model.{key}.diff": torch.ones(256, 256)}, lora)
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(), transformer=stored
    )
    with pytest.raises(ValueError, match="its weights are stored in fewer bits, to which nothing can be added"):
        load_loras(LoadedModel(pipe), [str(lora)])


@pytest.mark.parametrize("kind", ["q8_0", "q4_k", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_is_bitwise_diffusers_own(make_wan, wan_inputs, tmp_path, monkeypatch, kind, dtype):
    from diffusers import GGUFQuantizationConfig

    like = make_wan(**SIZES)
    like.save_config(tmp_path / "config")
    path, _ = write("q8_0" if kind == "mixed" else kind, like, tmp_path, monkeypatch)
    own = type(like).from_single_file(
        str(path),
        config=str(tmp_path / "config"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
        torch_dtype=dtype,
    )
    inputs = {name: value.to(dtype) for name, value in wan_inputs().items()}
    output = families.run(load(like, path, dtype=dtype), inputs)
    assert output.isfinite().all() and torch.equal(output, families.run(own, inputs))


@pytest.mark.parametrize("layout", ["diffusers", "comfy", "original", "original comfy", "folder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layout_is_bitwise_the_model_itself(make_wan, wan_inputs, tmp_path, layout, dtype):
    like = make_wan()
    like.save_pretrained(tmp_path / "folder")
    path = tmp_path / ("folder" if layout == "folder" else "weights.safetensors")
    if layout != "folder":
        is_original = layout.startswith("original")
        weights = original_keys(like, find_family(like).original_names) if is_original else like.state_dict()
        assert ("blocks.0.self_attn.q.weight" in weights) == is_original
        prefix = COMFY if layout.endswith("comfy") else ""
        others = {"vae.decoder.weight": torch.ones(2)} if prefix else {}
        save_file({f"{prefix}{key}": tensor for key, tensor in weights.items()} | others, path)
    own = type(like).from_pretrained(tmp_path / "folder", torch_dtype=dtype)
    loaded = load(like, path, dtype=dtype)
    assert {name: (value.dtype, value.shape) for name, value in loaded.state_dict().items()} == {
        name: (value.dtype, value.shape) for name, value in own.state_dict().items()
    }
    inputs = {name: value.to(dtype) for name, value in wan_inputs().items()}
    assert torch.equal(families.run(loaded, inputs), families.run(own, inputs))


@pytest.mark.parametrize("newer", [False, True])
def test_scales_follow_the_rows_of_fused_layers(make_hunyuan_video, hunyuan_video_inputs, tmp_path, newer):
    """HunyuanVideo's own files fuse q, k and v, which Diffusers splits; the scales of rows are split with them."""
    like = make_hunyuan_video()
    state = like.state_dict()
    fused = {}
    for key in list(state):
        if ".attn.to_q." in key and key.startswith("transformer_blocks."):
            names = [key.replace("to_q", f"to_{name}") for name in "qkv"]
            fused[key.replace("attn.to_q", "img_attn_qkv")] = torch.cat([state.pop(name) for name in names])
    renamed = {key.replace("transformer_blocks", "double_blocks"): value for key, value in fused.items()}
    from blade.models.transformer_layouts import translate_layout

    path = tmp_path / "weights.safetensors"
    prefixed = {key.replace("double_blocks", "blocks"): value for key, value in renamed.items()}
    exact = write_scaled(path, prefixed, newer=newer, rows=newer, prefix="")
    from safetensors.torch import load_file

    tensors = {key.replace("blocks.", "double_blocks."): value for key, value in load_file(path).items()}
    layout = translate_layout(type(like), like.config, like.state_dict(), tensors, "`transformer` x")
    for letter, rows in zip("qkv", exact["blocks.0.img_attn_qkv.weight"].chunk(3), strict=True):
        key = f"transformer_blocks.0.attn.to_{letter}.weight"
        assert layout.scales[key].shape == ((rows.shape[0], 1) if newer else ())
        assert torch.equal(layout.weights[key].float() * layout.scales[key], rows)


def test_headers_alone_make_an_empty_transformer_of_the_same_size(make_wan, tmp_path, monkeypatch):
    like = make_wan(**SIZES)
    for kind in ("fp8-scaled", "mixed"):
        path, _ = write(kind, like, tmp_path, monkeypatch)
        full, empty = load(like, path), load(like, path, "meta")
        sizes = [
            {name: (value.shape, value.dtype) for name, value in part.state_dict().items()} for part in (full, empty)
        ]
        assert sizes[0] == sizes[1] and all(value.is_meta for value in empty.state_dict().values())


def test_what_does_not_fit_is_refused_by_key_and_shapes(make_wan, tmp_path):
    like, path = make_wan(), tmp_path / "weights.safetensors"

    def refuse(message, **changes):
        state = {**like.state_dict(), **changes}
        save_file({key: value for key, value in state.items() if value is not None}, path)
        with pytest.raises(ModelError, match=message):
            load(like, path)

    key = "blocks.1.attn1.to_q.weight"
    refuse(r"blocks\.1\.attn1\.to_q\.weight is 32x16 in the file and 32x32 in the model", **{key: torch.ones(32, 16)})
    refuse(r"lacks 1 of \d+ weights, such as blocks\.1\.attn1\.to_q\.weight of 32x32", **{key: None})
    refuse(r"holds 1 weights that the model lacks, such as extra\.weight of 3\.", **{"extra.weight": torch.ones(3)})
    with pytest.raises(ValueError, match="must name one file, for the only transformer of this model, got a:b"):
        load(like, "a:b")
    save_file({"double_blocks.0.x": torch.ones(2)}, path)
    with pytest.raises(ModelError, match=r"does not fit|lacks"):
        load(like, path)


def test_what_could_run_code_or_is_no_weight_file_is_refused(make_wan, tmp_path):
    like = make_wan()
    for name in ("wan.pth", "wan.ckpt", "wan.pt", "wan.bin"):
        torch.save({}, tmp_path / name)
        with pytest.raises(ModelError, match=rf"{name} is a pickle, which can run code"):
            load(like, tmp_path / name)
    (tmp_path / "wan.txt").write_text("x")
    with pytest.raises(ModelError, match=r"must be a file that ends in \.safetensors or \.gguf"):
        load(like, tmp_path / "wan.txt")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678{}")
    with pytest.raises(ModelError, match=r"broken\.safetensors cannot be read as safetensors"):
        load(like, tmp_path / "broken.safetensors")
    with pytest.raises(ModelError, match="is no file or folder here, and no file of the Hub"):
        load(like, tmp_path / "missing.safetensors")
    like.save_pretrained(tmp_path / "other")
    config = (tmp_path / "other" / "config.json").read_text()
    for changed, message in (
        (config.replace("WanTransformer3DModel", "FluxTransformer2DModel"), "must hold a WanTransformer3DModel"),
        (config.replace("{", '{"quantization_config": {"quant_method": "torchao"},', 1), "Take a GGUF or fp8 file"),
    ):
        (tmp_path / "other" / "config.json").write_text(changed)
        with pytest.raises(ModelError, match=message):
            load(like, tmp_path / "other")


def test_formats_that_cannot_be_read_are_named(make_wan, tmp_path):
    like, path = make_wan(**SIZES), tmp_path / "weights.safetensors"
    write_scaled(path, like.state_dict(), newer=True)
    from safetensors.torch import load_file

    tensors = load_file(path)
    key = f"{COMFY}blocks.0.attn1.to_q"
    text = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    save_file({**tensors, f"{key}.comfy_quant": text}, path)
    with pytest.raises(ModelError, match=r"stores blocks\.0\.attn1\.to_q as nvfp4, which cannot be read"):
        load(like, path)
    save_file({**tensors, f"{key}.weight_scale": torch.ones(7)}, path)
    with pytest.raises(ModelError, match=r"has 7 scales for blocks\.0\.attn1\.to_q\.weight"):
        load(like, path)


@pytest.mark.parametrize(("package", "extra"), [("gguf", "gguf"), ("bitsandbytes", "nf4")])
def test_a_missing_package_is_named_with_its_extra(make_wan, tmp_path, monkeypatch, package, extra):
    from blade.models import transformer_sources

    like = make_wan()
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"GGUF")
    if package == "bitsandbytes":
        path = tmp_path / "folder"
        like.save_pretrained(path)
        config = (path / "config.json").read_text()
        quantization = '{"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": true},'
        (path / "config.json").write_text(config.replace("{", quantization, 1))
    monkeypatch.setattr(transformer_sources, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=rf'needs the package {package}: pip install "blade-video\[{extra}\]"'):
        load(like, path)


def test_a_family_without_original_files_takes_diffusers_keys(tmp_path):
    """CogVideoX, for which Diffusers translates no other layout."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    like = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=8, num_layers=1, max_text_seq_length=6,
    ).eval()  # fmt: skip
    path = tmp_path / "weights.safetensors"
    exact = write_float8(path, like.state_dict())
    stored = load(like, path)
    assert is_packed(stored.transformer_blocks[0].attn1.to_q)
    assert torch.equal(
        stored.transformer_blocks[0].attn1.to_q.full_weight(torch.float32),
        exact["transformer_blocks.0.attn1.to_q.weight"],
    )
    save_file({f"other.{key}": value for key, value in like.state_dict().items()}, path)
    with pytest.raises(ModelError, match="must have the keys of Diffusers' CogVideoXTransformer3DModel"):
        load(like, path)


def test_removal_leaves_a_stored_transformer_as_it_was(make_wan, tmp_path, monkeypatch):
    like = make_wan(**SIZES)
    path, _ = write("mixed", like, tmp_path, monkeypatch)
    stored = load(like, path)
    before = {name: (id(module), type(module)) for name, module in stored.named_modules()}
    remove_blade(apply_blade(stored, BladeConfig(asa=families.DETAILS)))
    assert before == {name: (id(module), type(module)) for name, module in stored.named_modules()}
