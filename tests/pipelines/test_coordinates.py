"""Token grids that are read from the coordinates of a packed sequence's tokens."""

import pytest
import torch
from blade_pipelines.shared.coordinates import grid_of_coordinates

from blade import TokenGrid


def box(frames, height, width, *, scale=8, fps=25.0, first=0, ends=False, spread=1):
    """Coordinates of a box, (1, 3, tokens), or (1, 3, tokens, 2): the first frame lasts one frame of the video."""
    steps = torch.arange(frames + 1, dtype=torch.float32) * scale
    times = ((steps + 1 - scale).clamp(min=0) + first) / fps
    begins = torch.meshgrid(
        times[:-1], torch.arange(height) * 32.0 * spread, torch.arange(width) * 32.0 * spread, indexing="ij"
    )
    begins = torch.stack(begins).flatten(1)
    if not ends:
        return begins[None]
    finishes = begins + 32.0 * spread
    finishes[0] = times[1:].repeat_interleave(height * width)
    return torch.stack((begins, finishes), dim=-1)[None]


def keyframe(height, width, index, *, fps=25.0):
    """Coordinates of one frame of the video, with ends."""
    made = box(1, height, width, first=index, fps=fps, ends=True)
    return made


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 7), (1, 4, 6), (6, 1, 3), (5, 3, 1), (2, 1, 1)])
def test_a_video_alone(size, ends):
    assert grid_of_coordinates(box(*size, ends=ends).repeat(2, *(1,) * (2 + ends))) == TokenGrid(*size)


@pytest.mark.parametrize("indices", [(8,), (8, 16), (16, 5), (1, 9, 17, 24)])
def test_conditions_before_the_video(indices):
    """As in LTX-Video's condition pipeline: every frame once more, at the time that it is given for."""
    conditions = [box(1, 5, 7, first=index) for index in indices]
    grid = grid_of_coordinates(torch.cat([*conditions, box(5, 5, 7)], dim=2))
    assert grid == TokenGrid(5, 5, 7, text_before=35 * len(indices))


def test_a_condition_of_two_frames_before_the_video():
    grid = grid_of_coordinates(torch.cat([box(2, 3, 4, first=16), box(4, 3, 4)], dim=2))
    assert grid == TokenGrid(4, 3, 4, text_before=24)


def test_frames_of_an_earlier_window_behind_the_video():
    """As in the long pipeline: the overlap has the video's first times again, and an image the one before them."""
    overlap, image = box(2, 3, 4), box(1, 3, 4, first=-8)
    assert grid_of_coordinates(torch.cat([box(6, 3, 4), overlap], dim=2)) == TokenGrid(6, 3, 4, text_after=24)
    grid = grid_of_coordinates(torch.cat([box(6, 3, 4), overlap, image], dim=2))
    assert grid == TokenGrid(6, 3, 4, text_after=36)


def test_a_guide_as_long_as_the_video_is_behind_it():
    assert grid_of_coordinates(torch.cat([box(6, 3, 4), box(6, 3, 4)], dim=2)) == TokenGrid(6, 3, 4, text_after=72)


@pytest.mark.parametrize("index", [24, 32, 5, 33])
def test_a_keyframe_behind_the_video_is_none_of_its_frames(index):
    """Also the last frame of the video, at whose time the last token of the video ends."""
    parts = [box(5, 3, 4, ends=True), keyframe(3, 4, index - 1)]
    grid = grid_of_coordinates(torch.cat(parts, dim=2))
    assert grid == TokenGrid(5, 3, 4, text_after=12)


def test_a_reference_of_half_the_size_behind_the_video():
    parts = [box(5, 4, 6, ends=True), box(5, 2, 3, ends=True, spread=2), keyframe(4, 6, 16)]
    assert grid_of_coordinates(torch.cat(parts, dim=2)) == TokenGrid(5, 4, 6, text_after=54)


def test_a_tile_of_a_video_begins_anywhere():
    whole = box(5, 6, 8, ends=True).unflatten(2, (5, 6, 8))
    tile = whole[:, :, 2:, 1:5, 3:].flatten(2, 4)
    grid = grid_of_coordinates(torch.cat([tile, keyframe(4, 5, 3)], dim=2))
    assert grid == TokenGrid(3, 4, 5, text_after=20)


def test_tokens_in_no_order_are_a_box_of_one():
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    grid = grid_of_coordinates(box(3, 4, 5).index_select(2, order))
    assert grid.sequence_length == 60 and grid.video_tokens < 20


def test_coordinates_that_change_in_place_are_read_again():
    coordinates = torch.cat([box(1, 3, 4, first=8), box(4, 3, 4)], dim=2)
    assert grid_of_coordinates(coordinates).text_before == 12
    coordinates.copy_(torch.cat([box(4, 3, 4), box(1, 3, 4, first=8)], dim=2))
    assert grid_of_coordinates(coordinates).text_before == 0
    with torch.inference_mode():
        assert grid_of_coordinates(coordinates.clone()).text_after == 12


def test_what_is_no_coordinates_is_refused():
    for shape in ((3, 5), (1, 2, 5), (1, 3, 0), (1, 3, 5, 2, 1)):
        with pytest.raises(ValueError, match=r"`video_coords` must be \(B, 3, tokens\)"):
            grid_of_coordinates(torch.zeros(shape))
    with pytest.raises(ValueError, match="must be the same for all items of the batch"):
        grid_of_coordinates(torch.cat([box(2, 3, 4), box(2, 3, 4, first=1)]))
