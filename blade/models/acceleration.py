"""Optional accelerations: LoRA merging, quantization, caching, compilation, offloading."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import nn

from blade.common.errors import first_line
from blade.common.rollback import unchanged_on_error
from blade.common.terminal import logger
from blade.models.adapters import Reach, adapter_layers, check_reach, unused_keys
from blade.models.choices import OFFLOADS, Offload, parse_cache, split_lora
from blade.models.loaded import LoadedModel
from blade.models.untrusted import find_lora

HEADROOM = 0.92
"""Share of a device's memory that weights and activations may fill."""

BOTH_LORAS = (
    "In Python, give each transformer its own file: `pipe.load_lora_weights(FILE, adapter_name=NAME)`, then "
    "`pipe.load_lora_weights(FILE_2, adapter_name=NAME, load_into_transformer_2=True)`, and `pipe.set_adapters(NAME)`."
)
"""Advice for a LoRA that is for one of two transformers."""


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

LOADERS = tuple(map(logging.getLogger, ("diffusers.loaders.peft", "diffusers.utils.peft_utils")))
"""Loggers of what Diffusers says about a LoRA's keys, in different versions."""

SHOWN_KEYS = 4
"""Most keys of a LoRA that a message names."""


def load_loras(model: LoadedModel, loras: Sequence[str]) -> dict[str, Reach]:
    """Load LoRAs onto a pipeline, all active together, or none if one of them fails.

    Keys of their files that match no module are told in a warning.

    Args:
        model: the model.
        loras: folders, files or Hub ids, each with "=STRENGTH" or without.

    Returns:
        By source, the number of modules that it changes in each transformer.

    Raises:
        ValueError: if one cannot be loaded onto this model, is pickled, or is for one of two transformers only.
    """
    names, weights, reached = [], [], dict[str, Reach]()
    with unchanged_on_error(model.pipe):
        for number, text in enumerate(loras):
            source, weight = split_lora(text)
            name, place = f"lora_{number}", find_lora(source, f"`loras` {source}")
            try:
                with _without_unexpected_keys():  # which `_tell_unused` tells shorter, those of other parts too
                    model.pipe.load_lora_weights(**place, adapter_name=name)
            except Exception as error:  # whatever Diffusers, PEFT, safetensors and the Hub's client raise
                raise ValueError(f"`loras` {source} cannot be loaded onto this model: {first_line(error)}") from error
            _tell_unused(model, source, place, name)
            reach = {part: len(adapter_layers(one, name)) for part, one in model.transformers.items()}
            check_reach(f"`loras` {source}", reach, BOTH_LORAS)
            reached[source] = reach
            names.append(name)
            weights.append(weight)
        if names:
            model.pipe.set_adapters(names, weights)
    return reached


@contextmanager
def _without_unexpected_keys() -> Iterator[None]:
    """Keep Diffusers from listing every key of a LoRA that matches nothing."""

    def is_other(record: logging.LogRecord) -> bool:
        return "unexpected keys" not in record.getMessage()

    for log in LOADERS:
        log.addFilter(is_other)
    try:
        yield
    finally:
        for log in LOADERS:
            log.removeFilter(is_other)


def _tell_unused(model: LoadedModel, source: str, place: Mapping[str, Any], adapter: str) -> None:
    """Warn of the keys of a LoRA's file that have no use."""
    state = model.pipe.lora_state_dict(**place)
    keys = state[0] if isinstance(state, tuple) else state
    unused = unused_keys(keys, model.transformers, adapter)
    if 0 < len(unused) < len(keys):  # where all of them are unknown, they are named in another way
        shown = ", ".join(unused[:SHOWN_KEYS]) + (", ..." if len(unused) > SHOWN_KEYS else "")
        logger.warning(
            f"`loras` {source}: {len(unused):,} of {len(keys):,} keys match no module of "
            f"{' or '.join(model.transformers)} and are left out: {shown}"
        )


def merge_loras(model: LoadedModel) -> None:
    """Add all LoRAs, a student's too, to the transformers' weights, where they cost no time; none can be taken off.

    Args:
        model: the model, its LoRAs loaded.
    """
    names = [name for name, transformer in model.transformers.items() if getattr(transformer, "peft_config", None)]
    if names:  # by the pipeline, which notes what it has merged
        model.pipe.fuse_lora(components=names)
        model.pipe.unload_lora_weights()


def quantize(model: LoadedModel, kind: str) -> None:
    """Store the weights of the transformers' blocks in fewer bits, with torchao.

    Args:
        model: the model, its LoRAs merged.
        kind: one of `QUANTIZATIONS`.

    Raises:
        ValueError: if torchao is not installed, or its version lacks this.
    """
    try:
        from torchao.quantization import quantize_
    except ImportError:
        raise ValueError('`quantize` needs torchao: pip install "blade-video[quantize]".') from None
    module, name = TORCHAO_CONFIGS[kind]
    try:
        config = getattr(import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`quantize` {kind} needs a newer torchao: {first_line(error)}") from error
    for transformer in model.transformers.values():
        for block in model.family.blocks(transformer):
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


def enable_cache(model: LoadedModel, text: str) -> None:
    """Let Diffusers reuse what changes little from step to step.

    Args:
        model: the model.
        text: one of `CACHES`, with "=NUMBER" or without.

    Raises:
        ValueError: if there is no such cache, or Diffusers does not know this model.
    """
    import diffusers

    name, number = parse_cache(text)
    for transformer in model.transformers.values():
        if name == "first-block":
            config: Any = diffusers.FirstBlockCacheConfig(threshold=number)
        else:
            config = diffusers.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=int(number),
                current_timestep_callback=lambda: model.pipe.current_timestep,
            )
        kind = type(transformer).__name__
        problem = model.family.cache_problem(transformer, name)
        if problem is not None:
            raise ValueError(f"`cache` must not be {name}: {problem}; use another cache.")
        try:
            transformer.enable_cache(config)
        except (ValueError, AttributeError, NotImplementedError) as error:
            raise ValueError(f"`cache` {name} is not known to Diffusers for a {kind}: {first_line(error)}") from error


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
    elif offload == "model":
        model.pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        model.pipe.enable_sequential_cpu_offload(device=device)
    else:
        stream = device.type == "cuda"
        model.pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=stream, non_blocking=stream)


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
