"""The way up from the methods to the model families and presets, which are imported where they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from blade_pipelines.presets.students import ReleasedStudent

    from blade.attention.config import BladeConfig
    from blade.families.protocol import ModelFamily


def model_families() -> tuple[ModelFamily, ...]:
    """Return every model family that there is an adapter for."""
    from blade_pipelines.registry import model_families

    return model_families()


def load_preset(name: str, kind: Literal["training-free", "student"] = "training-free") -> BladeConfig:
    """Return a preset by name. See `BladeConfig.from_preset`."""
    from blade_pipelines.registry import load_preset

    return load_preset(name, kind)


def preset_names(kind: Literal["training-free", "student"] = "training-free") -> tuple[str, ...]:
    """Return the names of the presets of a kind."""
    from blade_pipelines.registry import preset_names

    return preset_names(kind)


def released_students() -> dict[str, tuple[ReleasedStudent, ...]]:
    """Return what there is to know of published students, by Hub id."""
    from blade_pipelines.registry import released_students

    return released_students()
