"""What the count of block selection says is what the interpreted kernels touch."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from blade_kernels.block_selection import importance, selection

from blade.attention.adaptive import AdaptivePlan, draw_table, select
from blade.attention.config import AdaptiveConfig, BladeConfig
from blade.token_grid import TokenGrid

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU"),
]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import count_selection

        yield count_selection
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def touched(monkeypatch):
    """Kernel launches in turn: the name, and the addresses of bytes that are loaded and stored."""
    import kernel_memory

    launches = []
    check = kernel_memory.Launch.check

    def noting(self, kind, addresses, width):
        if not launches or launches[-1][0] is not self:
            launches.append((self, {"load": set(), "store": set(), "atomic update": set()}))
        launches[-1][1][kind].update((addresses[:, None] + np.arange(width)).ravel().tolist())
        return check(self, kind, addresses, width)

    monkeypatch.setattr(kernel_memory.Launch, "check", noting)
    return launches


def configuration(**options):
    details = {
        "block_size": 16, "probe_tokens": 4, "pooled_window": 16, "token_order": "raster", "rounding": "spread",
        "probe_keys": "half-largest", "statistic": "residual", "value_weighting": True, "budget": "layer",
    }  # fmt: skip
    return BladeConfig(attention="asa", sparsity=0.7, pooled_tokens="dropped", asa=AdaptiveConfig(**details | options))


@pytest.mark.parametrize(
    ("grid", "tolerance"), [(TokenGrid(2, 16, 16), 0.0), (TokenGrid(2, 16, 16, text_after=20), 0.25)]
)
def test_bytes_are_those_that_the_kernels_touch(script, touched, monkeypatch, grid, tolerance):
    """Exact where blocks fill the tiles; otherwise what is padded is counted, and the flags of absent keys are not."""
    config, heads, size = configuration(), 2, 16
    counted = [launch for launch in script.count_launches(config, grid, heads, size) if "kernel" in launch.name]
    for module in (importance, selection):
        monkeypatch.setattr(module, "choose_implementation", lambda *arguments: "triton")
    plan = AdaptivePlan.of(config, grid, torch.device("cpu"))
    q, k, v = torch.randn(3, 1, grid.sequence_length, heads, size).bfloat16()
    mask = select(q, k, v, plan, draw_table(config, layer=1, heads=heads, steps=1)[0])
    mask.check_values()
    assert [launch.name for launch in counted] == [launch.kernel for launch, _ in touched]
    for launch, (_, bytes_of) in zip(counted, touched, strict=True):
        read, written = len(bytes_of["load"]), len(bytes_of["store"])
        assert abs(launch.read - read) <= tolerance * launch.read, launch
        if launch.name == "digit_histogram_kernel":  # only the values that occur are counted up
            assert 0 < len(bytes_of["atomic update"]) <= launch.written
        else:
            assert abs(launch.written - written) <= tolerance * launch.written, launch


def test_operations_and_seconds(script):
    launches = script.count_launches(configuration(), TokenGrid(2, 16, 16), 3, 64)
    assert sum(launch.flops for launch in launches) == 2 * 3 * 128 * 128 * 64
    launch = script.Launch(name="x", read=4_800_000, written=0, flops=989_000_000)
    assert launch.floor_seconds == pytest.approx(1e-6)
    assert launch.predicted_seconds(1e12) == pytest.approx(989e-6)
    assert script.dense_seconds(32760, 12, 128) == pytest.approx(10.27e-3, rel=1e-3)


def test_heads_that_share_a_launch_are_counted(script, monkeypatch):
    monkeypatch.setattr(script.triton_launch, "STATISTICS_BYTES", 1)
    launches = script.count_launches(configuration(), TokenGrid(2, 16, 16), 3, 64)
    assert [launch.launches for launch in launches if launch.flops] == [3]


def test_a_tensor_is_counted_without_its_repetitions(script):
    x = torch.zeros(3, 1, 5, dtype=torch.int16)
    assert script.tensor_bytes((x, [x.expand(3, 4, 5)], 1)) == 2 * 30
