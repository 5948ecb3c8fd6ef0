"""The data of a model family: presets, released students, benchmark sizes; a YAML file beside its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from blade.families.kinds import PRESET_KINDS, PresetKind
from blade.token_grid import TokenGrid


@dataclass(frozen=True, kw_only=True)
class ReleasedStudent:
    """A published LoRA that is no folder of this project, and what it needs beside its weights."""

    source: str
    """Hub id."""
    folder_word: str
    """A word of the subfolder that holds it."""
    preset: str
    """Name of the student preset of its attention."""
    steps: tuple[int, ...]
    """Numbers of steps that it was trained for."""
    scheduler: str
    """Class of its sampler in Diffusers."""
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the sampler over the configuration of the model's own scheduler."""

    def make_scheduler(self, scheduler: Any) -> Any:
        """Return the student's sampler.

        Args:
            scheduler: the model's own scheduler.
        """
        import diffusers

        return getattr(diffusers, self.scheduler).from_config(scheduler.config, **self.scheduler_options)


@dataclass(frozen=True, kw_only=True)
class BenchmarkLayer:
    """The size of a self-attention layer of a published model, for benchmarks."""

    title: str
    """The model and its resolution."""
    grid: TokenGrid
    """Tokens of one video."""
    heads: int
    """Attention heads."""
    head_dim: int = 128
    """Numbers in one head of one token."""


@dataclass(frozen=True, kw_only=True)
class FamilyData:
    """Everything about a model family that is data."""

    example_model: str | None = None
    """Hub id of a published pipeline, named in messages."""
    presets: Mapping[PresetKind, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """By kind and name, the values of a `BladeConfig` as plain JSON values."""
    released_students: tuple[ReleasedStudent, ...] = ()
    """Published students."""
    benchmark_layers: Mapping[str, BenchmarkLayer] = field(default_factory=dict)
    """Sizes by name."""
    ddim_scheduler: str | None = None
    """Diffusers' deterministic sampler of this family's v-prediction models."""

    @classmethod
    def from_yaml(cls, path: str | Path) -> FamilyData:
        """Read a family's data.

        Args:
            path: a YAML file with the fields of this class. `presets` holds one mapping of names for each kind,
                `released_students` a list for each Hub id, `benchmark_layers` a mapping of names whose `grid` has the
                fields of `TokenGrid`. Keys that begin with a dot are ignored, so that they can hold shared values.

        Raises:
            ValueError: if the file has a field that does not exist, or lacks one that must be there.
        """
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        values = {name: value for name, value in values.items() if not name.startswith(".")}
        unknown = sorted(set(values) - {item.name for item in fields(cls)})
        if unknown:
            raise ValueError(f"`{path}` must hold fields of FamilyData, got {unknown[0]!r}.")
        presets = values.get("presets", {})
        if not set(presets) <= set(PRESET_KINDS):
            raise ValueError(
                f"`presets` of {path} must be of the kinds {', '.join(PRESET_KINDS)}, got {list(presets)}."
            )
        try:
            students = tuple(
                _released_student(source, student)
                for source, listed in values.pop("released_students", {}).items()
                for student in listed
            )
            layers = {
                name: BenchmarkLayer(**{**layer, "grid": TokenGrid(**layer["grid"])})
                for name, layer in values.pop("benchmark_layers", {}).items()
            }
        except (TypeError, KeyError) as error:
            raise ValueError(f"`{path}` has an entry with a wrong or missing field: {error}.") from error
        return cls(released_students=students, benchmark_layers=layers, **values)


def _released_student(source: str, values: Mapping[str, Any]) -> ReleasedStudent:
    """Return the student of one entry, whose `scheduler` holds a `class` and options."""
    options = dict(values["scheduler"])
    scheduler = options.pop("class")
    settings = {**values, "steps": tuple(values["steps"]), "scheduler": scheduler, "scheduler_options": options}
    return ReleasedStudent(source=source, **settings)
