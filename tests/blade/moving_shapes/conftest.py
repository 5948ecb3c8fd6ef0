"""Clips of the moving-shapes world, whole and damaged, for the tests of its measures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from blade.moving_shapes import world
from blade.moving_shapes.captions import Caption, parse_caption, sample_caption
from blade.moving_shapes.world import Scene

SIZE = {"frames": 17, "height": 64, "width": 64}


@dataclasses.dataclass(frozen=True)
class Clip:
    """A caption, a scene that shows it, and its size."""

    caption: Caption
    scene: Scene
    size: dict[str, int]

    @property
    def prompt(self) -> str:
        return str(self.caption)

    @property
    def video(self) -> torch.Tensor:
        return world.render(self.scene, **self.size)

    def redrawn(self, change: Callable[[world.MovingObject, int], world.MovingObject]) -> torch.Tensor:
        """The clip with every object changed in every frame."""
        frames = [
            world.render(
                dataclasses.replace(self.scene, objects=tuple(change(drawn, n) for drawn in self.scene.objects)),
                **{**self.size, "frames": 1},
                first_frame=n,
            )
            for n in range(self.size["frames"])
        ]
        return torch.cat(frames)


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Clip]:
    """`make_clip(prompt, seed)` draws a scene; without `size` it is 17 frames of 64x64."""

    def make(prompt: str, seed: int = 0, size: dict[str, int] = SIZE) -> Clip:
        caption = parse_caption(prompt)
        scene = world.sample_scene(caption, np.random.default_rng(seed), **size)
        return Clip(caption, scene, size)

    return make


@pytest.fixture(scope="session")
def random_clips() -> Callable[..., list[Clip]]:
    """`random_clips(count, objects, seed)` draws captions and scenes in which every object can be seen."""

    def draw(count: int, *, objects: int, seed: int, size: dict[str, int] = SIZE) -> list[Clip]:
        rng = np.random.default_rng(seed)
        clips: list[Clip] = []
        while len(clips) < count:
            caption = sample_caption(rng, objects=objects, held_out=len(clips) % 2 == 1)
            scene = world.sample_scene(caption, rng, **size)
            if objects == 1 or world.both_visible(*scene.objects, size["frames"]):
                clips.append(Clip(caption, scene, size))
        return clips

    return draw


def blur(clip: Clip, sigma: float) -> torch.Tensor:
    """Gaussian blur of every frame, `sigma` in pixels."""
    kernel = torch.exp(-torch.arange(-9.0, 10.0).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    frames = clip.video.flatten(0, 1)[:, None]
    frames = F.conv2d(F.pad(frames, (9, 9, 9, 9), mode="replicate"), kernel.view(1, 1, 1, -1))
    return F.conv2d(frames, kernel.view(1, 1, -1, 1)).view_as(clip.video)


def noise(clip: Clip, sigma: float) -> torch.Tensor:
    """White noise."""
    return clip.video + sigma * torch.randn(clip.video.shape, generator=torch.Generator().manual_seed(0))


def tint(clip: Clip, strength: float) -> torch.Tensor:
    """A constant shift of each channel."""
    return clip.video + strength * torch.tensor([1.0, -1.0, 0.5]).view(3, 1, 1)


def flicker(clip: Clip, strength: float) -> torch.Tensor:
    """Brightness that goes up and down from frame to frame."""
    signs = 1 - 2 * (torch.arange(clip.size["frames"]) % 2)
    return clip.video * (1 + strength * signs.view(-1, 1, 1, 1))


def ghost(clip: Clip, strength: float) -> torch.Tensor:
    """A faint copy of the objects, eight pixels away."""
    return (1 - strength) * clip.video + strength * clip.video.roll(8, dims=-1)


def deformation(clip: Clip, strength: float) -> torch.Tensor:
    """Objects that grow and shrink."""

    def breathe(drawn: world.MovingObject, frame: int) -> world.MovingObject:
        return dataclasses.replace(drawn, radius=drawn.radius * (1 + strength * math.sin(frame)))

    return clip.redrawn(breathe)


def uneven_motion(clip: Clip, pixels: float) -> torch.Tensor:
    """Objects that swing by so many pixels around their straight track."""

    def swing(drawn: world.MovingObject, frame: int) -> world.MovingObject:
        unit = [side / math.hypot(*drawn.velocity) for side in drawn.velocity]
        offset = pixels * math.sin(2 * math.pi * frame / 8)
        start = (drawn.start[0] + offset * unit[0], drawn.start[1] + offset * unit[1])
        return dataclasses.replace(drawn, start=start)

    return clip.redrawn(swing)


DAMAGES = {
    "blur": (blur, (0.5, 1.0, 2.0)),
    "noise": (noise, (0.01, 0.03, 0.1)),
    "flicker": (flicker, (0.05, 0.15, 0.3)),
    "ghost": (ghost, (0.1, 0.2, 0.4)),
    "deformation": (deformation, (0.05, 0.1, 0.2)),
    "uneven motion": (uneven_motion, (0.5, 1.0, 2.0)),
}
"""For each kind of damage its function and three strengths of it."""


@pytest.fixture(params=DAMAGES)
def damaged(request: pytest.FixtureRequest) -> Callable[[Clip], list[torch.Tensor]]:
    """`damaged(clip)` is the clip at three rising strengths of one kind of damage."""
    function, strengths = DAMAGES[request.param]
    return lambda clip: [function(clip, strength).clamp(0, 1) for strength in strengths]


@pytest.fixture(params=[(blur, 0.8), (noise, 0.03), (tint, 0.05)], ids=["blur", "noise", "tint"])
def mildly_damaged(request: pytest.FixtureRequest) -> Callable[[Clip], torch.Tensor]:
    """`mildly_damaged(clip)` is what a small VAE may do to a clip."""
    function, strength = request.param
    return lambda clip: function(clip, strength).clamp(0, 1)
