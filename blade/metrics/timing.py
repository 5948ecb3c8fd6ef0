"""Times and memory on the CPU and on CUDA."""

from __future__ import annotations

import importlib.util
import itertools
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


SHORTEST_TIMING_MS = 100.0
"""Milliseconds that calls on CUDA are timed for at the least, as `do_bench` does by itself."""


def measure(function: Callable[[int], object], device: torch.device | str, repeats: int) -> Measurement:
    """Time short calls, see `time_short_calls`, after one that does not count."""
    function(0)
    return time_short_calls(function, device, repeats)


def time_short_calls(function: Callable[[int], object], device: torch.device | str, repeats: int) -> Measurement:
    """Time calls of something short that is warm, such as a kernel.

    On CUDA, `triton.testing.do_bench` does it, which empties the L2 cache before each call, and does not count that.
    Unlike with `time_calls`, the number of calls is then not exact: about twice `repeats`, or as many as
    `SHORTEST_TIMING_MS` have room for if those are more, after eight or so that do not count. The peak of memory is
    that of one call before, without what empties the cache. Without Triton, and on the CPU, this is `time_calls`.

    Args:
        function: what is called, with the number of the call.
        device: where it computes.
        repeats: number of calls that count.
    """
    if torch.device(device).type != "cuda" or importlib.util.find_spec("triton") is None:
        return time_calls(function, device, repeats)
    from triton.testing import do_bench

    single = time_calls(function, device, 1)
    turns = itertools.count()
    with torch.cuda.device(device):
        milliseconds = do_bench(
            lambda: function(next(turns)),
            warmup=single.median,
            rep=max(SHORTEST_TIMING_MS, 2 * repeats * single.median),
            return_mode="all",
        )
    return Measurement(tuple(milliseconds), single.peak_bytes)


def time_calls(function: Callable[[int], object], device: torch.device | str, calls: int) -> Measurement:
    """Time an exact number of calls of a function that is warm, such as whole passes of a model.

    Args:
        function: what is called, with the number of the call.
        device: where it computes.
        calls: how many.
    """
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
