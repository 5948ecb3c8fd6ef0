"""The kernels of block statistics against the specification, and the CPU's statistics too."""

import importlib.util

import pytest
import torch
from blade_kernels import triton_support
from blade_kernels.block_selection import largest_key_offsets, triton_statistics_launch, value_spread

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
IMPLEMENTATIONS = [pytest.param("triton", marks=needs_triton), "cpu"]
if torch.cuda.is_available():
    pytestmark = pytest.mark.gpu


def tokens(count, dtype, lengths=None, size=16, seed=0):
    """(2, count, 3, size) with a mean far from zero, NaN where tokens are absent."""
    x = torch.randn(2, count, 3, size, generator=torch.Generator().manual_seed(seed)).add(2.0).to(dtype)
    for item, length in enumerate(() if lengths is None else lengths):
        x[item, length:] = float("nan")
    return x


def on_device(lengths):
    return None if lengths is None else torch.tensor(lengths, device=DEVICE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "lengths"), [(1, None), (64, None), (111, None), (111, (70, 0))])
@pytest.mark.parametrize("block", [16, 24])
def test_the_spread_of_values_matches_the_specification(implementation, dtype, count, lengths, block):
    v = tokens(count, dtype, lengths)
    expected = value_spread(
        v.double(), block, key_lengths=lengths and torch.tensor(lengths), implementation="naive"
    ).float()
    found = value_spread(v.to(DEVICE), block, key_lengths=on_device(lengths), implementation=implementation).cpu()
    assert found.dtype == torch.float32
    # a sum of squares, less that of the mean: what float32 rounds of it
    torch.testing.assert_close(found.square(), expected.square(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("count", "lengths"), [(1, None), (64, None), (111, None), (111, (70, 0)), (37, (2, 37))])
@pytest.mark.parametrize(("block", "samples", "largest"), [(16, 4, 2), (16, 16, 3), (24, 6, 6), (24, 5, 0)])
def test_the_keys_to_sample_are_those_of_the_specification(implementation, count, lengths, block, samples, largest):
    k = tokens(count, torch.float32, lengths)
    drawn = torch.rand(3, block, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :samples].to(torch.int16)
    expected = largest_key_offsets(
        k.double(), drawn, largest, block, key_lengths=lengths and torch.tensor(lengths), implementation="naive"
    )
    found = largest_key_offsets(
        k.to(DEVICE), drawn.to(DEVICE), largest, block, key_lengths=on_device(lengths), implementation=implementation
    ).cpu()
    assert found.dtype == torch.int32 and bool((found.diff(dim=-1) >= 0).all())
    for one, other in zip(found.flatten(0, 2).tolist(), expected.flatten(0, 2).tolist(), strict=True):
        assert {*one} == {*other}  # a short block may repeat either of its tokens


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_keys_at_nearly_one_distance_are_exchanged_in_half_precision(implementation):
    k = tokens(300, torch.bfloat16, size=64)
    drawn = torch.arange(8)
    found = largest_key_offsets(k.to(DEVICE), drawn.to(DEVICE), 4, 32, implementation=implementation).cpu()
    expected = largest_key_offsets(k.double(), drawn, 4, 32, implementation="naive")
    distances = (k.double() - k.double().mean(1, keepdim=True)).square().sum(-1).transpose(1, 2)
    distances = torch.nn.functional.pad(distances, (0, -300 % 32)).unflatten(-1, (-1, 32))
    # the CPU rounds products to the type of the keys
    tolerance = {"triton": 1e-5, "cpu": 1e-2}[implementation]
    sums = [distances.gather(-1, x.long()).topk(4).values.sum(-1) for x in (found, expected)]
    torch.testing.assert_close(*sums, rtol=tolerance, atol=0)


@needs_triton
def test_says_what_it_can_not_compute(monkeypatch):
    unsupported = triton_statistics_launch.statistics_unsupported
    assert "not torch.float64" in unsupported(torch.zeros(1, 1, 1, 16, dtype=torch.float64), 16)
    assert "heads of 16, 32, 64 or 128, got 20" in unsupported(torch.zeros(1, 1, 1, 20), 16)
    assert "at most 128 tokens of a block, got 129" in unsupported(torch.zeros(1, 1, 1, 16), 129)
    with pytest.raises(NotImplementedError, match="at most 128 tokens of a block, got 256"):
        value_spread(torch.zeros(1, 1, 1, 16), 256, implementation="triton")
    monkeypatch.setattr(triton_support, "interpreted", lambda: False)
    if DEVICE == "cpu":
        assert "run on NVIDIA GPUs" in unsupported(torch.zeros(1, 1, 1, 16), 16)


@needs_triton
@pytest.mark.slow
def test_the_operators_are_registered_soundly():
    k = tokens(70, torch.float32).to(DEVICE)
    offsets, lengths = torch.arange(4, device=DEVICE), torch.tensor([70, 3], device=DEVICE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.blade.largest_key_offsets.default, (k, offsets, 2, 16, lengths), test_utils=checks)
    torch.library.opcheck(torch.ops.blade.value_spread.default, (k, 16, None), test_utils=checks)
