"""Conditions beside the prompt, images or another video, and the pipeline that takes them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from blade.families.protocol import Condition
from blade.media.video import VideoLength, frames_at, video_length
from blade.models.loaded import LoadedModel

if TYPE_CHECKING:
    from PIL.Image import Image


def model_for(model: LoadedModel, condition: Condition | None) -> LoadedModel:
    """Return the model with the pipeline of the same weights that takes a condition.

    Args:
        model: the loaded model.
        condition: "image", "video", or None for a prompt alone.

    Raises:
        ValueError: if this model cannot take the condition, or needs one that is not given.
    """
    import diffusers

    pipe, kind, parameters = model.pipe, type(model.pipe).__name__, model.parameters
    if condition is None:
        for name in ("image", "video"):
            if name in parameters and parameters[name].default is parameters[name].empty:
                raise ValueError(f"`{name}` must be given: this model is a {kind}, which starts from one.")
        return model
    if condition in parameters:
        return model
    other = model.family.condition_pipeline(pipe, condition)
    if other is None:
        raise ValueError(f"`{condition}` must not be given: this model is a {kind}, whose weights take none.")
    if condition == "video" and len(model.transformers) > 1:
        raise ValueError(f"`video` must not be given for a model of two transformers: {other} has one.")
    return LoadedModel(_rebuild(pipe, getattr(diffusers, other)))


def size_like(model: LoadedModel, image: Image, area: int) -> tuple[int, int]:
    """Return the height and width nearest to an image's shape, of about so many pixels, that a model can make."""
    ratio = image.height / image.width
    edges = (math.sqrt(area * ratio), math.sqrt(area / ratio))
    height, width = (
        max(round(edge / multiple), 1) * multiple for edge, multiple in zip(edges, model.size_multiples, strict=True)
    )
    return height, width


def read_image(path: str, field: str = "image") -> Image:
    """Return the image in a file, or at an address.

    Args:
        path: where it is.
        field: name of the option, for the message.

    Raises:
        ValueError: if there is none.
    """
    # Diffusers' loader and not imageio, which mishandles the mirrored EXIF orientations of gray images (2.38.1)
    from diffusers.utils import load_image

    try:
        image: Image = load_image(path)
        return image
    except (OSError, ValueError) as error:
        raise ValueError(f"`{field}` must be an image file, or the address of one, got {path}: {error}.") from error


def measure_video(path: str, fps: int, frames: int | None = None) -> VideoLength:
    """Return the length of the video in a file, and check that it has enough frames at a rate.

    Args:
        path: an MP4, or whatever else FFmpeg reads.
        fps: frames a second that are wanted.
        frames: how many of them are wanted.

    Raises:
        ValueError: if there is no such video, or it has fewer frames at that rate.
    """
    try:
        length = video_length(path)
    except OSError as error:
        raise ValueError(f"`video` must be a video file, got {path}: {str(error).rstrip('.')}.") from error
    available = length.count_at(fps)
    if frames is not None and available < frames:
        raise ValueError(
            f"`frames` must be at most the {available} that `video` {path} has at {fps} a second ({length.frames} at "
            f"{length.fps:.4g} in the file), got {frames}."
        )
    return length


def read_frames(path: str, frames: int, fps: int) -> Iterator[Image]:
    """Yield the first frames of the video in a file, at the times that they have at a rate, one after the other.

    Args:
        path: an MP4, or whatever else FFmpeg reads.
        frames: how many.
        fps: frames a second.

    Raises:
        ValueError: if there is no such video, or it has fewer frames at that rate.
    """
    from PIL import Image

    measure_video(path, fps, frames)
    try:
        for frame in frames_at(path, fps, frames):
            yield Image.fromarray(frame.permute(1, 2, 0).numpy())
    except OSError as error:
        raise ValueError(f"`video` {path} cannot be read to its end: {str(error).rstrip('.')}.") from error


def cover(image: Image, height: int, width: int) -> Image:
    """Scale an image until it covers a size, and cut off what sticks out on both sides."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def _rebuild(pipe: Any, kind: type) -> Any:
    """Make a pipeline of another class from the parts and settings of one; `from_pipe` would cast them to float32."""
    settings = {name: value for name, value in pipe.config.items() if not name.startswith("_")}
    accepted = inspect.signature(kind).parameters
    return kind(**{name: part for name, part in {**settings, **pipe.components}.items() if name in accepted})
