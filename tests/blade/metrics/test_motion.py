import math

import pytest
import torch

from blade.metrics.motion import motion
from blade.moving_shapes import world
from blade.moving_shapes.world import MovingObject, Scene


@pytest.mark.parametrize("speed", [0.4, 1.0, 1.7])
@pytest.mark.parametrize("shape", ["ball", "square"])
def test_motion_is_the_speed_of_an_object(shape, speed):
    drawn = MovingObject(
        shape=shape, colour=(0.9, 0.2, 0.2), striped=False, radius=9.0, start=(16.0, 30.0), velocity=(speed, 0.0)
    )
    scene = Scene(objects=(drawn,), background="checkered")
    assert motion(world.render(scene, frames=9, height=48, width=64)) == pytest.approx(speed, rel=0.2)


@pytest.mark.parametrize("shift", [(1, 0), (0, -2), (3, 3)])
def test_motion_of_a_whole_picture(shift, pattern):
    frames = [image.roll((n * shift[1], n * shift[0]), (-2, -1)) for n, image in enumerate(pattern)]
    video = torch.stack(frames)[..., 20:-20, 20:-20]
    assert motion(video) == pytest.approx(math.hypot(*shift), rel=0.1)


def test_still_pictures_do_not_move(pattern):
    assert motion(pattern) == 0


def test_motion_wants_a_video():
    with pytest.raises(ValueError, match="frames, channels"):
        motion(torch.zeros(3, 16, 16))
