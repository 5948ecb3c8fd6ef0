"""The checker of what interpreted kernels touch finds what it is there for, and lets right kernels pass."""

import pytest
import torch

triton = pytest.importorskip("triton")
from kernel_memory import VERSIONS, checked_kernels  # noqa: E402
from triton import language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterError  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


@triton.jit
def copy(source, target, count, step, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    values = tl.load(source + at * step, at < count)
    tl.store(target + at, values, at < count)


@triton.jit
def copy_to_the_start(source, target, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(target + at, tl.load(source + tl.program_id(0) * SIZE + at))


@triton.jit
def copy_in_place(values, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(values + at, tl.load(values + SIZE * (1 - tl.program_id(0)) + tl.arange(0, SIZE)))


@triton.jit
def store_twice(target, SIZE: tl.constexpr):
    tl.store(target + tl.arange(0, SIZE) // 2, tl.arange(0, SIZE))


@triton.jit
def count(target, places, SIZE: tl.constexpr):
    tl.atomic_add(target + tl.load(places + tl.arange(0, SIZE)), 1)


@triton.jit
def multiply(target, factor):
    tl.store(target, tl.program_id(0) + factor * factor)


def fails(words, kernel, *arguments):
    with pytest.raises(InterpreterError, match=words) as found:
        kernel(*arguments)
    name, _, place = str(found.value).partition(": ")
    assert "KernelMemoryError" in name and f"at {__name__.rpartition('.')[2]}.py:" in place


def test_a_right_kernel_passes():
    source, target = torch.arange(20), torch.full((20,), -1)
    with checked_kernels() as launched:
        copy[(3,)](source, target, 20, 1, SIZE=8)
        copy[(3,)](torch.arange(40)[::2], target, 20, 2, SIZE=8)
    assert launched == ["copy", "copy"] and torch.equal(target, torch.arange(0, 40, 2))


def test_an_overrun_is_found():
    source, target = torch.arange(64)[:20].clone(), torch.zeros(64, dtype=torch.long)
    fails(r"copy: load of 1 of 5 lanes outside of every tensor, the first 160 bytes from the start of `source`, "
          r"which has 160", copy[(3,)], source, target, 21, 1, 8)  # fmt: skip
    fails("store of 4 of 8 lanes outside", copy[(3,)], torch.arange(64), torch.zeros(20, dtype=torch.long), 64, 1, 8)
    fails("load of 7 of 8 lanes outside", copy[(3,)], source, target, 64, -1000, 8)


def test_a_view_is_a_fence():
    storage = torch.arange(64)
    fails("load of 1 of 5 lanes outside", copy[(3,)], storage[:20], torch.zeros(64, dtype=torch.long), 21, 1, 8)
    fails("store of 1 of 5 lanes outside", copy[(3,)], storage, torch.zeros(64, dtype=torch.long)[5:25], 21, 1, 8)
    fails("load of 1 of 5 lanes outside", copy[(3,)], storage[:39:2], torch.zeros(64, dtype=torch.long), 21, 2, 8)


def test_a_race_is_found():
    source = torch.arange(16)
    copy_to_the_start[(1,)](source, torch.zeros(8, dtype=torch.long), SIZE=8)
    fails("two programs store to one place of `target`", copy_to_the_start[(2,)], source, source[:8].clone(), 8)
    fails("loads what another one stores in `values`", copy_in_place[(2,)], source.clone(), 8)
    fails("lanes of one store overlap in `target`", store_twice[(1,)], torch.zeros(8, dtype=torch.int32), 8)


def test_atomic_updates_stay_in_their_tensor_and_may_meet():
    target = torch.zeros(4, dtype=torch.int32)
    count[(3,)](target, torch.tensor([0, 1, 1, 3]), SIZE=4)
    assert target.tolist() == [3, 6, 0, 3]
    fails("atomic update of 1 of 4 lanes outside", count[(3,)], target, torch.tensor([0, 1, 4, 3]), 4)


def test_a_wrapped_integer_is_found():
    target = torch.zeros(1, dtype=torch.int32)
    multiply[(1,)](target, 46340)
    assert target.item() == 46340**2
    fails("mul.* of 32-bit integers reaches 2,147,488,281", multiply[(1,)], target, 46341)


def test_another_version_of_triton_is_refused(monkeypatch):
    monkeypatch.setattr("kernel_memory.version", lambda name: "4.1.0")
    with (
        pytest.raises(RuntimeError, match=f"was written for Triton {', '.join(VERSIONS)}, not 4.1"),
        checked_kernels(),
    ):
        pass
