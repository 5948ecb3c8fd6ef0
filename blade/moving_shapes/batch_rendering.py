"""Rendering of many scenes at once, on any device.

The pictures are those of `world.render`, within rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .captions import BACKGROUNDS, SHAPES
from .world import MovingObject, Scene, coverage, draw_background, signed_distance, stripe_shade

MOST_OBJECTS = 2
FIELDS = 11
"""Shown, shape, striped, radius, start (x, y), velocity (x, y) and colour (r, g, b)."""
PLATES = (None, *BACKGROUNDS)
"""Backgrounds in the order in which they are numbered."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SceneBatch:
    """Scenes as tensors."""

    objects: torch.Tensor
    """(B, 2, 11) float32, front first: the `FIELDS` of every object, zeros where a scene has only one."""
    backgrounds: torch.Tensor
    """(B,) int64, indices into `PLATES`."""

    def to(self, device: torch.device) -> SceneBatch:
        """Copy to a device, without waiting for it where that is possible."""
        return SceneBatch(objects=to_device(self.objects, device), backgrounds=to_device(self.backgrounds, device))


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor from the CPU to a device, through pinned memory where the device is a CUDA one."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def pack_scenes(scenes: Sequence[Scene]) -> SceneBatch:
    """Write scenes into tensors on the CPU.

    Raises:
        ValueError: If a scene has more than two objects.
    """
    objects = torch.zeros(len(scenes), MOST_OBJECTS, FIELDS)
    for number, scene in enumerate(scenes):
        if len(scene.objects) > MOST_OBJECTS:
            raise ValueError(f"`scenes` must have at most {MOST_OBJECTS} objects each, got {len(scene.objects)}.")
        for place, drawn in enumerate(scene.objects):
            objects[number, place] = torch.tensor(_fields(drawn))
    return SceneBatch(objects=objects, backgrounds=torch.tensor([PLATES.index(scene.background) for scene in scenes]))


def render_batch(scenes: SceneBatch, *, frames: int, height: int, width: int) -> torch.Tensor:
    """Draw scenes on the device that holds them.

    Args:
        scenes: What to draw.
        frames: Number of frames to draw.
        height: Height of the canvas in pixels.
        width: Width of the canvas in pixels.

    Returns:
        (B, frames, 3, height, width) float32 in [0, 1].
    """
    device = scenes.objects.device
    time = torch.arange(frames, dtype=torch.float32, device=device)[:, None, None]
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5)[None, :, None]
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5)[None, None, :]
    plates = torch.cat([draw_background(name, x, y) for name in PLATES])  # (backgrounds, 1, height, width)
    canvas = plates[scenes.backgrounds][:, None].expand(-1, frames, 3, height, width)
    for drawn in scenes.objects.flip(1).unbind(1):  # the rear one first
        shown, shape, striped, radius, start_x, start_y, velocity_x, velocity_y = (
            values[:, None, None, None] for values in drawn[:, :8].unbind(1)
        )
        dx = x - (start_x + time * velocity_x)  # (B, frames, 1, width)
        dy = y - (start_y + time * velocity_y)  # (B, frames, height, 1)
        distance = signed_distance(SHAPES[0], radius, dx, dy)
        for index, name in enumerate(SHAPES[1:], start=1):
            distance = torch.where(shape == index, signed_distance(name, radius, dx, dy), distance)
        shade = torch.where(striped > 0, stripe_shade(dy), 1.0)
        colour = drawn[:, None, 8:, None, None] * shade[:, :, None]  # (B, frames, 3, height, 1)
        canvas = canvas + (shown * coverage(distance))[:, :, None] * (colour - canvas)
    return canvas.contiguous()


def _fields(drawn: MovingObject) -> tuple[float, ...]:
    return (
        1.0,
        float(SHAPES.index(drawn.shape)),
        float(drawn.striped),
        drawn.radius,
        *drawn.start,
        *drawn.velocity,
        *drawn.colour,
    )
