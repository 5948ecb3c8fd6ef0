"""Parts that every training shares: checkpoints that survive a kill at any point, a log, and progress."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blade.common.errors import first_line
from blade.common.files import OutputError, append_json_line, read_json_lines, replaced_whole, write_files
from blade.common.terminal import print_line


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint under a temporary name, then rename it, so that a kill leaves the old or the new one.

    Raises:
        OutputError: if it cannot be written, for example on a full disk; the old one stays as it is.
    """
    try:
        with replaced_whole(path) as temporary:
            torch.save(dict(state), temporary)
    except RuntimeError as error:  # PyTorch's writer has no other one
        raise OutputError(f"The checkpoint {path} cannot be written: {first_line(error)}") from error


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """Return the checkpoint at `path`, on the CPU, or None if there is none.

    Raises:
        ValueError: if it cannot be read, as it is truncated or is something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever PyTorch and its unpickler raise for a file that is none, or is a hostile one
        raise ValueError(f"the checkpoint {path} cannot be read: {first_line(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"the checkpoint {path} must hold a dict, got a {type(state).__name__}.")
    return state


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
        lines = read_json_lines(path)
        kept = [line for line in lines if not (line.get("stage") == stage and line.get("step", 0) > start)]
        write_files({path: "".join(json.dumps(line) + "\n" for line in kept).encode()})
        self._start, self._began = start, time.monotonic()

    def write(self, step: int, **values: Any) -> None:
        """Record values reached after `step` steps."""
        seconds = time.monotonic() - self._began
        record = {"stage": self.stage, "step": step, "seconds": round(seconds, 1), **values}
        append_json_line(self.path, record)
        shown = " ".join(f"{name}={value:.4g}" for name, value in values.items() if isinstance(value, float))
        if self.total is None:
            self.show(f"{self.stage} {step} {shown}")
            return
        left = seconds / max(step - self._start, 1) * (self.total - step)
        self.show(f"{self.stage} {step}/{self.total} {shown} ({left / 60:.0f} min left)")
