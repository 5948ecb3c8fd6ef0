"""Times of calls: with an exact number of them, or, of short ones on CUDA, by Triton's `do_bench`."""

from __future__ import annotations

import inspect
import sys
from contextlib import nullcontext
from types import ModuleType

import pytest
import torch

from blade.metrics import timing
from blade.metrics.timing import SHORTEST_TIMING_MS, Measurement, measure, time_calls, time_short_calls


def test_calls_on_the_cpu_are_exact_and_numbered():
    turns = []
    found = time_calls(turns.append, "cpu", 3)
    assert turns == [0, 1, 2] and len(found.milliseconds) == 3
    assert found.median >= 0 and found.peak_bytes is None
    turns.clear()
    assert len(time_short_calls(turns.append, "cpu", 2).milliseconds) == 2 and turns == [0, 1]
    turns.clear()
    assert len(measure(turns.append, "cpu", 2).milliseconds) == 2 and turns == [0, 0, 1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What a stand-in for Triton's `do_bench` is asked for; a call takes 4 ms, after one that takes 5."""
    asked: list[dict[str, object]] = []

    def do_bench(fn, warmup=25, rep=100, grad_to_none=None, quantiles=None, return_mode="mean"):
        asked.append({"warmup": warmup, "rep": rep, "return_mode": return_mode})
        for _ in range(8):
            fn()
        return [4.0 for _ in range(int(rep / 4.0)) if fn() is None]

    module = ModuleType("triton.testing")
    module.do_bench = do_bench  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton.testing", module)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    def of_one_call(function, device, calls):
        assert calls == 1
        function(0)
        return Measurement((5.0,), 1000)

    monkeypatch.setattr(timing, "time_calls", of_one_call)
    return asked


def test_short_calls_on_cuda_are_left_to_triton(bench):
    turns = []
    found = time_short_calls(turns.append, "cuda", 3)
    # a few long calls: twice as many as are asked for, since the estimate may be off; short ones fill the time
    assert bench == [{"warmup": 5.0, "rep": SHORTEST_TIMING_MS, "return_mode": "all"}]
    assert len(found.milliseconds) == 25 and found.median == 4.0 and found.peak_bytes == 1000
    assert turns == [0, *range(8 + 25)], "calls take their inputs in turn"
    time_short_calls(turns.append, torch.device("cuda:1"), 30)
    assert bench[-1]["rep"] == 2 * 30 * 5.0


def test_without_triton_calls_on_cuda_are_exact(bench, monkeypatch):
    monkeypatch.setattr(timing.importlib.util, "find_spec", lambda name: None)
    assert time_short_calls(lambda turn: None, "cuda", 1) == Measurement((5.0,), 1000)
    assert bench == []


def test_triton_takes_what_it_is_given():
    testing = pytest.importorskip("triton.testing")
    parameters = inspect.signature(testing.do_bench).parameters
    assert {"fn", "warmup", "rep", "return_mode"} <= set(parameters)
    assert '"all"' in inspect.getsource(testing)
