"""Description of a loaded student: its steps, guidance and attention, and the preset for sparse attention on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from blade.attention.config import BladeConfig
from blade.families.kinds import PresetKind


def preset_kind(config: BladeConfig | None) -> PresetKind:
    """Return the kind of the preset from which sparse attention on a student's weights starts.

    Args:
        config: the attention that the student brings; None: none.

    Returns:
        `few-step` for a student that brings no sparse attention.
    """
    return "few-step" if config is None or config.attention == "dense" else "training-free"


@dataclass(frozen=True, kw_only=True)
class Student:
    """A loaded student; `print` it."""

    source: str
    """Folder or Hub id."""
    subfolder: str | None
    """Subfolder of the source."""
    step_counts: tuple[int, ...] | None
    """Numbers of steps that it is trained for; None if unknown."""
    guidance_scale: float
    """Weight of guidance that it is trained for: 1 is none."""
    config: BladeConfig | None
    """Its attention; None leaves the pipeline's as it was."""
    reach: Mapping[str, int] = field(default_factory=dict)
    """Number of modules that it changes, by transformer; nothing before it is loaded."""

    @property
    def steps(self) -> int | None:
        """Number of steps to run it with, the largest that it is trained for; None if unknown."""
        return None if self.step_counts is None else max(self.step_counts)

    @property
    def preset_kind(self) -> PresetKind:
        """Kind of the preset that `apply_blade` takes on it where the model has one; see `preset_kind`."""
        return preset_kind(self.config)

    def check_steps(self, steps: int) -> None:
        """Raise a `ValueError` if this is no number of steps that it is trained for."""
        if self.step_counts is not None and steps not in self.step_counts:
            counts = " or ".join(str(count) for count in self.step_counts)
            raise ValueError(f"`steps` must be {counts}, as the student {self.source} is trained, got {steps}.")

    def __str__(self) -> str:
        where = self.source if self.subfolder is None else f"{self.source}/{self.subfolder}"
        counts = self.step_counts
        steps = "steps unknown" if counts is None else f"{' or '.join(map(str, counts))} steps"
        if self.config is None:
            attention = "attention as it was, since it brings none"
        elif self.config.attention == "dense":
            attention = "dense attention"
        else:
            attention = f"{self.config.attention} at sparsity {self.config.sparsity:g}"
        if self.preset_kind == "few-step":
            attention += "; the few-step preset is meant for it"
        return f"student {where}: {steps}, guidance {self.guidance_scale:g}, {attention}"
