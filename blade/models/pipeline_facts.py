"""Facts about a loaded pipeline: its call, its compression, the sizes of videos that it can make."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from blade.families.registry import find_family
from blade.families.transformers import find_transformers

INPUTS = ("prompt", "image", "video")
"""Arguments of a pipeline's call that a generation can give."""


def execution_device(pipe: Any) -> torch.device:
    """Return the device that a pipeline runs on, wherever its weights wait."""
    return getattr(pipe, "_execution_device", pipe.device)


def main_transformer(pipe: Any) -> nn.Module:
    """Return the transformer of a pipeline, the first one where it has two."""
    return next(iter(find_transformers(pipe).values()))


def call_parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline's call by name; those of its base where a subclass passes all on."""
    calls = [vars(kind)["__call__"] for kind in type(pipe).__mro__ if "__call__" in vars(kind)]
    found = [inspect.signature(call).parameters for call in calls]
    passes_on = inspect.Parameter.VAR_KEYWORD
    return next((one for one in found if all(each.kind is not passes_on for each in one.values())), found[0])


def vae_compression(pipe: Any) -> tuple[int, int]:
    """Return how many frames, and how many pixels of height and of width, become one in a pipeline's latents."""
    time = int(getattr(pipe, "vae_scale_factor_temporal", 0) or getattr(pipe, "vae_temporal_compression_ratio", 4))
    space = int(getattr(pipe, "vae_scale_factor_spatial", 0) or getattr(pipe, "vae_spatial_compression_ratio", 8))
    return time, space


def latent_size(pipe: Any, height: int, width: int, frames: int) -> tuple[int, int, int]:
    """Return frames, height and width of the latent of a video of so many pixels and frames."""
    time, space = vae_compression(pipe)
    return (frames - 1) // time + 1, height // space, width // space


def empty_latent(pipe: Any, size: tuple[int, int, int]) -> torch.Tensor:
    """Return zeros of the shape, type and device that a pipeline's VAE decodes: (1, channels, *size)."""
    vae = pipe.vae
    return next(vae.parameters()).new_zeros(1, vae.config.get("z_dim") or vae.config.latent_channels, *size)


def size_multiples(pipe: Any) -> tuple[int, int]:
    """Return what a pipeline's heights and widths are whole multiples of."""
    transformer = main_transformer(pipe)
    patch, least = getattr(transformer.config, "patch_size", 1), find_family(transformer).size_multiple
    edges = (patch, patch) if isinstance(patch, int) else patch[-2:]
    _, scale = vae_compression(pipe)
    height, width = (math.lcm(least, scale * edge) for edge in edges)
    return height, width


def check_size(pipe: Any, height: int, width: int, frames: int) -> None:
    """Check that a pipeline can make a video of this size, which Diffusers would change with a mere warning.

    Args:
        pipe: the pipeline.
        height: pixels.
        width: pixels.
        frames: number of frames.

    Raises:
        ValueError: naming the nearest sizes that it can make.
    """
    for name, value, multiple in zip(("height", "width"), (height, width), size_multiples(pipe), strict=True):
        _check_step(name, value, first=multiple, step=multiple, rule=f"a multiple of {multiple}")
    step, _ = vae_compression(pipe)
    _check_step("frames", frames, first=1, step=step, rule=f"{step}n + 1 for a whole number n")


def _check_step(name: str, value: int, *, first: int, step: int, rule: str) -> None:
    below = first + (value - first) // step * step
    if value == below and value >= first:
        return
    nearest = f"{first}" if value < first else f"{below} or {below + step}"
    raise ValueError(f"`{name}` must be {rule} for this model, got {value}; the nearest is {nearest}.")
