"""What a pipeline can be given beside BLADE: LoRAs, fewer bits a weight, caches, compilation, offloading."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blade.common.errors import first_line
from blade.families.registry import find_family
from blade.families.transformers import find_transformers

OFFLOADS = ("none", "model", "sequential", "group", "auto")
"""Where weights are while they are not needed, fastest first; "auto" takes the fastest that fits."""

QUANTIZATIONS = ("int8", "fp8")
"""What the weights of the transformers' linear layers can be stored in."""

CACHES = {"first-block": 0.05, "pyramid": 2}
"""Diffusers' caches, and what each takes for its one number: the residual's threshold below which all blocks but the
first are skipped, and every how many steps attention is computed."""

HEADROOM = 0.92
"""Share of a device's memory that weights and activations may fill."""


def split_lora(text: str) -> tuple[str, float]:
    """Read a LoRA and its strength, such as "style.safetensors=0.8"; without a strength: 1.

    Raises:
        ValueError: if the strength is no number.
    """
    source, separator, weight = text.rpartition("=")
    if not separator:
        return text, 1.0
    try:
        return source, float(weight)
    except ValueError:
        raise ValueError(f"`loras` must be sources, each with =STRENGTH or not, got {text!r}.") from None


def load_loras(pipe: Any, loras: Sequence[str]) -> None:
    """Load LoRAs onto a pipeline, all active together.

    Args:
        pipe: the pipeline.
        loras: folders, files or Hub ids, each with "=STRENGTH" or without.

    Raises:
        ValueError: if one cannot be loaded onto this model.
    """
    names, weights = [], []
    for number, text in enumerate(loras):
        source, weight = split_lora(text)
        path, name = Path(source).expanduser(), f"lora_{number}"
        place: dict[str, Any] = {"weight_name": path.name} if path.is_file() else {}
        try:
            pipe.load_lora_weights(str(path.parent) if path.is_file() else source, adapter_name=name, **place)
        except Exception as error:  # whatever Diffusers, PEFT, safetensors and the Hub's client raise
            raise ValueError(f"`loras` {source} cannot be loaded onto this model: {first_line(error)}") from error
        if not any(name in getattr(one, "peft_config", {}) for one in find_transformers(pipe).values()):
            raise ValueError(f"`loras` {source} holds no weights for this model's transformer.")
        names.append(name)
        weights.append(weight)
    if names:
        pipe.set_adapters(names, weights)


def merge_loras(pipe: Any) -> None:
    """Add all LoRAs, a student's too, to the transformers' weights, where they cost no time; none can be taken off.

    Args:
        pipe: the pipeline, its LoRAs loaded.
    """
    for transformer in find_transformers(pipe).values():
        if getattr(transformer, "peft_config", None):
            transformer.fuse_lora()
            transformer.unload_lora()


def quantize(pipe: Any, kind: str) -> None:
    """Store the weights of the transformers' blocks in fewer bits, with torchao.

    Args:
        pipe: the pipeline, its LoRAs merged.
        kind: one of `QUANTIZATIONS`. Matrices are multiplied in the model's own type.

    Raises:
        ValueError: if torchao is not installed.
    """
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ValueError('`quantize` needs torchao: pip install "blade-video[quantize]".') from None
    for transformer in find_transformers(pipe).values():
        config = Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig()
        for block in find_family(transformer).blocks(transformer):
            quantize_(block, config)


def enable_cache(pipe: Any, text: str) -> None:
    """Let Diffusers reuse what changes little from step to step.

    Args:
        pipe: the pipeline.
        text: one of `CACHES`, with "=NUMBER" or without.

    Raises:
        ValueError: if there is no such cache, or Diffusers does not know this model.
    """
    import diffusers

    name, number = parse_cache(text)
    for transformer in find_transformers(pipe).values():
        if name == "first-block":
            config: Any = diffusers.FirstBlockCacheConfig(threshold=number)
        else:
            config = diffusers.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=int(number), current_timestep_callback=lambda: pipe.current_timestep
            )
        kind = type(transformer).__name__
        problem = find_family(transformer).cache_problem(transformer, name)
        if problem is not None:
            raise ValueError(f"`cache` must not be {name}: {problem}; use another cache.")
        try:
            transformer.enable_cache(config)
        except (ValueError, AttributeError, NotImplementedError) as error:
            raise ValueError(f"`cache` {name} is not known to Diffusers for a {kind}: {first_line(error)}") from error


def parse_cache(text: str) -> tuple[str, float]:
    """Read a cache and its number, such as "first-block=0.1".

    Raises:
        ValueError: if there is no such cache, or its number makes no sense.
    """
    name, separator, value = text.partition("=")
    if name not in CACHES:
        raise ValueError(f"`cache` must be one of {', '.join(CACHES)}, with =NUMBER or without, got {text!r}.")
    try:
        number = float(value) if separator else float(CACHES[name])
    except ValueError:
        number = -1
    if name == "first-block" and number <= 0:
        raise ValueError(f"`cache` first-block takes a threshold above 0, such as 0.05, got {value!r}.")
    if name == "pyramid" and (number != int(number) or number < 2):
        raise ValueError(f"`cache` pyramid takes a whole number of steps from 2, got {value!r}.")
    return name, number


def compile_blocks(pipe: Any) -> None:
    """Compile the transformers' blocks one by one, and the decoder of the VAE, when they first run."""
    for transformer in find_transformers(pipe).values():
        for block in find_family(transformer).blocks(transformer):
            block.compile()
    if isinstance(decoder := getattr(pipe.vae, "decoder", None), nn.Module):
        decoder.compile()


def enable_tiling(pipe: Any) -> None:
    """Have the VAE decode in tiles.

    Raises:
        ValueError: if this VAE cannot.
    """
    if not hasattr(pipe.vae, "enable_tiling"):
        raise ValueError(f"`vae_tiling` must not be given: a {type(pipe.vae).__name__} cannot decode in tiles.")
    pipe.vae.enable_tiling()


def place(pipe: Any, device: torch.device, offload: str) -> None:
    """Put a pipeline on a device, or have its parts brought there when they are needed.

    Args:
        pipe: the pipeline, on the CPU.
        device: where it runs.
        offload: one of `OFFLOADS` but "auto".
    """
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        stream = device.type == "cuda"
        pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=stream, non_blocking=stream)


def choose_offload(weights: dict[str, float], activations: dict[str, float], device_gib: float) -> str:
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
