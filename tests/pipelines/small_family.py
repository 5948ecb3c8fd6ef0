"""A kind of transformer of the tests that all families pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TEXT_TOKENS = 6


@dataclass(frozen=True)
class Family:
    """One kind of transformer, and its inputs."""

    make: Callable[[], Any]
    inputs: Callable[..., dict[str, Any]]
    """Takes a grid of tokens, `batch`, `seed` and `timestep`."""
    text: int = 0
    """Text tokens that self-attention sees."""
    text_first: bool = True
    """True if the model puts them before the video."""
    history: Callable[[tuple[int, int, int]], int] = lambda grid: 0
    """Tokens before the video in the model and behind it under BLADE, by the grid."""
    first_frame_apart: bool = False
    """True if the first frame stays first in every order."""
    shared: tuple[str, ...] = ()
    """Names of inputs that all items of a batch share."""
    frames_apart: bool = False
    """True if an order runs inside each frame."""
    least_frames: int = 1
    """The fewest frames that Diffusers' own class takes, or that are more than its history."""
    blocks_compile: bool = True
    """True if each block of Diffusers' own is one graph."""
    checkpoints: bool = True
    """True if Diffusers' own gradient checkpointing works."""
    float32_parts: tuple[str, ...] = ()
    """Endings of the names of modules that the class runs in float32, whatever the dtype of the others."""

    def grid(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return a grid with as many frames as the class needs."""
        return (max(grid[0], self.least_frames), *grid[1:])
