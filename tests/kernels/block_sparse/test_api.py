from dataclasses import replace

import pytest
import torch
from blade_kernels.block_sparse import PooledTokens, block_sparse_attention, pool_tokens, resolve_implementation


def test_output_alone_or_with_log_sum_exp(case):
    inputs = case(20)
    out, lse = block_sparse_attention(inputs.q, inputs.k, inputs.v, inputs.mask, return_lse=True)
    assert out.shape == inputs.q.shape and lse.shape == inputs.q.shape[:3]
    assert torch.equal(block_sparse_attention(inputs.q, inputs.k, inputs.v, inputs.mask), out)


def test_no_pooled_tokens_are_as_none(case):
    inputs = case(20)
    empty = pool_tokens(inputs.k, inputs.v, 4, start=3, stop=3)
    found = block_sparse_attention(inputs.q, inputs.k, inputs.v, inputs.mask, pooled=empty)
    assert torch.equal(found, block_sparse_attention(inputs.q, inputs.k, inputs.v, inputs.mask))


def test_autocast_casts_as_pytorchs_attention_does(case):
    inputs = case(20, dtype=torch.float32)
    pooled = pool_tokens(inputs.k, inputs.v, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = block_sparse_attention(inputs.q, inputs.k.bfloat16(), inputs.v, inputs.mask, pooled=pooled)
    low = [x.bfloat16() for x in (inputs.q, inputs.k, inputs.v)]
    pooled = PooledTokens(pooled.k.bfloat16(), pooled.v.bfloat16(), pooled.log_weight)
    assert torch.equal(found, block_sparse_attention(*low, inputs.mask, pooled=pooled))


def test_auto_takes_cpu_on_the_cpu(case):
    inputs = case(20)
    assert resolve_implementation(inputs.q, inputs.k, inputs.v, inputs.mask) == "cpu"


@pytest.mark.parametrize(("implementation", "resolved"), [("cpu", "cpu"), ("reference", "cpu"), ("naive", "naive")])
def test_plain_implementations_take_everything(case, implementation, resolved):
    inputs = case(20, grad=True)
    tensors = (inputs.q, inputs.k, inputs.v, inputs.mask)
    assert resolve_implementation(*tensors, return_lse=True, implementation=implementation) == resolved


def test_flex_that_can_not_is_refused(case):
    inputs = case(20)
    with pytest.raises(NotImplementedError, match=r"FlexAttention computes float32, .* not torch.float64"):
        block_sparse_attention(inputs.q, inputs.k, inputs.v, inputs.mask, implementation="flex")


BAD = {
    "q": (lambda c: {"q": c.q[0]}, r"`q` must be floating point of shape .* got torch.float64 of shape \(20, 2, 8\)"),
    "q type": (lambda c: {"q": c.q.long()}, "`q` must be floating point"),
    "k heads": (lambda c: {"k": c.k[:, :, :1]}, r"`k` must be \(2, tokens, 2, 8\) .* got \(2, 20, 1, 8\)"),
    "v": (lambda c: {"v": c.v[:, :19]}, r"`v` must be \(2, 20, 2, 8\) to match `k`, got \(2, 19, 2, 8\)"),
    "v type": (lambda c: {"v": c.v.float()}, "`v` must be torch.float64 on cpu as `q` is, got torch.float32 on cpu"),
    "k device": (lambda c: {"k": c.k.to("meta")}, "`k` must be torch.float64 on cpu"),
    "mask": (
        lambda c: {"q": c.q[:, :16]},
        r"`mask` must be \(2 or 1, 2 or 1, 1, 3\) for 16 queries and 20 keys in blocks .* got \(2, 2, 2, 3\)",
    ),
    "mask device": (lambda c: {"mask": c.mask.to("meta")}, "`mask` must be on cpu as `q` is, got meta"),
    "pooled": (
        lambda c: {"pooled": pool_tokens(c.k[:1], c.v[:1], 4)},
        r"`pooled` must hold keys .* got \(1, 5, 2, 8\)",
    ),
    "pooled type": (
        lambda c: {"pooled": pool_tokens(c.k.float(), c.v.float(), 4)},
        "`pooled.k` must be torch.float64",
    ),
    "lengths": (lambda c: {"key_lengths": torch.tensor([3])}, r"`key_lengths` must be integers of shape \(2,\)"),
    "lengths type": (lambda c: {"key_lengths": torch.tensor([3.0, 4.0])}, "got torch.float32"),
    "name": (lambda c: {"implementation": "cuda"}, "must be one of auto, triton, cute, flex, cpu, naive, got 'cuda'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(case, name):
    inputs = case(20)
    change, message = BAD[name]
    arguments = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "mask": inputs.mask} | change(inputs)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments)


def test_a_mask_for_one_batch_item_fits_any_number(case):
    inputs = case(20, shared=(True, True))
    many = replace(inputs, q=inputs.q.repeat(3, 1, 1, 1), k=inputs.k.repeat(3, 1, 1, 1), v=inputs.v.repeat(3, 1, 1, 1))
    out = block_sparse_attention(many.q, many.k, many.v, many.mask)
    assert torch.equal(out[:2], block_sparse_attention(inputs.q, inputs.k, inputs.v, inputs.mask))
