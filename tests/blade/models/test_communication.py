"""Bytes of collective operations are those of the chunks that ranks own and need, listed one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blade.attention.head_deal import shares
from blade.models.communication import (
    Collective,
    CutKeys,
    SplitPass,
    cut_sequence,
    exchange_heads,
    exchange_outputs,
    gather_output,
    gather_scores,
    reduce_densities,
)
from blade.token_grid import TokenGrid

COUNTS = st.integers(1, 4).flatmap(
    lambda ranks: st.tuples(*[st.lists(st.integers(0, 5), min_size=ranks, max_size=ranks)] * 2)
)
"""Tokens and heads by rank; some ranks may have none."""

SMALL = st.integers(1, 3)


def owners(counts: list[int]) -> list[int]:
    """Return the rank of every item."""
    return [rank for rank, count in enumerate(counts) for _ in range(count)]


def add_up(moves: Iterator[tuple[int, int, int]], ranks: int) -> Collective:
    """Add up moves of bytes from one rank to another; those that stay are none."""
    sent, received = [0] * ranks, [0] * ranks
    for source, target, size in moves:
        if source != target:
            sent[source] += size
            received[target] += size
    return Collective(sent=tuple(sent), received=tuple(received))


@settings(max_examples=60, deadline=None)
@given(COUNTS, SMALL, SMALL, st.sampled_from([2, 4]))
def test_exchanges_are_every_chunk_between_ranks(counts, batch, head_dim, element_size) -> None:
    tokens, heads = counts
    sizes = {"batch": batch, "tokens": tokens, "heads": heads, "head_dim": head_dim, "element_size": element_size}
    chunk = batch * head_dim * element_size
    pairs = [(token, head) for token in owners(tokens) for head in owners(heads)]
    before = add_up(((token, head, 3 * chunk) for token, head in pairs), len(tokens))
    after = add_up(((head, token, chunk) for token, head in pairs), len(tokens))
    assert exchange_heads(**sizes) == before and exchange_outputs(**sizes) == after


@settings(max_examples=30, deadline=None)
@given(COUNTS, SMALL, SMALL)
def test_gathers_bring_every_part_to_every_other_rank(counts, batch, blocks) -> None:
    tokens, heads = counts
    ranks = range(len(heads))
    even = owners([max(heads)] * len(heads))  # padded
    parts = [(head, rank, batch * blocks * blocks * 4) for head in even for rank in ranks]
    assert gather_scores(batch=batch, heads=heads, blocks=blocks) == add_up(iter(parts), len(heads))
    even = owners([max(tokens)] * len(tokens))
    parts = [(token, rank, batch * 7 * 2) for token in even for rank in ranks]
    output = gather_output(batch=batch, tokens=tokens, out_channels=7, element_size=2)
    assert output == add_up(iter(parts), len(heads))
    assert reduce_densities(ranks=len(heads), layers=3).sent == ((len(heads) - 1) * 12,) * len(heads)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(1, 9))
def test_shares_are_those_of_tensor_split(count, ranks) -> None:
    assert shares(count, ranks) == tuple(len(piece) for piece in torch.arange(count).tensor_split(ranks))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(0, 5), st.integers(1, 6))
def test_the_sequence_is_cut_as_tensors_are(frames, text, ranks) -> None:
    grid = TokenGrid(frames, 2, 3, text_after=text)
    tokens, output = cut_sequence(grid, ranks, text_apart=False)
    assert tokens == output == shares(grid.sequence_length, ranks)
    tokens, output = cut_sequence(grid, ranks, text_apart=True)
    assert output == shares(grid.video_tokens, ranks)
    assert [own - shown for own, shown in zip(tokens, output)] == list(shares(text, ranks))


@settings(max_examples=30, deadline=None)
@given(COUNTS, SMALL, SMALL)
def test_keys_that_are_cut_go_to_the_ranks_of_their_heads(counts, batch, head_dim) -> None:
    tokens, _ = counts
    keys = CutKeys(queries=7, heads=5, head_dim=head_dim)
    exchanged, gathered = keys.collectives(batch=batch, tokens=tokens, element_size=2)
    heads, chunk = shares(5, len(tokens)), batch * head_dim * 2
    moves = ((token, head, 2 * chunk) for token in owners(tokens) for head in owners(heads))
    assert exchanged == add_up(moves, len(tokens))
    assert gathered.sent == gathered.received == ((len(tokens) - 1) * heads[0] * 7 * chunk,) * len(tokens)


def split_of(ranks: int, **changes) -> SplitPass:
    given_values = {
        "batch": 2, "heads": 12, "layers": 3, "head_dim": 16, "element_size": 2, "out_channels": 64,
        "score_blocks": 5, "scored_layers": (1, 2), "text_apart": True,
    }  # fmt: skip
    return SplitPass.equal(TokenGrid(3, 4, 5, text_after=7), ranks=ranks, **(given_values | changes))


def test_a_single_process_sends_nothing() -> None:
    alone = split_of(1)
    assert alone.sent() == (0,) and {operation.busiest for operation in alone.collectives()} == {0}


def test_a_pass_is_its_layers_and_its_end() -> None:
    split = split_of(8)
    assert split.heads[0] == (2, 2, 2, 2, 1, 1, 1, 1) and split.tokens == (9, 9, 9, 9, 8, 8, 8, 7)
    unit = 2 * 16 * 2  # a head of a token, of both batch items
    scores = 7 * 2 * 2 * 25 * 4
    exchanged = [
        unit * (3 * own * (12 - heads) + (67 - own) * heads) for own, heads in zip(split.tokens, split.heads[0])
    ]
    assert split.layer_sent(0) == tuple(exchanged)
    assert split.layer_sent(1) == tuple(sent + scores for sent in exchanged)
    end = 7 * (2 * max(split.output_tokens) * 64 * 2 + 4 * 3)
    layers = [split.layer_sent(layer) for layer in range(3)]
    assert split.sent() == tuple(sum(sent) + end for sent in zip(*layers))
    assert list(split.layer_collectives(1)) == ["queries, keys and values", "block scores", "attention outputs"]
    assert len(split.collectives()) == 3 * 2 + 2 + 2
    # a rank with two of twelve heads gets more than it sends
    assert split.layer_collectives(0)["queries, keys and values"].busiest == 3 * unit * (67 - 9) * 2


def test_attention_beside_the_layers_is_counted() -> None:
    keys = CutKeys(queries=9, heads=4, head_dim=8)
    more = [split.sent() for split in (split_of(2, cut_keys=(keys, keys)), split_of(2))]
    exchanged, gathered = keys.collectives(batch=2, tokens=split_of(2).tokens, element_size=2)
    expected = [2 * sum(sent) for sent in zip(exchanged.sent, gathered.sent)]
    assert [longer - shorter for longer, shorter in zip(*more)] == expected and min(expected) > 0


def test_heads_may_differ_from_layer_to_layer() -> None:
    split = SplitPass(
        batch=1,
        tokens=(5, 4),
        output_tokens=(5, 4),
        heads=((1, 3), (2, 2)),
        head_dim=8,
        element_size=4,
        out_channels=3,
    )
    assert split.layer_sent(0) == (32 * (3 * 5 * 3 + 4 * 1), 32 * (3 * 4 * 1 + 5 * 3))
    assert split.layer_sent(1) == (32 * (3 * 5 * 2 + 4 * 2), 32 * (3 * 4 * 2 + 5 * 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": 0}, "`ranks` must be"),
        ({"ranks": 2, "batch": 0}, "`batch` must be"),
        ({"ranks": 2, "layers": 0, "scored_layers": ()}, "`heads` must have a layer, got none"),
        ({"ranks": 2, "score_blocks": None}, "`score_blocks` must be given with `scored_layers`, got None"),
        ({"ranks": 2, "scored_layers": (3,)}, "`scored_layers` must be"),
    ],
)
def test_a_pass_that_cannot_be_is_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        split_of(**changes)


def test_counts_of_other_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="`heads` must be of the 2 ranks of `tokens`, got 3"):
        exchange_heads(batch=1, tokens=(4, 4), heads=(1, 1, 1), head_dim=8, element_size=2)
    with pytest.raises(ValueError, match=r"`tokens` must be counts by rank, got \(-1, 4\)"):
        exchange_heads(batch=1, tokens=(-1, 4), heads=(1, 1), head_dim=8, element_size=2)
