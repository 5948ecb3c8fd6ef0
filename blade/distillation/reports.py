"""Results of a distillation and of its dry run, which `print` shows as summaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "triton")
"""Packages whose versions are reported."""


@dataclass(frozen=True, kw_only=True)
class DistillationReport:
    """Result of a distillation; its `str` is a summary."""

    output: Path
    """The student's folder."""
    updates: int
    """Total updates of the generator."""
    seconds: float
    """Duration of this run."""
    skipped: Mapping[str, int]
    """Skipped steps of each role."""
    scores: Mapping[str, float]
    """Scores of the last validation."""

    def __str__(self) -> str:
        skipped = ", ".join(f"{role} {count}" for role, count in self.skipped.items())
        lines = [
            f"student     {self.output} (blade-generate --student {self.output})",
            f"updates     {self.updates}, in {self.seconds / 60:.1f} min; left out: {skipped}",
        ]
        lines += [f"validation  {name} {value:.3f}" for name, value in self.scores.items()]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated cost of a distillation; its `str` is a summary."""

    seconds_trajectories: float
    """Time of all teacher trajectories, extrapolated from one of the student's steps; 0 if there are none."""
    gib_trajectories: float
    """Disk space of the trajectories."""
    seconds_ode_update: float
    """Time of an update of ODE initialization; 0 if there is none."""
    seconds_update: float
    """Time of any other update."""
    ode_updates: int
    """Updates of ODE initialization."""
    updates: int
    """Total updates."""
    peak_gib: float
    """Peak memory of the GPU, or of the process on a CPU."""
    device: str
    versions: Mapping[str, str | None]
    trained_parameters: int
    prompts: int
    """Number of prompts; 0 in a run with random weights."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self) | {"versions": dict(self.versions)}

    def __str__(self) -> str:
        ode_updates = min(self.updates, self.ode_updates)
        later_updates = self.updates - ode_updates
        seconds_updates = ode_updates * self.seconds_ode_update + later_updates * self.seconds_update
        seconds = self.seconds_trajectories + seconds_updates
        lines = []
        if self.seconds_trajectories:
            hours = self.seconds_trajectories / 3600
            lines.append(
                f"teacher     {hours:.2f} hours (measured on a step) and {self.gib_trajectories:.2f} GiB of disk"
            )
        if self.ode_updates:
            lines.append(f"ODE update  {self.seconds_ode_update:.2f} s (measured), {ode_updates} of them")
        lines += [
            f"update      {self.seconds_update:.2f} s (measured), {later_updates} of them",
            f"together    {seconds / 3600:.2f} hours",
            f"memory      {self.peak_gib:.2f} GiB at most on {self.device} (measured)",
            f"trained     {self.trained_parameters:,} weights, of student and fake score together",
            f"prompts     {self.prompts:,}, whose embeddings are made first; that time is not counted"
            if self.prompts
            else "weights     random, so that nothing was loaded; text encoders and VAE come on top",
        ]
        return "\n".join(lines)
