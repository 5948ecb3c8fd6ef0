"""Fitting a scene of the moving-shapes world to a video."""

from __future__ import annotations

import dataclasses

import torch

from . import world
from .captions import ObjectCaption, parse_caption
from .scoring import match_objects, radius_of_area
from .segmentation import Track, check_video, segment
from .world import MovingObject, Scene

COLOUR_FREEDOM = 0.1
"""Largest distance, in each channel, of a fitted colour from the named one: a tint is free, a wrong colour is not."""
RADIUS_RANGE = (world.RADIUS[None][0] / 2, world.RADIUS[None][1] * 1.5)
"""Least and greatest fitted radius in pixels."""
EDGE_WIDTHS = (3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
"""Softness in pixels of the outline in each step of a fit; a soft edge pulls from further away."""
HALF_STEP = 0.25
"""Pixels to either side over which derivatives are taken."""
ROOM = 6
"""Pixels around an object that its fit looks at."""
SETTLED = 1e-3
"""A fit ends once no parameter moves by more than this many pixels (or pixels a frame)."""


def fit_scene(video: torch.Tensor, prompt: str) -> Scene:
    """Find the scene of a prompt's shapes, fills and background that is nearest to a video in the least-squares sense.

    Starts from the video's segmentation and takes Levenberg-Marquardt steps, one object at a time.

    Args:
        video: (frames, 3, height, width) in [0, 1].
        prompt: A caption of the grammar; see `captions`.

    Returns:
        The scene; described objects of which nothing was found in the video are left out.

    Raises:
        ValueError: If `video` does not have that shape or is not finite, or `prompt` is no sentence of the grammar.
    """
    video = check_video(video)
    caption = parse_caption(prompt)
    found = [
        (_first_guess(track, described), described)
        for track, described in zip(match_objects(segment(video), caption), caption.objects)
        if track is not None
    ]
    objects = [drawn for drawn, _ in found]
    for _ in range(len(objects)):  # with two, the second round knows what hides what
        for index, (_, described) in enumerate(found):
            objects[index] = _Fit(video, objects, index, described, caption.background).run()
    return Scene(objects=tuple(objects), background=caption.background)


def _first_guess(track: Track, described: ObjectCaption) -> MovingObject:
    radius = radius_of_area(described.shape, track.full_area)
    return MovingObject(
        shape=described.shape,
        colour=world.RGB[described.colour],
        striped=described.fill == "striped",
        radius=min(max(radius, RADIUS_RANGE[0]), RADIUS_RANGE[1]),
        start=track.start,
        velocity=track.velocity,
    )


class _Fit:
    """Levenberg-Marquardt for one object, inside a window that follows it, with the rest of the scene fixed.

    The parameters are the centre (x, y) in the middle of the video, the velocity (x, y) and the radius; the colour
    follows from them by linear least squares.
    """

    def __init__(
        self,
        video: torch.Tensor,
        objects: list[MovingObject],
        index: int,
        described: ObjectCaption,
        background: str | None,
    ) -> None:
        frames, _, height, width = video.shape
        size = {"frames": frames, "height": height, "width": width}
        self.drawn = drawn = objects[index]
        self.named = torch.tensor(world.RGB[described.colour])
        self.time = torch.arange(frames) - (frames - 1) / 2
        middle = drawn.centre((frames - 1) / 2)
        self.parameters = torch.tensor([*middle, *drawn.velocity, drawn.radius])

        around = torch.arange(2 * (int(world.TRIANGLE_CIRCUMRADIUS * drawn.radius) + ROOM) + 1)
        around = around - len(around) // 2
        centre = (self.parameters[:2] + self.time[:, None] * self.parameters[2:4]).floor().long()
        columns, rows = (centre[:, :1] + around)[:, None, :], (centre[:, 1:] + around)[:, :, None]
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        self.x, self.y = columns + 0.5, rows + 0.5
        window = (torch.arange(frames)[:, None, None], rows.clamp(0, height - 1), columns.clamp(0, width - 1))

        def cut(pixels: torch.Tensor) -> torch.Tensor:
            return pixels.movedim(1, -1)[window].movedim(-1, 1).contiguous()  # (frames, channels, window, window)

        behind = Scene(objects=tuple(objects[index + 1 :]), background=background)
        rest = Scene(objects=tuple(objects[:index] + objects[index + 1 :]), background=background)
        uncovered = torch.ones(frames, 1, height, width)
        for front in objects[:index]:
            uncovered = uncovered * (1 - world.coverage(world.object_distance(front, **size))[:, None])
        self.uncovered = cut(uncovered) * inside[:, None]
        self.under = cut(world.render(behind, **size))
        self.target = cut(video - world.render(rest, **size)) * inside[:, None]

    def run(self) -> MovingObject:
        """The object at the best parameters found."""
        damping = 1e-3
        for edge_width in EDGE_WIDTHS:
            colour = self._colour(edge_width)
            missing = self.target - self._shown(self.parameters, colour, edge_width)
            gram, slope = self._normal_equations(missing, colour, edge_width)
            # the constant keeps parameters of which nothing is visible where they are
            step = torch.linalg.solve(gram + damping * gram.diag().diag() + 1e-4 * torch.eye(5), slope)
            trial = self.parameters + step
            trial[4] = trial[4].clamp(*RADIUS_RANGE)
            left = self.target - self._shown(trial, colour, edge_width)
            if left.square().sum() < missing.square().sum():
                self.parameters, damping = trial, damping / 4
                if edge_width == EDGE_WIDTHS[-1] and float(step.abs().max()) < SETTLED:
                    break
            else:
                damping *= 16
        x, y, velocity_x, velocity_y, radius = self.parameters.tolist()
        first = float(self.time[0])
        return dataclasses.replace(
            self.drawn,
            colour=tuple(self._colour(EDGE_WIDTHS[-1]).tolist()),
            radius=radius,
            start=(x + first * velocity_x, y + first * velocity_y),
            velocity=(velocity_x, velocity_y),
        )

    def _cover(self, parameters: torch.Tensor, edge_width: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the share of each pixel that the object hides, and its shade, both (frames, 1, window, window)."""
        x, y, velocity_x, velocity_y, radius = parameters
        dx = self.x - (x + self.time * velocity_x)[:, None, None]
        dy = self.y - (y + self.time * velocity_y)[:, None, None]
        distance = world.signed_distance(self.drawn.shape, radius, dx, dy)
        cover = world.coverage(distance, edge_width=edge_width)[:, None] * self.uncovered
        shade = world.stripe_shade(dy)[:, None] if self.drawn.striped else torch.ones(())
        return cover, shade

    def _shown(self, parameters: torch.Tensor, colour: torch.Tensor, edge_width: float) -> torch.Tensor:
        """Return the object's addition to the scene without it: (frames, 3, window, window)."""
        cover, shade = self._cover(parameters, edge_width)
        return cover * (shade * colour[:, None, None] - self.under)

    def _colour(self, edge_width: float) -> torch.Tensor:
        """The RGB that fits best, near the named one."""
        cover, shade = self._cover(self.parameters, edge_width)
        weight = cover * shade
        best = (weight * (self.target + cover * self.under)).sum((0, 2, 3)) / weight.square().sum().clamp(min=1e-6)
        low, high = (self.named - COLOUR_FREEDOM).clamp(min=0), (self.named + COLOUR_FREEDOM).clamp(max=1)
        return best.clamp(low, high)

    def _normal_equations(
        self, missing: torch.Tensor, colour: torch.Tensor, edge_width: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gauss-Newton's matrix (5, 5) and right-hand side (5,) at the current parameters."""
        frames = len(self.time)
        fields = []
        for move in HALF_STEP * torch.eye(5)[[0, 1, 4]]:
            ahead = self._shown(self.parameters + move, colour, edge_width)
            behind = self._shown(self.parameters - move, colour, edge_width)
            fields.append(((ahead - behind) / (2 * HALF_STEP)).view(frames, -1))
        slopes = torch.stack(fields, dim=1)  # (frames, x | y | radius, pixels)
        gram = slopes @ slopes.transpose(1, 2)
        slope = (slopes @ missing.reshape(frames, -1, 1))[:, :, 0]
        # a frame's centre is the middle one plus time * velocity
        chain = torch.zeros(frames, 3, 5)
        chain[:, 0, 0] = chain[:, 1, 1] = chain[:, 2, 4] = 1
        chain[:, 0, 2] = chain[:, 1, 3] = self.time
        return (chain.transpose(1, 2) @ gram @ chain).sum(0), torch.einsum("fai,fa->i", chain, slope)
