"""Scores of a video against its caption, from pixels alone and attribute by attribute.

This is a measure, not a training signal: nothing may be trained on it, and no checkpoint chosen by it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch

from . import world
from .captions import SHAPES, Caption, ObjectCaption, parse_caption
from .counting import REACHES, Explained, unexplained_area
from .segmentation import CONTACT, REACH, Segmentation, Track, TrackPart, dilate, segment, smooth

BASICS = ("colour", "shape", "direction")
"""The attributes that every caption names for every object."""

COLOUR_TOLERANCE = 0.25
"""Distance in RGB from the palette's colour; two palette colours are at least 0.45 apart."""
LEAST_OVERLAP = 0.75
"""Of an object with the shape it is nearest to. Halves of shapes stay below 0.70, blurred whole ones above 0.79."""
BLURS = (1, 2, 4, 8)
"""Most times that a silhouette may be blurred, by sqrt(1/2) pixels each time, to look like the object."""
LEAST_SPEED = world.SPEED[None][0] / 2
"""Pixels a frame below which an object counts as static: half the world's slowest."""
LEAST_PRESENCE = 0.9
"""Share of frames in which an object must be seen, or be hidden by another one."""
SIZE_THRESHOLD = (world.RADIUS["small"][1] + world.RADIUS["large"][0]) / 2
SPEED_THRESHOLD = (world.SPEED["slowly"][1] + world.SPEED["fast"][0]) / 2
LEAST_PART_OVERLAP = 0.7
"""Of an object with its shape in a part of the video, which is less well seen than all of it."""
PART_MARGIN = 0.05
"""Overlap by which another shape must be nearer in a part of the video for the shape to count as changed."""
LEAST_PART_SPEED = LEAST_SPEED / 2
"""Pixels a frame, along its direction, below which an object counts as at rest in a part of the video."""
MOST_EXTRA = 0.1
"""Share of frames in which there may be a piece that no described object explains."""
MOST_TRACKS = 4
"""Number of the largest objects in a video that are considered."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectScore:
    """An object's named attributes, each right or wrong in the video."""

    attributes: dict[str, bool]
    """`colour`, `shape` and `direction`, and those of `size`, `fill` and `speed` that the caption names. All are False
    where the video shows no such object, or one that is missing in more than a tenth of the frames."""

    @property
    def basics(self) -> bool:
        """True if colour, shape and direction are all right."""
        return all(self.attributes[name] for name in BASICS)

    @property
    def all_attributes(self) -> bool:
        """True if everything that the caption says of the object is right."""
        return all(self.attributes.values())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A caption's attributes, each right or wrong in a video."""

    objects: tuple[ObjectScore, ...]
    """In the caption's order."""
    count: bool
    """True if there are as many objects as described, and nothing else: no stranger, duplicate or leftover in more
    than `MOST_EXTRA` of the frames; see `counting`."""
    background: bool | None = None
    """True if the named background is there; None where the caption names none."""

    @property
    def basics(self) -> bool:
        """True if every object has its colour, shape and direction, and nothing else is there."""
        return self.count and all(scored.basics for scored in self.objects)

    @property
    def all_attributes(self) -> bool:
        """True if the video shows everything that the caption says."""
        return self.count and self.background is not False and all(scored.all_attributes for scored in self.objects)

    @property
    def fraction(self) -> float:
        """Share of the named attributes that are right."""
        marks = [mark for scored in self.objects for mark in scored.attributes.values()]
        marks += [self.count] if self.background is None else [self.count, self.background]
        return sum(marks) / len(marks)


def score(video: torch.Tensor, prompt: str) -> Score:
    """Say which of the attributes that a caption names a video shows.

    Each described object is compared with one object of the video: that of its colour, and where there is none, the
    one that has most else in common with it. Its attributes are then judged one by one.

    Args:
        video: (frames, 3, height, width) in [0, 1].
        prompt: A caption of the grammar; see `captions`.

    Raises:
        ValueError: If `video` does not have that shape or is not finite, or `prompt` is no sentence of the grammar.
    """
    caption = parse_caption(prompt)
    return score_segmentation(segment(video), caption)


def score_segmentation(seen: Segmentation, caption: Caption) -> Score:
    """`score` for a video that is already segmented."""
    tracks = seen.tracks[:MOST_TRACKS]
    views = [_look_at(track) for track in tracks]
    matched = _match(views, caption)
    shown = [number for number in matched if number is not None]
    for number in shown:  # only what the caption asks for may hide an object
        others = [tracks[other].mask for other in shown if other != number]
        views[number] = dataclasses.replace(views[number], present=_present_throughout(tracks[number], others))
    return Score(
        objects=tuple(
            _judge(None if n is None else views[n], described) for n, described in zip(matched, caption.objects)
        ),
        count=None not in matched
        and _nothing_else(seen, [_explained(tracks[number], views[number]) for number in shown]),
        background=None if caption.background is None else _background_shown(seen, caption.background),
    )


def unexplained_share(video: torch.Tensor, prompt: str) -> float:
    """Measure what a video shows beside the objects that its caption describes.

    Args:
        video: (frames, 3, height, width) in [0, 1].
        prompt: a caption of the grammar; see `captions`.

    Returns:
        Mean over frames of the area of the largest piece that no object explains, in areas of the largest object; see
        `counting`. 0 where the video shows none of the objects.
    """
    seen = segment(video)
    tracks = [track for track in match_objects(seen, parse_caption(prompt)) if track is not None]
    if not tracks:
        return 0.0
    extra = unexplained_area(seen.amplitude, [_explained(track, _look_at(track)) for track in tracks])
    return float(extra.mean()) / max(track.full_area for track in tracks)


def match_objects(seen: Segmentation, caption: Caption) -> tuple[Track | None, ...]:
    """The object of a video that each described one is compared with, or None where the video has too few."""
    matched = _match([_look_at(track) for track in seen.tracks[:MOST_TRACKS]], caption)
    return tuple(None if n is None else seen.tracks[n] for n in matched)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeFit:
    """Fit of a shape to an object's appearance."""

    shape: str
    striped: bool
    overlap: float
    """Sum of the pixelwise smaller over sum of the pixelwise larger of the two: 1 is perfect."""
    radius: float
    """In pixels, as `world.MovingObject` counts it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _View:
    """Appearance of one object of a video."""

    present: bool
    colour: str | None
    shape: str | None
    size: str
    striped: bool
    velocity: tuple[float, float]
    part_velocities: tuple[tuple[float, float], ...]
    steady: bool
    reach: float


def _look_at(track: Track) -> _View:
    best = compare_shapes(track)[0]
    keeps_shape = best.overlap >= LEAST_OVERLAP and all(_shows_shape(part, track, best) for part in track.parts)
    return _View(
        present=bool((track.area > 0).any()),
        colour=nearest_colour(track.colour),
        shape=best.shape if keeps_shape else None,
        size="small" if best.radius < SIZE_THRESHOLD else "large",
        striped=best.striped or track.striped,
        velocity=track.velocity,
        part_velocities=tuple(part.velocity for part in track.parts),
        steady=_steady(track, tolerance=max(4.0, best.radius / 2)),
        reach=REACHES[best.shape] * best.radius,
    )


def _explained(track: Track, view: _View) -> Explained:
    return Explained(track=track, reach=view.reach)


def _nothing_else(seen: Segmentation, objects: Sequence[Explained]) -> bool:
    extra = unexplained_area(seen.amplitude, objects) > 0
    return float(extra.float().mean()) <= MOST_EXTRA


def _shows_shape(part: TrackPart, track: Track, best: ShapeFit) -> bool:
    """Return whether no other shape is clearly nearer to the object in a part of the video."""
    fits = {shape: _fit_shape(part.appearance, track.full_area, shape, best.striped).overlap for shape in SHAPES}
    return fits[best.shape] >= max(LEAST_PART_OVERLAP, max(fits.values()) - PART_MARGIN)


def _match(views: list[_View], caption: Caption) -> tuple[int | None, ...]:
    """For each described object the index of a view: most colours right first, then most attributes."""

    def agreement(choice: tuple[int | None, ...]) -> tuple[int, int, int]:
        chosen = [(views[n], described) for n, described in zip(choice, caption.objects) if n is not None]
        marks = [_judge(view, described).attributes for view, described in chosen]
        return (sum(mark["colour"] for mark in marks), sum(sum(mark.values()) for mark in marks), len(marks))

    wanted = len(caption.objects)
    return max(itertools.permutations([*range(len(views)), *[None] * wanted], wanted), key=agreement)


def _background_shown(seen: Segmentation, name: str) -> bool:
    return seen.background_matches and seen.background == name


def _judge(view: _View | None, described: ObjectCaption) -> ObjectScore:
    named = [name for name, value in dataclasses.asdict(described).items() if value is not None]
    if view is None or not view.present:
        return ObjectScore(attributes=dict.fromkeys(named, False))
    verdicts = {
        "colour": view.colour == described.colour,
        "shape": view.shape == described.shape,
        "direction": view.steady
        and _moves(view.velocity, described.direction)
        and all(_keeps_moving(velocity, described.direction) for velocity in view.part_velocities),
        "size": view.size == described.size,
        "fill": view.striped == (described.fill == "striped"),
        "speed": ("slowly" if math.hypot(*view.velocity) < SPEED_THRESHOLD else "fast") == described.speed,
    }
    return ObjectScore(attributes={name: verdicts[name] for name in named})


def nearest_colour(rgb: tuple[float, float, float]) -> str | None:
    """The palette's colour nearest to an RGB triple; None if none is near."""
    name = min(world.RGB, key=lambda name: math.dist(world.RGB[name], rgb))
    return name if math.dist(world.RGB[name], rgb) <= COLOUR_TOLERANCE else None


def compare_shapes(track: Track) -> list[ShapeFit]:
    """Fit each shape, solid and striped, to what the object looks like on average; the best comes first."""
    fits = [
        _fit_shape(track.appearance, track.full_area, shape, striped) for shape in SHAPES for striped in (False, True)
    ]
    return sorted(fits, key=lambda fit: -fit.overlap)


def _fit_shape(whole: torch.Tensor, area: float, shape: str, striped: bool) -> ShapeFit:
    """Search radius, place and blur for the greatest overlap with an appearance, from coarse to fine."""
    radius, x, y = radius_of_area(shape, area), 0.0, 0.0
    reach = min(int(1.6 * world.TRIANGLE_CIRCUMRADIUS * radius) + 2, REACH)
    pixels = torch.arange(-reach, reach + 1).float()
    appearance = whole[REACH - reach : REACH + reach + 1, REACH - reach : REACH + reach + 1]

    def overlaps(candidates: Sequence[torch.Tensor], blurs: int) -> torch.Tensor:
        radius, x, y = (values.view(-1, 1, 1) for values in candidates)
        dx, dy = pixels - x, pixels[:, None] - y
        drawn = world.coverage(world.signed_distance(shape, radius, dx, dy))
        if striped:
            drawn = drawn * world.stripe_shade(dy)
        for _ in range(blurs):
            drawn = smooth(drawn[:, None])[:, 0]
        smaller, larger = torch.minimum(drawn, appearance), torch.maximum(drawn, appearance)
        return smaller.sum((1, 2)) / larger.sum((1, 2))

    few, many = torch.arange(-1.0, 2.0), torch.arange(-2.0, 3.0)
    for scale in (1.0, 0.5, 0.25):
        axes = (radius * (1 + 0.08 * scale * many), x + scale * few, y + scale * many)
        grid = [axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")]
        best = int(overlaps(grid, blurs=2).argmax())
        radius, x, y = (float(axis[best]) for axis in grid)
    found = [torch.tensor([value]) for value in (radius, x, y)]
    overlap = max(float(overlaps(found, blurs=count)) for count in BLURS)
    return ShapeFit(shape=shape, striped=striped, overlap=overlap, radius=radius)


def radius_of_area(shape: str, area: float) -> float:
    """The radius, as `world.MovingObject` counts it, at which a shape covers so many pixels."""
    if shape == "triangle":
        return math.sqrt(area / (0.75 * math.sqrt(3))) / world.TRIANGLE_CIRCUMRADIUS
    return math.sqrt(area / math.pi)


def _present_throughout(track: Track, others: Sequence[torch.Tensor]) -> bool:
    """Return whether at least half of what no other object hides is there, in nearly all frames.

    Args:
        track: the object.
        others: (frames, height, width) bool, the pixels of each object that may hide it.
    """
    dx, dy = _offsets(track.line, track.mask)
    expected = math.pi * (dx.square() + dy.square()) < track.full_area
    for mask in others:
        expected &= ~dilate(mask & ~track.mask, CONTACT)
    present = track.area >= 0.5 * expected.sum((1, 2))
    return float(present.float().mean()) >= LEAST_PRESENCE


def _steady(track: Track, tolerance: float) -> bool:
    """Return whether at least four fifths of the frames lie near the straight track."""
    frames = track.free if bool(track.free.any()) else track.area > 0
    deviation = (track.centre - track.line)[frames].norm(dim=1)
    return float((deviation <= tolerance).float().mean()) >= 0.8


def _moves(velocity: tuple[float, float], direction: str) -> bool:
    """Return whether a velocity is fast enough to be seen and within 27 degrees of a direction."""
    unit = world.VELOCITY[direction]
    along = velocity[0] * unit[0] + velocity[1] * unit[1]
    across = velocity[0] * unit[1] - velocity[1] * unit[0]
    return along >= LEAST_SPEED and abs(across) <= along / 2


def _keeps_moving(velocity: tuple[float, float], direction: str) -> bool:
    """Return whether a part's velocity is more along a direction than across, and no rest."""
    unit = world.VELOCITY[direction]
    along = velocity[0] * unit[0] + velocity[1] * unit[1]
    across = velocity[0] * unit[1] - velocity[1] * unit[0]
    return along >= LEAST_PART_SPEED and abs(across) <= max(along, LEAST_SPEED)


def _offsets(centre: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets (frames, 1, width) to the right and (frames, height, 1) downwards of pixel centres from a centre."""
    y = (torch.arange(mask.shape[1]) + 0.5)[None, :, None]
    x = (torch.arange(mask.shape[2]) + 0.5)[None, None, :]
    return x - centre[:, 0, None, None], y - centre[:, 1, None, None]
