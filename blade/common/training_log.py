"""Parts that every training shares: checkpoints that survive a kill at any point, a log, and progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blade.common.files import replaced_whole
from blade.common.terminal import print_line


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint under a temporary name, then rename it, so that a kill leaves the old or the new one.

    Raises:
        OSError: if it cannot be written, for example on a full disk; the old one stays as it is.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_whole(path) as temporary:
            torch.save(dict(state), temporary)
    except (OSError, RuntimeError) as error:  # PyTorch's writer has a RuntimeError for a full disk
        raise OSError(f"The checkpoint {path} cannot be written, so that the one before it stays: {error}") from error


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint at `path`, on the CPU, or None if there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def numpy_rng(seed: int, *stream: int) -> np.random.Generator:
    """A generator for one step of one stream of randomness, so that a resumed run draws what the first would have."""
    return np.random.default_rng([seed, *stream])


def torch_rng(seed: int, *stream: int, device: str = "cpu") -> torch.Generator:
    """As `numpy_rng`, for PyTorch."""
    state = np.random.SeedSequence([seed, *stream]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0] >> 1))


class TrainingLog:
    """Appends a JSON line a record and shows it, with the time left where the number of steps is known.

    A resumed run drops the records that its checkpoint had not reached, so that steps appear once and in order.
    """

    def __init__(
        self,
        path: Path,
        *,
        stage: str,
        start: int,
        total: int | None,
        show: Callable[[str], None] = print_line,
    ) -> None:
        self.path, self.stage, self.total, self.show = path, stage, total, show
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in _lines(path) if not (line["stage"] == stage and line["step"] > start)]
        with replaced_whole(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._start, self._began = start, time.monotonic()

    def write(self, step: int, **values: Any) -> None:
        """Record values reached after `step` steps."""
        seconds = time.monotonic() - self._began
        record = {"stage": self.stage, "step": step, "seconds": round(seconds, 1), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        shown = " ".join(f"{name}={value:.4g}" for name, value in values.items() if isinstance(value, float))
        if self.total is None:
            self.show(f"{self.stage} {step} {shown}")
            return
        left = seconds / max(step - self._start, 1) * (self.total - step)
        self.show(f"{self.stage} {step}/{self.total} {shown} ({left / 60:.0f} min left)")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
