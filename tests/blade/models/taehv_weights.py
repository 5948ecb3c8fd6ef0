"""Random weights in TAEHV's published layout, and a plain implementation of its published graph.

Source: https://github.com/madebyollin/taehv. Nothing of `blade` is imported, so that it is a second opinion.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def base_weights(channels: int = 16, patch: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights of the base variant, by their published keys, with a key of the encoder."""
    widths = (256, 128, 64, 64)
    draw, weights = _drawing(seed)
    draw("encoder.0", 64, 3 * patch**2, 3)
    draw("decoder.1", widths[0], channels, 3)
    for stage, scale in enumerate((1, 2, 2)):
        first, width = 3 + 6 * stage, widths[stage]
        for block in range(first, first + 3):
            for part, inputs in (("0", 2 * width), ("2", width), ("4", width)):
                draw(f"decoder.{block}.conv.{part}", width, inputs, 3)
        draw(f"decoder.{first + 4}.conv", width * scale, width, 1, bias=False)
        draw(f"decoder.{first + 5}", widths[stage + 1], width, 3, bias=False)
    draw("decoder.22", 3 * patch**2, widths[-1], 3)
    return weights


def super_weights(channels: int = 48, patch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return random weights of the super variant, by their published keys."""
    widths = (512, 256, 128, 64)
    draw, weights = _drawing(seed)
    draw("decoder.0", widths[0], channels, 1, bias=False)
    for stage, scale in enumerate((1, 2, 2)):
        first, width, following = 1 + 7 * stage, widths[stage], widths[stage + 1]
        for block in range(first, first + 3):
            draw(f"decoder.{block}.conv.0", 2 * width, 1, 7, bias=False)
            draw(f"decoder.{block}.conv.1", 4 * width, 2 * width, 1)
            draw(f"decoder.{block}.conv.3", width, 4 * width, 1, bias=False)
        draw(f"decoder.{first + 3}", 4 * following, width, 3)
        draw(f"decoder.{first + 6}.conv", following * scale, following, 1, bias=False)
    draw("decoder.22", 3 * patch**2, widths[-1], 3)
    return weights


def _drawing(seed: int):
    generator, weights = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()

    def draw(name: str, outputs: int, inputs: int, size: int, bias: bool = True) -> None:
        scale = (inputs * size**2) ** -0.5
        weights[f"{name}.weight"] = torch.randn(outputs, inputs, size, size, generator=generator) * scale
        if bias:
            weights[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.1

    return draw, weights


def decode_plainly(weights: dict[str, torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    """Decode (channels, F, h, w) frame by frame through whole lists of frames: (frames, 3, H, W), in float64."""
    weights = {key: value.double() for key, value in weights.items()}
    wide = "decoder.1.conv.0.weight" in weights
    frames = [latents[:, number][None].double() for number in range(latents.shape[1])]

    def convolve(x: torch.Tensor, name: str) -> torch.Tensor:
        kernel = weights[f"{name}.weight"]
        return functional.conv2d(
            x, kernel, weights.get(f"{name}.bias"), padding=kernel.shape[-1] // 2, groups=x.shape[1] // kernel.shape[1]
        )

    def remember(frames: list[torch.Tensor], name: str) -> list[torch.Tensor]:
        made, before = [], torch.zeros_like(frames[0])
        for frame in frames:
            x = torch.cat((frame, before), 1)
            if wide:
                x = convolve(convolve(convolve(x, f"{name}.conv.0"), f"{name}.conv.1").clamp(min=0), f"{name}.conv.3")
                made.append(x + frame)
            else:
                x = convolve(x, f"{name}.conv.0").clamp(min=0)
                x = convolve(convolve(x, f"{name}.conv.2").clamp(min=0), f"{name}.conv.4")
                made.append((x + frame).clamp(min=0))
            before = frame
        return made

    def grow(frames: list[torch.Tensor], name: str) -> list[torch.Tensor]:
        width = weights[f"{name}.conv.weight"].shape[1]
        return [part for frame in frames for part in convolve(frame, f"{name}.conv").split(width, dim=1)]

    if wide:
        frames = [convolve(frame, "decoder.0") for frame in frames]
        for stage in range(3):
            first = 1 + 7 * stage
            for block in range(first, first + 3):
                frames = remember(frames, f"decoder.{block}")
            frames = [
                functional.pixel_shuffle(convolve(frame, f"decoder.{first + 3}").clamp(min=0), 2) for frame in frames
            ]
            frames = grow(frames, f"decoder.{first + 6}")
    else:
        frames = [convolve(3 * torch.tanh(frame / 3), "decoder.1").clamp(min=0) for frame in frames]
        for stage in range(3):
            first = 3 + 6 * stage
            for block in range(first, first + 3):
                frames = remember(frames, f"decoder.{block}")
            frames = [frame.repeat_interleave(2, 2).repeat_interleave(2, 3) for frame in frames]
            frames = [convolve(frame, f"decoder.{first + 5}") for frame in grow(frames, f"decoder.{first + 4}")]
        frames = [frame.clamp(min=0) for frame in frames]
    frames = [convolve(frame, "decoder.22") for frame in frames]
    patch = int((frames[0].shape[1] // 3) ** 0.5)
    frames = [functional.pixel_shuffle(frame, patch) if patch > 1 else frame for frame in frames]
    return torch.cat(frames)[3:].clamp(0, 1)
