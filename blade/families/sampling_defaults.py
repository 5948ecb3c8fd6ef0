"""Sampling defaults of a model: the size, steps and guidance that its family recommends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """Values that a family recommends; None leaves the default of the pipeline's call or of its scheduler."""

    height: int | None = None
    """Pixels."""
    width: int | None = None
    """Pixels."""
    frames: int | None = None
    """Number of frames."""
    fps: int | None = None
    """Frames a second."""
    steps: int | None = None
    """Denoising steps."""
    guidance_scale: float | None = None
    """Weight of classifier-free guidance."""
    guidance_scale_2: float | None = None
    """The same, of a second transformer."""
    negative_prompt: str | None = None
    """Content that the video should not have."""
    flow_shift: float | None = None
    """Shift of a flow-matching scheduler toward high noise, for the size that is made."""
