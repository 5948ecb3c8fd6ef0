"""The Triton kernels against dense attention in float64: on a CUDA device, or interpreted on the CPU."""

import importlib.util
import itertools
import logging

import blade_kernels.block_sparse.api as api
import pytest
import torch
from attention_call import DEVICE, attend
from blade_kernels import triton_support
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import block_sparse_attention, pool_tokens, triton_attention
from blade_kernels.block_sparse.launch_table import BLOCK_SIZES, HEAD_SIZES, KERNELS, architecture, launch_config

pytestmark = [pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)

LENGTHS = [1, 63, 64, 129, 1000, 2049]
KINDS = [None, "all", "dropped"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Poison memory that a kernel leaves unwritten: with NaN, or with an index far out of range."""

    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: poison(empty_like(*args, **options)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **options: poison(new_empty(*args, **options)))


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def descriptors(request, monkeypatch):
    """Load through pointers, and through descriptors, whatever the table says."""
    tiles = triton_attention._tiles
    monkeypatch.setattr(triton_attention, "_tiles", lambda *args: tiles(*args[:2], request.param))
    return request.param


def results(function, inputs, seed=0):
    """Output, log-sum-exp, and the gradients of q, k and v through both."""
    out, lse = function(inputs)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    loss = (out.double() * weight).sum() + lse[lse.isfinite()].double().sin().sum()
    return [out, lse, *torch.autograd.grad(loss, (inputs.q, inputs.k, inputs.v))]


def check(dense, as_good_as, inputs):
    """Output, log-sum-exp and gradients err no more than those of dense attention in the same precision."""

    def run(dtype):
        pooled, lengths = inputs.pooled(), inputs.key_lengths
        return lambda _: dense(
            inputs.q, inputs.k, inputs.v, inputs.mask, pooled=pooled, key_lengths=lengths, dtype=dtype
        )

    plain, exact = results(run(inputs.q.dtype), inputs), results(run(torch.float64), inputs)
    for found, precise, coarse in zip(results(attend, inputs), exact, plain):
        as_good_as(found, precise, coarse)


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "pooled"), [*itertools.product(LENGTHS[:5], KINDS), (2049, None)])
def test_errs_no_more_than_the_plain_computation(dense, as_good_as, case, tokens, pooled, descriptors):
    few = tokens < 500
    check(
        dense, as_good_as,
        case(
            tokens,
            batch=2 if few else 1,
            heads=2 if few else 1,
            size=64,
            block_size=(64, 32 if few else 128),
            density=1.1 if tokens == 1 else 0.4 if few else 0.15,
            pooled=pooled,
            # over one key the plain computation's rounding cancels to nothing in float32
            dtype=torch.bfloat16 if tokens == 1 else torch.float32,
            grad=True,
        ),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("block_size", [(16, 16), (16, 64), (32, 32), (64, 128), (128, 64), (128, 128)])
def test_half_precision_and_all_sizes(dense, as_good_as, case, dtype, size, block_size):
    check(
        dense, as_good_as,
        case(300, batch=1, size=size, block_size=block_size, pooled="dropped", lengths=True, dtype=dtype, grad=True),
    )  # fmt: skip


@pytest.mark.parametrize("shared", [(True, False), (False, True), (True, True)])
def test_shared_masks_different_lengths_and_key_lengths(dense, as_good_as, case, shared, descriptors):
    check(
        dense, as_good_as,
        case(
            70, keys=150, size=64, block_size=(32, 64), shared=shared, lengths=True, pooled="all", dtype=torch.float32,
            grad=True,
        ),
    )  # fmt: skip


def test_all_blocks_are_pytorchs_own_attention(case):
    inputs = case(129, size=64, block_size=(64, 64), density=1.1, dtype=torch.float32)
    own = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)), scale=-0.2
    )
    torch.testing.assert_close(attend(inputs, scale=-0.2)[0], own.transpose(1, 2), atol=2e-6, rtol=2e-6)


def test_rows_without_blocks_give_zeros_and_get_no_gradient(case):
    inputs = case(64, size=64, block_size=(32, 32), density=-1.0, dtype=torch.float32, grad=True)
    out, lse, *grads = results(attend, inputs)
    assert not out.any() and bool((lse == -torch.inf).all())
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("pooled", KINDS)
def test_skipped_heads_and_items_without_keys_touch_nothing_else(dense, as_good_as, case, pooled, descriptors):
    """With lists no longer than the longest row, and the last block a short one that some rows keep alone."""
    inputs = case(100, heads=3, size=64, block_size=(32, 32), pooled=pooled, dtype=torch.float32, grad=True)
    keep = torch.zeros(2, 3, 4, 4, dtype=torch.bool)
    keep[0, 0, :, 3] = keep[1, 1, 1:3, 1:3] = keep[1, 2, 3, :2] = True
    inputs.mask = BlockMask.from_dense(keep, (32, 32), capacity=2).longest_rows_first()
    inputs.mask.check_values()
    if pooled != "all":  # there an item without keys has no token to attend to
        inputs.key_lengths = torch.tensor([100, 0])
    check(dense, as_good_as, inputs)


@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_what_is_not_seen_never_leaks(case, poison, descriptors):
    """Keys past `key_lengths`, and blocks that no row keeps, may hold anything: output and gradients stay the same."""
    found = []
    for fill in (0.0, poison):
        inputs = case(150, size=64, block_size=(32, 32), lengths=True, dtype=torch.float32)
        inputs.mask.keep[:, :, :, [0, 2]] = False
        inputs.mask = BlockMask.from_dense(inputs.mask.keep, (32, 32))
        unseen = torch.arange(150).ge(inputs.key_lengths.unsqueeze(-1))
        unseen[:, :32] = unseen[:, 64:96] = True
        inputs.k, inputs.v = (x.masked_fill(unseen[:, :, None, None], fill) for x in (inputs.k, inputs.v))
        for x in (inputs.q, inputs.k, inputs.v):
            x.requires_grad_()
        found.append(results(attend, inputs))
    for clean, poisoned in zip(*found):
        assert torch.equal(clean, poisoned)


def test_the_order_of_rows_changes_nothing(case):
    inputs = case(200, batch=1, size=64, block_size=(32, 32), pooled="dropped", dtype=torch.float32, grad=True)
    before = results(attend, inputs)
    inputs.mask = inputs.mask.longest_rows_first()
    counts = inputs.mask.counts.gather(-1, inputs.mask.order.long())
    assert bool((counts.diff(dim=-1) <= 0).all()) and bool((counts.diff(dim=-1) < 0).any())
    for one, other in zip(before, results(attend, inputs)):
        assert torch.equal(one, other)


def test_any_strides_are_read(case):
    """Views into one projection, and a gradient that is one number expanded."""
    inputs = case(100, size=64, block_size=(32, 32), dtype=torch.float32)
    joint = torch.cat((inputs.q, inputs.k, inputs.v), -1).to(DEVICE)
    found = []
    for together in (False, True):
        tensors = [x if together else x.contiguous() for x in joint.chunk(3, -1)]
        tensors = [x.detach().requires_grad_() for x in tensors]
        assert tensors[0].is_contiguous() is not together
        out = block_sparse_attention(*tensors, inputs.mask.to(DEVICE), implementation="triton")
        found.append([out, *torch.autograd.grad(out.sum(), tensors)])
    for one, other in zip(*found):
        assert torch.equal(one, other)


def test_the_same_input_gives_the_same_bits(case):
    inputs = case(129, batch=1, size=64, block_size=(32, 32), pooled="all", dtype=torch.bfloat16, grad=True)
    for one, other in zip(results(attend, inputs), results(attend, inputs)):
        assert torch.equal(one, other)


def test_the_operators_are_registered_soundly(case, monkeypatch):
    monkeypatch.undo()  # the check compares what is not written with itself
    inputs = case(
        40, batch=1, size=64, block_size=(32, 32), pooled="dropped", lengths=True, dtype=torch.float32, grad=True
    )
    pooled, mask = inputs.pooled(), inputs.mask
    arguments = (
        inputs.q, inputs.k, inputs.v, mask.keep, mask.counts, mask.indices, None, [32, 32], pooled.k.detach(),
        pooled.v.detach(), pooled.log_weight, pooled.key_block, inputs.key_lengths, 0.3,
    )  # fmt: skip
    arguments = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(torch.ops.blade.block_sparse_triton.default, tuple(arguments))


def test_checkpointing_and_compilation_compute_the_same(case, monkeypatch):
    monkeypatch.undo()
    inputs = case(70, size=64, block_size=(32, 32), dtype=torch.float32)
    tensors = [x.to(DEVICE).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    mask = inputs.mask.to(DEVICE)

    def run(q, k, v):
        pooled = pool_tokens(k, v, 8)
        return block_sparse_attention(q, k, v, mask, pooled=pooled, implementation="triton")

    def checkpointed(*args):
        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)

    plain = run(*tensors)
    expected = [plain, *torch.autograd.grad(plain.square().sum(), tensors)]
    for function in (checkpointed, torch.compile(run, backend="aot_eager", fullgraph=True)):
        out = function(*tensors)
        for one, other in zip(expected, [out, *torch.autograd.grad(out.square().sum(), tensors)]):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cpu", torch.float64, 64, (64, 64)), "not torch.float64"),
        (("cpu", torch.float32, 80, (64, 64)), "heads of 64 or 128, got 80"),
        (("cpu", torch.float32, 64, (64, 8)), r"blocks of 16, 32, 64 or 128 tokens, got \(64, 8\)"),
        (("cpu", torch.float32, 64, (64, 64)), "run on NVIDIA GPUs"),
    ],
)
def test_says_what_it_can_not_do(monkeypatch, arguments, message):
    monkeypatch.setattr(triton_support, "interpreted", lambda: False)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(triton_attention.unsupported(*arguments))


@pytest.mark.parametrize(
    ("problems", "chosen", "words"),
    [
        ((None, None), "triton", None),
        (("no heads", None), "flex", "uses FlexAttention: no heads."),
        (
            ("no heads", "no blocks"),
            "cpu",
            "uses plain PyTorch (`cpu`), which is slow on cuda: no heads; no blocks.",
        ),
    ],
)
def test_auto_takes_triton_on_cuda_or_says_once_why_not(monkeypatch, caplog, problems, chosen, words):
    monkeypatch.setattr(api.triton_attention, "unsupported", lambda *_: problems[0])
    monkeypatch.setattr(api.flex, "unsupported", lambda *_: problems[1])
    monkeypatch.setattr(api.cute, "unsupported", lambda *_, **__: "not verified")
    api._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        call = api._Call("cuda", torch.bfloat16, 64, (128, 128), False, False, False, False, "full")
        found = {api._resolve("auto", *call) for _ in range(2)}
    assert found == {chosen}
    assert [record.message for record in caplog.records] == (
        [] if words is None else [f"Block-sparse attention {words}"]
    )


def test_every_size_has_a_configuration_whose_tiles_divide_its_blocks():
    for arch in {
        architecture(capability) for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    }:
        for kernel in KERNELS:
            for size in HEAD_SIZES:
                for block_size in [(bq, bk) for bq in BLOCK_SIZES for bk in BLOCK_SIZES]:
                    for half in (True, False):
                        config = launch_config(kernel, arch, size, block_size, half=half)
                        assert block_size[0] % config.block_m == block_size[1] % config.block_n == 0
    with pytest.raises(ValueError, match=r"`capability` must be at least \(8, 0\), got \(7, 5\)"):
        architecture((7, 5))
