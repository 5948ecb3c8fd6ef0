"""The token grid of a packed sequence, read from its tokens' coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from blade.token_grid import TokenGrid

TOLERANCE = 1e-4
"""Relative error of times in seconds, which are counts of frames divided by a rate in float32."""


@dataclass(frozen=True)
class _Box:
    """Consecutive tokens that lie in a grid."""

    start: int
    """Index of the first token."""
    frames: int
    """Frames."""
    rows: np.ndarray
    """Vertical coordinate of every row."""
    columns: np.ndarray
    """Horizontal coordinate of every token of a row."""
    time: float
    """Time of the first frame."""

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.frames * len(self.rows) * len(self.columns)


_grids = WeakIdKeyDictionary()
"""By tensor of coordinates, its version and the grid: a run hands the same tensor to every step."""


def grid_of_coordinates(coordinates: torch.Tensor) -> TokenGrid:
    """Return the grid of the video that a sequence is made for; all other tokens are its text.

    The video is the largest part of the sequence that fills a box in raster order: frames of the same rows and
    columns, each as long after the one before it as the others, but for the first, which may be shorter. What stands
    before and after it, such as keyframes and reference videos, is kept exactly.

    Args:
        coordinates: (B, 3, tokens) times, rows and columns of the tokens, or (B, 3, tokens, 2) their beginnings and
            ends; the same for all items of the batch.

    Raises:
        ValueError: for coordinates of another shape, or that differ between items.
    """
    if coordinates.ndim not in (3, 4) or coordinates.shape[1] != 3 or not coordinates.shape[2]:
        shape = tuple(coordinates.shape)
        raise ValueError(f"`video_coords` must be (B, 3, tokens) or (B, 3, tokens, 2), got shape {shape}.")
    version = None if coordinates.is_inference() else coordinates._version  # inference tensors have none
    known = _grids.get(coordinates)
    if known is not None and version is not None and known[0] == version:
        grid: TokenGrid = known[1]
        return grid
    values = coordinates.detach().double().cpu().numpy()
    if not (values == values[:1]).all():
        raise ValueError("`video_coords` must be the same for all items of the batch.")
    grid = _largest_grid(values[0])
    _grids[coordinates] = version, grid
    return grid


def _largest_grid(values: np.ndarray) -> TokenGrid:
    """Return the grid of one item's coordinates."""
    starts = values if values.ndim == 2 else values[..., 0]
    ends = None if values.ndim == 2 else values[0, :, 1]
    boxes = _boxes(starts, ends)
    video = max(boxes, key=lambda box: (box.tokens, -box.time, -box.start))
    after = starts.shape[1] - video.start - video.tokens
    return TokenGrid(video.frames, len(video.rows), len(video.columns), text_before=video.start, text_after=after)


def _boxes(starts: np.ndarray, ends: np.ndarray | None) -> list[_Box]:
    """Cut a sequence into boxes, as long as they get.

    Args:
        starts: (3, tokens) times, rows and columns.
        ends: (tokens,) times at which they end, if those are known.
    """
    boxes: list[_Box] = []
    times: list[float] = []  # of the latest box's frames
    frames = _frames(starts)
    for frame in frames:
        box = boxes[-1] if boxes else None
        begins = frame.time
        if box is not None and _same(box.rows, frame.rows) and _same(box.columns, frame.columns):
            follows = _steps_on(times, begins) if ends is None else _equal(float(ends[frame.start - 1]), begins)
            if follows and begins > times[-1]:
                boxes[-1] = _Box(box.start, box.frames + 1, box.rows, box.columns, box.time)
                times.append(begins)
                continue
        boxes.append(frame)
        times = [begins]
    return boxes


def _frames(starts: np.ndarray) -> list[_Box]:
    """Cut a sequence into frames: tokens of one time, in raster order. A frame with gaps falls into its rows."""
    time, row, column = starts
    back = (np.diff(row) < 0) | ((np.diff(row) == 0) & (np.diff(column) <= 0))
    cuts = np.flatnonzero((np.diff(time) != 0) | back) + 1
    frames = []
    for start, stop in zip((0, *cuts), (*cuts, len(time))):
        rows, counts = np.unique(row[start:stop], return_counts=True)
        columns = column[start : start + counts[0]]
        whole = (counts == counts[0]).all() and (column[start:stop].reshape(-1, counts[0]) == columns).all()
        if whole:
            frames.append(_Box(int(start), 1, rows, columns, float(time[start])))
            continue
        for first, count, place in zip(np.cumsum((start, *counts[:-1])), counts, rows):
            line = column[first : first + count]
            frames.append(_Box(int(first), 1, np.array([place]), line, float(time[start])))
    return frames


def _steps_on(times: list[float], time: float) -> bool:
    """Return whether a time comes as long after the last as that after the one before, the first step being free."""
    step = time - times[-1]
    if len(times) == 1:
        return step > 0
    before = times[-1] - times[-2]
    return _equal(step, before) or (len(times) == 2 and step > before)


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return len(one) == len(other) and bool((one == other).all())


def _equal(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE * max(abs(one), abs(other))
