"""The numbers of frames that a pipeline makes, and of latent frames that stand for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VideoLengths:
    """Numbers of frames at equal steps, each step as many latent frames."""

    first: int
    """Fewest frames."""
    step: int
    """Frames from one length to the next."""
    first_latents: int
    """Latent frames of the fewest frames."""
    latents_per_step: int
    """Latent frames of a step."""
    last: int | None = None
    """Most frames; None: there is no limit."""
    rule: str
    """The lengths in words, for messages, such as "4n + 1 for a whole number n"."""

    @classmethod
    def of_compression(cls, step: int) -> VideoLengths:
        """Return the lengths of a VAE whose first frame is a latent frame, and every `step` further ones another."""
        return cls(first=1, step=step, first_latents=1, latents_per_step=1, rule=f"{step}n + 1 for a whole number n")

    def latent_frames(self, frames: int) -> int:
        """Return the latent frames of a video of so many frames, or of the last length before them."""
        return self.first_latents + (frames - self.first) // self.step * self.latents_per_step

    def longest(self, frames: int) -> int:
        """Return the longest length of at most so many frames, or the shortest of all."""
        if self.last is not None:
            frames = min(frames, self.last)
        return self.first + max(frames - self.first, 0) // self.step * self.step
