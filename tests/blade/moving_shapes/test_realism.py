import dataclasses
import itertools

import pytest
import torch

from blade.moving_shapes import world
from blade.moving_shapes.fitting import fit_scene
from blade.moving_shapes.realism import MAX_ERROR, realism_error

PROMPTS = {
    "single": "a red ball moving right",
    "patterned": "a striped white triangle moving up over a checkered background",
    "two": "a large green square moving left and a blue ball moving down",
}


@pytest.fixture(params=PROMPTS.values(), ids=PROMPTS.keys())
def clip(request, make_clip):
    return make_clip(request.param, seed=1)


def test_rendered_truth_has_no_error(random_clips):
    for clip in [*random_clips(4, objects=1, seed=1), *random_clips(4, objects=2, seed=2)]:
        assert realism_error(clip.video, clip.prompt) < 0.01, clip


def test_fit_finds_the_scene(random_clips):
    for clip in random_clips(4, objects=2, seed=3):
        for found, drawn in zip(fit_scene(clip.video, clip.prompt).objects, clip.scene.objects):
            for name in ("start", "velocity", "colour"):
                assert getattr(found, name) == pytest.approx(getattr(drawn, name), abs=0.02), clip
            assert found.radius == pytest.approx(drawn.radius, abs=0.02)


@pytest.mark.slow
def test_error_rises_with_damage(clip, damaged):
    errors = [realism_error(video, clip.prompt) for video in (clip.video, *damaged(clip))]
    for less, more in itertools.pairwise(errors):
        assert more > 1.2 * less + 0.005, errors


def test_tint_is_free_and_wrong_colour_is_not(make_clip):
    clip = make_clip("a red ball moving right")

    def painted(rgb):
        return clip.redrawn(lambda drawn, frame: dataclasses.replace(drawn, colour=rgb))

    assert realism_error(painted((0.85, 0.2, 0.1)), clip.prompt) < 0.01
    assert realism_error(painted(world.RGB["yellow"]), clip.prompt) > 0.5


@pytest.mark.parametrize(
    "wrong", ["a red square moving right", "a striped red ball moving right", "a red triangle moving right"]
)
def test_wrong_shape_or_fill_is_an_error(make_clip, wrong):
    assert realism_error(make_clip("a red ball moving right").video, wrong) > 0.15


def test_wrong_background_is_an_error(make_clip):
    video = make_clip("a red ball moving right over a striped background").video
    assert realism_error(video, "a red ball moving right") > 0.3


def test_absent_objects_have_the_greatest_error(make_clip):
    clip = make_clip(PROMPTS["two"], seed=1)
    one, none = (
        world.render(dataclasses.replace(clip.scene, objects=clip.scene.objects[:kept]), **clip.size)
        for kept in (1, 0)
    )
    assert realism_error(one, clip.prompt) == pytest.approx((MAX_ERROR / 2) ** 0.5, abs=0.01)
    assert realism_error(none, clip.prompt) == MAX_ERROR


def test_copy_far_away_is_an_error(make_clip):
    clip = make_clip("a small red ball moving right")
    empty = dataclasses.replace(clip.scene, objects=())
    (drawn,) = clip.scene.objects
    other = dataclasses.replace(drawn, start=(drawn.start[0], (drawn.start[1] + 32) % 64), radius=5.0)
    copy = world.render(dataclasses.replace(empty, objects=(other,)), **clip.size)
    video = torch.maximum(clip.video, copy)
    assert realism_error(video, clip.prompt) > 0.1


def test_error_never_exceeds_its_bound():
    video = torch.rand(9, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert 0.5 < realism_error(video, "a red ball moving right and a blue square moving up") <= MAX_ERROR
