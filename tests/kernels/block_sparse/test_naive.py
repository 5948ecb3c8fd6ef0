"""The specification of block-sparse attention against values worked out by hand and PyTorch's own attention."""

import math
from dataclasses import replace

import pytest
import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import PooledTokens, block_sparse_attention, pool_tokens
from blade_kernels.block_sparse.naive import naive_attention

KINDS = [None, "all", "dropped"]


def attend(case, **arguments):
    return block_sparse_attention(
        case.q,
        case.k,
        case.v,
        case.mask,
        pooled=case.pooled(),
        key_lengths=case.key_lengths,
        implementation="naive",
        **arguments,
    )


def own_attention(q, k, v, seen=None, scale=None):
    """PyTorch's attention; `seen` is (B or 1, H or 1, S, T) bool."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=seen, scale=scale)
    return out.transpose(1, 2)


def pairs_seen(mask, queries, keys):
    """(B or 1, H or 1, S, T) bool, a pair of tokens at a time."""
    seen = torch.zeros(*mask.keep.shape[:2], queries, keys, dtype=torch.bool)
    for query in range(queries):
        for key in range(keys):
            seen[..., query, key] = mask.keep[..., query // mask.block_size[0], key // mask.block_size[1]]
    return seen


def test_values_worked_out_by_hand():
    """Two queries in blocks of one, of which the second keeps the first key alone; no query keeps the third key."""
    q = torch.ones(1, 2, 1, 1)
    k = torch.tensor([1.0, 2.0, 5.0]).log().view(1, 3, 1, 1)  # weights 1, 2 and 5
    v = torch.tensor([3.0, 6.0, 100.0]).view(1, 3, 1, 1)
    mask = BlockMask.from_dense(torch.tensor([[[[True, True, False], [True, False, False]]]]), (1, 1))
    out, lse = block_sparse_attention(q, k, v, mask, scale=1.0, return_lse=True, implementation="naive")
    torch.testing.assert_close(out.flatten(), torch.tensor([5.0, 3.0]))  # (3 + 2 * 6) / 3
    torch.testing.assert_close(lse.flatten().exp(), torch.tensor([3.0, 1.0]))
    pooled = PooledTokens(k[:, :1], torch.full((1, 1, 1, 1), 1.0), torch.tensor([math.log(3.0)]))  # weight 3
    for key_block, expected in ((None, [3.0, 1.5]), (1, [5.0, 1.5])):  # the first query keeps block 1
        owner = None if key_block is None else torch.tensor([key_block], dtype=torch.int32)
        own = replace(pooled, key_block=owner)
        out = block_sparse_attention(q, k, v, mask, pooled=own, scale=1.0, implementation="naive")
        torch.testing.assert_close(out.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("tokens", [1, 17, 64])
@pytest.mark.parametrize("block_size", [(16, 8), (5, 7)])
@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True)])
def test_kept_blocks_are_pytorchs_attention_under_a_mask(case, tokens, block_size, shared):
    inputs = case(tokens, keys=tokens + 9, block_size=block_size, shared=shared)
    inputs.mask.keep[..., 0] = True  # PyTorch's attention has no rows without keys
    expected = own_attention(
        inputs.q, inputs.k, inputs.v, pairs_seen(inputs.mask, tokens, tokens + 9).expand(2, 2, -1, -1), 0.7
    )
    torch.testing.assert_close(attend(inputs, scale=0.7), expected)


def test_absent_keys_are_as_cut_off(case):
    inputs = case(40, density=1.1, lengths=True)
    expected = [
        own_attention(inputs.q[item : item + 1], inputs.k[item : item + 1, :n], inputs.v[item : item + 1, :n])
        for item, n in enumerate(inputs.key_lengths)
    ]
    torch.testing.assert_close(attend(inputs), torch.cat(expected))


def test_a_pooled_token_is_its_mean_key_once_for_every_token_it_stands_for(case):
    inputs = case(23, density=1.1)
    pooled = pool_tokens(inputs.k, inputs.v, 5, start=3)  # four windows of five tokens
    inputs.mask.keep[..., 1:] = False  # the first eight keys
    found = block_sparse_attention(inputs.q, inputs.k, inputs.v, inputs.mask, pooled=pooled, implementation="naive")
    keys, values = (
        torch.cat((x[:, :8], means.repeat_interleave(5, 1)), 1)
        for x, means in ((inputs.k, pooled.k), (inputs.v, pooled.v))
    )
    torch.testing.assert_close(found, own_attention(inputs.q, keys, values))


def test_windows_of_one_token_for_the_dropped_blocks_are_dense_attention(case):
    inputs = case(61)
    pooled = pool_tokens(inputs.k, inputs.v, 1, block_size=8)
    found = block_sparse_attention(inputs.q, inputs.k, inputs.v, inputs.mask, pooled=pooled, implementation="naive")
    torch.testing.assert_close(found, own_attention(inputs.q, inputs.k, inputs.v))


def test_rows_with_nothing_kept_give_zeros_and_no_gradients(case):
    inputs = case(64, grad=True)  # the first row of the first head keeps nothing
    out, lse = attend(inputs, return_lse=True)
    assert not out[0, :16, 0].any() and bool((lse[0, :16, 0] == -torch.inf).all())
    grads = torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), (inputs.q, inputs.k, inputs.v))
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert not grads[0][0, :16, 0].any()


@pytest.mark.parametrize("pooled", KINDS)
@pytest.mark.parametrize("lengths", [False, True])
def test_gradients_pass_through_output_log_sum_exp_and_pooling(case, pooled, lengths):
    inputs = case(9, batch=1, heads=1, size=3, block_size=(4, 3), pooled=pooled, lengths=lengths, grad=True)

    def run(q, k, v):
        inputs.q, inputs.k, inputs.v = q, k, v
        out, lse = attend(inputs, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(run, (inputs.q, inputs.k, inputs.v))


@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_keys_that_no_query_sees_may_hold_anything(case, poison):
    clean = case(61, lengths=True)
    clean.mask.keep[:, :, :, [0, 2]] = False
    unseen = torch.arange(61).ge(clean.key_lengths.unsqueeze(-1))
    unseen[:, :8] = unseen[:, 16:24] = True
    results = []
    for fill in (0.0, poison):
        tensors = [clean.q.clone(), *(x.masked_fill(unseen[:, :, None, None], fill) for x in (clean.k, clean.v))]
        tensors = [x.requires_grad_() for x in tensors]
        out = block_sparse_attention(*tensors, clean.mask, key_lengths=clean.key_lengths, implementation="naive")
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    for clean_result, poisoned in zip(*results):
        assert torch.equal(clean_result, poisoned)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_computes_in_single_precision_at_the_least_and_rounds_once(case, dtype):
    inputs = case(70, size=32, pooled="dropped", dtype=dtype)
    out, lse = attend(inputs, return_lse=True)
    precision = torch.promote_types(dtype, torch.float32)
    assert out.dtype == dtype and lse.dtype == precision
    pooled = inputs.pooled()
    pooled = replace(pooled, k=pooled.k.to(precision), v=pooled.v.to(precision))
    tensors = [x.to(precision) for x in (inputs.q, inputs.k, inputs.v)]
    exact, exact_lse = naive_attention(*tensors, inputs.mask, pooled, None, 32**-0.5)
    assert torch.equal(out, exact.to(dtype)) and torch.equal(lse, exact_lse)


def test_autocast_rounds_the_inputs_and_nothing_else(case):
    inputs = case(20, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(inputs)
    inputs.q, inputs.k, inputs.v = (x.bfloat16() for x in (inputs.q, inputs.k, inputs.v))
    assert torch.equal(found, attend(inputs))


def test_compiles_into_one_graph(case):
    inputs = case(40, pooled="dropped", lengths=True)
    compiled = torch.compile(lambda: attend(inputs, return_lse=True), backend="aot_eager", fullgraph=True)
    for eager, own in zip(attend(inputs, return_lse=True), compiled()):
        torch.testing.assert_close(eager, own)
