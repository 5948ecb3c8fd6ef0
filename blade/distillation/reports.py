"""What a distillation, or its dry run, has come to; `print` it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "triton")
"""Whose versions are told."""


@dataclass(frozen=True, kw_only=True)
class DistillationReport:
    """What became of a distillation; `print` it."""

    output: Path
    """The student's folder."""
    updates: int
    """Of the generator, all in all."""
    seconds: float
    """Of this run."""
    skipped: Mapping[str, int]
    """Steps that were left out, of each role."""
    scores: Mapping[str, float]
    """Of the last validation."""

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
    """What a distillation would take; `print` it."""

    seconds_trajectories: float
    """Of all trajectories of the teacher, from one of the student's steps; 0 where there are none."""
    gib_trajectories: float
    """That they take on the disk."""
    seconds_ode_update: float
    """Of an update of ODE initialization; 0 where there is none."""
    seconds_update: float
    """Of any other."""
    ode_updates: int
    updates: int
    """In all."""
    peak_gib: float
    """Memory at most: of the GPU, or of the process on a CPU."""
    device: str
    versions: Mapping[str, str | None]
    trained_parameters: int
    prompts: int
    """None in a run with random weights."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"versions": dict(self.versions)}

    def __str__(self) -> str:
        ode_updates = min(self.updates, self.ode_updates)
        others = self.updates - ode_updates
        seconds = self.seconds_trajectories + ode_updates * self.seconds_ode_update + others * self.seconds_update
        lines = []
        if self.seconds_trajectories:
            hours = self.seconds_trajectories / 3600
            lines.append(
                f"teacher     {hours:.2f} hours (measured on a step) and {self.gib_trajectories:.2f} GiB of disk"
            )
        if self.ode_updates:
            lines.append(f"ODE update  {self.seconds_ode_update:.2f} s (measured), {ode_updates} of them")
        lines += [
            f"update      {self.seconds_update:.2f} s (measured), {others} of them",
            f"together    {seconds / 3600:.2f} hours",
            f"memory      {self.peak_gib:.2f} GiB at most on {self.device} (measured)",
            f"trained     {self.trained_parameters:,} weights, of student and fake score together",
            f"prompts     {self.prompts:,}, whose embeddings are made first; that time is not counted"
            if self.prompts
            else "weights     random, so that nothing was loaded; text encoders and VAE come on top",
        ]
        return "\n".join(lines)
