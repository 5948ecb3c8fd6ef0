"""A loaded pipeline and its facts: family, preset, call, compression, the sizes of videos that it can make."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from blade.attention.config import BladeConfig
from blade.families.kinds import PresetKind
from blade.families.protocol import Inputs, ModelFamily
from blade.families.registry import find_family, preset_names
from blade.families.sampling_defaults import SamplingDefaults
from blade.families.transformers import Transformer, find_transformers
from blade.families.video_lengths import VideoLengths
from blade.models.adapters import Reach
from blade.models.modular import call_parameters, is_modular
from blade.models.parallel import Team
from blade.models.tiny_decoder import TinyDecoder
from blade.token_grid import TokenGrid

LatentSize = tuple[int, int, int]
"""Frames, height and width of a latent."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A pipeline and what is known of it, each fact worked out once."""

    pipe: Any
    """A Diffusers pipeline with a video transformer, with its weights or on the meta device."""
    changes: dict[str, Reach] = field(default_factory=dict)
    """Number of modules that the loaded LoRAs and student change in each transformer, by their sources."""
    decoder: TinyDecoder | None = None
    """The tiny decoder that stands in for the VAE's own, if any."""
    team: Team | None = None
    """The processes that make each of its videos together; None: one does."""

    @property
    def transformers(self) -> dict[str, Transformer]:
        """The transformers by their component's name; a student of whole weights replaces one."""
        return find_transformers(self.pipe)

    @property
    def transformer(self) -> Transformer:
        """The transformer, the first one where there are two."""
        return next(iter(self.transformers.values()))

    @property
    def device(self) -> torch.device:
        """The device that the pipeline runs on, wherever its weights wait."""
        device: torch.device = getattr(self.pipe, "_execution_device", self.pipe.device)
        return device

    @cached_property
    def family(self) -> ModelFamily:
        """The adapter of the model's family."""
        return find_family(self.transformer)

    @cached_property
    def preset_name(self) -> str:
        """The name of the preset that suits the model."""
        return self.family.preset_name(self.transformer)

    @cached_property
    def preset(self) -> BladeConfig:
        """The model's values for ordinary weights."""
        return BladeConfig.from_preset(self.preset_name)

    def preset_of(self, kind: PresetKind) -> BladeConfig:
        """Return the model's values of a kind.

        Raises:
            ValueError: if it has none of this kind.
        """
        return BladeConfig.from_preset(self.preset_name, kind)

    @cached_property
    def student_preset(self) -> BladeConfig | None:
        """The model's values for students; None if none are known."""
        known = self.preset_name in preset_names("student")
        return self.preset_of("student") if known else None

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of the pipeline's call by name; those of its base where a subclass passes all on."""
        if is_modular(self.pipe):
            return call_parameters(self.pipe)
        calls = [vars(base)["__call__"] for base in type(self.pipe).__mro__ if "__call__" in vars(base)]
        signatures = [inspect.signature(call).parameters for call in calls]
        return next((names for names in signatures if not _passes_on(names)), signatures[0])

    @cached_property
    def compression(self) -> tuple[int, int]:
        """The frames, and the pixels of height and of width, that become one in a latent."""
        pipe = self.pipe
        time = int(getattr(pipe, "vae_scale_factor_temporal", 0) or getattr(pipe, "vae_temporal_compression_ratio", 4))
        space = int(getattr(pipe, "vae_scale_factor_spatial", 0) or getattr(pipe, "vae_spatial_compression_ratio", 8))
        return time, space

    @cached_property
    def size_multiples(self) -> tuple[int, int]:
        """The pixels that heights and widths are whole multiples of."""
        patch = getattr(self.transformer.config, "patch_size", 1)
        edges = (patch, patch) if isinstance(patch, int) else patch[-2:]
        _, scale = self.compression
        height, width = (math.lcm(self.family.size_multiple, scale * edge) for edge in edges)
        return height, width

    def latent_size(self, height: int, width: int, frames: int) -> LatentSize:
        """Return the size of the latent of a video of so many pixels and frames."""
        _, space = self.compression
        return self.video_lengths.latent_frames(frames), height // space, width // space

    @cached_property
    def video_lengths(self) -> VideoLengths:
        """The numbers of frames that the pipeline makes."""
        return self.family.video_lengths(self.pipe) or VideoLengths.of_compression(self.compression[0])

    @property
    def latent_channels(self) -> int:
        """The channels of the latents that the VAE decodes."""
        config = self.pipe.vae.config
        channels: int = config.get("z_dim") or config.latent_channels
        return channels

    def empty_latent(self, size: LatentSize) -> torch.Tensor:
        """Return zeros of the shape, type and device that the VAE decodes: (1, channels, *size)."""
        like: torch.Tensor = next(self.pipe.vae.parameters())
        return like.new_zeros(1, self.latent_channels, *size)

    def example_inputs(self, size: LatentSize) -> Inputs:
        """Return inputs of the transformer for a latent of a size, all zeros."""
        return self.family.example_inputs(self.transformer, size)

    def token_grid(self, size: LatentSize) -> TokenGrid:
        """Return the grid of the tokens of a latent of a size."""
        return self.family.token_grid(self.transformer, self.example_inputs(size))

    def sampling_defaults(self, height: int | None, width: int | None) -> SamplingDefaults:
        """Return the values that the model's authors recommend.

        Args:
            height: pixels that were asked for, if any.
            width: pixels that were asked for, if any.
        """
        return self.family.sampling_defaults(self.pipe, height, width)

    def check_size(self, height: int, width: int, frames: int) -> None:
        """Check that the pipeline can make a video of this size, which Diffusers would change with a mere warning.

        Args:
            height: pixels.
            width: pixels.
            frames: number of frames.

        Raises:
            ValueError: naming the nearest sizes that it can make.
        """
        for name, value, multiple in zip(("height", "width"), (height, width), self.size_multiples, strict=True):
            _check_step(name, value, first=multiple, step=multiple, rule=f"a multiple of {multiple}")
        lengths = self.video_lengths
        _check_step("frames", frames, first=lengths.first, step=lengths.step, last=lengths.last, rule=lengths.rule)


def _passes_on(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Return whether a call takes arguments that it does not name."""
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


def _check_step(name: str, value: int, *, first: int, step: int, rule: str, last: int | None = None) -> None:
    below = first + (value - first) // step * step
    last = max(value, below + step) if last is None else last
    if value == below and first <= value <= last:
        return
    nearest = f"{first}" if value < first else f"{last}" if value > last else f"{below} or {below + step}"
    raise ValueError(f"`{name}` must be {rule} for this model, got {value}; the nearest is {nearest}.")
