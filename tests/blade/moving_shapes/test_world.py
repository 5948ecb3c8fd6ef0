import math

import numpy as np
import pytest
import torch

from blade.moving_shapes import world
from blade.moving_shapes.captions import BACKGROUNDS, SHAPES, parse_caption
from blade.moving_shapes.world import MovingObject, Scene


def disc(**changes):
    defaults = {
        "shape": "ball",
        "colour": (1.0, 0.0, 0.0),
        "striped": False,
        "radius": 8.0,
        "start": (20.3, 24.6),
        "velocity": (0.5, 0.0),
    }
    return MovingObject(**{**defaults, **changes})


@pytest.mark.parametrize(("shape", "area"), [("ball", math.pi), ("square", math.pi), ("triangle", 2.546)])
def test_shapes_have_their_area_and_centre(shape, area):
    video = world.render(Scene(objects=(disc(shape=shape, colour=(1.0, 1.0, 1.0)),)), frames=3, height=48, width=48)
    cover = (video[:, 0] - world.BACKGROUND_LEVEL) / (1 - world.BACKGROUND_LEVEL)
    total = cover.sum((1, 2))
    torch.testing.assert_close(total, torch.full((3,), area * 64), rtol=0.01, atol=0)
    pixels = torch.arange(48) + 0.5
    torch.testing.assert_close((cover.sum(1) @ pixels) / total, 20.3 + 0.5 * torch.arange(3), rtol=0, atol=0.05)
    torch.testing.assert_close((cover.sum(2) @ pixels) / total, torch.full((3,), 24.6), rtol=0, atol=0.05)


@pytest.mark.parametrize("background", [None, *BACKGROUNDS])
def test_window_is_part_of_the_whole(background):
    scene = Scene(objects=(disc(striped=True), disc(start=(26.0, 20.0), shape="square")), background=background)
    whole = world.render(scene, frames=8, height=48, width=56)
    part = world.render(scene, frames=3, height=20, width=30, first_frame=4, top=11, left=7)
    torch.testing.assert_close(part, whole[4:7, :, 11:31, 7:37], rtol=0, atol=1e-5)


def test_first_object_is_in_front():
    red, blue = disc(), disc(colour=(0.0, 0.0, 1.0))
    video = world.render(Scene(objects=(red, blue)), frames=1, height=48, width=48)
    assert video[0, :, 24, 20].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", SHAPES)
def test_objects_stay_on_the_canvas_at_their_named_speed_and_size(shape):
    rng = np.random.default_rng(0)
    caption = parse_caption(f"a large red {shape} moving down fast")
    for _ in range(50):
        (drawn,) = world.sample_scene(caption, rng, frames=33, height=96, width=96).objects
        assert world.RADIUS["large"][0] <= drawn.radius <= world.RADIUS["large"][1]
        assert drawn.velocity[0] == 0 and world.SPEED["fast"][0] <= drawn.velocity[1] <= world.SPEED["fast"][1]
        left, right, top, bottom = world.extents(shape, drawn.radius)
        for x, y in (drawn.centre(0), drawn.centre(32)):
            assert left <= x <= 96 - right and top <= y <= 96 - bottom


def test_objects_without_room_are_refused():
    caption = parse_caption("a large red ball moving right fast")
    with pytest.raises(ValueError, match="leave room"):
        world.sample_scene(caption, np.random.default_rng(0), frames=33, height=32, width=32)
