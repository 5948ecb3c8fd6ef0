"""Finding the moving objects of a video by colour: what `scoring` and `realism` start from.

Every background of the world is grey and every object has a palette colour or white, so that hue alone tells most
objects from the background, whatever the background turned out to be. A pixel's *amplitude* is how far it has gone
from grey to a palette colour: 1 in a bright area, 0.55 in a dark stripe, 0 on the background. White is the one colour
without hue: its amplitude is how far the brightness has gone from that of the background to white.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from . import world
from .captions import BACKGROUNDS

COARSE = 4
"""Edge of the cells, in pixels, on which connected objects are found."""
CONTACT = 2
"""Objects nearer than this many pixels to each other may hide or blend with each other."""
LEAST_AREA = 30.0
"""Visible area in pixels, averaged over all frames, below which something is not an object."""
REACH = 28
"""Pixels to each side of its centre that an object's appearance covers; the largest triangle reaches 22.4."""
BAND = int(world.STRIPE_PERIOD / 2)
"""Width of a striped object's dark stripes in pixels."""
MOST_CAST = 0.06
"""Tint of the whole video, in each channel, that is taken away before colours are told apart."""
PARTS = 3
"""Parts of a video in each of which an object must be right."""
LEAST_PART_FRAMES = 4
"""Frames of a part in which nothing hides an object, fewer than which say nothing of it."""
WHITE_CHROMA = 0.25
"""Distance from grey above which a pixel is not white."""
BACKGROUND_TOLERANCE = (world.PATTERN_LEVEL - world.BACKGROUND_LEVEL) / 2
"""A pixel this far off a background is nearer to the other level of its pattern."""

HUES = tuple(name for name in world.RGB if name != "white")
LABELS = (*HUES, "white")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackPart:
    """An object during a part of the video in which nothing hides it for long."""

    appearance: torch.Tensor
    """See `Track`."""
    velocity: tuple[float, float]
    """(x, y) in pixels a frame."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Track:
    """One object seen in a video."""

    label: str
    """The palette colour whose hue is nearest."""
    colour: tuple[float, float, float]
    """RGB of its bright area."""
    striped: bool
    mask: torch.Tensor
    """(frames, height, width) bool: its visible pixels, dark stripes included."""
    near_other: torch.Tensor
    """(frames, height, width) bool: pixels at which another object may hide this one."""
    appearance: torch.Tensor
    """(2 * REACH + 1, 2 * REACH + 1): its amplitude around its centre, 1 where it is brightest, averaged over frames
    where nothing hides that pixel."""
    area: torch.Tensor
    """(frames,) visible pixels."""
    centre: torch.Tensor
    """(frames, 2) centroid (x, y) of the visible pixels; NaN where there are none."""
    free: torch.Tensor
    """(frames,) bool: seen, and away from other objects."""
    start: tuple[float, float]
    """Centre (x, y) in the first frame of the robust straight track."""
    velocity: tuple[float, float]
    """(x, y) in pixels a frame of the robust straight track."""
    full_area: float
    """Area in pixels where nothing hides the object: the median over free frames, else the largest seen."""
    parts: tuple[TrackPart, ...]
    """Of each of `PARTS` equal parts of the video: those in which nothing hides the object for a few frames."""

    @property
    def line(self) -> torch.Tensor:
        """(frames, 2) centres (x, y) on the straight track."""
        time = torch.arange(len(self.area), dtype=torch.float32)[:, None]
        return torch.tensor(self.start) + time * torch.tensor(self.velocity)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Objects and background of a video."""

    background: str | None
    """The nearest of the world's backgrounds; None is plain dark."""
    background_matches: bool
    """True if nine tenths of the pixels away from objects look like `background`."""
    amplitude: torch.Tensor
    """(frames, height, width), see above."""
    tracks: tuple[Track, ...]
    """Largest first."""


def check_video(video: torch.Tensor) -> torch.Tensor:
    """The video as float32 on the CPU, clamped to [0, 1].

    Raises:
        ValueError: If it is not (frames, 3, height, width) with at least 2 frames, or not finite.
    """
    if video.ndim != 4 or video.shape[1] != 3 or video.shape[0] < 2:
        raise ValueError(f"`video` must be (frames >= 2, 3, height, width), got {tuple(video.shape)}.")
    video = video.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(video).all()):
        raise ValueError("`video` must be finite, got NaN or infinity.")
    return video.clamp(0, 1)


def segment(video: torch.Tensor) -> Segmentation:
    """Find the background and the objects of a video.

    Args:
        video: (frames, 3, height, width) in [0, 1].

    Raises:
        ValueError: If `video` does not have that shape, or is not finite.
    """
    smoothed = smooth(check_video(video))
    background, canvas = _nearest_background(smoothed.mean(1))
    smoothed = smoothed - _cast(smoothed, canvas)
    off = (smoothed.mean(1) - canvas).abs()
    amplitude, label = _amplitude_and_label(smoothed, canvas)
    seen = [
        outline
        for index, name in enumerate(LABELS)
        for cells in _connected_cells((amplitude > 0.5) & (label == index))
        if (outline := _outline(name, smoothed, amplitude, label == index, cells, canvas if name == "white" else None))
    ]
    seen.sort(key=lambda outline: -int(outline.mask.sum()))
    masks = [outline.mask for outline in seen]
    everything = torch.stack(masks).any(0) if masks else torch.zeros_like(off, dtype=torch.bool)
    away = ~dilate(everything, 2 * CONTACT)
    return Segmentation(
        background=background,
        background_matches=bool((off[away] < BACKGROUND_TOLERANCE).float().mean() > 0.9),
        amplitude=amplitude,
        tracks=tuple(_track(outline, dilate(everything & ~outline.mask, CONTACT)) for outline in seen),
    )


def smooth(video: torch.Tensor) -> torch.Tensor:
    """Binomial 3x3 blur, which takes noise to three eighths and hardly moves an edge."""
    padded = F.pad(video, (1, 1, 1, 1), mode="replicate")
    rows = (padded[:, :, :-2] + padded[:, :, 2:]) / 4 + padded[:, :, 1:-1] / 2
    return (rows[..., :-2] + rows[..., 2:]) / 4 + rows[..., 1:-1] / 2


def _nearest_background(brightness: torch.Tensor) -> tuple[str | None, torch.Tensor]:
    """The best background's name, and its brightness (1, height, width)."""
    y, x = (torch.arange(size) + 0.5 for size in brightness.shape[1:])
    candidates = []
    for name in (None, *BACKGROUNDS):
        canvas = world.draw_background(name, x[None, None, :], y[None, :, None])[:, 0]
        off = (brightness - canvas).abs().clamp(max=BACKGROUND_TOLERANCE).mean()
        candidates.append((float(off), name, canvas))
    _, name, canvas = min(candidates, key=lambda candidate: candidate[0])
    return name, canvas


def _cast(smoothed: torch.Tensor, canvas: torch.Tensor) -> torch.Tensor:
    """The tint (3, 1, 1) of the whole video, as most of the background has it."""
    off = (smoothed - canvas[:, None])[::3, :, ::2, ::2].transpose(0, 1).flatten(1)
    return off.median(1).values.clamp(-MOST_CAST, MOST_CAST)[:, None, None]


def _amplitude_and_label(smoothed: torch.Tensor, canvas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each pixel's amplitude of its best colour, and that colour's index in `LABELS`; both (frames, height, width)."""
    brightness = smoothed.mean(1)
    chroma = smoothed - brightness[:, None]
    palette = torch.tensor([world.RGB[name] for name in HUES])
    palette = palette - palette.mean(1, keepdim=True)
    length = palette.norm(dim=1)
    projections = F.conv2d(chroma, (palette / length[:, None])[:, :, None, None]).unbind(1)
    best, hue = projections[0], torch.zeros_like(brightness, dtype=torch.int64)
    for index, projection in enumerate(projections):
        hue = torch.where(projection > best, index, hue)
        best = torch.maximum(projection, best)
    amplitude = best / length[hue]
    white = (brightness - canvas) / (world.RGB["white"][0] - canvas)
    white = torch.where(chroma.square().sum(1) < WHITE_CHROMA**2, white, 0)
    is_white = white > amplitude
    return torch.where(is_white, white, amplitude), torch.where(is_white, len(HUES), hue)


def _connected_cells(core: torch.Tensor) -> list[torch.Tensor]:
    """Split a colour's bright pixels into objects, connected in space and time.

    Cells of `COARSE` pixels are connected to their neighbours, and upwards and downwards over a dark stripe; parts
    that are never seen together are one object, which something hid in between.

    Args:
        core: (frames, height, width) bool.

    Returns:
        For each object the cells (frames, rows, columns) that it touches.
    """
    cells = F.avg_pool2d(core.float(), COARSE, ceil_mode=True) > 0.15
    labels = connect(cells, frames=1, rows=2, columns=1)
    parts = [labels == value for value in labels.unique() if value > 0]
    parts.sort(key=lambda part: -int(part.sum()))
    objects: list[torch.Tensor] = []
    for part in parts:
        apart = [n for n, other in enumerate(objects) if not bool((part.any((1, 2)) & other.any((1, 2))).any())]
        if apart:
            objects[apart[0]] = objects[apart[0]] | part
        else:
            objects.append(part)
    return objects


def connect(cells: torch.Tensor, *, frames: int = 0, rows: int = 0, columns: int = 0) -> torch.Tensor:
    """Number the connected parts of cells.

    Args:
        cells: (frames, rows, columns) bool.
        frames: distance in frames at which cells are connected.
        rows: distance in rows.
        columns: distance in columns.

    Returns:
        (frames, rows, columns) float32, a number for each part, 0 where there is no cell.
    """
    labels = torch.arange(1, cells.numel() + 1, dtype=torch.float32).view(cells.shape) * cells
    while True:
        grown = _spread(labels, frames=frames, rows=rows, columns=columns) * cells
        if torch.equal(grown, labels):
            return labels
        labels = grown


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Outline:
    """First guess of an object, before it is followed; see `Track`."""

    label: str
    colour: tuple[float, float, float]
    striped: bool
    mask: torch.Tensor
    amplitude: torch.Tensor
    """(frames, height, width): 1 where it is brightest, 0 where another object is."""


def _outline(
    name: str,
    smoothed: torch.Tensor,
    amplitude: torch.Tensor,
    labelled: torch.Tensor,
    cells: torch.Tensor,
    white_canvas: torch.Tensor | None,
) -> _Outline | None:
    """Find one object's outline; None if it is too small to be an object.

    Args:
        name: Its palette colour.
        smoothed: (frames, 3, height, width).
        amplitude: (frames, height, width).
        labelled: Pixels of the object's hue.
        cells: The cells that its bright area touches.
        white_canvas: For a white object the background, from which its dark stripes must be told.
    """
    height, width = amplitude.shape[1:]
    reach = dilate(cells, 1).float()
    region = F.interpolate(reach[:, None], scale_factor=COARSE)[:, 0, :height, :width] > 0
    core = region & labelled & (amplitude > 0.5)
    peak = float(amplitude[core].quantile(0.75))
    dark = world.STRIPE_SHADE * peak
    if white_canvas is None:
        whole = region & labelled & (amplitude > dark / 2)
    else:
        brightest = _spread(white_canvas, rows=1, columns=1)
        dark_level = world.STRIPE_SHADE * peak * world.RGB["white"][0]
        whole = _spread(core, rows=BAND + 1, columns=BAND) & (smoothed.mean(1) > (brightest + dark_level) / 2)
        whole &= labelled | (amplitude < dark / 2)
    inside = ~_spread(~whole, rows=1, columns=2)  # stripes are horizontal: their rows are what must be kept
    between = (1 + world.STRIPE_SHADE) / 2 * peak
    striped = bool((amplitude[inside] < between).float().mean() > 0.2)
    mask = region & labelled & (amplitude > peak / 2)
    if striped:  # its edges lie at half of what each row has
        mask = whole & ((amplitude > peak / 2) | (_spread(amplitude, columns=3) < between))
    if int(mask.sum()) < LEAST_AREA * len(mask):
        return None
    bright = core & (amplitude >= peak)
    red, green, blue = smoothed.movedim(1, 0)[:, bright].median(1).values.tolist()
    return _Outline(
        label=name,
        colour=(red, green, blue),
        striped=striped,
        mask=mask,
        amplitude=torch.where(region & labelled, amplitude / peak, 0).clamp(0, 1),
    )


def _track(outline: _Outline, near_other: torch.Tensor) -> Track:
    """Follow an object: a Theil-Sen line through its centroids, where it can in frames in which nothing hides it."""
    mask = outline.mask
    frames, height, width = mask.shape
    area = mask.sum((1, 2)).float()
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    weight = mask / area[:, None, None]
    centre = torch.stack(((weight.sum(1) * x).sum(1), (weight.sum(2) * y).sum(1)), dim=1)  # NaN where not seen
    seen = area >= 0.2 * area.max()
    free = seen & ~(mask & near_other).any(2).any(1)
    time = torch.arange(frames, dtype=torch.float32)
    chosen = free if int(free.sum()) >= max(3, frames // 8) else seen
    times, points = time[chosen], centre[chosen]
    velocity = _velocity(times, points)
    start = (points - times[:, None] * velocity).median(0).values
    shown = free if bool(free.any()) else seen
    middle = centre if bool(free.any()) else start + time[:, None] * velocity
    return Track(
        label=outline.label,
        colour=outline.colour,
        striped=outline.striped,
        mask=mask,
        near_other=near_other,
        appearance=_appearance(outline.amplitude[shown], ~near_other[shown], middle[shown]),
        area=area,
        centre=centre,
        free=free,
        start=(float(start[0]), float(start[1])),
        velocity=(float(velocity[0]), float(velocity[1])),
        full_area=float(area[free].median() if bool(free.any()) else area.max()),
        parts=tuple(
            TrackPart(
                appearance=_appearance(outline.amplitude[part], ~near_other[part], centre[part]),
                velocity=tuple(_velocity(time[part], centre[part]).tolist()),
            )
            for part in (time[free].long()[time[free].long() * PARTS // frames == number] for number in range(PARTS))
            if len(part) >= LEAST_PART_FRAMES
        ),
    )


def _velocity(times: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Theil and Sen's slope (x, y) of points over time; none of a single point."""
    if len(times) < 2:
        return torch.zeros(2)
    first, second = torch.triu_indices(len(times), len(times), 1)
    slopes = (points[second] - points[first]) / (times[second] - times[first])[:, None]
    return slopes.median(0).values


def _appearance(amplitude: torch.Tensor, known: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Average of (frames, height, width) around a centre (x, y) that moves, where it is known."""
    height, width = amplitude.shape[1:]
    offsets = torch.arange(-REACH, REACH + 1)
    x = (2 * (centre[:, :1] + offsets) / width - 1)[:, None, :].expand(-1, len(offsets), -1)
    y = (2 * (centre[:, 1:] + offsets) / height - 1)[:, :, None].expand(-1, -1, len(offsets))
    layers = torch.stack((amplitude * known, known.float()), dim=1)
    total: torch.Tensor
    weight: torch.Tensor
    total, weight = F.grid_sample(layers, torch.stack((x, y), dim=-1), align_corners=False).sum(0)
    return total / weight.clamp(min=1e-3)


def dilate(mask: torch.Tensor, by: int) -> torch.Tensor:
    """Grow (frames, height, width) bool by so many pixels to each side."""
    return _spread(mask, rows=by, columns=by)


def _spread(values: torch.Tensor, *, frames: int = 0, rows: int = 0, columns: int = 0) -> torch.Tensor:
    """The largest value within a box of so many frames, rows and columns to either side of each pixel."""
    for axis, reach in enumerate((frames, rows, columns)):
        spread = values.clone()
        for shift in range(1, min(reach, values.shape[axis] - 1) + 1):
            rest = values.shape[axis] - shift
            for here, there in ((0, shift), (shift, 0)):
                part = spread.narrow(axis, here, rest)
                torch.maximum(part, values.narrow(axis, there, rest), out=part)
        values = spread
    return values
