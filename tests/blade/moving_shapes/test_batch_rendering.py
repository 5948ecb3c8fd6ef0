"""Rendering of many scenes at once draws what `world.render` draws."""

import dataclasses

import numpy as np
import pytest
import torch

from blade.moving_shapes.batch_rendering import pack_scenes, render_batch
from blade.moving_shapes.captions import BACKGROUNDS, SHAPES, parse_caption, sample_caption
from blade.moving_shapes.world import render, sample_scene

SIZE = {"frames": 9, "height": 72, "width": 88}


def sample_scenes(count: int):
    rng = np.random.default_rng(0)
    captions = [sample_caption(rng, objects=1 + number % 2, striped=0.5) for number in range(count)]
    return [sample_scene(caption, rng, **SIZE) for caption in captions]


def test_pictures_are_those_of_the_renderer_of_one_scene() -> None:
    scenes = sample_scenes(40)
    drawn = [shown for scene in scenes for shown in scene.objects]
    assert {shown.shape for shown in drawn} == set(SHAPES) and {shown.striped for shown in drawn} == {False, True}
    assert {scene.background for scene in scenes} == {None, *BACKGROUNDS}
    videos = render_batch(pack_scenes(scenes), **SIZE)
    assert videos.shape == (40, 9, 3, 72, 88) and videos.dtype == torch.float32
    for scene, video in zip(scenes, videos):
        torch.testing.assert_close(video, render(scene, **SIZE), atol=5e-5, rtol=0)


def test_the_first_object_hides_the_second() -> None:
    caption = parse_caption("a red square moving right and a blue ball moving left")
    scene = sample_scene(caption, np.random.default_rng(0), **SIZE)
    front, rear = (dataclasses.replace(shown, start=(44.0, 36.0), velocity=(0.0, 0.0)) for shown in scene.objects)
    video = render_batch(pack_scenes([dataclasses.replace(scene, objects=(front, rear))]), **SIZE)
    assert video[0, 0, :, 36, 44].tolist() == pytest.approx(front.colour)


def test_a_scene_of_three_objects_is_refused() -> None:
    (scene,) = sample_scenes(1)
    crowded = dataclasses.replace(scene, objects=scene.objects * 3)
    with pytest.raises(ValueError, match="`scenes` must have at most 2 objects each, got 3"):
        pack_scenes([crowded])
