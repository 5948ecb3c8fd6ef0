"""Attention in 8 bits: the kernels against the specification, and its error against float64."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from attention_call import DEVICE, attend
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import api, block_sparse_attention, triton_attention
from blade_kernels.block_sparse.naive import rounded_weights
from blade_kernels.block_sparse.quantized import (
    dequantize,
    mean_keys,
    quantize,
    rounded_inputs,
    rounded_values,
)

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
KINDS = [None, "all", "dropped"]
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def shifted(case, **options):
    """Inputs whose keys have a large part in common, and an outlier channel, as those of video transformers do."""
    inputs = case(150, size=64, block_size=(32, 32), **options)
    generator = torch.Generator().manual_seed(1)
    common = 4 * torch.randn(1, 1, inputs.k.shape[2], 64, generator=generator)
    inputs.k = (inputs.k + common.to(inputs.k)).contiguous()
    return inputs


def error(found, exact):
    return float((found.double() - exact.double()).norm() / exact.double().norm())


@needs_triton
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("pooled", KINDS)
def test_the_kernel_computes_with_what_the_integers_stand_for(case, pooled, lengths):
    inputs = shifted(case, pooled=pooled, lengths=lengths, dtype=torch.float32)
    if lengths:
        for item, length in enumerate(inputs.key_lengths):
            inputs.k[item, length:] = inputs.v[item, length:] = float("nan")
        if pooled is not None:
            inputs.pooled = lambda clean=inputs.pooled: None  # of keys that are not there
    found = attend(inputs, "triton", precision="int8")
    for implementation in ("cpu", "naive"):
        expected = attend(inputs, implementation, precision="int8")
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
    full = attend(inputs, "naive")
    seen = full[1].isfinite()
    assert 1e-3 < error(found[0], full[0]) < 0.02
    assert error(found[1][seen], full[1][seen]) < 2e-3 and torch.equal(found[1].isfinite(), seen)


@needs_triton
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("pooled", KINDS)
def test_the_kernel_computes_with_what_8_bit_floats_stand_for(case, pooled, lengths):
    inputs = shifted(case, pooled=pooled, lengths=lengths, dtype=torch.float32)
    inputs.v = inputs.v * torch.logspace(-2, 2, 64)  # channels of very different magnitudes
    if lengths:
        for item, length in enumerate(inputs.key_lengths):
            inputs.k[item, length:] = inputs.v[item, length:] = float("nan")
        if pooled is not None:
            inputs.pooled = lambda clean=inputs.pooled: None  # of keys that are not there
    out, lse = attend(inputs, "triton", precision="fp8")
    expected, expected_lse = attend(inputs, "naive", precision="fp8")
    by_channel = expected.abs().amax((0, 1, 2))
    torch.testing.assert_close(out / by_channel, expected / by_channel, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=2e-5)
    full = attend(inputs, "naive")[0]
    integers = attend(inputs, "naive", precision="int8")[0]
    # values that cancel err as each of them does: by some 2.6 % for weights and as much for values
    assert error(integers / by_channel, full / by_channel) < error(out / by_channel, full / by_channel) < 0.05


@needs_triton
def test_8_bit_floats_are_rounded_to_the_nearest():
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # all from 0 up, the largest is 448
    halves = (every[1:] + every[:-1]) / 2
    values = torch.cat((every, halves, halves * (1 + 1e-6), halves * (1 - 1e-6)))
    values = torch.nn.functional.pad(torch.cat((values, -values)), (0, 1024 - 2 * len(values))).view(1, 16, 1, 64)
    found = triton_attention.round_values(values.to(DEVICE), torch.ones(1, 1, 64, device=DEVICE), None)
    assert torch.equal(found.cpu().float(), values.to(torch.float8_e4m3fn).float())


def test_values_are_rounded_by_channel_and_weights_to_powers_of_two():
    v = torch.randn(2, 50, 3, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 8)
    v[0, :, 0, 0] = 0
    back = rounded_values(v, None)
    assert ((back - v).abs() <= v.abs() / 16 + v.abs().amax(1, keepdim=True) * 2**-10 / 448).all()
    assert not back[0, :, 0, 0].any() and (back != v).any()
    v[1, 30:] = float("nan")
    lengths = torch.tensor([50, 30])
    torch.testing.assert_close(rounded_values(v, lengths)[1, :30], rounded_values(v[1:, :30], None)[0])
    assert not rounded_values(v, lengths)[1, 30:].any()
    weights = torch.linspace(0, 1, 999)
    torch.testing.assert_close(rounded_weights(weights), weights, atol=2**-10 / 448, rtol=1 / 16)
    # halving the largest weight halves all of them, but for the smallest
    torch.testing.assert_close(rounded_weights(weights / 2), rounded_weights(weights) / 2, atol=2**-9 / 448, rtol=0)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("precision", "block"), [("int8", 16), ("int8", 128), ("fp8", 32), ("fp8", 128)])
def test_half_precision_and_other_blocks(case, dtype, precision, block):
    inputs = case(300, batch=1, size=128, block_size=(block, block), pooled="dropped", dtype=dtype)
    out, lse = attend(inputs, "triton", precision=precision)
    exact, exact_lse = attend(inputs, "naive", precision=precision)
    assert out.dtype == dtype and error(out, exact) < 1e-2
    torch.testing.assert_close(lse, exact_lse, atol=2e-2, rtol=1e-2)


def published_scheme(inputs, precision):
    """The output over the kept blocks of SageAttention or, in 8-bit floats, of SageAttention2."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        from compare_precisions import as_published
    finally:
        sys.path.remove(str(SCRIPTS))
    row = torch.arange(inputs.q.shape[1]) // inputs.mask.block_size[0]
    column = torch.arange(inputs.k.shape[1]) // inputs.mask.block_size[1]
    keep = inputs.mask.keep[:, :, row][..., column]
    return as_published(inputs.q.float(), inputs.k.float(), inputs.v.float(), keep, float8=precision == "fp8")


@pytest.mark.parametrize("spread", [1.0, 3.0])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_errs_little_more_than_the_published_scheme(case, block, spread, precision):
    inputs = case(400, size=64, block_size=(block, block), density=0.5, dtype=torch.float32)
    inputs.mask.keep[..., 0] = True
    inputs.mask = BlockMask.from_dense(inputs.mask.keep, (block, block))
    generator = torch.Generator().manual_seed(2)
    inputs.k = inputs.k * spread * torch.rand(64, generator=generator) + 4 * torch.randn(64, generator=generator)
    exact = attend(inputs, "naive")[0]
    ours = error(attend(inputs, "cpu" if precision == "int8" else "naive", precision=precision)[0], exact)
    theirs = error(published_scheme(inputs, precision), exact)
    assert 0 < ours <= 1.3 * theirs, (ours, theirs)


def test_rounding_is_by_block_and_undone(case):
    x = torch.randn(2, 70, 3, 16, generator=torch.Generator().manual_seed(0))
    x[0, 32:64, 1] *= 1000
    x[1, :32] = 0
    values, scales = quantize(x, 32)
    assert values.dtype == torch.int8 and values.shape == x.shape and scales.shape == (2, 3, 3)
    back = dequantize(values, scales, 32)
    steps = scales.repeat_interleave(32, 2)[..., :70].transpose(1, 2)[..., None]
    assert ((back - x).abs() <= 0.5001 * steps).all() and int(values.abs().max()) == 127
    assert not back[1, :32].any()


def test_the_mean_of_keys_leaves_out_those_that_are_not_there():
    k = torch.randn(2, 10, 3, 4)
    k[1, 6:] = float("nan")
    mean = mean_keys(k, torch.tensor([10, 6]))
    torch.testing.assert_close(mean, torch.stack((k[0].mean(0), k[1, :6].mean(0))))
    assert not mean_keys(k, torch.tensor([0, 0])).any()
    torch.testing.assert_close(mean_keys(k[:1], None), k[:1].mean(1))


def test_the_log_sum_exp_is_that_of_the_keys_themselves(case):
    inputs = shifted(case, pooled="all", dtype=torch.float64)
    lacking = rounded_inputs(inputs.q, inputs.k, inputs.pooled(), None, (32, 32))[3]
    assert float(lacking.abs().mean()) > 1
    assert error(attend(inputs, "naive", precision="int8")[1], attend(inputs, "naive")[1]) < 1e-3


def test_gradients_and_unknown_precisions_are_refused(case):
    inputs = case(40, dtype=torch.float32, grad=True)
    tensors = (inputs.q, inputs.k, inputs.v, inputs.mask)
    for precision in ("int8", "fp8"):
        with pytest.raises(NotImplementedError, match=f'"full" where gradients are needed, got "{precision}"'):
            block_sparse_attention(*tensors, precision=precision)
    with torch.no_grad():
        block_sparse_attention(*tensors, precision="int8")
        block_sparse_attention(*tensors, precision="fp8")
        with pytest.raises(ValueError, match="`precision` must be one of full, int8, fp8, got 'int4'"):
            block_sparse_attention(*tensors, precision="int4")
        for implementation in ("cpu", "flex"):
            with pytest.raises(NotImplementedError, match="computed by 'triton' and 'naive' alone"):
                block_sparse_attention(*tensors, precision="fp8", implementation=implementation)


def test_8_bit_floats_are_left_to_cards_that_multiply_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 6))
    monkeypatch.setattr(triton_attention, "missing_triton", lambda device: None)
    call = api._Call("cuda", torch.bfloat16, 128, (128, 128), False, False, True, False, "fp8")
    with pytest.raises(NotImplementedError, match=r"need compute capability 8.9, got 8.6. Use 'full' or 'int8'"):
        api._resolve("auto", *call)
    assert api._resolve("auto", *call._replace(precision="int8")) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 9))
    assert api._resolve("auto", *call) == "triton"
    with pytest.raises(NotImplementedError, match="need key blocks of at least 32 tokens, got 16"):
        api._resolve("auto", *call._replace(block_size=(16, 16)))
