"""The layouts that `file_layouts.py` tabulates, each with the files that it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from layout_models import DEFAULT, DOWN_UP, FileOf, hunyuan_video, ltx_2, ltx_video, minimax_h3, wan
from layout_writers import (
    LTX,
    LTX_2,
    WAN,
    WAN_OWN,
    Write,
    accvideo,
    causvid,
    differences,
    fast_h3,
    flat,
    fused,
    h3,
    lightning,
    lightx2v,
    pairs,
    whole,
    whole_original,
    with_alpha,
    with_config,
    with_gate,
    with_metadata,
    with_projection,
)

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
    """Description."""
    source: str
    """Source of the names of its keys."""
    pipe: Callable[[], Any] = wan
    files: tuple[Write, ...]
    """Makes the file of each transformer."""
    is_student: bool = False
    names: tuple[str, ...] = ("lora.safetensors",)
    """Names of the files."""

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
