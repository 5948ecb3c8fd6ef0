"""The layouts that `file_layouts.py` tabulates, each with the files that it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from layout_models import DEFAULT, DOWN_UP, RANK, FileOf, hunyuan_video, ltx_2, ltx_video, minimax_h3, wan

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

HERE = "tests of BLADE"
COMFY = "comfy/lora.py of Comfy-Org/ComfyUI"
CONVERTERS = "lora_conversion_utils.py of Diffusers"
LIGHTX2V = "lora_adapter.py of ModelTC/lightx2v"
FASTVIDEO = "wanvideo.py of hao-ai-lab/FastVideo"
TURBO = "modify_model.py and SLA/core.py of thu-ml/TurboDiffusion"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout of files."""

    name: str
    what: str
    """What it is."""
    source: str
    """Where the names of its keys are from."""
    pipe: Callable[[], Any] = wan
    files: tuple[Write, ...]
    """Makes the file of each transformer."""
    is_student: bool = False
    names: tuple[str, ...] = ("lora.safetensors",)
    """Names of the files."""
    beside: dict[str, Any] = field(default_factory=dict)
    """JSON files beside them."""

    def save(self, file: FileOf, folder: Path, number: int) -> Path:
        """Write a file, and return what is to be named as the source."""
        name = self.names[min(number, len(self.names) - 1)]
        if self.names[0] == self.names[-1] and number:
            name = f"{number}-{name}"
        path = file.save(folder / name)
        if name.startswith("transformer/"):
            file.transformer.save_config(folder / "transformer")
            return folder
        return path


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


ROWS = (
    Layout(name="Diffusers", what="LoRA, Wan", source=HERE, files=(pairs(WAN_OWN, "transformer."),)),
    Layout(name="Diffusers, alpha in the header", what="LoRA, Wan", source=HERE, files=(with_metadata,)),
    Layout(name="PEFT", what="LoRA, Wan", source=HERE, files=(pairs(WAN_OWN, "base_model.model."),)),
    Layout(
        name="PEFT, alpha in adapter_config.json",
        what="LoRA, Wan",
        source=HERE,
        files=(with_config,),
        names=("adapter_model.safetensors",),
    ),
    Layout(name="DiffSynth", what="LoRA, Wan", source=CONVERTERS, files=(pairs(WAN, endings=DEFAULT),)),
    Layout(name="DiffSynth, pipe.dit.", what="LoRA, Wan", source=HERE, files=(pairs(WAN, "pipe.dit."),)),
    Layout(name="ComfyUI", what="LoRA, Wan", source=COMFY, files=(pairs(WAN, "diffusion_model."),)),
    Layout(
        name="ComfyUI, alpha",
        what="LoRA, Wan",
        source=COMFY,
        files=(pairs(WAN, "diffusion_model.", endings=DOWN_UP, alpha=3.0),),
    ),
    Layout(
        name="kohya, musubi",
        what="LoRA, Wan",
        source=CONVERTERS,
        files=(pairs(flat(WAN), "lora_unet_", endings=DOWN_UP, alpha=3.0),),
    ),
    Layout(
        name="LyCORIS",
        what="LoRA, Wan",
        source=HERE,
        files=(pairs(flat(WAN), "lycoris_", endings=DOWN_UP, alpha=1.0),),
    ),
    Layout(
        name="kohya, fused projections and swapped halves",
        what="LoRA, HunyuanVideo",
        source="single_file_utils.py of Diffusers",
        pipe=hunyuan_video,
        files=(fused,),
    ),
    Layout(name="differences: diff, diff_b", what="LoRA, Wan", source=COMFY, files=(differences,)),
    Layout(
        name="DoRA, PEFT",
        what="LoRA, Wan",
        source="peft/tuners/lora/dora.py of PEFT",
        files=(pairs(WAN_OWN, "transformer.", magnitude="lora_magnitude_vector"),),
    ),
    Layout(
        name="DoRA, kohya",
        what="LoRA, Wan",
        source="weight_adapter/base.py of Comfy-Org/ComfyUI",
        files=(pairs(flat(WAN), "lora_unet_", endings=DOWN_UP, alpha=1.0, magnitude="dora_scale"),),
    ),
    Layout(
        name="LoKr",
        what="LoRA, Wan",
        source="weight_adapter/lokr.py of Comfy-Org/ComfyUI",
        files=(lambda transformer: FileOf(transformer).add({"blocks.0.self_attn.q.lokr_w1": torch.ones(2, 2)}),),
    ),
    Layout(
        name="lightx2v, Wan2.1 distill LoRA",
        what="student, Wan",
        source=LIGHTX2V,
        files=(lightx2v,),
        is_student=True,
        names=("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors",),
    ),
    Layout(
        name="lightx2v, Wan2.2-Lightning: a file for each expert",
        what="student, Wan 2.2",
        source="wan/utils/utils.py of ModelTC/Wan2.2-Lightning",
        pipe=lambda: wan(2),
        files=(lightning, lightning),
        is_student=True,
        names=("high_noise_model.safetensors", "low_noise_model.safetensors"),
    ),
    Layout(
        name="lightx2v, Wan2.2-Distill-Loras: a file for each expert, diff_m",
        what="student, Wan 2.2",
        source=LIGHTX2V,
        pipe=lambda: wan(2),
        files=(lightx2v, lightx2v),
        is_student=True,
        names=(
            "wan2.2_i2v_A14b_high_noise_lora_rank64_lightx2v_4step_1022.safetensors",
            "wan2.2_i2v_A14b_low_noise_lora_rank64_lightx2v_4step_1022.safetensors",
        ),
    ),
    Layout(
        name="lightx2v, one of two experts",
        what="student, Wan 2.2",
        source=LIGHTX2V,
        pipe=lambda: wan(2),
        files=(lightx2v,),
        is_student=True,
    ),
    Layout(name="CausVid", what="student, Wan", source=CONVERTERS, files=(causvid,), is_student=True),
    Layout(name="AccVideo", what="student, Wan", source=CONVERTERS, files=(accvideo,), is_student=True),
    Layout(
        name="FastWan, full attention: a folder of whole weights",
        what="student, Wan",
        source=FASTVIDEO,
        files=(whole,),
        is_student=True,
        names=("transformer/diffusion_pytorch_model.safetensors",),
    ),
    Layout(
        name="FastWan, gates of VSA",
        what="student, Wan",
        source=FASTVIDEO,
        files=(with_gate(0.1),),
        is_student=True,
        names=("transformer/diffusion_pytorch_model.safetensors",),
    ),
    Layout(
        name="FastWan, gates of VSA that are zero",
        what="student, Wan",
        source=FASTVIDEO,
        files=(with_gate(0.0),),
        is_student=True,
        names=("transformer/diffusion_pytorch_model.safetensors",),
    ),
    Layout(
        name="TurboWan, as it is published (.pth)",
        what="student, Wan",
        source=TURBO,
        files=(with_projection(0.1),),
        is_student=True,
        names=("TurboWan2.1-T2V-1.3B-480P.pth",),
    ),
    Layout(
        name="TurboWan, made safetensors, projections of SLA",
        what="student, Wan",
        source=TURBO,
        files=(with_projection(0.1),),
        is_student=True,
        names=("TurboWan2.1-T2V-1.3B-480P.safetensors",),
    ),
    Layout(
        name="TurboWan, made safetensors, projections that are zero",
        what="student, Wan",
        source=TURBO,
        files=(with_projection(0.0),),
        is_student=True,
        names=("TurboWan2.1-T2V-1.3B-480P.safetensors",),
    ),
    Layout(
        name="whole weights by the authors' names, ComfyUI's prefix",
        what="student, Wan",
        source="single_file_utils.py of Diffusers",
        files=(lambda transformer: whole_original(transformer, "model.diffusion_model."),),
        is_student=True,
    ),
    Layout(
        name="whole weights as a LoRA",
        what="LoRA, Wan",
        source=HERE,
        files=(whole,),
    ),
    Layout(
        name="FastHunyuan: a folder of whole weights",
        what="student, HunyuanVideo",
        source="the files of FastVideo/FastHunyuan-diffusers",
        pipe=hunyuan_video,
        files=(whole,),
        is_student=True,
        names=("transformer/diffusion_pytorch_model.safetensors",),
    ),
    Layout(
        name="LTX-Video 0.9.7, distilled LoRA",
        what="student, LTX-Video",
        source=CONVERTERS,
        pipe=ltx_video,
        files=(pairs(LTX, "diffusion_model."),),
        is_student=True,
        names=("ltxv-13b-0.9.7-distilled-lora128.safetensors",),
    ),
    Layout(
        name="LTX-Video, distilled checkpoint with its VAE",
        what="student, LTX-Video",
        source="single_file_utils.py of Diffusers",
        pipe=ltx_video,
        files=(
            lambda transformer: whole_original(transformer, "model.diffusion_model.").add(
                {"vae.decoder.conv_in.conv.weight": torch.ones(2)}
            ),
        ),
        is_student=True,
        names=("ltxv-2b-0.9.8-distilled.safetensors",),
    ),
    Layout(
        name="LTX-2, distilled LoRA",
        what="student, LTX-2",
        source="sd_ops.py of Lightricks/LTX-2",
        pipe=ltx_2,
        files=(pairs(LTX_2, "diffusion_model."),),
        is_student=True,
        names=("ltx-2-19b-distilled-lora-384.safetensors",),
    ),
    Layout(
        name="H3-Turbo, as it is published",
        what="student, MiniMax-H3",
        source="a listing of the keys in a discussion of larryvrh/MiniMax-H3-Turbo-Lora",
        pipe=minimax_h3,
        files=(h3(""),),
        is_student=True,
    ),
    Layout(
        name="H3-Turbo, ComfyUI, alpha",
        what="student, MiniMax-H3",
        source=CONVERTERS,
        pipe=minimax_h3,
        files=(h3("diffusion_model.", alpha=4.0),),
        is_student=True,
        names=("minimax_h3_fl2v_turbo_4step_v1.1_768p_comfyui_bf16.safetensors",),
    ),
    Layout(
        name="H3-Turbo, alpha in the header",
        what="student, MiniMax-H3",
        source="the documentation of MiniMaxH3LoraLoaderMixin of Diffusers",
        pipe=minimax_h3,
        files=(with_alpha,),
        is_student=True,
        names=("minimax_h3_fl2v_turbo_8step_v1.0_768p_bf16.safetensors",),
    ),
    Layout(
        name="musubi, MiniMax-H3",
        what="LoRA, MiniMax-H3",
        source=CONVERTERS,
        pipe=minimax_h3,
        files=(h3("lora_unet_", is_flat=True, endings=DOWN_UP, alpha=4.0),),
    ),
    Layout(
        name="DiffSynth, MiniMax-H3: rows head by head",
        what="LoRA, MiniMax-H3",
        source=CONVERTERS,
        pipe=minimax_h3,
        files=(h3("", by_head=True, endings=DEFAULT),),
    ),
    Layout(
        name="FastH3 LoRA: diff, diff_b, set_weight",
        what="student, MiniMax-H3",
        source="fastvideo-lora-v2, by the tests of other projects that read it",
        pipe=minimax_h3,
        files=(fast_h3(None),),
        is_student=True,
    ),
    Layout(
        name="FastH3 LoRA, gates of VSA with tiles of 64 tokens",
        what="student, MiniMax-H3",
        source="fastvideo-lora-v2, by the tests of other projects that read it",
        pipe=minimax_h3,
        files=(fast_h3(0.1),),
        is_student=True,
    ),
)
"""All layouts, in the order of the table."""
