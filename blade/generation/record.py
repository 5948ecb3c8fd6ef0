"""The record of a generation: everything needed to make the same video again, and what it cost, as flat JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch

from blade.attention.config import BladeConfig
from blade.common.machine import describe_machine, describe_versions, peak_memory_gib
from blade.common.options import option_names
from blade.common.reading import read_json
from blade.generation.options import GROUPS
from blade.generation.request import SPARSE_OPTIONS, GenerationRequest, ResolvedRequest
from blade.generation.run import Generation

PACKAGES = ("blade-video", "torch", "diffusers", "transformers", "av")
"""Packages whose versions are recorded."""

REQUEST_FIELDS = tuple(item.name for item in fields(GenerationRequest))

VIDEO_DIGEST = "video_sha256"
"""Field of a record beside its video: the SHA-256 of the MP4, in hexadecimal digits."""

PLACE_FIELDS = ("device", "offload")
"""Fields that say where a video is made, and not what it is: processes on several devices share a list."""

DEFAULTS = {item.name: None if item.default is MISSING else item.default for item in fields(GenerationRequest)} | {
    "loras": [],
    "added": {},
}
"""Values of the fields of a request that are not given, as plain JSON."""


def make_record(request: ResolvedRequest, generation: Generation, *, seconds_loading: float) -> dict[str, Any]:
    """Return the record of a generation, plain JSON values.

    Args:
        request: the resolved request.
        generation: what came of it.
        seconds_loading: how long loading the pipeline took.

    Returns:
        First the fields of the request, by name, and the state of the files that it names (`inputs`), then what it
        cost (`seconds_...`, densities, `peak_memory_gib` of one of the `processes`), how many modules of each
        transformer LoRAs and a student change (`changed_modules`), the channels and samples a second of its `sound`,
        `machine` and `versions`.
    """
    device, sound = torch.device(request.device), generation.sound
    return _recorded_fields(request) | {
        "inputs": request.input_state,
        "layer_density": generation.layer_density,
        "run_density": generation.run_density,
        "changed_modules": {source: dict(reach) for source, reach in generation.changes.items()},
        "sound": None if sound is None else {"channels": len(sound.samples), "rate": sound.rate},
        "seconds_loading": round(seconds_loading, 4),
        "seconds_text": round(generation.seconds_text, 4),
        "seconds_denoising": round(generation.seconds_denoising, 4),
        "seconds_decoding": round(generation.seconds_decoding, 4),
        "peak_memory_gib": round(peak_memory_gib(device), 4),
        "processes": generation.processes,
        "machine": describe_machine(device),
        "versions": describe_versions(PACKAGES),
    }


def _recorded_fields(request: ResolvedRequest) -> dict[str, Any]:
    """Return the fields of a request as plain JSON values."""
    fields_ = {name: getattr(request, name) for name in REQUEST_FIELDS if name not in ("config", "preset")}
    config = request.blade_config
    fields_["blade_config"] = None if config is None else config.to_dict()
    fields_["dense_layers"] = None if config is None else list(config.dense_layers)
    fields_["loras"] = list(request.loras)
    plain: dict[str, Any] = json.loads(json.dumps(fields_))
    return plain


def deciding_fields(request: ResolvedRequest) -> dict[str, Any]:
    """Return what decides a video: the fields of its request but `PLACE_FIELDS`, and the state of its inputs."""
    decisive = {name: value for name, value in _recorded_fields(request).items() if name not in PLACE_FIELDS}
    return decisive | {"inputs": request.input_state}


def changed_fields(record: Mapping[str, Any], request: ResolvedRequest) -> list[str]:
    """Return the fields in which the request of a record differs from another one; none if the videos are the same.

    Fields that a record of an earlier version lacks count as left at their defaults, and the state of inputs that it
    does not tell as the same.
    """
    now = deciding_fields(request)
    before = {**DEFAULTS, "inputs": now["inputs"], "precision": now["precision"] and "full", **record}
    return [
        name
        for name, value in now.items()
        if not (
            is_same_config(before[name], request.blade_config) if name == "blade_config" else before.get(name) == value
        )
    ]


def is_same_config(recorded: dict[str, Any] | None, config: BladeConfig | None) -> bool:
    """Return whether a recorded configuration equals `config`; fields that it lacks take their defaults."""
    if recorded is None or config is None:
        return recorded is None and config is None
    try:
        return recorded == config.to_dict() or BladeConfig.from_dict(recorded) == config
    except (ValueError, TypeError, AttributeError):  # of a version that has other values
        return False


def read_request(path: str | Path, changes: Mapping[str, Any] | None = None) -> GenerationRequest:
    """Return the request of a record, so that the same video can be made again.

    Args:
        path: the JSON.
        changes: fields of the request to change. A changed `model`, `student`, `attention`, `config` or `preset`
            takes the recorded values that belong to the old one along only where they still make sense.

    Raises:
        ValueError: if this is no such record.
    """
    source = Path(path).expanduser()
    if not source.exists():
        raise ValueError(f"`from_json` must be the JSON beside a video, but there is no file {path}.")
    record = read_json(source, f"`from_json` {path}")
    if record.get("prompt") is None:
        raise ValueError(f"`from_json` must be the JSON beside a video, with a `prompt`; {path} has none.")
    changes = dict(changes or {})
    values = {name: record[name] for name in REQUEST_FIELDS if record.get(name) is not None}
    of_student = option_names(*GROUPS, of_student=True)
    forgotten: tuple[str, ...] = ()
    other_model = _differs("model", changes, values)
    other_student = values.get("student") is not None if other_model else _differs("student", changes, values)
    if "config" in changes or "preset" in changes or other_model or other_student:
        forgotten = ("blade_config", "attention", *SPARSE_OPTIONS)
    if other_student:
        forgotten += ("steps", "guidance_scale", *of_student)
    if other_model:
        forgotten += ("revision", "negative_prompt", *of_student, *option_names(*GROUPS, of_model=True))
    if changes.get("attention") == "dense":
        forgotten += ("blade_config", *SPARSE_OPTIONS)
    if changes.get("decoder") == "full":
        forgotten += ("decoder_weights",)
    values = {name: value for name, value in values.items() if name not in forgotten} | changes
    if "blade_config" in values and not isinstance(values["blade_config"], BladeConfig):
        values["blade_config"] = BladeConfig.from_dict(values["blade_config"])
    return GenerationRequest(**values)


def _differs(name: str, changes: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    return name in changes and changes[name] != values.get(name)
