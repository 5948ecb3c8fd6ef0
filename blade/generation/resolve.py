"""Resolution of a request: every value that it leaves to the model, filled in."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from blade.attention.config import BladeConfig
from blade.families.registry import find_family
from blade.generation.request import BUNDLED_DEFAULTS, FPS, OPTIONAL_DEFAULTS, SPARSE_OPTIONS, GenerationRequest
from blade.models.conditions import read_frames, read_image, size_like
from blade.models.pipeline_facts import (
    call_parameters,
    check_size,
    execution_device,
    main_transformer,
    vae_compression,
)
from blade.models.source import BUNDLED, hub_commit
from blade.students.loading import Student, loaded_student
from blade.students.source import BUNDLED_STUDENTS


def resolve_request(request: GenerationRequest, pipe: Any, *, student: Student | None = None) -> GenerationRequest:
    """Fill in everything that a request leaves to the model, so that it stays the same when defaults change.

    Args:
        request: what was asked for.
        pipe: the loaded pipeline.
        student: one that would be loaded; None: the one that is, if any.

    Returns:
        A request without None, but for `negative_prompt`, `config`, `revision` where the model is not from the Hub,
        what belongs to a student, what this model does not take, and, where it is dense, what belongs to BLADE.

    Raises:
        ValueError: if the model cannot make a video of this size, or no configuration can be had.
    """
    student = student or loaded_student(pipe)
    config = request.sparse_config(lambda: student.config if student and student.config else _preset(pipe))
    defaults = _defaults(pipe, request)
    if student is not None:
        steps = {} if student.steps is None else {"steps": student.steps[-1]}
        defaults |= {**steps, "guidance_scale": student.guidance_scale, "flow_shift": None}
    asked = {name: getattr(request, name) for name in (*BUNDLED_DEFAULTS, *OPTIONAL_DEFAULTS)}
    settings: dict[str, Any] = {name: defaults.get(name) if value is None else value for name, value in asked.items()}
    missing = [name for name in BUNDLED_DEFAULTS if settings[name] is None]
    if missing:
        raise ValueError(f"`{missing[0]}` must be given: {type(pipe).__name__} has no default for it.")
    if student is not None:
        student.check_steps(settings["steps"])
    check_size(pipe, settings["height"], settings["width"], settings["frames"])
    sparse: dict[str, Any] = dict.fromkeys(SPARSE_OPTIONS)
    if config is not None:
        sparse = {name: getattr(config, name) for name in SPARSE_OPTIONS}
    return replace(
        request,
        **settings,
        **sparse,
        attention=_method(config),
        model=request.model if request.model == BUNDLED else _absolute(request.model) or request.model,
        revision=hub_commit(request.model, request.revision),
        student=request.student if request.student in BUNDLED_STUDENTS.values() else _absolute(request.student),
        config=None,
        blade_config=config,
        image=_absolute(request.image),
        last_image=_absolute(request.last_image),
        video=_absolute(request.video),
        loras=tuple(_absolute_lora(lora) for lora in request.loras),
        device=str(execution_device(pipe)),
        dtype=str(main_transformer(pipe).dtype).removeprefix("torch."),
    )


def _absolute(source: str | None) -> str | None:
    """A file's or folder's whole path, so that a record names it wherever it is read; a Hub id as it is."""
    path = Path(source or "").expanduser()
    return str(path.resolve()) if source and path.exists() else source


def _absolute_lora(text: str) -> str:
    source, separator, weight = text.rpartition("=") if "=" in text else (text, "", "")
    return f"{_absolute(source)}{separator}{weight}"


def _preset(pipe: Any) -> BladeConfig:
    transformer = main_transformer(pipe)
    return BladeConfig.from_preset(find_family(transformer).preset_name(transformer))


def _defaults(pipe: Any, request: GenerationRequest) -> dict[str, Any]:
    """Return what a request is filled in with: of a real model its family's values, then those of its pipeline's call.

    A video made from an image takes its shape, one made from a video its length.
    """
    if request.model == BUNDLED:
        defaults: dict[str, Any] = {**BUNDLED_DEFAULTS, "fps": FPS}
    else:
        names = {"num_frames": "frames", "num_inference_steps": "steps", "frame_rate": "fps"}
        own = {names.get(name, name): parameter.default for name, parameter in call_parameters(pipe).items()}
        family = find_family(main_transformer(pipe)).sampling_defaults(pipe, request.height, request.width)
        recommended = {name: value for name, value in asdict(family).items() if value is not None}
        defaults = {"fps": FPS, **own, **recommended}
    if request.image is not None and request.height is None and request.width is None:
        area = defaults["height"] * defaults["width"]
        height, width = size_like(pipe, read_image(request.image), area)
        defaults |= {"height": height, "width": width}
    if request.video is not None and request.frames is None:
        step, _ = vae_compression(pipe)
        defaults["frames"] = (len(read_frames(request.video, None)) - 1) // step * step + 1
    return defaults


def _method(config: BladeConfig | None) -> Literal["dense", "asa", "asa-gt", "patterns"]:
    """The name of a configuration's method in a request."""
    if config is None or config.attention == "dense":
        return "dense"
    if config.attention == "patterns":
        return "patterns"
    return "asa-gt" if config.pooled_tokens == "all" else "asa"
