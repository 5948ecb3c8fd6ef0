"""The selection kernels against the specification, which has tests of its own."""

import importlib.util

import pytest
import torch
from blade_kernels import triton_support
from blade_kernels.block_selection import largest_key_offsets, sampled_importance, select_blocks, triton_launch
from blade_kernels.block_selection.importance import STATISTICS
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = [pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.gpu)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def both(importance, *arguments, **options):
    """The mask of the kernel, on the CPU, and that of the specification."""
    moved = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    found = select_blocks(importance.to(DEVICE), *arguments, **moved, implementation="triton").to("cpu")
    return found, select_blocks(importance, *arguments, **options, implementation="naive")


def assert_same(found, expected):
    assert torch.equal(found.keep, expected.keep)
    assert torch.equal(found.counts, expected.counts)
    assert torch.equal(found.indices, expected.indices)
    assert found.block_size == expected.block_size


@pytest.mark.slow
@settings(max_examples=20 if torch.cuda.is_available() else 60, deadline=None)  # each may have to be compiled
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 5), st.integers(1, 40)),
    st.integers(1, 44),
    st.integers(1, 44),
    st.none() | st.sampled_from([0.125, 0.5, 0.75, 0.9375, 1.0]),
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(0, 2),
    st.sampled_from([2, 4096]),
    st.integers(0, 99),
)
def test_selects_what_the_specification_selects(shape, first, second, mass, keys, queries, radius, values, seed):
    """Many ties and none; importance in multiples of 1/4096, so that sums do not depend on their order."""
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randint(0, values, shape, generator=generator) / 4096
    found, expected = both(
        importance,
        (8, 16),
        max_blocks=max(first, second),
        extra_blocks=seed % shape[-2],
        min_blocks=min(first, second, shape[-1]),
        cumulative_mass=mass,
        forced_key_blocks=torch.rand(shape[-1], generator=generator) < 0.2 if keys else None,
        forced_query_blocks=torch.rand(shape[-2], generator=generator) < 0.2 if queries else None,
        local_radius=radius,
    )
    assert_same(found, expected)


def test_one_dominant_block_among_many_and_rows_of_zeros():
    importance = torch.full((1, 1, 2, 1300), 1e-6)
    importance[0, 0, 0, 123] = 1.0
    importance[0, 0, 1] = 0.0
    found, expected = both(importance, cumulative_mass=0.95, max_blocks=700)
    assert_same(found, expected)
    assert found.keep[0, 0].nonzero().tolist() == [[0, 123], [1, 0]]


def test_expanded_importance_is_read_by_its_strides():
    importance = torch.rand(1, 1, 5, 7, generator=torch.Generator().manual_seed(0)).expand(2, 3, 5, 7)
    assert_same(*both(importance, max_blocks=3))


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("values", [1, 3, 2**20])
def test_a_layer_keeps_what_the_specification_keeps(forced, values):
    generator = torch.Generator().manual_seed(values)
    importance = torch.randint(0, values, (2, 3, 37, 53), generator=generator) / 7
    flags = [torch.rand(blocks, generator=generator) < 0.1 for blocks in (53, 37)]
    found, expected = both(
        importance,
        (8, 8),
        max_blocks=9,
        extra_blocks=5,
        min_blocks=2,
        forced_key_blocks=flags[0] if forced else None,
        forced_query_blocks=flags[1] if forced else None,
        budget="layer",
    )
    assert_same(found, expected)


def test_rows_that_share_ties_are_counted_in_parts(monkeypatch):
    monkeypatch.setattr(triton_launch, "CHUNK", 16)  # fewer than the rows, and than the blocks of two of them
    importance = torch.randint(0, 3, (2, 2, 20, 13), generator=torch.Generator().manual_seed(0)) / 7
    assert_same(*both(importance, max_blocks=5, extra_blocks=3, budget="layer"))


def test_a_layer_whose_rows_all_keep_everything():
    flags = torch.ones(5, dtype=torch.bool)
    found, expected = both(torch.rand(1, 2, 5, 7), max_blocks=3, forced_query_blocks=flags, budget="layer")
    assert_same(found, expected)
    assert bool(found.keep.all())


def test_expanded_importance_of_a_layer_is_read_by_its_strides():
    importance = torch.rand(1, 1, 5, 7, generator=torch.Generator().manual_seed(0)).expand(2, 3, 5, 7)
    assert_same(*both(importance, max_blocks=3, local_radius=0, budget="layer"))


def test_heads_are_scored_in_parts_where_memory_is_short(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 150, 3, 16, generator=generator).to(DEVICE) for _ in range(2))
    offsets = torch.arange(0, 16, 2, device=DEVICE)
    scores = []
    for memory in (1, 2**28):
        monkeypatch.setattr(triton_launch, "STATISTICS_BYTES", memory)
        scores.append(sampled_importance(q, k, offsets, offsets, (16, 16), implementation="triton"))
    assert torch.equal(*scores)


@pytest.mark.parametrize("denominator", [True, False])
@pytest.mark.parametrize("lengths", [None, (50, 0)])
@pytest.mark.parametrize(
    ("dtype", "samples"), [(torch.float32, (16, 4)), (torch.bfloat16, (4, 16)), (torch.float16, (1, 2))]
)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (97, 200)])
@pytest.mark.parametrize(("statistic", "largest"), [*((name, False) for name in STATISTICS), ("residual", True)])
def test_scores_what_the_specification_scores(denominator, lengths, dtype, samples, queries, keys, statistic, largest):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 3, 16, generator=generator).to(dtype) for n in (queries, keys))
    drawn = [torch.rand(3, 32, generator=generator).argsort(-1)[:, :count].to(torch.int16) for count in samples]
    if lengths is not None:
        lengths = torch.tensor(lengths).clamp(max=keys)
        for item, length in enumerate(lengths):
            k[item, length:] = float("nan")
    options = {"softmax_denominator": denominator, "key_lengths": lengths, "statistic": statistic}
    if largest:
        drawn[1] = largest_key_offsets(k, drawn[1], samples[1] // 2, 32, key_lengths=lengths)
    expected = sampled_importance(q, k, *drawn, (32, 32), **options, implementation="naive")
    on_device = [x.to(DEVICE) for x in (q, k, *drawn)]
    options["key_lengths"] = None if lengths is None else lengths.to(DEVICE)
    found = sampled_importance(*on_device, (32, 32), **options, implementation="triton").cpu()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(1, 1, 1, 16, dtype=torch.float64), 16, 16), "not torch.float64"),
        ((torch.zeros(1, 1, 1, 16), 16, 16, torch.bfloat16), "of one type, got torch.float32 and torch.bfloat16"),
        ((torch.zeros(1, 1, 1, 20), 16, 16), "heads of 16, 32, 64 or 128, got 20"),
        ((torch.zeros(1, 1, 1, 16), 12, 16), "a power of two of at most 64 samples of a block, got 12 and 16"),
        ((torch.zeros(1, 1, 1, 16), 16, 16), "run on NVIDIA GPUs"),
    ],
)
def test_says_what_it_can_not_score(monkeypatch, arguments, message):
    monkeypatch.setattr(triton_support, "interpreted", lambda: False)
    with pytest.raises(AssertionError, match=message):
        q, *samples = arguments[:3]
        k = q.to(*arguments[3:]) if arguments[3:] else q
        raise AssertionError(triton_launch.scoring_unsupported(q, k, *samples))


def test_the_implementation_is_checked():
    importance = torch.rand(1, 1, 1, 4)
    with pytest.raises(ValueError, match="`implementation` must be one of auto, triton, cpu, naive, got 'flex'"):
        select_blocks(importance, implementation="flex")
    with pytest.raises(NotImplementedError, match="at most 16384 blocks of keys, got 16385"):
        select_blocks(torch.rand(1, 1, 1, 16385), implementation="triton")


@pytest.mark.slow
def test_everything_compiles_into_one_graph_and_the_operators_are_registered_soundly():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 70, 2, 16, generator=generator).to(DEVICE) for _ in range(2))
    offsets = torch.arange(0, 32, 8, device=DEVICE)

    def run(q, k):
        importance = sampled_importance(q, k, offsets, offsets, (32, 32), implementation="triton")
        mask = select_blocks(importance, (32, 32), max_blocks=2, cumulative_mass=0.9, implementation="triton")
        return importance, mask.keep, mask.counts, mask.indices

    expected = run(q, k)
    for one, other in zip(expected, torch.compile(run, backend="aot_eager", fullgraph=True)(q, k)):
        assert torch.equal(one, other)
    checks = ("test_schema", "test_faketensor")
    arguments = (q, k, offsets, offsets, [32, 32], 0.25, None, True, "rms")
    torch.library.opcheck(torch.ops.blade.sampled_importance.default, arguments, test_utils=checks)
    arguments = (expected[0], [32, 32], 2, 0, 1, 0.9, None, None, 1, 3)
    torch.library.opcheck(torch.ops.blade.select_blocks.default, arguments, test_utils=checks)
    flags = torch.tensor([True, False, False], device=DEVICE)
    arguments = (expected[0], 2, 1, 1, None, flags)
    torch.library.opcheck(torch.ops.blade.select_over_heads.default, arguments, test_utils=checks)
