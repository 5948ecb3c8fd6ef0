import blade_kernels.block_sparse.cpu_walk as walk
import blade_kernels.scratch as scratch
import pytest
import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_selection.selection import random_blocks
from blade_kernels.block_sparse import PooledTokens, block_sparse_attention, pool_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

ODD = [1, 63, 64, 129, 1000]
KINDS = [None, "all", "dropped"]


def attend(case, **arguments):
    return block_sparse_attention(
        case.q,
        case.k,
        case.v,
        case.mask,
        pooled=case.pooled(),
        key_lengths=case.key_lengths,
        implementation="cpu",
        **arguments,
    )


def expected(dense, case, **arguments):
    return dense(case.q, case.k, case.v, case.mask, pooled=case.pooled(), key_lengths=case.key_lengths, **arguments)


@pytest.fixture(params=["whole", "in many pieces"])
def pieces(request, monkeypatch):
    """The walk must not depend on how much it takes at a time."""
    if request.param != "whole":
        monkeypatch.setattr(walk, "_THREAD_ELEMENTS", 600)


@pytest.mark.parametrize("tokens", ODD)
@pytest.mark.parametrize("pooled", KINDS)
@pytest.mark.parametrize("lengths", [False, True])
def test_matches_dense_attention_in_float64(dense, case, tokens, pooled, lengths, pieces):
    inputs = case(tokens, pooled=pooled, lengths=lengths)
    for found, exact in zip(attend(inputs, return_lse=True), expected(dense, inputs)):
        torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("shared", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("block_size", [(16, 16), (8, 16), (32, 5)])
def test_shared_masks_and_unequal_blocks(dense, case, shared, block_size):
    inputs = case(70, shared=shared, block_size=block_size, pooled="dropped")
    torch.testing.assert_close(attend(inputs), expected(dense, inputs)[0])


def test_queries_and_keys_of_different_lengths(dense, case):
    inputs = case(37, keys=90, lengths=True)
    torch.testing.assert_close(attend(inputs, scale=0.9), expected(dense, inputs, scale=0.9)[0])


@pytest.mark.parametrize("shared", [(False, False), (True, True)])
@pytest.mark.parametrize("pooled", KINDS)
@pytest.mark.parametrize("bound", [2**18, 1100, 600])  # all three heads together, two, and one by one
def test_heads_that_keep_as_many_blocks(monkeypatch, dense, case, shared, pooled, bound):
    monkeypatch.setattr(walk, "_THREAD_ELEMENTS", bound // torch.get_num_threads())
    inputs = case(64, heads=3, shared=shared, pooled=pooled, grad=True)
    masks, heads = inputs.mask.keep.shape[:2]
    inputs.mask = random_blocks((masks, heads, 4, 8), 3, (16, 8), generator=torch.Generator().manual_seed(1))
    together = [some.stop - some.start for _, some in walk_of(inputs)]
    assert together == {2**18: [3, 3], 1100: [2, 1, 2, 1], 600: [1] * 6}[bound]
    found, exact = attend(inputs, return_lse=True), expected(dense, inputs)
    tensors = (inputs.q, inputs.k, inputs.v)
    weight = torch.randn_like(exact[0])
    for one, other in zip(found, exact):
        torch.testing.assert_close(one, other)
    losses = [(out * weight).sum() + lse.sin().sum() for out, lse in (found, exact)]
    for one, other in zip(*(torch.autograd.grad(loss, tensors) for loss in losses)):
        torch.testing.assert_close(one, other)


def walk_of(inputs):
    nothing = PooledTokens(inputs.k[:, :0], inputs.v[:, :0], torch.zeros(0))
    pooled = nothing if inputs.pooled() is None else inputs.pooled()
    return walk.Heads(inputs.q, inputs.k, inputs.v, inputs.mask, pooled, None, 1.0)


@pytest.mark.parametrize("tokens", ODD)
def test_all_blocks_are_pytorchs_own_attention(case, tokens):
    inputs = case(tokens, density=1.1)
    own = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    )
    torch.testing.assert_close(attend(inputs), own.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_errs_no_more_than_the_plain_computation(dense, as_good_as, case, dtype):
    inputs = case(129, size=32, pooled="all", dtype=dtype)
    found, exact = attend(inputs, return_lse=True), expected(dense, inputs)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    for one, precise, plain in zip(found, exact, expected(dense, inputs, dtype=dtype)):
        as_good_as(one, precise, plain)


def test_peaked_logits_neither_overflow_nor_vanish(dense, case):
    inputs = case(64, pooled="all", dtype=torch.float32)
    inputs.q = inputs.q * 1000
    found, exact = attend(inputs, return_lse=True), expected(dense, inputs)
    torch.testing.assert_close(found[0].double(), exact[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1].double(), exact[1], atol=0, rtol=1e-5)


def test_rows_without_blocks_give_zeros(case):
    inputs = case(64)
    out, lse = attend(inputs, return_lse=True)
    assert not out[0, :16, 0].any() and bool((lse[0, :16, 0] == -torch.inf).all())


def test_dropped_windows_alone_stand_for_a_row_that_keeps_nothing(case):
    """Windows of one token, all of them dropped: dense attention, by pooled tokens alone."""
    inputs = case(40, block_size=(16, 8))
    mask = BlockMask.from_dense(torch.zeros_like(inputs.mask.keep), (16, 8))
    pooled = pool_tokens(inputs.k, inputs.v, 1, block_size=8)
    found = block_sparse_attention(inputs.q, inputs.k, inputs.v, mask, pooled=pooled)
    own = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    )
    torch.testing.assert_close(found, own.transpose(1, 2))


def test_dropped_windows_count_nothing_twice(case):
    """Windows of one token for exactly the dropped blocks: whatever is kept, together it is dense attention."""
    inputs = case(61, block_size=(16, 8))
    pooled = pool_tokens(inputs.k, inputs.v, 1, block_size=8)
    found = block_sparse_attention(inputs.q, inputs.k, inputs.v, inputs.mask, pooled=pooled)
    own = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    )
    torch.testing.assert_close(found, own.transpose(1, 2))


@pytest.mark.parametrize("pooled", KINDS)
@pytest.mark.parametrize("lengths", [False, True])
def test_gradients_pass_through_output_log_sum_exp_and_pooling(case, pooled, lengths):
    inputs = case(9, batch=1, heads=1, size=3, block_size=(4, 3), pooled=pooled, lengths=lengths, grad=True)

    def run(q, k, v):
        inputs.q, inputs.k, inputs.v = q, k, v
        out, lse = attend(inputs, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(run, (inputs.q, inputs.k, inputs.v))


@pytest.mark.parametrize("tokens", [1, 63, 129])
@pytest.mark.parametrize("pooled", KINDS)
def test_gradients_match_dense_attention(dense, case, tokens, pooled, pieces):
    inputs = case(tokens, pooled=pooled, lengths=True, grad=True)
    found, exact = attend(inputs, return_lse=True), expected(dense, inputs)
    weight = torch.randn_like(exact[0])
    tensors = (inputs.q, inputs.k, inputs.v)
    losses = [(out * weight).sum() + lse[lse.isfinite()].sin().sum() for out, lse in (found, exact)]
    for one, other in zip(*(torch.autograd.grad(loss, tensors) for loss in losses)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_what_is_not_seen_never_leaks(case, poison):
    """Keys past `key_lengths`, and blocks that no row keeps, may hold anything: output and gradients stay the same."""
    clean = case(61, block_size=(16, 8), lengths=True)
    clean.mask.keep[:, :, :, [0, 2]] = False
    mask = BlockMask.from_dense(clean.mask.keep, (16, 8))
    unseen = torch.arange(61).ge(clean.key_lengths.unsqueeze(-1))
    unseen[:, :8] = unseen[:, 16:24] = True
    results = []
    for fill in (0.0, poison):
        tensors = [clean.q.clone(), *(x.masked_fill(unseen[:, :, None, None], fill) for x in (clean.k, clean.v))]
        tensors = [x.requires_grad_() for x in tensors]
        out = block_sparse_attention(*tensors, mask, key_lengths=clean.key_lengths)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for clean_result, poisoned in zip(*results):
        assert torch.equal(clean_result, poisoned)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.floats(0, 1.1),
    st.sampled_from(KINDS),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_shape_matches_dense_attention(dense, case, tokens, keys, block_size, density, pooled, lengths, seed):
    inputs = case(tokens, keys=keys, block_size=block_size, density=density, pooled=pooled, lengths=lengths, seed=seed)
    for found, exact in zip(attend(inputs, return_lse=True), expected(dense, inputs)):
        torch.testing.assert_close(found, exact)


def test_no_gathered_copy_outgrows_the_caches(case, monkeypatch):
    """The keys and values gathered at a time, and the logits, stay within a bound for each thread; the rest within a
    head's keys.
    """
    largest = {}
    original = scratch.Scratch.__call__

    def record(self, name, *shape):
        tensor = original(self, name, *shape)
        largest[name] = max(largest.get(name, 0), tensor.numel())
        return tensor

    monkeypatch.setattr(scratch.Scratch, "__call__", record)
    monkeypatch.setattr(walk, "_THREAD_ELEMENTS", 1000)
    inputs = case(512, size=8, block_size=(16, 16), density=0.8, grad=True)
    attend(inputs).sum().backward()
    pieces = {name: largest[name] for name in ("gathered", "logits", "ds")}
    assert max(pieces.values()) <= 1000 * torch.get_num_threads()
    assert max(size for name, size in largest.items() if name not in pieces) <= 512 * 8


def test_compiles_into_one_graph_with_its_gradients(case):
    inputs = case(40, pooled="dropped", lengths=True, dtype=torch.float32, grad=True)
    pooled = inputs.pooled()
    mask, tensors = inputs.mask, (inputs.q, inputs.k, inputs.v)

    def run(q, k, v, keep, lengths):
        fresh = PooledTokens(pooled.k.detach(), pooled.v.detach(), pooled.log_weight, pooled.key_block)
        mask = BlockMask.from_dense(keep, (16, 8))
        return block_sparse_attention(q, k, v, mask, pooled=fresh, key_lengths=lengths)

    results = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        out = function(*tensors, mask.keep, inputs.key_lengths)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled)


def test_the_operators_are_registered_soundly(case):
    inputs = case(20, batch=1, pooled="dropped", lengths=True, grad=True)
    pooled = inputs.pooled()
    mask = inputs.mask
    arguments = (
        inputs.q, inputs.k, inputs.v, mask.keep, mask.counts, mask.indices, None, [16, 8], pooled.k.detach(),
        pooled.v.detach(), pooled.log_weight, pooled.key_block, inputs.key_lengths, 0.3,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.blade.block_sparse_cpu.default, arguments)


def test_gradient_checkpointing_recomputes_the_same(case):
    inputs = case(40, pooled="all", grad=True)

    def run(q, k, v):
        return block_sparse_attention(q, k, v, inputs.mask, pooled=pool_tokens(k, v, 5))

    tensors = (inputs.q, inputs.k, inputs.v)
    plain = torch.autograd.grad(run(*tensors).square().sum(), tensors)
    out = torch.utils.checkpoint.checkpoint(run, *tensors, use_reentrant=False)
    for one, other in zip(plain, torch.autograd.grad(out.square().sum(), tensors)):
        assert torch.equal(one, other)
