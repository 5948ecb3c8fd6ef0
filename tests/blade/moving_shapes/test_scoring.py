import dataclasses

import pytest
import torch

from blade.moving_shapes import world
from blade.moving_shapes.captions import COLOURS, DIRECTIONS, SHAPES
from blade.moving_shapes.scoring import BASICS, score

FULL_SIZE = {"frames": 33, "height": 96, "width": 96}


@pytest.mark.slow
@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("size", [FULL_SIZE, {"frames": 17, "height": 64, "width": 64}], ids=["96", "64"])
def test_rendered_truth_shows_everything(random_clips, objects, size):
    for clip in random_clips(50, objects=objects, seed=3, size=size):
        assert score(clip.video, clip.prompt).all_attributes, clip


def test_mild_damage_does_not_matter(random_clips, mildly_damaged):
    clips = [*random_clips(8, objects=1, seed=4), *random_clips(8, objects=2, seed=5)]
    for clip in clips:
        assert score(mildly_damaged(clip), clip.prompt).basics, clip


@pytest.mark.slow
def test_shuffled_prompts_score_near_chance(random_clips):
    clips = random_clips(48, objects=1, seed=6)
    scores = [score(clip.video, other.prompt) for clip, other in zip(clips, clips[1:] + clips[:1])]
    for name, words in zip(BASICS, (COLOURS, SHAPES, DIRECTIONS)):
        right = sum(scored.objects[0].attributes[name] for scored in scores)
        chance = 1 / len(words)
        spread = (chance * (1 - chance) * len(clips)) ** 0.5
        assert abs(right - chance * len(clips)) < 4 * spread, name
    assert sum(scored.basics for scored in scores) <= 6


def test_each_wrong_word_is_found_alone(make_clip):
    video = make_clip("a small striped red ball moving right fast over a checkered background").video
    right = score(video, "a small striped red ball moving right fast over a checkered background")
    assert right.fraction == 1
    for prompt, wrong in {
        "a large striped red ball moving right fast": "size",
        "a small striped blue ball moving right fast": "colour",
        "a small striped red square moving right fast": "shape",
        "a small striped red ball moving up fast": "direction",
        "a small striped red ball moving right slowly": "speed",
    }.items():
        attributes = score(video, prompt).objects[0].attributes
        assert [name for name, shown in attributes.items() if not shown] == [wrong]
    assert score(video, "a red ball moving right over a striped background").background is False
    solid = make_clip("a red ball moving right").video
    assert score(solid, "a striped red ball moving right").objects[0].attributes["fill"] is False


@pytest.mark.parametrize("shape", SHAPES)
def test_static_clip_has_no_direction(make_clip, shape):
    clip = make_clip(f"a red {shape} moving right")
    static = clip.video[:1].expand_as(clip.video)
    attributes = score(static, clip.prompt).objects[0].attributes
    assert attributes == {"colour": True, "shape": True, "direction": False}


@pytest.mark.parametrize("rgb", [world.RGB["blue"], (0.9, 0.55, 0.15), (0.5, 0.5, 0.5), (0.45, 0.1, 0.1)])
def test_wrong_colour_is_rejected(make_clip, rgb):
    clip = make_clip("a red ball moving right")
    painted = clip.redrawn(lambda drawn, frame: dataclasses.replace(drawn, colour=rgb))
    assert not score(painted, clip.prompt).objects[0].attributes["colour"]


def test_wrong_colour_voids_nothing_else(make_clip):
    clip = make_clip("a red ball moving right and a green square moving up", seed=2)
    wrong = clip.prompt.replace("green", "purple")
    first, second = score(clip.video, wrong).objects
    assert first.all_attributes
    assert second.attributes == {"colour": False, "shape": True, "direction": True}


def test_two_objects_of_one_colour_are_told_apart(make_clip):
    clip = make_clip("a red ball moving right and a blue square moving up", seed=12)
    red = clip.redrawn(lambda drawn, frame: dataclasses.replace(drawn, colour=world.RGB["red"]))
    first, second = score(red, clip.prompt).objects
    assert first.all_attributes
    assert second.attributes == {"colour": False, "shape": True, "direction": True}


@pytest.mark.parametrize("objects", [1, 2])
def test_vanishing_object_is_rejected(random_clips, objects):
    for clip in random_clips(6, objects=objects, seed=7):
        kept = dataclasses.replace(clip.scene, objects=clip.scene.objects[1:])
        vanished = clip.video
        vanished[clip.size["frames"] * 2 // 3 :] = world.render(kept, **clip.size)[clip.size["frames"] * 2 // 3 :]
        objects_scored = score(vanished, clip.prompt).objects
        assert not any(objects_scored[0].attributes.values()), clip
        assert all(scored.all_attributes for scored in objects_scored[1:]), clip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["left", "right", "top", "bottom"])
def test_half_an_object_has_the_wrong_shape(make_clip, shape, side):
    if (shape, side) == ("triangle", "bottom"):
        pytest.skip("what remains of a triangle is a triangle")
    clip = make_clip(f"a red {shape} moving right")
    (drawn,) = clip.scene.objects
    empty = world.render(dataclasses.replace(clip.scene, objects=()), **clip.size)
    video = clip.video
    for frame in range(len(video)):
        x, y = (round(side) for side in drawn.centre(frame))
        part = {
            "left": (slice(None), slice(None, x)),
            "right": (slice(None), slice(x, None)),
            "top": (slice(None, y), slice(None)),
            "bottom": (slice(y, None), slice(None)),
        }[side]
        video[frame][:, *part] = empty[frame][:, *part]
    assert not score(video, clip.prompt).objects[0].attributes["shape"]


def test_half_transparent_object_is_rejected(make_clip):
    clip = make_clip("a yellow square moving left")
    empty = world.render(dataclasses.replace(clip.scene, objects=()), **clip.size)
    assert not score((clip.video + empty) / 2, clip.prompt).objects[0].attributes["colour"]


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_blank_video_shows_nothing(value):
    scored = score(torch.full((5, 3, 32, 32), value), "a red ball moving right over a striped background")
    assert not any(scored.objects[0].attributes.values()) and scored.background is False
    assert scored.count is (value == 1.0)  # a white canvas is one object, of a wrong colour and shape


def test_noise_shows_nothing():
    video = torch.rand(9, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert not score(video, "a red ball moving right").basics


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (torch.zeros(3, 8, 64, 64), "`video` must be"),
        (torch.zeros(1, 3, 64, 64), "`video` must be"),
        (torch.full((4, 3, 64, 64), torch.nan), "finite"),
    ],
)
def test_bad_video_is_refused(video, message):
    with pytest.raises(ValueError, match=message):
        score(video, "a red ball moving right")


def test_foreign_prompt_is_refused():
    with pytest.raises(ValueError, match="must read like"):
        score(torch.zeros(4, 3, 64, 64), "a cat")
