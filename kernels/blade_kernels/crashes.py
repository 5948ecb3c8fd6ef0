"""Crashes of a device, after which a process computes nothing more on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class DeviceCrashError(Exception):
    """A kernel has crashed a device, such as by an illegal memory access; only a new process can use it again.

    No `RuntimeError`, as PyTorch's own is, so that what goes on after those of a missing feature does not go on here.
    """


@contextmanager
def naming_crashes(what: str, device: torch.device | str) -> Iterator[None]:
    """Wait for a device at the end of a `with` block, so that a crash in it is not taken for one of what comes later.

    Args:
        what: what is computed, for the error's message.
        device: where.

    Raises:
        DeviceCrashError: if a kernel crashes.
    """
    try:
        yield
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
    except torch.AcceleratorError as error:
        reason = str(error).strip().partition("\n")[0]
        raise DeviceCrashError(f"{what} has crashed {device}: {reason}. A new process can use it again.") from error
