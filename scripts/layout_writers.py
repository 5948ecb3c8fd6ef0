"""Writers of the files that `file_layouts.py` loads, one for each layout of keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from layout_models import DEFAULT, DOWN_UP, RANK, FileOf

from blade.families.registry import find_family
from blade.models.lora_layouts import ModuleNames

Write = Callable[[Any], FileOf]
"""Makes the file of a transformer."""

WAN = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.0.attn1.to_out.0": "blocks.0.self_attn.o",
    "blocks.1.attn2.to_k": "blocks.1.cross_attn.k",
    "blocks.1.ffn.net.0.proj": "blocks.1.ffn.0",
    "blocks.1.ffn.net.2": "blocks.1.ffn.2",
}
"""Modules by Diffusers' names, and the authors'."""
WAN_OWN = {name: name for name in WAN}
HUNYUAN = {f"transformer_blocks.0.attn.to_{part}": "" for part in "qkv"}
LTX = {name: name for name in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2")}
LTX_2 = {
    "transformer_blocks.0.attn1.to_q": "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.0.audio_to_video_attn.to_k": "transformer_blocks.0.audio_to_video_attn.to_k",
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed.linear": "adaln_single.linear",
    "av_cross_attn_video_a2v_gate.linear": "av_ca_a2v_gate_adaln_single.linear",
}
H3 = {
    "transformer_blocks.0.attn.to_out.0": "blocks.0.attn.out_proj",
    "transformer_blocks.0.ff.net.2": "blocks.0.mlp.fc2",
    "transformer_blocks.1.adaln_proj.linear": "blocks.1.adaln_proj.linear",
    "token_refiner.refiner_blocks.0.attn.to_out.0": "token_refiner.blocks.0.attn.out_proj",
    "proj_out": "final_layer.video_out",
}


def pairs(names: dict[str, str], prefix: str = "", **options: Any) -> Write:
    """Return a writer of pairs; see `FileOf.add_pair`."""
    return lambda transformer: FileOf(transformer, prefix).add_pairs(names, **options)


def flat(names: dict[str, str]) -> dict[str, str]:
    """Return names with underscores for dots."""
    return {module: name.replace(".", "_") for module, name in names.items()}


def with_metadata(transformer: Any) -> FileOf:
    """Return Diffusers' file with PEFT's alpha in its header."""
    file = FileOf(transformer, "transformer.").add_pairs(WAN_OWN, scale=3.0)
    file.metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 3 * RANK})}
    return file


def with_config(transformer: Any) -> FileOf:
    """Return PEFT's file with its configuration beside it."""
    file = FileOf(transformer, "base_model.model.").add_pairs(WAN_OWN, scale=3.0)
    file.config = {"r": RANK, "lora_alpha": 3 * RANK}
    return file


def fused(transformer: Any) -> FileOf:
    """Return HunyuanVideo's fused projections, and its last modulation, whose halves are swapped."""
    file = FileOf(transformer, "lora_unet_")
    file.add_pair("double_blocks_0_img_attn_qkv", *HUNYUAN, endings=DOWN_UP, alpha=3.0)
    file.add_pair("final_layer_adaLN_modulation_1", "norm_out.linear", endings=DOWN_UP, alpha=3.0, reorder=swapped)
    return file


def swapped(rows: torch.Tensor) -> torch.Tensor:
    """Return rows with their halves the other way round."""
    first, second = rows.chunk(2)
    return torch.cat([second, first])


def differences(transformer: Any) -> FileOf:
    """Return differences of norms, a modulation and biases."""
    file = FileOf(transformer, "diffusion_model.").add_pairs(WAN)
    file.add_difference("blocks.0.self_attn.norm_q.diff", "blocks.0.attn1.norm_q.weight")
    file.add_difference("blocks.0.modulation.diff", "blocks.0.scale_shift_table")
    return file.add_difference("time_projection.1.diff_b", "condition_embedder.time_proj.bias")


def lightx2v(transformer: Any) -> FileOf:
    """Return a distill LoRA of lightx2v: pairs, and differences of biases, norms, modulations and the head."""
    file = FileOf(transformer, "diffusion_model.").add_pairs(WAN, endings=DOWN_UP)
    file.add_difference("blocks.0.self_attn.q.diff_b", "blocks.0.attn1.to_q.bias")
    file.add_difference("blocks.0.self_attn.norm_q.diff", "blocks.0.attn1.norm_q.weight")
    file.add_difference("blocks.1.norm3.diff", "blocks.1.norm2.weight")
    file.add_difference("head.head.diff", "proj_out.weight")
    file.add_difference("head.diff_m", "scale_shift_table")
    return file.add_difference("blocks.1.diff_m", "blocks.1.scale_shift_table")


def lightning(transformer: Any) -> FileOf:
    """Return an expert's LoRA of Wan2.2-Lightning."""
    return FileOf(transformer).add_pairs(WAN, endings=DOWN_UP, alpha=1.0)


def causvid(transformer: Any) -> FileOf:
    """Return pairs and differences of biases, that of the time's projection among them."""
    file = FileOf(transformer, "diffusion_model.").add_pairs(WAN, endings=DOWN_UP, alpha=2.0)
    file.add_pair("time_projection.1", "condition_embedder.time_proj", endings=DOWN_UP, alpha=2.0)
    file.add_difference("time_projection.1.diff_b", "condition_embedder.time_proj.bias")
    return file.add_difference("blocks.0.ffn.0.diff_b", "blocks.0.ffn.net.0.proj.bias")


def accvideo(transformer: Any) -> FileOf:
    """Return pairs, and a difference of a bias whose module has no pair."""
    file = FileOf(transformer, "diffusion_model.").add_pairs(WAN)
    return file.add_difference("time_projection.1.diff_b", "condition_embedder.time_proj.bias")


def whole(transformer: Any, prefix: str = "") -> FileOf:
    """Return all weights by Diffusers' names."""
    file = FileOf(transformer, prefix)
    for name, _ in transformer.named_parameters():
        file.add_whole(name, name)
    return file


def whole_original(transformer: Any, prefix: str = "") -> FileOf:
    """Return all weights by the authors' names, which a test sets beside Diffusers' converter."""
    file = FileOf(transformer, prefix)
    for original, (name,) in ModuleNames(transformer, find_family(transformer)).originals.items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in file.expected:
                file.add_whole(f"{original}.{kind}", f"{name}.{kind}")
        if name in file.expected:
            file.add_whole(original, name)
    return file


def with_gate(value: float) -> Write:
    """Return a writer of FastWan's weights, with the gates of Video Sparse Attention."""

    def write(transformer: Any) -> FileOf:
        file = whole(transformer)
        for block in range(2):
            file.tensors[f"blocks.{block}.to_gate_compress.weight"] = torch.full((32, 32), value)
            file.tensors[f"blocks.{block}.to_gate_compress.bias"] = torch.full((32,), value)
        return file

    return write


def with_projection(value: float) -> Write:
    """Return a writer of TurboWan's weights, with the projections of Sparse-Linear Attention."""

    def write(transformer: Any) -> FileOf:
        file = whole_original(transformer)
        for block in range(2):
            begin = f"blocks.{block}.self_attn.attn_op.local_attn.proj_l"
            file.tensors |= {f"{begin}.weight": torch.full((16, 16), value), f"{begin}.bias": torch.full((16,), value)}
        return file

    return write


def h3(prefix: str, *, is_flat: bool = False, by_head: bool = False, **options: Any) -> Write:
    """Return a writer of LoRAs of MiniMax-H3 by its authors' names."""

    def by_part(rows: torch.Tensor) -> torch.Tensor:
        heads = [head.chunk(3) for head in rows.chunk(2)]
        return torch.cat([head[part] for part in range(3) for head in heads])

    def write(transformer: Any) -> FileOf:
        spell = (lambda name: name.replace(".", "_")) if is_flat else str
        names = {module: spell(name) for module, name in H3.items()}
        file = FileOf(transformer, prefix).add_pairs(names, **options)
        parts = [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"]
        fused_options = {**options, "reorder": by_part} if by_head else options
        file.add_pair(spell("blocks.0.attn.qkv_proj"), *parts, **fused_options)
        file.add_pair(spell("blocks.1.mlp.fc1"), "transformer_blocks.1.ff.net.0.proj", reorder=swapped, **options)
        return file

    return write


def with_alpha(transformer: Any) -> FileOf:
    """Return lightx2v's LoRA of MiniMax-H3 by Diffusers' names, with one alpha in the header."""
    file = FileOf(transformer).add_pairs({name: name for name in H3}, endings=DEFAULT, scale=2.0)
    file.metadata = {"alpha": str(2 * RANK)}
    return file


def fast_h3(gate: float | None) -> Write:
    """Return a writer of FastH3's LoRA: pairs, differences, and whole weights, those of gates among them."""

    def write(transformer: Any) -> FileOf:
        names = {name: name for name in H3}
        file = FileOf(transformer).add_pairs(names)
        file.add_difference("transformer_blocks.0.norm1.diff", "transformer_blocks.0.norm1.weight")
        file.add_difference("proj_in.diff_b", "proj_in.bias")
        file.add_whole("norm_out.linear.set_weight", "norm_out.linear.weight")
        if gate is not None:
            for block in range(2):
                key = f"transformer_blocks.{block}.attn.to_gate_compress.set_weight"
                file.tensors[key] = torch.full((32, 32), gate)
        return file

    return write
