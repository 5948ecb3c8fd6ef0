"""Scenes of the moving-shapes world, drawn from captions and rendered with anti-aliasing.

Lengths are in pixels and velocities in pixels a frame. The x axis points right and the y axis points down; pixel
centres lie at half-integers. An object moves at constant velocity and stays wholly inside the canvas.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from .captions import Caption, ObjectCaption

RGB = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.20),
    "blue": (0.20, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.62, 0.20, 0.82),
    "white": (0.95, 0.95, 0.95),
}
VELOCITY = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
"""Unit vector (x, y) of each direction."""
RADIUS = {"small": (7.0, 9.5), "large": (13.0, 16.0), None: (7.0, 16.0)}
"""Range of the radius by named size: a ball's own; other shapes are scaled to look as large."""
SPEED = {"slowly": (0.4, 0.7), "fast": (1.25, 1.7), None: (0.4, 1.7)}
"""Range of the speed by named speed, in pixels a frame."""

BACKGROUND_LEVEL = 0.08
PATTERN_LEVEL = 0.26
PATTERN_CELL = 12.0
"""Edge of a background's cells and width of its stripes."""
STRIPE_PERIOD = 8.0
STRIPE_SHADE = 0.55
"""A striped object's dark bands have its colour times this."""

SQUARE_HALF_EDGE = math.sqrt(math.pi) / 2
TRIANGLE_CIRCUMRADIUS = 1.4
MARGIN = 1.0
"""Least distance between an object and the border of the canvas."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovingObject:
    """One object of a scene."""

    shape: str
    colour: tuple[float, float, float]
    """RGB in [0, 1]."""
    striped: bool
    radius: float
    start: tuple[float, float]
    """Centre (x, y) in the first frame."""
    velocity: tuple[float, float]
    """(x, y), pixels a frame."""

    def centre(self, frame: float) -> tuple[float, float]:
        """Centre (x, y) in a frame, counted from 0."""
        return (self.start[0] + frame * self.velocity[0], self.start[1] + frame * self.velocity[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Scene that `render` draws."""

    objects: tuple[MovingObject, ...]
    """Front first."""
    background: str | None = None
    """One of `captions.BACKGROUNDS`, or None for plain dark."""


def extents(shape: str, radius: float) -> tuple[float, float, float, float]:
    """Reach of a shape from its centre to the left, right, top and bottom."""
    if shape == "ball":
        return (radius, radius, radius, radius)
    if shape == "square":
        half = SQUARE_HALF_EDGE * radius
        return (half, half, half, half)
    circumradius = TRIANGLE_CIRCUMRADIUS * radius
    half_edge = circumradius * math.sqrt(3) / 2
    return (half_edge, half_edge, circumradius, circumradius / 2)


def sample_scene(caption: Caption, rng: np.random.Generator, *, frames: int, height: int, width: int) -> Scene:
    """Draw what a caption leaves open: start, and size and speed where it names none.

    Two objects start and end apart, so that both can be seen, and may hide part of each other on the way.

    Args:
        caption: What the video shows.
        rng: Source of randomness.
        frames: Length of the video.
        height: Canvas height in pixels.
        width: Canvas width in pixels.

    Raises:
        ValueError: If an object at its slowest and smallest does not fit the canvas.
    """
    for _ in range(100):
        objects = tuple(_sample_object(described, rng, frames, height, width) for described in caption.objects)
        if len(objects) == 1 or both_visible(objects[0], objects[1], frames):
            break
    return Scene(objects=objects, background=caption.background)


def render(
    scene: Scene,
    *,
    frames: int,
    height: int,
    width: int,
    first_frame: int = 0,
    top: int = 0,
    left: int = 0,
) -> torch.Tensor:
    """Draw a scene, or a window of it in time and space.

    Args:
        scene: What to draw.
        frames: Number of frames to draw.
        height: Height of what is drawn, in pixels.
        width: Width of what is drawn, in pixels.
        first_frame: First frame of the window.
        top: Upper edge of the window on the canvas.
        left: Left edge of the window on the canvas.

    Returns:
        (frames, 3, height, width) float32 in [0, 1].
    """
    time = torch.arange(first_frame, first_frame + frames, dtype=torch.float32)[:, None, None]
    y = (torch.arange(top, top + height, dtype=torch.float32) + 0.5)[None, :, None]
    x = (torch.arange(left, left + width, dtype=torch.float32) + 0.5)[None, None, :]
    canvas = draw_background(scene.background, x, y).expand(frames, 3, height, width)
    for drawn in reversed(scene.objects):
        dx = x - (drawn.start[0] + time * drawn.velocity[0])
        dy = y - (drawn.start[1] + time * drawn.velocity[1])
        colour = torch.tensor(drawn.colour)[None, :, None, None]
        if drawn.striped:
            colour = colour * stripe_shade(dy)[:, None]
        canvas = canvas + coverage(signed_distance(drawn.shape, drawn.radius, dx, dy))[:, None] * (colour - canvas)
    return canvas.contiguous()


def coverage(distance: torch.Tensor, *, edge_width: float = 1.0) -> torch.Tensor:
    """Return the share of each pixel that a shape covers, in [0, 1].

    Args:
        distance: From pixel centres to the outline, in pixels, negative inside.
        edge_width: Over how many pixels coverage falls from 1 to 0. The world draws 1; a fit may start softer.
    """
    return (0.5 - distance / edge_width).clamp(0, 1)


def object_distance(drawn: MovingObject, *, frames: int, height: int, width: int) -> torch.Tensor:
    """Distance in pixels of every pixel centre from an object's outline, negative inside: (frames, height, width)."""
    time = torch.arange(frames, dtype=torch.float32)[:, None, None]
    dx = (torch.arange(width) + 0.5)[None, None, :] - (drawn.start[0] + time * drawn.velocity[0])
    dy = (torch.arange(height) + 0.5)[None, :, None] - (drawn.start[1] + time * drawn.velocity[1])
    return signed_distance(drawn.shape, drawn.radius, dx, dy)


def stripe_shade(dy: torch.Tensor) -> torch.Tensor:
    """Return the factor of a striped object's colour, for offsets from its centre: 1 or `STRIPE_SHADE`."""
    return 1 - (1 - STRIPE_SHADE) * _bands(dy, STRIPE_PERIOD)


def draw_background(name: str | None, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Brightness of a background.

    Args:
        name: One of `captions.BACKGROUNDS`, or None for plain dark.
        x: (1, 1, width) pixel centres.
        y: (1, height, 1) pixel centres.

    Returns:
        (1, 1, height, width).
    """
    plain = torch.full((1, 1, y.shape[1], x.shape[2]), BACKGROUND_LEVEL, device=x.device)
    if name is None:
        return plain
    columns = _bands(x, 2 * PATTERN_CELL)
    if name == "checkered":
        rows = _bands(y, 2 * PATTERN_CELL)
        columns = columns + rows - 2 * columns * rows
    return plain + (PATTERN_LEVEL - BACKGROUND_LEVEL) * columns[:, None]


def signed_distance(shape: str, radius: float | torch.Tensor, dx: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """Distance in pixels from a shape's outline, negative inside, for offsets (dx, dy) from its centre."""
    if shape == "ball":
        return torch.hypot(dx, dy) - radius
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - SQUARE_HALF_EDGE * radius
    inradius = TRIANGLE_CIRCUMRADIUS * radius / 2
    slanted = (math.sqrt(3) / 2) * dx.abs() - 0.5 * dy
    return torch.maximum(slanted, dy) - inradius


def _bands(offset: torch.Tensor, period: float) -> torch.Tensor:
    """1 in the dark half of each period, 0 in the other, with edges one pixel wide; a bright band lies at 0."""
    distance = (torch.remainder(offset + period / 4, period) - period / 2).abs() - period / 4
    inside_bright = torch.remainder(offset + period / 4, period) < period / 2
    edge = period / 4 - distance.abs()
    return torch.where(inside_bright, 0.5 - edge, 0.5 + edge).clamp(0, 1)


def _sample_object(
    described: ObjectCaption, rng: np.random.Generator, frames: int, height: int, width: int
) -> MovingObject:
    radius = rng.uniform(*RADIUS[described.size])
    slowest, fastest = SPEED[described.speed]
    unit = VELOCITY[described.direction]
    left, right, top, bottom = extents(described.shape, radius)
    room_x = width - left - right - 2 * MARGIN
    room_y = height - top - bottom - 2 * MARGIN
    room_along = room_x if unit[0] else room_y
    fastest = min(fastest, room_along / max(frames - 1, 1))
    if min(room_x, room_y) < 0 or fastest < slowest:
        raise ValueError(
            f"`height` and `width` must leave room for {described} over {frames} frames, got {height}x{width}."
        )
    speed = rng.uniform(slowest, fastest)
    velocity = (speed * unit[0], speed * unit[1])
    travel = (velocity[0] * (frames - 1), velocity[1] * (frames - 1))
    start = (
        rng.uniform(MARGIN + left + max(-travel[0], 0), width - MARGIN - right - max(travel[0], 0)),
        rng.uniform(MARGIN + top + max(-travel[1], 0), height - MARGIN - bottom - max(travel[1], 0)),
    )
    return MovingObject(
        shape=described.shape,
        colour=RGB[described.colour],
        striped=described.fill == "striped",
        radius=radius,
        start=start,
        velocity=velocity,
    )


def both_visible(front: MovingObject, rear: MovingObject, frames: int) -> bool:
    """Return whether two objects start and end apart, and the front one never hides most of the rear one."""
    reach = front.radius + rear.radius
    distances = [math.dist(front.centre(frame), rear.centre(frame)) for frame in range(frames)]
    return min(distances[0], distances[-1]) >= 1.1 * reach and min(distances) >= 0.4 * reach
