"""Resolution of a request: every value that it leaves to the model, filled in."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from blade.attention.config import BladeConfig
from blade.common.terminal import logger
from blade.families.registry import available_kind
from blade.generation.inputs import input_state
from blade.generation.request import SPARSE_OPTIONS, GenerationRequest, ResolvedRequest
from blade.models.choices import SEPARATOR, parse_lora, parse_transformer, split_sources
from blade.models.conditions import measure_video, read_image, size_like
from blade.models.loaded import LoadedModel
from blade.models.loras import check_sources
from blade.models.source import BUNDLED, hub_commit
from blade.moving_shapes.bundled import BUNDLED_DEFAULTS
from blade.students.description import Student
from blade.students.loading import loaded_student
from blade.students.source import BUNDLED_STUDENTS

FPS = 16
"""Frames a second of a model that does not say its own: that of the Wan models."""

NEEDED = ("height", "width", "frames", "steps", "guidance_scale")
"""Fields that no run can do without."""

DEFAULTED = (*NEEDED, "fps", "negative_prompt", "guidance_scale_2", "flow_shift")
"""Fields that a model or its family has values for."""

CALL_NAMES = {"num_frames": "frames", "num_inference_steps": "steps", "frame_rate": "fps"}
"""Names of fields where a pipeline's call has others."""


def resolve_request(
    request: GenerationRequest, model: LoadedModel, *, student: Student | None = None
) -> ResolvedRequest:
    """Fill in everything that a request leaves to the model, so that it stays the same when defaults change.

    Args:
        request: the request.
        model: the loaded model.
        student: one that would be loaded; None: the one that is, if any.

    Raises:
        ValueError: if the model cannot make a video of this size, or no configuration can be had.
    """
    student = student or loaded_student(model.pipe)
    config = request.sparse_config(lambda: _attention(request, model, student))
    defaults = _defaults(model, request)
    if student is not None:
        if student.steps is None and request.steps is None:
            raise ValueError(
                f"`steps` must be given: nothing says for how many the student {student.source} was trained; give "
                "--steps, and the times that it was trained at with --scheduler."
            )
        defaults |= {"steps": student.steps, "guidance_scale": student.guidance_scale, "flow_shift": None}
        if defaults.get("guidance_scale_2") is not None:
            defaults["guidance_scale_2"] = student.guidance_scale
    settings: dict[str, Any] = {name: getattr(request, name) for name in DEFAULTED}
    settings = {name: defaults.get(name) if value is None else value for name, value in settings.items()}
    missing = [name for name in NEEDED if settings[name] is None]
    if missing:
        raise ValueError(f"`{missing[0]}` must be given: {type(model.pipe).__name__} has no default for it.")
    _refuse_ignored(request, model)
    if student is not None:
        student.check_steps(settings["steps"])
    model.check_size(settings["height"], settings["width"], settings["frames"])
    check_sources(model, request.loras)
    if request.video is not None:
        _tell_frames(request.video, settings["frames"], settings["fps"])
    values = {item.name: getattr(request, item.name) for item in fields(GenerationRequest)}
    values |= settings
    values |= {name: None if config is None else getattr(config, name) for name in SPARSE_OPTIONS}
    values |= {
        "attention": _method(config),
        "model": request.model if request.model == BUNDLED else _absolute(request.model),
        "revision": hub_commit(request.model, request.revision),
        "student": _absolute_student(request.student),
        "config": None,
        "preset": None,
        "blade_config": config,
        "image": _absolute(request.image),
        "last_image": _absolute(request.last_image),
        "video": _absolute(request.video),
        "strength": _strength(request, model),
        "decoder_weights": _absolute(request.decoder_weights),
        "transformer": _absolute_transformer(request.transformer),
        "loras": tuple(_absolute_lora(lora) for lora in request.loras),
        "device": str(model.device),
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
    }
    return ResolvedRequest(**values, input_state=input_state(request))


def describe_student(source: str, kind: str | None) -> str:
    """Return a student with the preset of its attention, where that is the model's few-step one.

    Args:
        source: folder or Hub id.
        kind: of the run's configuration; None: dense attention.
    """
    return f"{source} (attention of the few-step preset, for students trained dense)" if kind == "few-step" else source


def _attention(request: GenerationRequest, model: LoadedModel, student: Student | None) -> BladeConfig:
    """Return the attention that a request starts from where it brings no configuration."""
    if request.preset is not None:
        return model.preset_of(request.preset)
    if student is None:
        return model.preset
    asks = request.attention is not None or any(getattr(request, name) is not None for name in SPARSE_OPTIONS)
    if student.config is not None and (student.config.attention != "dense" or not asks):
        return student.config
    kind = available_kind(model.preset_name, student.preset_kind)
    logger.info(f"Attention starts from the {kind} preset: the student {student.source} has no sparse attention.")
    return model.preset_of(kind)


def _defaults(model: LoadedModel, request: GenerationRequest) -> dict[str, Any]:
    """Return the defaults of a request: of a real model its family's values, then those of its pipeline's call.

    A video made from an image takes its shape, one made from a video its length in seconds.
    """
    if request.model == BUNDLED:
        defaults: dict[str, Any] = {**BUNDLED_DEFAULTS, "fps": FPS}
    else:
        own = {CALL_NAMES.get(name, name): parameter.default for name, parameter in model.parameters.items()}
        family = model.sampling_defaults(request.height, request.width)
        recommended = {name: value for name, value in asdict(family).items() if value is not None}
        defaults = {"fps": FPS, **own, **recommended}
    if request.image is not None and request.height is None and request.width is None:
        area = defaults["height"] * defaults["width"]
        height, width = size_like(model, read_image(request.image), area)
        defaults |= {"height": height, "width": width}
    if request.video is not None and request.frames is None:
        length = measure_video(request.video, request.fps or defaults["fps"])
        defaults["frames"] = model.video_lengths.longest(length.count_at(request.fps or defaults["fps"]))
    return defaults


def _refuse_ignored(request: GenerationRequest, model: LoadedModel) -> None:
    """Refuse guidance that a pipeline would not even see."""
    guided = "guidance_scale" in model.parameters or getattr(model.pipe, "guider", None) is not None
    given = {
        "guidance_scale": not guided and request.guidance_scale not in (None, 1),
        "negative_prompt": "negative_prompt" not in model.parameters and bool(request.negative_prompt),
    }
    for name in [name for name, is_ignored in given.items() if is_ignored]:
        raise ValueError(f"`{name}` must not be given: a {type(model.pipe).__name__} does not take it.")


def _tell_frames(path: str, frames: int, fps: int) -> None:
    """Check the frames that are taken from a video, and say which where they are not those in the file."""
    length = measure_video(path, fps, frames)
    if frames == length.frames and frames == length.count_at(fps):
        return
    logger.info(
        f"Of {path}, {length.frames} frames at {length.fps:.4g} a second, the first {frames / fps:.2f} of "
        f"{float(length.seconds):.2f} s are taken, as {frames} frames at {fps} a second (--fps takes other ones)."
    )


def _strength(request: GenerationRequest, model: LoadedModel) -> float | None:
    """Return the share of a video that is changed; None where no video is."""
    parameter = model.parameters.get("strength")
    if request.strength is not None and parameter is None:
        raise ValueError(f"`strength` must not be given: a {type(model.pipe).__name__} does not take it.")
    if request.strength is not None or request.video is None or parameter is None:
        return request.strength
    return float(parameter.default)


def _method(config: BladeConfig | None) -> Literal["dense", "asa", "asa-gt", "patterns"]:
    """Return the name of a configuration's method in a request."""
    if config is None or config.attention == "dense":
        return "dense"
    if config.attention == "patterns":
        return "patterns"
    return "asa-gt" if config.pooled_tokens == "all" else "asa"


def _absolute(source: str | None) -> str | None:
    """Return a file's or folder's whole path, so that a record names it wherever it is read; a Hub id as it is."""
    path = Path(source or "").expanduser()
    return str(path.resolve()) if source and path.exists() else source


def _absolute_student(source: str | None) -> str | None:
    """Return a student with the whole paths of its files."""
    if source is None or source in BUNDLED_STUDENTS.values():
        return source
    return SEPARATOR.join(f"{_absolute(part)}" for part in split_sources(source) or (source,))


def _absolute_lora(text: str) -> str:
    """Return a LoRA with the whole paths of its files."""
    lora = parse_lora(text)
    return SEPARATOR.join(f"{_absolute(source)}" for source in lora.sources) + text.removeprefix(lora.name)


def _absolute_transformer(text: str | None) -> str | None:
    """Return the files of transformers with their whole paths."""
    return None if text is None else SEPARATOR.join(f"{_absolute(source)}" for source in parse_transformer(text))
