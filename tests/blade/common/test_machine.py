"""Peak memory is in GiB, whatever unit the system counts in."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from blade.common.machine import peak_memory_gib


@pytest.mark.parametrize(("system", "unit"), [("Linux", 2**10), ("Darwin", 1)])
def test_the_peak_of_the_process_is_in_gib(monkeypatch: pytest.MonkeyPatch, system: str, unit: int) -> None:
    usage = SimpleNamespace(ru_maxrss=3 * 2**30 // unit)
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setitem(sys.modules, "resource", SimpleNamespace(getrusage=lambda _: usage, RUSAGE_SELF=0))
    assert peak_memory_gib(torch.device("cpu")) == 3


def test_windows_tells_the_peak_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(rss=1, peak_wset=3 * 2**30))
    assert peak_memory_gib(torch.device("cpu")) == 3


def test_the_peak_of_a_cuda_device_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * 2**30 * (device.index + 1))
    assert peak_memory_gib(torch.device("cuda:1")) == 10


def test_this_process_takes_memory_but_not_all() -> None:
    assert 0.05 < peak_memory_gib(torch.device("cpu")) < 1000
