"""Pieces of a video that no described object explains: duplicates, strangers and leftovers.

A frame's pixels that stand out from the background are split into connected pieces. Each described object explains the
piece at its place on its straight track, as far as its own area goes, and what lies wholly within its outline, such as
the parts that another object has cut it into.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from . import world
from .segmentation import Track, connect

VISIBLE = 0.4
"""Amplitude above which a pixel stands out: below a dark stripe's, and twice that of a background's brighter cells."""
CELL = 2
"""Edge in pixels of the cells of which pieces are made."""
LEAST_PIECE = 24.0
"""Area in pixels from which an unexplained piece counts: about a sixth of the smallest object of the world."""
GROWTH = 1.4
"""Factor by which a piece may be larger than the objects that it shows, which blur and deform."""
ROOM = 3.0
"""Pixels that a piece's centre may lie outside an object's outline."""
REACHES = {"ball": 1.0, "square": world.SQUARE_HALF_EDGE * math.sqrt(2), "triangle": world.TRIANGLE_CIRCUMRADIUS}
"""Distance of a shape's furthest point from its centre, in radii."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explained:
    """A described object, as far as it explains what a video shows."""

    track: Track
    """The object of the video."""
    reach: float
    """Distance in pixels of its furthest point from its centre."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Piece:
    """Connected cells of one frame."""

    cells: torch.Tensor
    """(cells, 2) centres (x, y) in pixels."""

    @property
    def area(self) -> float:
        """Area in pixels."""
        return float(len(self.cells) * CELL**2)

    def distance(self, place: torch.Tensor) -> float:
        """Distance in pixels of the nearest cell from a place (x, y)."""
        return float((self.cells - place).norm(dim=1).min())


def unexplained_area(amplitude: torch.Tensor, objects: Sequence[Explained]) -> torch.Tensor:
    """Measure the largest piece of every frame that no object explains.

    Args:
        amplitude: (frames, height, width), see `segmentation`.
        objects: what explains pieces.

    Returns:
        (frames,) pixels; 0 where the largest is smaller than `LEAST_PIECE`.
    """
    areas = [
        max(_unexplained(pieces, [(it.track.line[frame], it) for it in objects]), default=0.0)
        for frame, pieces in enumerate(_pieces(amplitude))
    ]
    found = torch.tensor(areas)
    return torch.where(found >= LEAST_PIECE, found, 0.0)


def _pieces(amplitude: torch.Tensor) -> list[list[_Piece]]:
    """The connected pieces of every frame."""
    cells = F.avg_pool2d((amplitude > VISIBLE).float()[:, None], CELL, ceil_mode=True)[:, 0] >= 0.5
    labels = connect(cells, rows=1, columns=1)
    frames = []
    for frame in labels:
        rows, columns = frame.nonzero(as_tuple=True)
        places = (torch.stack((columns, rows), dim=1) + 0.5) * CELL
        numbers = frame[rows, columns]
        frames.append([_Piece(cells=places[numbers == number]) for number in numbers.unique()])
    return frames


def _unexplained(pieces: Sequence[_Piece], objects: Sequence[tuple[torch.Tensor, Explained]]) -> list[float]:
    """The area of each of a frame's pieces that the objects leave unexplained.

    Args:
        pieces: the pieces.
        objects: the place (x, y) of each object in this frame, and the object.
    """
    shown = [0.0] * len(pieces)  # area of the objects that each piece shows
    for place, explained in objects:
        distances = [piece.distance(place) for piece in pieces]
        nearest = min(distances, default=math.inf)
        if nearest < explained.reach:
            shown[distances.index(nearest)] += explained.track.full_area
    areas = []
    for piece, area in zip(pieces, shown):
        centre = piece.cells.mean(0)
        if area:
            areas.append(piece.area - GROWTH * area)
        elif any(float((centre - place).norm()) < explained.reach + ROOM for place, explained in objects):
            areas.append(0.0)
        else:
            areas.append(piece.area)
    return areas
