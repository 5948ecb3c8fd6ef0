"""Videos with one planted fault each: whatever is wrong in more than a tenth of the frames makes a video wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from blade.moving_shapes import world
from blade.moving_shapes.captions import SHAPES, Caption, ObjectCaption, sample_caption
from blade.moving_shapes.realism import realism_error
from blade.moving_shapes.scoring import Score, score
from blade.moving_shapes.world import MovingObject, Scene

SIZE = {"frames": 33, "height": 96, "width": 96}
LATE = 20
"""Frame from which a video is wrong that is right in 60 % of its frames."""


@dataclass(frozen=True)
class Truth:
    """A plain caption, its scene, and chance."""

    caption: Caption
    scene: Scene
    rng: np.random.Generator

    @property
    def first(self) -> MovingObject:
        return self.scene.objects[0]

    def drawn(self, *objects: MovingObject) -> torch.Tensor:
        return world.render(Scene(objects=objects), **SIZE)

    @property
    def video(self) -> torch.Tensor:
        return self.drawn(*self.scene.objects)

    def other(self, values: list, value: object) -> object:
        others = [other for other in values if other != value]
        return others[self.rng.integers(len(others))]


def plain(described: ObjectCaption) -> ObjectCaption:
    return replace(described, size=None, fill=None, speed=None)


def on_canvas(drawn: MovingObject) -> bool:
    left, right, top, bottom = world.extents(drawn.shape, drawn.radius)
    centres = (drawn.centre(0), drawn.centre(SIZE["frames"] - 1))
    return all(left < x < SIZE["width"] - right and top < y < SIZE["height"] - bottom for x, y in centres)


def never_touch(one: MovingObject, two: MovingObject) -> bool:
    distance = 1.4 * (one.radius + two.radius) + 4
    return all(math.dist(one.centre(frame), two.centre(frame)) > distance for frame in range(SIZE["frames"]))


def stranger(truth: Truth, *, same_colour: bool, radius: float) -> MovingObject | None:
    """An object of any shape that moves anywhere, apart from those of the scene; None if there is no room."""
    used = [drawn.colour for drawn in truth.scene.objects]
    free = [colour for colour in world.RGB.values() if colour not in used]
    for _ in range(500):
        angle, speed = truth.rng.uniform(0, 2 * math.pi), truth.rng.uniform(0, 1.2)
        drawn = replace(
            truth.first,
            shape=SHAPES[truth.rng.integers(3)],
            colour=truth.first.colour if same_colour else free[truth.rng.integers(len(free))],
            radius=radius,
            start=tuple(truth.rng.uniform(8, 88, 2)),
            velocity=(speed * math.cos(angle), speed * math.sin(angle)),
        )
        if on_canvas(drawn) and all(never_touch(drawn, other) for other in truth.scene.objects):
            return drawn
    return None


def with_stranger(same_colour: bool, radii: tuple[float, float], late: bool = False) -> Callable:
    def plant(truth: Truth) -> torch.Tensor | None:
        drawn = stranger(truth, same_colour=same_colour, radius=truth.rng.uniform(*radii))
        if drawn is None:
            return None
        video = truth.drawn(*truth.scene.objects, drawn)
        return torch.cat((truth.video[:LATE], video[LATE:])) if late else video

    return plant


def comes_from_behind(truth: Truth) -> torch.Tensor | None:
    """A smaller copy, hidden by the object in the first frame, that moves out sideways."""
    along = truth.first.velocity
    aside = truth.rng.choice([-1.2, 1.2]) / math.hypot(*along)
    velocity = (along[0] + aside * along[1], along[1] + aside * along[0])
    drawn = replace(truth.first, radius=0.7 * truth.first.radius, velocity=velocity)
    return truth.drawn(truth.first, drawn) if on_canvas(drawn) else None


def changed_from(frame: int, **change: Callable[[Truth], object]) -> Callable:
    def plant(truth: Truth) -> torch.Tensor:
        changed = replace(truth.first, **{name: value(truth) for name, value in change.items()})
        return torch.cat((truth.video[:frame], truth.drawn(changed)[frame:]))

    return plant


def swapped_colours(truth: Truth) -> torch.Tensor:
    one, two = truth.scene.objects
    swapped = truth.drawn(replace(one, colour=two.colour), replace(two, colour=one.colour))
    return torch.cat((truth.video[:16], swapped[16:]))


def vanishes(truth: Truth) -> torch.Tensor:
    return torch.cat((truth.video[:LATE], truth.drawn()[LATE:]))


def stops(truth: Truth) -> torch.Tensor:
    return torch.cat((truth.video[:LATE], truth.video[LATE : LATE + 1].expand(SIZE["frames"] - LATE, -1, -1, -1)))


def turns_back(truth: Truth) -> torch.Tensor:
    return torch.cat((truth.video[:LATE], truth.video[2 * LATE - SIZE["frames"] : LATE].flip(0)))


def other_shape(truth: Truth) -> object:
    return truth.other(list(SHAPES), truth.first.shape)


def other_colour(truth: Truth) -> object:
    return truth.other(list(world.RGB.values()), truth.first.colour)


FAULTS: dict[str, tuple[int, Callable, str]] = {
    "a large duplicate": (1, with_stranger(True, (8, 13)), "count"),
    "a small duplicate": (1, with_stranger(True, (4, 6)), "count"),
    "a large stranger": (1, with_stranger(False, (8, 13)), "count"),
    "a small stranger": (1, with_stranger(False, (4, 6)), "count"),
    "a third object": (2, with_stranger(False, (6, 10)), "count"),
    "a duplicate of one of two": (2, with_stranger(True, (6, 10)), "count"),
    "a late duplicate": (1, with_stranger(True, (6, 12), late=True), "count"),
    "a late stranger": (1, with_stranger(False, (6, 12), late=True), "count"),
    "one from behind": (1, comes_from_behind, "count"),
    "swapped colours": (2, swapped_colours, "direction"),
    "another shape midway": (1, changed_from(16, shape=other_shape), "shape"),
    "another shape in 40 %": (1, changed_from(LATE, shape=other_shape), "shape"),
    "another colour in 40 %": (1, changed_from(LATE, colour=other_colour), "colour"),
    "gone in 40 %": (1, vanishes, "colour"),
    "at rest in 40 %": (1, stops, "direction"),
    "turned back in 40 %": (1, turns_back, "direction"),
}
"""For each fault the number of described objects, the function that plants it, and an attribute that is then wrong."""


def planted(name: str, seed: int) -> tuple[str, torch.Tensor, torch.Tensor]:
    """The prompt, the truth's video, and the video with the fault."""
    objects, plant, _ = FAULTS[name]
    rng = np.random.default_rng(seed)
    while True:
        caption = sample_caption(rng, objects=objects, striped=0)
        caption = replace(caption, background=None, objects=tuple(map(plain, caption.objects)))
        truth = Truth(caption, world.sample_scene(caption, rng, **SIZE), rng)
        video = plant(truth)
        if video is not None:
            return str(caption), truth.video, video


def wrong_attributes(scored: Score) -> set[str]:
    wrong = {name for judged in scored.objects for name, right in judged.attributes.items() if not right}
    return wrong if scored.count else wrong | {"count"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_makes_the_video_wrong(name):
    prompt, truth, video = planted(name, seed=0)
    assert score(truth, prompt).all_attributes
    scored = score(video, prompt)
    assert not scored.all_attributes and not scored.basics
    assert FAULTS[name][2] in wrong_attributes(scored), scored
    assert realism_error(truth, prompt) < 0.05 and realism_error(video, prompt) > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_make_every_video_wrong(name):
    for seed in range(1, 5):
        prompt, _, video = planted(name, seed)
        scored = score(video, prompt)
        assert not scored.all_attributes and FAULTS[name][2] in wrong_attributes(scored), (seed, prompt)


def test_what_is_small_or_short_does_not_count():
    """A speck below the stated size, and a stranger that is there in a tenth of the frames, are forgiven."""
    prompt, truth, video = planted("a large stranger", seed=0)
    assert score(torch.cat((truth[:-3], video[-3:])), prompt).all_attributes
    assert not score(torch.cat((truth[:-4], video[-4:])), prompt).count
    speck = truth.clone()
    speck[:, :, 2:5, 2:7] = 0.9
    assert score(speck, prompt).count
