"""Which model families and presets there are."""

from __future__ import annotations

from functools import cache
from typing import Literal

from blade.attention.config import BladeConfig
from blade.families.protocol import ModelFamily
from blade_pipelines.presets import STUDENT, TRAINING_FREE
from blade_pipelines.presets.students import RELEASED, ReleasedStudent

_PRESETS = {"training-free": TRAINING_FREE, "student": STUDENT}


@cache
def model_families() -> tuple[ModelFamily, ...]:
    """Return every model family that there is an adapter for."""
    from blade_pipelines.cogvideox import CogVideoXFamily
    from blade_pipelines.hunyuan_video import HunyuanVideo15Family, HunyuanVideoFamily
    from blade_pipelines.ltx_video import LTXVideoFamily
    from blade_pipelines.wan import WanFamily

    return (WanFamily(), CogVideoXFamily(), HunyuanVideoFamily(), HunyuanVideo15Family(), LTXVideoFamily())


def preset_names(kind: Literal["training-free", "student"] = "training-free") -> tuple[str, ...]:
    """Return the names of the presets of a kind."""
    return tuple(_presets(kind))


def load_preset(name: str, kind: Literal["training-free", "student"] = "training-free") -> BladeConfig:
    """Return a preset by name. See `BladeConfig.from_preset`."""
    presets = _presets(kind)
    if name not in presets:
        others = [other for other, members in _PRESETS.items() if name in members]
        hint = f" It exists as {others[0]} preset." if others else ""
        raise ValueError(f"`name` must be one of the {kind} presets {', '.join(presets)}, got {name!r}.{hint}")
    return presets[name]()


def _presets(kind: str) -> dict:
    if kind not in _PRESETS:
        raise ValueError(f'`kind` must be "training-free" or "student", got {kind!r}.')
    return _PRESETS[kind]


def released_students() -> dict[str, tuple[ReleasedStudent, ...]]:
    """Return what there is to know of published students, by Hub id."""
    return RELEASED
