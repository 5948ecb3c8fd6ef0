"""Distance of a video from the nearest one that the world could have drawn.

`fitting.fit_scene` finds the scene whose rendering comes closest to the whole video: one radius, one colour and one
constant velocity an object. What remains is the error, relative to how much the objects stand out. Blur, flicker,
ghosts, deformation, uneven motion and noise are things that no scene has, so that all of them remain.

This is a measure, not a training signal: nothing may be trained on it, and no checkpoint chosen by it.
"""

from __future__ import annotations

import dataclasses

import torch

from . import world
from .captions import parse_caption
from .fitting import fit_scene
from .scoring import unexplained_share
from .segmentation import check_video

MAX_ERROR = 1.0
"""No better than a video that shows only the background."""
NEAR = 4.0
"""Pixels around an object's outline that count as near it."""


def realism_error(video: torch.Tensor, prompt: str) -> float:
    """Measure what no scene of the world explains.

    With the fitted scene's rendering R and, for object i, the rendering R_i of the scene without it,

        error^2 = mean over objects of near_i^2 + far^2 + extra,
        near_i^2 = sum (video - R)^2 / sum (R_i - R)^2, over the pixels within `NEAR` of object i, at most 1,
        far^2 = mean (video - R)^2 over all other pixels / mean over objects of their mean squared contrast,
        extra = mean over frames of the largest piece that no object explains, in areas of the largest object.

    0 is a rendered video; 1 (`MAX_ERROR`, and never more) is a video without the objects. Shape, fill and background
    are the prompt's, so that others count as errors, and so does a colour further than `fitting.COLOUR_FREEDOM` from
    the named one. Position, size and velocity are free: whether the prompt names them so is a matter of `score`.

    Args:
        video: (frames, 3, height, width) in [0, 1].
        prompt: A caption of the grammar; see `captions`.

    Raises:
        ValueError: If `video` does not have that shape or is not finite, or `prompt` is no sentence of the grammar.
    """
    video = check_video(video)
    fitted = fit_scene(video, prompt)
    missing = len(parse_caption(prompt).objects) - len(fitted.objects)
    if not fitted.objects:
        return MAX_ERROR
    size = {"frames": video.shape[0], "height": video.shape[2], "width": video.shape[3]}
    rendered = world.render(fitted, **size)
    residual = (video - rendered).square().mean(1)
    far = torch.ones_like(residual, dtype=torch.bool)
    near_errors, contrasts = [MAX_ERROR] * missing, []
    for index, drawn in enumerate(fitted.objects):
        others = fitted.objects[:index] + fitted.objects[index + 1 :]
        shown = (rendered - world.render(dataclasses.replace(fitted, objects=others), **size)).square().mean(1)
        distance = world.object_distance(drawn, **size)
        near = distance < NEAR
        energy = float(shown.sum())
        near_errors.append(min(float(residual[near].sum()) / max(energy, 1e-6), MAX_ERROR))
        contrasts.append(energy / max(int((distance < 0).sum()), 1))
        far &= ~near
    contrast = sum(contrasts) / len(contrasts)
    far_error = float(residual[far].mean()) / max(contrast, 1e-6) if bool(far.any()) else 0.0
    squared = sum(near_errors) / len(near_errors) + far_error + unexplained_share(video, prompt)
    return min(float(squared**0.5), MAX_ERROR)
