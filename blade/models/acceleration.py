"""Optional accelerations: quantization, compilation, offloading."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import nn
from torch.nn.utils.weight_norm import WeightNorm

from blade.common.errors import first_line
from blade.families.protocol import ModelFamily
from blade.families.transformers import Transformer
from blade.models.choices import OFFLOADS, Offload
from blade.models.loaded import LoadedModel
from blade.models.modular import is_modular

HEADROOM = 0.92
"""Share of a device's memory that weights and activations may fill."""

TORCHAO_CONFIGS = {
    "int8": ("torchao.quantization", "Int8WeightOnlyConfig"),
    "fp8": ("torchao.quantization", "Float8WeightOnlyConfig"),
    "int8-dynamic": ("torchao.quantization", "Int8DynamicActivationInt8WeightConfig"),
    "fp8-dynamic": ("torchao.quantization", "Float8DynamicActivationFloat8WeightConfig"),
    "nvfp4": ("torchao.prototype.mx_formats", "NVFP4DynamicActivationNVFP4WeightConfig"),
}
"""Module and name of torchao's configuration of each quantization."""

LEAST_CAPABILITIES = {"int8-dynamic": (8, 0), "fp8-dynamic": (8, 9), "nvfp4": (10, 0)}
"""Compute capability from which on a GPU multiplies in the type of a quantization."""


def quantize(model: LoadedModel, kind: str) -> None:
    """Store the weights of the transformers' blocks in fewer bits, with torchao.

    Args:
        model: the model, its LoRAs merged.
        kind: one of `QUANTIZATIONS`.

    Raises:
        ValueError: if torchao is not installed, or its version lacks this.
    """
    for transformer in model.transformers.values():
        quantize_blocks(transformer, model.family, kind)


def quantize_blocks(transformer: Transformer, family: ModelFamily, kind: str) -> None:
    """Store the weights of one transformer's blocks in fewer bits; see `quantize`."""
    try:
        from torchao.quantization import quantize_
    except ImportError:
        raise ValueError('`quantize` needs torchao: pip install "blade-video[quantize]".') from None
    module, name = TORCHAO_CONFIGS[kind]
    try:
        config = getattr(import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`quantize` {kind} needs a newer torchao: {first_line(error)}") from error
    for block in family.blocks(transformer):
        quantize_(block, config)


def check_quantizable(kind: str | None, device: torch.device) -> None:
    """Check that a device multiplies in the type of a quantization.

    Args:
        kind: one of `QUANTIZATIONS`, or None.
        device: the device.

    Raises:
        ValueError: if it cannot.
    """
    least = LEAST_CAPABILITIES.get(kind or "")
    if least is None or (device.type == "cpu" and kind == "int8-dynamic"):
        return
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < least:
        shown = str(device) if capability is None else f"{device} of {capability[0]}.{capability[1]}"
        raise ValueError(
            f"`quantize` {kind} needs a GPU of compute capability {least[0]}.{least[1]} or later, got {shown}; "
            "int8 and fp8 run everywhere."
        )


def compile_blocks(model: LoadedModel) -> None:
    """Compile the transformers' blocks one by one, and the decoder, when they first run."""
    for transformer in model.transformers.values():
        for block in model.family.blocks(transformer):
            block.compile()
    if model.decoder is not None:
        for block in model.decoder.memory_blocks:
            block.compile()
    elif isinstance(decoder := getattr(model.pipe.vae, "decoder", None), nn.Module):
        decoder.compile()


def enable_tiling(model: LoadedModel) -> None:
    """Have the VAE decode in tiles.

    Raises:
        ValueError: if this VAE cannot.
    """
    if not hasattr(model.pipe.vae, "enable_tiling"):
        raise ValueError(f"`vae_tiling` must not be given: a {type(model.pipe.vae).__name__} cannot decode in tiles.")
    model.pipe.vae.enable_tiling()


def place(model: LoadedModel, device: torch.device, offload: str) -> None:
    """Put a pipeline on a device, or have its parts brought there when they are needed.

    Args:
        model: the model, on the CPU.
        device: where it runs.
        offload: one of `OFFLOADS` but "auto".
    """
    if offload == "none":
        model.pipe.to(device)
    elif is_modular(model.pipe):
        _offload_parts(
            [part for part in model.pipe.components.values() if isinstance(part, nn.Module)], device, offload
        )
    elif offload == "model":
        model.pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        model.pipe.enable_sequential_cpu_offload(device=device)
    else:
        stream = device.type == "cuda"
        model.pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=stream, non_blocking=stream)


def _offload_parts(parts: Sequence[nn.Module], device: torch.device, offload: str) -> None:
    """Have each part brought to a device when it runs, as pipelines do that are not modular; see `place`.

    Parts with normalised weights, which a hook computes before any other would bring them, stay on the device where
    others are brought there layer by layer.
    """
    from accelerate import cpu_offload, cpu_offload_with_hook
    from diffusers.hooks import apply_group_offloading

    hook, stream = None, device.type == "cuda"
    for part in parts:
        if offload == "model":
            _, hook = cpu_offload_with_hook(part, device, prev_module_hook=hook)
        elif any(
            isinstance(own, WeightNorm) for module in part.modules() for own in module._forward_pre_hooks.values()
        ):
            part.to(device)
        elif offload == "sequential":
            cpu_offload(part, device, offload_buffers=True)
        else:
            apply_group_offloading(part, device, offload_type="leaf_level", use_stream=stream, non_blocking=stream)


def choose_offload(weights: dict[str, float], activations: dict[str, float], device_gib: float) -> Offload:
    """Return the fastest way of offloading whose memory a device has.

    Args:
        weights: GiB of the weights by part of the pipeline.
        activations: GiB beside the weights of the "transformer" and of "decoding".
        device_gib: the device's memory.
    """
    room = HEADROOM * device_gib
    if sum(weights.values()) + max(activations.values()) <= room:
        return "none"
    denoising = max(weights.values()) + activations["transformer"]
    decoding = weights.get("vae", 0.0) + activations["decoding"]
    return "model" if max(denoising, decoding) <= room else "group"


def advise(offload: str, *, quantized: bool, tiled: bool, decoding: bool) -> str:
    """Say what to try after a run that took more memory than there is.

    Args:
        offload: how it was offloaded.
        quantized: whether its weights were quantized.
        tiled: whether the VAE decoded in tiles.
        decoding: whether it failed in decoding.
    """
    if decoding and not tiled:
        return "Decode in tiles: --vae-tiling."
    later = OFFLOADS[OFFLOADS.index(offload) + 1 : -1]
    if offload == "none":
        return "Keep parts that are not running on the CPU: --offload model, or --offload group for the least memory."
    if "group" in later:
        return "Bring weights to the device layer by layer: --offload group."
    if not quantized:
        return "Store weights in fewer bits: --quantize int8."
    return "Make a smaller or a shorter video: --height, --width, --frames."
