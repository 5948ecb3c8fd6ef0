import blade_kernels.block_selection.importance as module
import pytest
import torch
from blade_kernels.block_selection import (
    largest_key_offsets,
    mean_pooled_importance,
    sampled_importance,
    value_spread,
)
from blade_kernels.block_selection.importance import STATISTICS


def inputs(queries, keys=None, batch=2, heads=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    return [torch.randn(batch, n, heads, size, generator=generator, dtype=torch.float64) for n in (queries, keys)]


def offsets(samples, size, shape=(2, 3), seed=1):
    return torch.rand(*shape, size, generator=torch.Generator().manual_seed(seed)).argsort(-1)[..., :samples]


@pytest.mark.parametrize("denominator", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (15, 63), (64, 64), (65, 33), (97, 127)])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_matches_the_specification(queries, keys, denominator, statistic):
    q, k = inputs(queries, keys)
    drawn = offsets(4, 16), offsets(3, 8, seed=2)
    found, exact = (
        sampled_importance(
            q, k, *drawn, (16, 8), softmax_denominator=denominator, statistic=statistic, implementation=name
        )
        for name in ("cpu", "naive")
    )
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("denominator", [True, False])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_absent_keys_take_no_part(denominator, statistic):
    q, k = inputs(40, 61)
    lengths = torch.tensor([37, 0])
    drawn = offsets(4, 16), offsets(3, 8, seed=2)
    k[0, 37:] = float("nan")
    k[1] = float("nan")
    options = {"softmax_denominator": denominator, "key_lengths": lengths, "statistic": statistic}
    found, exact = (
        sampled_importance(q, k, *drawn, (16, 8), **options, implementation=name) for name in ("cpu", "naive")
    )
    torch.testing.assert_close(found, exact)
    assert not found[1].any() and not found[0, :, :, 5:].any()


@pytest.mark.parametrize("implementation", ["naive", "cpu"])
def test_without_the_denominator_every_row_of_blocks_reaches_one(implementation):
    q, k = inputs(64)
    drawn = offsets(4, 16), offsets(4, 16, seed=2)
    with_denominator, without = (
        sampled_importance(q, k, *drawn, (16, 16), softmax_denominator=denominator, implementation=implementation)
        for denominator in (True, False)
    )
    torch.testing.assert_close(without.amax(-1), torch.ones(2, 3, 4, dtype=torch.float64))
    assert float(with_denominator.amax()) < 1


@pytest.mark.parametrize("implementation", ["naive", "cpu"])
def test_all_tokens_sampled_give_the_largest_weight_of_each_pair_of_blocks(implementation):
    q, k = inputs(64)
    everything = torch.arange(16)
    found = sampled_importance(q, k, everything, everything, (16, 16), implementation=implementation)
    weights = (q.transpose(1, 2) @ k.transpose(1, 2).mT * 8**-0.5).softmax(-1)
    torch.testing.assert_close(found, weights.unfold(2, 16, 16).unfold(3, 16, 16).amax((-1, -2)))


@pytest.mark.parametrize("implementation", ["naive", "cpu"])
def test_the_residual_is_what_a_mean_key_gets_wrong(implementation):
    q, k = inputs(64)
    k[:, 16:32] = k[:, 16:17]  # its mean is each of its keys
    everything = torch.arange(16)
    options = {"statistic": "residual", "implementation": implementation}
    found = sampled_importance(q, k, everything, everything, (16, 16), **options)
    logits = q.transpose(1, 2) @ k.transpose(1, 2).mT * 8**-0.5
    base = logits.logsumexp(-1, keepdim=True)
    means = k.transpose(1, 2).unflatten(2, (4, 16)).mean(3)
    mean_weights = (q.transpose(1, 2) @ means.mT * 8**-0.5 - base).exp().repeat_interleave(16, -1)
    squares = ((logits - base).exp() - mean_weights).square().unfold(2, 16, 16).unfold(3, 16, 16)
    torch.testing.assert_close(found, (squares.sum((-1, -2)) / 16).sqrt())
    assert float(found[..., 1].amax()) < 1e-12 < float(found[..., 0].amin())


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize(("keys", "lengths"), [(64, None), (61, None), (57, None), (61, torch.tensor([37, 0]))])
def test_the_largest_keys_are_sampled_and_others_as_drawn(keys, lengths, statistic):
    q, k = inputs(40, keys)
    k[:, 5, 0] += 100  # a sink in the first block
    drawn = offsets(4, 16), offsets(4, 8, seed=2)
    places = largest_key_offsets(k, drawn[1], 2, 8, key_lengths=lengths)
    assert places.shape == (2, 3, 8, 4) and (places[:1, 0, 0] == 5).any()
    lasting = [keys, keys] if lengths is None else lengths.tolist()
    for item, length in enumerate(lasting):
        centre = k[item, :length].mean(0) if length else 0
        for head in range(3):
            for block in range(-(-length // 8)):
                tokens = k[item, 8 * block : min(8 * block + 8, length), head]
                distances = (tokens - (centre[head] if length else 0)).norm(dim=-1)
                found = places[item, head, block].tolist()
                assert found == sorted(found) and max(found) < len(tokens)
                assert len({*found}) == min(4, len(tokens))
                assert {*distances.topk(min(2, len(tokens))).indices.tolist()} <= {*found}
                others = [place for place in drawn[1][item, head].tolist() if place < len(tokens)]
                assert len({*found} & {*others}) >= min(2, len(others))
    options = {"key_lengths": lengths, "statistic": statistic}
    found, exact = (
        sampled_importance(q, k, drawn[0], places, (16, 8), **options, implementation=name)
        for name in ("cpu", "naive")
    )
    torch.testing.assert_close(found, exact)


def test_a_number_of_largest_keys_out_of_range_is_refused():
    with pytest.raises(ValueError, match="`largest` must be from 0 to the 4 offsets of a block, got 5"):
        largest_key_offsets(inputs(8)[0], offsets(4, 8), 5, 8)


@pytest.mark.parametrize("lengths", [None, torch.tensor([37, 0])])
def test_the_spread_of_values_matches_its_definition(lengths):
    _, v = inputs(1, 61)
    v = v + 3
    for b, count in enumerate([61, 61] if lengths is None else lengths.tolist()):
        v[b, count:] = float("nan")
        found = value_spread(v, 8, key_lengths=lengths)[b]
        distances = (v[b, :count] - v[b, :count].mean(0)).square().sum(-1)  # (tokens, heads)
        expected = [distances[start : start + 8].mean(0).sqrt() for start in range(0, count, 8)]
        assert found.shape == (3, 8) and not found[:, len(expected) :].any()
        if expected:
            torch.testing.assert_close(found[:, : len(expected)], torch.stack(expected, -1))


@pytest.mark.parametrize("limit", [1, 300, 3000])
def test_does_not_depend_on_how_much_is_held_at_a_time(monkeypatch, limit):
    q, k = inputs(97)
    drawn = offsets(4, 16), offsets(4, 16, seed=2)
    whole = sampled_importance(q, k, *drawn, (16, 16))
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", limit)
    torch.testing.assert_close(sampled_importance(q, k, *drawn, (16, 16)), whole)


@pytest.mark.parametrize("shape", [(), (3,), (1, 3)])
def test_offsets_may_be_shared(shape):
    q, k = inputs(50)
    drawn = offsets(4, 16, shape).to(torch.int16)
    full = drawn.expand(2, 3, 4)
    expected = sampled_importance(q, k, full, full, (16, 16))
    assert torch.equal(sampled_importance(q, k, drawn, drawn, (16, 16)), expected)


def test_scores_are_single_precision_whatever_comes_in():
    q, k = (x.bfloat16() for x in inputs(64))
    drawn = offsets(4, 16)
    found = sampled_importance(q, k, drawn, drawn, (16, 16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, sampled_importance(q.float(), k.float(), drawn, drawn, (16, 16)))
    assert mean_pooled_importance(q, k, (16, 16)).dtype == torch.float32


@pytest.mark.parametrize("lengths", [None, torch.tensor([37, 0])])
def test_mean_pooled_matches_its_definition(lengths):
    q, k = inputs(40, 61)
    present = [61, 61] if lengths is None else lengths.tolist()
    for b, count in enumerate(present):
        k[b, count:] = float("nan")
    found = mean_pooled_importance(q, k, (16, 8), key_lengths=lengths)
    assert found.shape == (2, 3, 3, 8)
    for b, count in enumerate(present):
        columns = [k[b, start : min(start + 8, count)].mean(0) for start in range(0, count, 8)]
        for i in range(3):
            mean_q = q[b, 16 * i : 16 * i + 16].mean(0)
            expected = torch.zeros(3, 8, dtype=torch.float64)
            if columns:
                expected[:, : len(columns)] = (
                    torch.stack([(mean_q * c).sum(-1) for c in columns], -1) * 8**-0.5
                ).softmax(-1)
            torch.testing.assert_close(found[b, :, i], expected)


def test_no_gradients_are_kept():
    q, k = (x.requires_grad_() for x in inputs(32))
    drawn = offsets(4, 16)
    assert not sampled_importance(q, k, drawn, drawn, (16, 16)).requires_grad
    assert not mean_pooled_importance(q, k, (16, 16)).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 32, 1, 8)}, r"`k` must be \(2, tokens, 3, 8\) to match `q`, got \(2, 32, 1, 8\)"),
        ({"q": torch.zeros(2, 3, 8)}, r"`q` must be .* got \(2, 3, 8\)"),
        ({"block_size": (16, 0)}, r"`block_size` must be two positive numbers of tokens, got \(16, 0\)"),
        ({"key_lengths": torch.tensor([1])}, r"`key_lengths` must be of shape \(2,\), got \(1,\)"),
        ({"key_offsets": torch.zeros(3)}, r"`key_offsets` must be integers that broadcast to \(2, 3, samples\)"),
        ({"statistic": "sum"}, "`statistic` must be one of max, mean, rms, residual, got 'sum'"),
        ({"query_offsets": torch.zeros(0, dtype=torch.int64)}, r"`query_offsets` .* got torch.int64 of shape \(0,\)"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    q, k = inputs(32)
    arguments = {
        "q": q,
        "k": k,
        "query_offsets": offsets(4, 16),
        "key_offsets": offsets(4, 16),
        "block_size": (16, 16),
    }
    with pytest.raises(ValueError, match=message):
        sampled_importance(**(arguments | change))
