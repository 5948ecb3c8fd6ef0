"""Tiny decoders of video latents (TAEHV), which stand in for a VAE's decoder.

Source of the architecture, the names and shapes of its weights, and of what it takes and returns: TAEHV, "Tiny
AutoEncoder for Hunyuan Video", https://github.com/madebyollin/taehv (MIT). The code here is BLADE's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt, prod

import torch
from torch import nn
from torch.nn import functional

from blade.models.source import ModelError

WIDTHS = {"base": (256, 128, 64, 64), "super": (512, 256, 128, 64)}
"""Channels of the three stages and after them, by variant."""

BLOCKS = 3
"""Memory blocks of a stage."""

COLOURS = 3

PATCHES = (1, 2, 4)
"""Edges of the patches that published decoders shuffle into pixels."""

TIME_SCALES = (1, 2)
"""Frames that a stage may make of one."""

CLAMP = 3.0
"""Latents are squeezed into (-3, 3) by `tanh` before the base variant."""


class MemoryBlock(nn.Module):
    """A residual block over one frame and the frame before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _convolution(2 * width, width), nn.ReLU(), _convolution(width, width), nn.ReLU(),
            _convolution(width, width),
        )  # fmt: skip

    def forward(self, frames: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Return frames of the same shape, (N, width, h, w)."""
        changed: torch.Tensor = self.conv(torch.cat((frames, previous), dim=1))
        return functional.relu(changed + frames)


class WideMemoryBlock(nn.Module):
    """The memory block of the super variant: a 7 x 7 convolution of each channel, and a wide middle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 7, padding=3, groups=2 * width, bias=False),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.ReLU(),
            nn.Conv2d(4 * width, width, 1, bias=False),
        )

    def forward(self, frames: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """Return frames of the same shape, (N, width, h, w)."""
        changed: torch.Tensor = self.conv(torch.cat((frames, previous), dim=1))
        return changed + frames


class TimeUpscale(nn.Module):
    """Makes several frames of every one, by a product with weights."""

    def __init__(self, width: int, scale: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * scale, 1, bias=False)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Return frames, (N * scale, width, h, w), from (N, width, h, w)."""
        width = frames.shape[1]
        grown: torch.Tensor = self.conv(frames)
        return grown.reshape(-1, width, *grown.shape[2:])


class Clamp(nn.Module):
    """Squeezes latents into a range, smoothly."""

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Return latents of the same shape."""
        return torch.tanh(latents / CLAMP) * CLAMP


@dataclass(frozen=True, kw_only=True)
class TinyDecoderLayout:
    """The sizes in which published tiny decoders differ, as their weights show them."""

    latent_channels: int
    """Channels of the latents."""
    patch: int = 1
    """Edge of the patch of pixels that the last convolution makes at every place."""
    time_scales: tuple[int, int, int] = (1, 2, 2)
    """Frames that each stage makes of one."""
    variant: str = "base"
    """A key of `WIDTHS`."""

    @property
    def time_scale(self) -> int:
        """Frames that become one in a latent."""
        return prod(self.time_scales)

    @property
    def space_scale(self) -> int:
        """Pixels of height, and of width, that become one in a latent."""
        scale: int = 2 ** len(self.time_scales) * self.patch
        return scale

    def __str__(self) -> str:
        edge = self.space_scale
        return f"{self.latent_channels} channels, {edge} x {edge} pixels and {self.time_scale} frames each"

    def frame_count(self, latent_frames: int) -> int:
        """Return the frames of a video: those of the first frame of a latent but the last are no part of it."""
        return self.time_scale * (latent_frames - 1) + 1


class TinyDecoder(nn.Module):
    """A tiny decoder. Its submodules have the names of the published weights.

    It takes latents as a diffusion model makes them: with no mean added and no scale taken off.
    """

    def __init__(self, layout: TinyDecoderLayout) -> None:
        """Make a decoder with random weights.

        Args:
            layout: its sizes.
        """
        super().__init__()
        self.layout = layout
        self.decoder = nn.Sequential(*_layers(layout))

    @property
    def memory_blocks(self) -> list[nn.Module]:
        """The blocks that see the frame before, where nearly all operations are."""
        return [layer for layer in self.decoder if isinstance(layer, (MemoryBlock, WideMemoryBlock))]

    def stream(self, latents: torch.Tensor, chunk: int = 1) -> Iterator[torch.Tensor]:
        """Decode a few latent frames at a time. Memory depends on `chunk` and not on the length of the video.

        Args:
            latents: (B, channels, F, h, w), in the type and on the device of the weights.
            chunk: latent frames that are decoded together; more are faster, as far as the device is not busy.

        Yields:
            (B, frames, 3, H, W) in [0, 1]: `time_scale` frames for each of a latent, and one for its first.

        Raises:
            ValueError: if the latents have another number of channels, or `chunk` is below 1.
        """
        if chunk < 1:
            raise ValueError(f"`chunk` must be at least 1, got {chunk}.")
        if latents.ndim != 5 or latents.shape[1] != self.layout.latent_channels:
            raise ValueError(
                f"`latents` must be (B, {self.layout.latent_channels}, F, h, w), got shape {tuple(latents.shape)}."
            )
        memory: dict[int, torch.Tensor] = {}
        for start in range(0, latents.shape[2], chunk):
            frames = self._decode_next(latents[:, :, start : start + chunk].transpose(1, 2), memory)
            yield frames if start else frames[:, self.layout.time_scale - 1 :]

    def _decode_next(self, frames: torch.Tensor, memory: dict[int, torch.Tensor]) -> torch.Tensor:
        """Decode the frames that follow, (B, T, channels, h, w), and keep what those after them will see."""
        batch = frames.shape[0]
        frames = frames.flatten(0, 1)
        for number, layer in enumerate(self.decoder):
            if isinstance(layer, (MemoryBlock, WideMemoryBlock)):
                apart = frames.unflatten(0, (batch, -1))
                before = memory[number] if number in memory else torch.zeros_like(apart[:, :1])
                # a copy, as a view would hold all frames in memory
                memory[number] = apart[:, -1:].clone()
                frames = layer(frames, torch.cat((before, apart[:, :-1]), dim=1).flatten(0, 1))
            else:
                frames = layer(frames)
        if self.layout.patch > 1:
            frames = functional.pixel_shuffle(frames, self.layout.patch)
        decoded: torch.Tensor = frames.clamp(0, 1).unflatten(0, (batch, -1))
        return decoded

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, chunk: int = 1) -> torch.Tensor:
        """Decode the latents of one video.

        Args:
            latents: (channels, F, h, w).
            chunk: see `stream`.

        Returns:
            (frames, 3, H, W), float32 on the CPU, in [0, 1].

        Raises:
            ValueError: see `stream`.
        """
        weight = next(self.parameters())
        if latents.ndim != 4:
            raise ValueError(f"`latents` must be (channels, F, h, w), got shape {tuple(latents.shape)}.")
        _, count, height, width = latents.shape
        edge, first = self.layout.space_scale, 0
        video = torch.empty(self.layout.frame_count(count), COLOURS, height * edge, width * edge)
        for frames in self.stream(latents[None].to(weight.device, weight.dtype), chunk):
            video[first : first + frames.shape[1]] = frames[0]
            first += frames.shape[1]
        return video


def layout_of(shapes: Mapping[str, tuple[int, ...]], what: str) -> TinyDecoderLayout:
    """Return the sizes of a decoder whose weights have these shapes.

    Args:
        shapes: the shapes of the weights by their keys.
        what: the subject of the error's message, such as "`decoder_weights` FILE".

    Raises:
        ModelError: naming the key that is missing or has a shape of no tiny decoder.
    """
    variant = "super" if "decoder.1.conv.0.weight" in shapes else "base"
    widths = WIDTHS[variant]
    with torch.device("meta"):
        layers = _layers(TinyDecoderLayout(latent_channels=1, variant=variant))
    first = next(number for number, layer in enumerate(layers) if isinstance(layer, nn.Conv2d))
    grown = [number for number, layer in enumerate(layers) if isinstance(layer, TimeUpscale)]
    channels = _axis(shapes, f"decoder.{first}.weight", 1, what)
    colours = _axis(shapes, f"decoder.{len(layers) - 1}.weight", 0, what)
    patch = isqrt(colours // COLOURS)
    if colours != COLOURS * patch**2 or patch not in PATCHES:
        allowed = ", ".join(str(COLOURS * edge**2) for edge in PATCHES)
        raise ModelError(
            f"{what} has a decoder.{len(layers) - 1}.weight of {colours} output channels, which must be one of "
            f"{allowed}."
        )
    scales = []
    for number, width in zip(grown, widths[1:] if variant == "super" else widths[:-1], strict=True):
        made = _axis(shapes, f"decoder.{number}.conv.weight", 0, what)
        if made % width or made // width not in TIME_SCALES:
            raise ModelError(
                f"{what} has a decoder.{number}.conv.weight of {made} output channels, which must be one of "
                f"{', '.join(str(width * scale) for scale in TIME_SCALES)}."
            )
        scales.append(made // width)
    return TinyDecoderLayout(
        latent_channels=channels, patch=patch, time_scales=(scales[0], scales[1], scales[2]), variant=variant
    )


def make_tiny_decoder(weights: Mapping[str, torch.Tensor], what: str) -> TinyDecoder:
    """Make a decoder of published weights; those of an encoder, `encoder.`, have no use and may be there.

    Args:
        weights: the weights by their keys.
        what: see `layout_of`.

    Raises:
        ModelError: naming the key that is missing, unknown, of another shape or type, or not finite.
    """
    weights = {key: value for key, value in weights.items() if not key.startswith("encoder.")}
    layout = layout_of({key: tuple(value.shape) for key, value in weights.items()}, what)
    with torch.device("meta"):
        decoder = TinyDecoder(layout)
    expected = {key: tuple(value.shape) for key, value in decoder.state_dict().items()}
    kind = f"a tiny decoder of {layout.latent_channels} latent channels ({layout.variant})"
    for key, shape in expected.items():
        if key not in weights:
            raise ModelError(f"{what} lacks {key}, which must be {shape} in {kind}.")
        if tuple(weights[key].shape) != shape:
            raise ModelError(
                f"{what} has {key} of shape {tuple(weights[key].shape)}, which must be {shape} in {kind}."
            )
    for key, value in weights.items():
        if key not in expected:
            raise ModelError(f"{what} has the key {key}, which {kind} does not have.")
        if value.layout != torch.strided or value.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            dtype = f"{value.dtype}".removeprefix("torch.")
            raise ModelError(f"{what} has {key} in {dtype}, which must be float16, bfloat16 or float32.")
        if not value.isfinite().all():
            raise ModelError(f"{what} has numbers in {key} that are infinite or not numbers.")
    decoder.load_state_dict({key: value.float().contiguous() for key, value in weights.items()}, assign=True)
    return decoder.eval().requires_grad_(False)


def _axis(shapes: Mapping[str, tuple[int, ...]], key: str, axis: int, what: str) -> int:
    """Return a size of a convolution's weights, (output channels, input channels, height, width)."""
    if key not in shapes:
        keys = ", ".join(sorted(shapes)[:3]) or "none"
        raise ModelError(
            f"{what} lacks {key}, so that it is no tiny decoder in TAEHV's format; its first keys: {keys}."
        )
    if len(shapes[key]) != 4:
        raise ModelError(f"{what} has {key} of shape {shapes[key]}, which must have four axes.")
    return shapes[key][axis]


def _convolution(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def _layers(layout: TinyDecoderLayout) -> list[nn.Module]:
    return _base_layers(layout) if layout.variant == "base" else _super_layers(layout)


def _base_layers(layout: TinyDecoderLayout) -> list[nn.Module]:
    """Return the layers of the base variant, in their published order."""
    widths = WIDTHS["base"]
    layers: list[nn.Module] = [Clamp(), _convolution(layout.latent_channels, widths[0]), nn.ReLU()]
    for (width, following), scale in zip(pairwise(widths), layout.time_scales, strict=True):
        layers += [MemoryBlock(width) for _ in range(BLOCKS)]
        layers += [nn.Upsample(scale_factor=2), TimeUpscale(width, scale), _convolution(width, following, bias=False)]
    return [*layers, nn.ReLU(), _convolution(widths[-1], COLOURS * layout.patch**2)]


def _super_layers(layout: TinyDecoderLayout) -> list[nn.Module]:
    """Return the layers of the super variant, in their published order."""
    widths = WIDTHS["super"]
    layers: list[nn.Module] = [nn.Conv2d(layout.latent_channels, widths[0], 1, bias=False)]
    for (width, following), scale in zip(pairwise(widths), layout.time_scales, strict=True):
        layers += [WideMemoryBlock(width) for _ in range(BLOCKS)]
        layers += [_convolution(width, 4 * following), nn.ReLU(), nn.PixelShuffle(2), TimeUpscale(following, scale)]
    return [*layers, _convolution(widths[-1], COLOURS * layout.patch**2)]
