"""A card's checks of its CuTe kernels, with plain PyTorch in their place."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from blade_kernels.block_sparse import cute, cute_table
from cute_stand_ins import StandInCudnn, StandInFlash

from blade.benchmarks.card import checks, steps

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for the CPU"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


@pytest.fixture
def hopper(monkeypatch):
    """Pretend that the CPU is an H100 whose kernels compute in float32, at small sizes."""
    stand_ins = {"cudnn": StandInCudnn(90), "flash": StandInFlash()}
    rows = tuple(replace(row, dtypes=(torch.float32,)) for row in cute_table.ROWS)
    monkeypatch.setattr(cute_table, "ROWS", rows)
    monkeypatch.setattr(cute, "architecture", lambda device_type: 90)
    monkeypatch.setattr(steps, "architecture", lambda device_type: 90)
    for module in (cute, checks):
        monkeypatch.setattr(module, "missing_library", lambda name: None)
    monkeypatch.setattr(cute, "library", stand_ins.__getitem__)
    return stand_ins


def test_every_kernel_is_a_step_those_of_the_presets_first(hopper):
    usual, unusual = steps._cute_kernels(torch.device("cpu"))
    assert [step.name for step in usual] == [
        f"CuTe kernel: {library} {direction} sm_90 128 128x128"
        for library in ("cudnn", "flash")
        for direction in ("forward", "backward")
    ]
    assert len({step.name for step in usual + unusual}) == len(cute_table.kernels_of(90))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cudnn forward sm_90 64 64x64", "flash backward sm_90 64 128x128"])
def test_right_kernels_pass_and_wrong_ones_do_not(hopper, monkeypatch, name):
    kernel = next(kernel for kernel in cute_table.kernels_of(90) if str(kernel) == name)
    library, direction = hopper[kernel.row.library], kernel.row.direction
    errors = checks.check_cute(kernel, torch.device("cpu"))
    results = {"forward": {"output", "log-sum-exp"}, "backward": {"dq", "dk", "dv"}}[direction]
    assert set(errors) == {f"{kind}, {result}" for kind in ("none", "dropped") for result in results}
    assert max(errors.values()) <= checks.FACTOR and any(
        call.backward == (direction == "backward") for call in library.calls
    )

    right = getattr(library, direction)
    monkeypatch.setattr(library, direction, lambda *given: tuple(1.01 * x for x in right(*given)), raising=False)
    with pytest.raises(checks.WrongResultError, match=name):
        checks.check_cute(kernel, torch.device("cpu"))


def test_a_library_that_is_not_installed_is_named(hopper, monkeypatch):
    monkeypatch.setattr(checks, "missing_library", lambda name: "its kernels are not installed")
    with pytest.raises(NotImplementedError, match="not installed"):
        checks.check_cute(cute_table.kernels_of(90)[0], torch.device("cpu"))
