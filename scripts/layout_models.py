"""Small models with random weights, and the files of LoRAs and students that `file_layouts.py` writes for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MiniMaxH3ModularPipeline,
    MiniMaxH3Transformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import save_file

from blade.common.files import write_files

RANK = 2
"""Rank of all pairs."""

AB = ("lora_A.weight", "lora_B.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")
DOWN_UP = ("lora_down.weight", "lora_up.weight")
"""Endings of the two matrices of a pair."""


def wan(experts: int = 1) -> Any:
    """Return a small Wan pipeline, with one transformer or two."""
    made = [
        WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=16,
            ffn_dim=24,
            num_layers=2,
            rope_max_seq_len=32,
        )
        for _ in range(experts)
    ]
    second = {"transformer_2": made[1], "boundary_ratio": 0.875} if experts == 2 else {}
    return WanPipeline(**_parts(vae=None, transformer=made[0]), **second)


def hunyuan_video() -> Any:
    """Return a small HunyuanVideo pipeline."""
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    return HunyuanVideoPipeline(**_parts(vae=None, transformer=transformer), text_encoder_2=None, tokenizer_2=None)


def ltx_video() -> Any:
    """Return a small LTX-Video pipeline."""
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=8,
    )
    return LTXPipeline(**_parts(vae=None, transformer=transformer))


def ltx_2() -> Any:
    """Return a small LTX-2 pipeline."""
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=8,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
    )
    others = dict.fromkeys(("vae", "audio_vae", "connectors", "vocoder"))
    return LTX2Pipeline(**_parts(transformer=transformer), **others)


def minimax_h3() -> Any:
    """Return a small MiniMax-H3 pipeline."""
    transformer = MiniMaxH3Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        ffn_dim=24,
        in_channels=4,
        audio_in_channels=4,
        text_dim=8,
        freq_dim=16,
        time_embed_hidden_dim=32,
        time_embed_dim=16,
        rope_freq_dim=2,
    )
    pipe = MiniMaxH3ModularPipeline()
    pipe.update_components(transformer=transformer)
    return pipe


def _parts(**parts: Any) -> dict[str, Any]:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {"tokenizer": None, "text_encoder": None, "scheduler": scheduler, **parts}


class FileOf:
    """A file for a transformer, and the values that its weights are to have."""

    def __init__(self, transformer: Any, prefix: str = "") -> None:
        self.transformer, self.prefix = transformer, prefix
        self.tensors: dict[str, torch.Tensor] = {}
        self.metadata: dict[str, str] | None = None
        self.config: dict[str, Any] = {}
        self.expected = {name: weight.detach().clone() for name, weight in transformer.named_parameters()}

    def add_pair(
        self,
        name: str,
        *modules: str,
        endings: tuple[str, str] = AB,
        alpha: float | None = None,
        scale: float = 1.0,
        reorder: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
        magnitude: str | None = None,
    ) -> None:
        """Add a pair of matrices.

        Args:
            name: the module's in the file.
            modules: Diffusers' names of the modules that its rows are of, in their order.
            endings: of the keys.
            alpha: is written beside the pair.
            scale: of the change, if there is no alpha.
            reorder: puts the file's rows into Diffusers' order.
            magnitude: ending of DoRA's norms, if it is one.
        """
        weights = [self.expected[f"{module}.weight"] for module in modules]
        down = torch.randn(RANK, *weights[0].shape[1:])
        up = torch.randn(sum(map(len, weights)), RANK, *(1,) * (weights[0].ndim - 2))
        begin = self.prefix + name
        self.tensors |= {f"{begin}.{endings[0]}": down, f"{begin}.{endings[1]}": up}
        if alpha is not None:
            self.tensors[f"{begin}.alpha"] = torch.tensor(alpha)
            scale = alpha / RANK
        product = (reorder(up).flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])
        changed = torch.cat(weights) + scale * product
        if magnitude is not None:
            norms = torch.rand(len(changed), 1) + 0.5
            self.tensors[f"{begin}.{magnitude}"] = norms if magnitude == "dora_scale" else norms[:, 0]
            changed = norms * changed / changed.norm(dim=1, keepdim=True)
        rows = changed.split([len(weight) for weight in weights])
        self.expected |= {f"{module}.weight": part for module, part in zip(modules, rows, strict=True)}

    def add_pairs(self, names: Mapping[str, str], **options: Any) -> FileOf:
        """Add pairs of modules, by Diffusers' names and the file's; see `add_pair`."""
        for module, name in names.items():
            self.add_pair(name, module, **options)
        return self

    def add_difference(self, name: str, parameter: str) -> FileOf:
        """Add what is to be added to a parameter, by the key's name in the file and Diffusers' name."""
        difference = torch.randn_like(self.expected[parameter])
        self.tensors[self.prefix + name] = difference
        self.expected[parameter] = self.expected[parameter] + difference
        return self

    def add_whole(self, name: str, parameter: str) -> FileOf:
        """Add what takes a parameter's place; see `add_difference`."""
        self.tensors[self.prefix + name] = self.expected[parameter] = torch.randn_like(self.expected[parameter])
        return self

    def add(self, tensors: Mapping[str, torch.Tensor]) -> FileOf:
        """Add tensors that the model has no place for, by their whole keys."""
        self.tensors |= tensors
        return self

    def save(self, path: Path) -> Path:
        """Write the file, and PEFT's configuration beside it if there is one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
        save_file(tensors, path, self.metadata)
        if self.config:
            write_files({path.with_name("adapter_config.json"): json.dumps(self.config).encode()})
        return path
