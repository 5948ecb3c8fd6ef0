"""Token orders are permutations with the published curve's exact values, whatever the grid."""

import hashlib
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blade import BladeConfig
from blade.attention.adaptive import AdaptivePlan
from blade.attention.config import AdaptiveConfig
from blade.token_grid import (
    TokenGrid,
    TokenOrder,
    canonical_order,
    gilbert_order,
    plain_orders,
    register_token_order,
)

# Source: first 16 hexadecimal digits of the sha256 of the comma-joined permutation; (width, height, depth).
GILBERT_VECTORS = {
    (52, 30, 21): "c2f0a9f0131a73f1",
    (45, 30, 13): "86dc98f2126f4c2f",
    (80, 45, 21): "d94b8eb8aa570f06",
    (4, 4, 4): "d50724ae3e0c47db",
    (3, 2, 2): "8db694f2091658b3",
    (2, 5, 3): "1cea8bf7533032c0",
    (3, 4, 7): "fd3b8f3ea0e936d6",
}

sizes = st.integers(1, 7)
orders = st.sampled_from(["raster", "token-major", "gilbert", "bricks(1,1,1)", "bricks(2,3,2)", "bricks(9,1,4)"])


@pytest.mark.parametrize("shape", GILBERT_VECTORS)
def test_gilbert_order_equals_the_published_vectors(shape):
    values = ",".join(str(value) for value in gilbert_order(*shape).tolist())
    assert hashlib.sha256(values.encode()).hexdigest()[:16] == GILBERT_VECTORS[shape]


def test_gilbert_order_of_a_720p_grid_is_fast():
    start = time.perf_counter()
    gilbert_order(81, 44, 23)  # a shape that no other test has cached
    assert time.perf_counter() - start < 1.0


def test_gilbert_steps_are_short():
    grid = TokenGrid(13, 30, 45)
    steps = grid.positions("gilbert").diff(dim=0).abs().sum(-1)
    # 151 of 17549 steps have length 2, all others length 1 (the published count).
    assert steps.max() == 2
    assert (steps == 2).sum() == 151


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, sizes, orders, st.booleans(), st.booleans())
def test_an_order_then_its_inverse_is_the_identity(frames, height, width, name, first_apart, apart):
    grid = TokenGrid(frames, height, width, first_frame_apart=first_apart, frames_apart=apart)
    tokens = torch.arange(grid.video_tokens)
    ordered = tokens[grid.order(name)]
    assert torch.equal(ordered.sort().values, tokens)
    assert torch.equal(ordered[grid.inverse_order(name)], tokens)


@settings(max_examples=30, deadline=None)
@given(sizes, sizes, sizes, orders)
def test_frames_apart_stay_together_and_in_order(frames, height, width, name):
    positions = TokenGrid(frames, height, width, frames_apart=True).positions(name).view(frames, -1, 3)
    assert torch.equal(positions[..., 0], torch.arange(frames)[:, None].expand(frames, height * width))
    inside = TokenGrid(1, height, width).positions(name)[:, 1:]
    assert all(torch.equal(frame[:, 1:], inside) for frame in positions)


def test_token_major_keeps_all_frames_of_a_pixel_together():
    positions = TokenGrid(3, 2, 2).positions("token-major")
    assert positions[:3].tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
    assert positions[3:6].tolist() == [[0, 0, 1], [1, 0, 1], [2, 0, 1]]


def test_bricks_hold_neighbours_and_are_cut_at_the_far_faces():
    positions = TokenGrid(3, 5, 7).positions("bricks(2,2,4)")
    first, at_the_right_face = positions[:16], positions[16:28]
    assert first.max(0).values.tolist() == [1, 1, 3]
    assert at_the_right_face.min(0).values.tolist() == [0, 0, 4]
    assert at_the_right_face.max(0).values.tolist() == [1, 1, 6]


def test_a_first_frame_apart_comes_first_and_the_rest_is_ordered_as_if_alone():
    grid = TokenGrid(4, 5, 6, first_frame_apart=True)
    order = grid.order("gilbert")
    assert torch.equal(order[:30], TokenGrid(1, 5, 6).order("gilbert"))
    assert torch.equal(order[30:], 30 + TokenGrid(3, 5, 6).order("gilbert"))


def test_raster_is_the_order_of_a_flattened_box():
    grid = TokenGrid(2, 3, 4)
    assert torch.equal(grid.order("raster"), torch.arange(24))


def test_permutations_are_cached_and_can_be_saved_for_backward():
    grid = TokenGrid(2, 3, 5)
    with torch.inference_mode():
        first = grid.order("gilbert")
    assert first is grid.order("gilbert")
    leaf = torch.ones(30, requires_grad=True)
    leaf.index_select(0, first).sum().backward()
    assert torch.equal(leaf.grad, torch.ones(30))


@settings(max_examples=30, deadline=None)
@given(sizes, sizes, orders, st.integers(0, 5), st.integers(0, 5))
def test_an_order_of_the_whole_sequence_leaves_the_text_where_it_is(frames, height, name, before, after):
    grid = TokenGrid(frames, height, 3, text_before=before, text_after=after)
    whole, inverse = grid.order(name, whole=True), grid.inverse_order(name, whole=True)
    assert torch.equal(whole[inverse], torch.arange(grid.sequence_length))
    assert torch.equal(whole[before : grid.video_stop] - before, grid.order(name))
    assert whole[:before].tolist() == list(range(before))
    assert whole[grid.video_stop :].tolist() == list(range(grid.video_stop, grid.sequence_length))


def test_text_counts_in_the_sequence_but_not_in_the_order():
    grid = TokenGrid(2, 2, 2, text_before=3, text_after=1)
    assert (grid.video_tokens, grid.text_tokens, grid.sequence_length) == (8, 4, 12)
    assert (grid.video_start, grid.video_stop) == (3, 11)
    assert len(grid.order("gilbert")) == 8


COLUMNS = """
import numpy as np

from blade.token_grid import TokenOrder, raster_order, register_token_order


def columns(frames, height, width, stride):
    raster = raster_order(frames, height, width)
    return np.lexsort((raster, raster % width // stride))


ORDER = register_token_order(TokenOrder("by-columns(stride)", columns))
"""


def test_an_order_of_a_temporary_module(import_temporary):
    import_temporary("columns_order", COLUMNS)
    grid = TokenGrid(2, 2, 4)
    assert grid.positions("by-columns(2)")[:8, 2].tolist() == [0, 1] * 4
    assert torch.equal(grid.order("by-columns(9)"), grid.order("raster"))
    config = AdaptiveConfig(token_order="by_columns( 2 )", block_size=8, probe_tokens=4)
    assert config.token_order == "by-columns(2)"
    plan = AdaptivePlan.of(BladeConfig(sparsity=0.5, asa=config), TokenGrid(4, 4, 8), torch.device("cpu"))
    assert plan.token_order == "by-columns(2)" and plan.budget.kept_blocks == 8
    with pytest.raises(ValueError, match=r"must be one of raster, .*by-columns\(stride\), got 'by-columns\(0\)'"):
        grid.order("by-columns(0)")
    with pytest.raises(ValueError, match="`name` must be new in the table"):
        register_token_order(TokenOrder("gilbert", lambda frames, height, width: None))
    with pytest.raises(ValueError, match="`name` must be in kebab-case"):
        TokenOrder("by_rows", lambda frames, height, width: None)


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("gilbert", "gilbert"),
        ("token-major", "token-major"),
        ("token_major", "token-major"),
        ("bricks( 2, 3,4)", "bricks(2,3,4)"),
    ],
)
def test_old_spellings_are_read(name, canonical):
    assert canonical_order(name) == canonical
    grid = TokenGrid(3, 5, 7)
    assert grid.order(name) is grid.order(canonical)


def test_orders_without_parameters_are_listed():
    assert plain_orders() == ("raster", "token-major", "gilbert")


@pytest.mark.parametrize("name", ["hilbert", "bricks(0,1,1)", "bricks(2,2)", 3])
def test_an_unknown_order_is_refused(name):
    with pytest.raises(ValueError, match=r"`token_order` must be one of raster, .*got"):
        TokenGrid(1, 1, 1).order(name)


@pytest.mark.parametrize(("field", "value"), [("frames", 0), ("width", 1.5), ("text_after", -1)])
def test_a_bad_size_is_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be an integer of at least"):
        TokenGrid(**{"frames": 1, "height": 1, "width": 1, field: value})
