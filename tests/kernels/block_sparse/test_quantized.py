"""Attention with 8-bit queries and keys: the kernel against the specification, and its error against float64."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from attention_call import attend
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import block_sparse_attention
from blade_kernels.block_sparse.quantized import dequantize, mean_keys, quantize, rounded_inputs

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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [16, 128])
def test_half_precision_and_other_blocks(case, dtype, block):
    inputs = case(300, batch=1, size=128, block_size=(block, block), pooled="dropped", dtype=dtype)
    out, lse = attend(inputs, "triton", precision="int8")
    exact, exact_lse = attend(inputs, "naive", precision="int8")
    assert out.dtype == dtype and error(out, exact) < 1e-2
    torch.testing.assert_close(lse, exact_lse, atol=2e-2, rtol=1e-2)


def published_scheme(inputs):
    """SageAttention's output over the kept blocks."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        from compare_precisions import as_published
    finally:
        sys.path.remove(str(SCRIPTS))
    row = torch.arange(inputs.q.shape[1]) // inputs.mask.block_size[0]
    column = torch.arange(inputs.k.shape[1]) // inputs.mask.block_size[1]
    keep = inputs.mask.keep[:, :, row][..., column]
    return as_published(inputs.q.float(), inputs.k.float(), inputs.v.float(), keep)


@pytest.mark.parametrize("spread", [1.0, 3.0])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_errs_little_more_than_the_published_scheme(case, block, spread):
    inputs = case(400, size=64, block_size=(block, block), density=0.5, dtype=torch.float32)
    inputs.mask.keep[..., 0] = True
    inputs.mask = BlockMask.from_dense(inputs.mask.keep, (block, block))
    generator = torch.Generator().manual_seed(2)
    inputs.k = inputs.k * spread * torch.rand(64, generator=generator) + 4 * torch.randn(64, generator=generator)
    exact = attend(inputs, "naive")[0]
    ours = error(attend(inputs, "cpu", precision="int8")[0], exact)
    theirs = error(published_scheme(inputs), exact)
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
    with pytest.raises(NotImplementedError, match='`precision` must be "full" where gradients are needed, got "int8"'):
        block_sparse_attention(*tensors, precision="int8")
    with torch.no_grad():
        block_sparse_attention(*tensors, precision="int8")
        with pytest.raises(ValueError, match="`precision` must be one of full, int8, got 'int4'"):
            block_sparse_attention(*tensors, precision="int4")
