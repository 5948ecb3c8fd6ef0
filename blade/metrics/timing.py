"""Times and memory on the CPU and on CUDA."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch


@dataclass(frozen=True)
class Measurement:
    """Calls of a function, one after the other."""

    milliseconds: tuple[float, ...]
    """Of each call; on CUDA, the device's own."""
    peak_bytes: int | None
    """Most memory that was allocated on the CUDA device meanwhile, what lay there before included; None on the CPU."""

    @property
    def median(self) -> float:
        """Median milliseconds of a call."""
        return statistics.median(self.milliseconds)


def measure(function: Callable[[int], object], device: torch.device | str, repeats: int) -> Measurement:
    """Time calls of a function after one that does not count.

    Args:
        function: what is called, with the number of the call.
        device: where it computes.
        repeats: number of calls that count.
    """
    function(0)
    return time_calls(function, device, repeats)


def time_calls(function: Callable[[int], object], device: torch.device | str, calls: int) -> Measurement:
    """Time calls of a function that is warm; the arguments are those of `measure`."""
    if torch.device(device).type != "cuda":
        times = []
        for turn in range(calls):
            started = time.perf_counter()
            function(turn)
            times.append((time.perf_counter() - started) * 1e3)
        return Measurement(tuple(times), None)
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        marks = [_mark()]
        for turn in range(calls):
            function(turn)
            marks.append(_mark())
        torch.cuda.synchronize()
        return Measurement(_between(marks), torch.cuda.max_memory_allocated())


class Stopwatch:
    """Shares out one call's time among named regions; a region inside another is not counted in the outer one.

    On CUDA the boundaries are events in the stream, so that the device does not wait.
    """

    def __init__(self, device: torch.device | str) -> None:
        """Make a stopwatch for what computes on a device."""
        self._on_cuda = torch.device(device).type == "cuda"
        self._open: list[str] = []
        self._marks: list[Any] = []
        self._names: list[str] = []

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        """Count what happens inside as this region's."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def enter(self, name: str) -> None:
        """Begin a region."""
        self._open.append(name)
        self._boundary()

    def leave(self) -> None:
        """End the innermost region."""
        self._open.pop()
        self._boundary()

    def milliseconds(self) -> dict[str, float]:
        """Time of each region so far."""
        if self._on_cuda:
            torch.cuda.synchronize()
        total: defaultdict[str, float] = defaultdict(float)
        for name, ms in zip(self._names, _between(self._marks)):
            total[name] += ms
        return {name: ms for name, ms in total.items() if name}

    def _boundary(self) -> None:
        """From here on, time belongs to the innermost open region."""
        self._marks.append(_mark() if self._on_cuda else time.perf_counter())
        self._names.append(self._open[-1] if self._open else "")


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(marks: list[Any]) -> tuple[float, ...]:
    """Milliseconds from each mark to the next."""
    return tuple(
        (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end) for start, end in pairwise(marks)
    )
