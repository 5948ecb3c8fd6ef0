"""Files of a transformer's weights as people have them: ComfyUI's 8-bit ones, GGUF, bitsandbytes' 4-bit folders."""

import json
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

COMFY = "model.diffusion_model."
LARGEST = 448.0
"""Largest number of float8_e4m3fn."""


def is_block_weight(name, tensor):
    """Return whether a weight is one that quantised files have in fewer bits: of a linear layer in a block."""
    return tensor.ndim == 2 and re.match(r"(blocks|transformer_blocks|single_transformer_blocks)\.", name) is not None


def original_keys(transformer, names):
    """Return a transformer's weights under its authors' own keys; `names` is the family's `original_names`."""
    renamed = {}
    for key, tensor in transformer.state_dict().items():
        owner, _, last = key.rpartition(".")
        module, ending = (owner, f".{last}") if last in ("weight", "bias") else (key, "")
        for pattern, replacement in names:
            module = re.sub(pattern, replacement, module)
        renamed[module + ending] = tensor
    return renamed


def write_scaled(path, weights, *, newer=False, rows=False, prefix=COMFY):
    """Write ComfyUI's 8-bit floats with scales, of its older format or its newer one; return what they stand for."""
    tensors, exact = {} if newer else {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}, {}
    for key, tensor in weights.items():
        exact[key] = tensor.clone()
        if not is_block_weight(key, tensor):
            tensors[prefix + key] = tensor.clone()
            continue
        scale = tensor.abs().amax(1 if rows else (0, 1)) / LARGEST
        stored = (tensor / (scale[:, None] if rows else scale)).to(torch.float8_e4m3fn)
        exact[key] = stored.float() * (scale[:, None] if rows else scale)
        layer = prefix + key.removesuffix(".weight")
        tensors[f"{layer}.weight"] = stored
        tensors[f"{layer}.{'weight_scale' if newer else 'scale_weight'}"] = scale
        tensors[f"{layer}.{'input_scale' if newer else 'scale_input'}"] = torch.tensor(1.0)
        if newer:
            name = json.dumps({"format": "float8_e4m3fn"}).encode()
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(name), dtype=torch.uint8)
    save_file(tensors, path)
    return exact


def write_float8(path, weights):
    """Write 8-bit floats without scales; return what they stand for."""
    stored = {
        key: tensor.to(torch.float8_e4m3fn) if is_block_weight(key, tensor) else tensor
        for key, tensor in weights.items()
    }
    save_file(stored, path)
    return {key: tensor.float() for key, tensor in stored.items()}


def pack_q4_k(array):
    """Return the blocks of Q4_K for rows of whole 256s: two levels of scales and minima, then 4 bits a weight.

    The layout is ggml's `block_q4_K`: d, dmin, 12 bytes of 6-bit scales and minima, 128 bytes of weights.
    """
    rows, columns = array.shape
    groups = array.reshape(-1, 8, 32).astype(np.float32)
    low = np.minimum(groups.min(-1), 0)
    scale = np.maximum((groups.max(-1) - low) / 15, 1e-12)
    d = (scale.max(-1, keepdims=True) / 63).astype(np.float16)
    dmin = np.maximum(-low.min(-1, keepdims=True) / 63, 1e-7).astype(np.float16)
    scales = np.clip(np.rint(scale / d.astype(np.float32)), 1, 63).astype(np.uint8)
    minima = np.clip(np.rint(-low / dmin.astype(np.float32)), 0, 63).astype(np.uint8)
    step = (d.astype(np.float32) * scales)[..., None]
    values = np.rint((groups + (dmin.astype(np.float32) * minima)[..., None]) / step)
    values = np.clip(values, 0, 15).astype(np.uint8)
    packed = np.concatenate(
        [
            (scales[:, :4] & 63) | (scales[:, 4:] >> 4 << 6),
            (minima[:, :4] & 63) | (minima[:, 4:] >> 4 << 6),
            (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4),
        ],
        -1,
    )
    nibbles = values.reshape(-1, 4, 2, 32)
    weights = (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).reshape(-1, 128)
    blocks = np.concatenate([d.view(np.uint8), dmin.view(np.uint8), packed, weights], -1)
    return blocks.reshape(rows, columns // 256 * 144)


def write_gguf(path, weights, choose):
    """Write a GGUF file; `choose` names each tensor's type. Return what the tensors stand for, by gguf's own code."""
    import gguf

    writer, exact = gguf.GGUFWriter(path, "none"), {}
    for key, tensor in weights.items():
        kind = gguf.GGMLQuantizationType[choose(key, tensor)]
        array = tensor.numpy().astype(np.float16 if kind.name == "F16" else np.float32)
        if kind.name in ("F16", "F32"):
            writer.add_tensor(key, array)
            exact[key] = torch.from_numpy(array.astype(np.float32))
            continue
        data = pack_q4_k(array) if kind.name == "Q4_K" else gguf.quants.quantize(array, kind)
        writer.add_tensor(key, data, raw_dtype=kind)
        exact[key] = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


def all_of(kind):
    """Return a choice: linear layers of blocks in a type, all else in 32 bits."""
    return lambda key, tensor: kind if is_block_weight(key, tensor) else "F32"


def mixed(key, tensor):
    """Choose types as files named Q4_K_M do: several in one file; biases, norms and embeddings in 16 or 32 bits."""
    if tensor.ndim == 5:
        return "F16"
    if not is_block_weight(key, tensor):
        return "BF16" if tensor.ndim == 2 or key.endswith("norm_q.weight") else "F32"
    return "BF16" if "attn2.to_v" in key else "Q8_0" if "ffn" in key else "Q4_K"


def write_nf4(folder: Path, transformer, monkeypatch, skipped=("proj_out",)):
    """Write a folder of bitsandbytes' 4-bit weights with Diffusers.

    Its demand for a GPU is set aside, and bitsandbytes' products in bfloat16 on CPUs that have them, so that it
    multiplies as it does elsewhere.
    """
    import bitsandbytes
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    monkeypatch.setattr(bnb_quantizer.BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    transformer.save_pretrained(folder / "plain")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=list(skipped),
    )
    packed = type(transformer).from_pretrained(
        folder / "plain", quantization_config=config, torch_dtype=torch.float32, device_map={"": "cpu"}
    )
    packed.save_pretrained(folder / "nf4")
    return folder / "nf4"
