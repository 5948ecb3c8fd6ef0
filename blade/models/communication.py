"""Bytes that processes send each other when they make one video together, by Ulysses sequence parallelism.

Every one of N ranks holds a piece of the sequence, S_r of its S tokens. In a self-attention layer it gives away its
tokens of the heads that others compute, gets all tokens of the H_r heads that it computes, and gives the results back.
Source: DeepSpeed-Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from blade.attention.head_deal import shares
from blade.common.checks import check_integer
from blade.token_grid import TokenGrid

FLOAT32 = 4
"""Bytes of a number in float32."""


@dataclass(frozen=True)
class Collective:
    """One collective operation: what is for a rank itself is not counted."""

    sent: tuple[int, ...]
    """Bytes that each rank sends to the others together."""
    received: tuple[int, ...]
    """Bytes that each rank gets from the others together."""

    @property
    def busiest(self) -> int:
        """Bytes in one direction of the link that carries most: links carry both directions at once."""
        return max(*self.sent, *self.received)


def cut_sequence(grid: TokenGrid, ranks: int, *, text_apart: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens of each rank's piece of the sequence, and those of them whose output is gathered.

    Args:
        grid: all tokens.
        ranks: number of pieces.
        text_apart: whether text is a tensor of its own, which is cut by itself and has no output;
            `SequenceSplit.text_apart`. Otherwise all tokens are cut together.
    """
    if not text_apart:
        tokens = shares(grid.sequence_length, ranks)
        return tokens, tokens
    video, text = shares(grid.video_tokens, ranks), shares(grid.text_tokens, ranks)
    return tuple(map(sum, zip(video, text))), video


def exchange_heads(
    *, batch: int, tokens: Sequence[int], heads: Sequence[int], head_dim: int, element_size: int, tensors: int = 3
) -> Collective:
    """Return the all-to-all before attention, of queries, keys and values, B `batch` and D `head_dim`.

    Rank r sends `3 * B * S_r * (H - H_r) * D` elements, and gets `3 * B * (S - S_r) * H_r * D`.

    Args:
        batch: batch items.
        tokens: of the sequence, by rank.
        heads: that each rank computes.
        head_dim: numbers in one head of one token.
        element_size: bytes of a number.
        tensors: how many tensors are exchanged.

    Raises:
        ValueError: unless there are as many `heads` as `tokens`.
    """
    _check_ranks(tokens=tokens, heads=heads)
    unit, length, count = tensors * batch * head_dim * element_size, sum(tokens), sum(heads)
    return Collective(
        sent=tuple(unit * own * (count - computed) for own, computed in zip(tokens, heads)),
        received=tuple(unit * (length - own) * computed for own, computed in zip(tokens, heads)),
    )


def exchange_outputs(
    *, batch: int, tokens: Sequence[int], heads: Sequence[int], head_dim: int, element_size: int
) -> Collective:
    """Return the all-to-all after attention: that of one tensor before it, the other way round.

    Rank r sends `B * (S - S_r) * H_r * D` elements, and gets `B * S_r * (H - H_r) * D`. Arguments are those of
    `exchange_heads`.
    """
    there = exchange_heads(
        batch=batch, tokens=tokens, heads=heads, head_dim=head_dim, element_size=element_size, tensors=1
    )
    return Collective(sent=there.received, received=there.sent)


def gather_scores(*, batch: int, heads: Sequence[int], blocks: int) -> Collective:
    """Return the all-gather of a layer's block scores, (B, H, n, n) float32, for a budget of the whole layer.

    With as many heads as the largest share has, H_p, every rank sends `B * H_p * n * n * 4` bytes to each of the N - 1
    others: smaller shares are padded.

    Args:
        batch: batch items.
        heads: that each rank computes.
        blocks: n, the blocks of the sequence.
    """
    return _gather([batch * computed * blocks**2 * FLOAT32 for computed in heads])


def gather_output(*, batch: int, tokens: Sequence[int], out_channels: int, element_size: int) -> Collective:
    """Return the all-gather of the output at the end of a forward pass.

    With as many tokens as the largest piece has, V_p, every rank sends `B * V_p * out_channels` elements to each of
    the N - 1 others: smaller pieces are padded.

    Args:
        batch: batch items.
        tokens: of the output, by rank.
        out_channels: numbers of a token of the output.
        element_size: bytes of a number.
    """
    return _gather([batch * own * out_channels * element_size for own in tokens])


def reduce_densities(*, ranks: int, layers: int) -> Collective:
    """Return the all-reduce of the layers' densities, a float32 each.

    Counted as if every rank sent its `4 * layers` bytes to each of the N - 1 others; it makes no difference.
    """
    return _gather([layers * FLOAT32] * ranks)


@dataclass(frozen=True, kw_only=True)
class CutKeys:
    """Attention of queries that every rank has to keys and values that are cut."""

    queries: int
    """Number of the queries."""
    heads: int
    """Heads, which are dealt out in equal parts."""
    head_dim: int
    """Numbers in one head of one token."""

    def collectives(self, *, batch: int, tokens: Sequence[int], element_size: int) -> tuple[Collective, Collective]:
        """Return the all-to-all of keys and values, and the all-gather of the heads' outputs.

        Args:
            batch: batch items.
            tokens: of the keys, by rank.
            element_size: bytes of a number.
        """
        heads, head_dim = shares(self.heads, len(tokens)), self.head_dim
        exchanged = exchange_heads(
            batch=batch, tokens=tokens, heads=heads, head_dim=head_dim, element_size=element_size, tensors=2
        )
        return exchanged, _gather([batch * own * self.queries * head_dim * element_size for own in heads])


@dataclass(frozen=True, kw_only=True)
class SplitPass:
    """One forward pass that ranks make together."""

    batch: int
    """Batch items."""
    tokens: tuple[int, ...]
    """Tokens of the sequence, by rank: of video and of what else self-attention sees."""
    output_tokens: tuple[int, ...]
    """Tokens whose output is gathered, by rank."""
    heads: tuple[tuple[int, ...], ...]
    """Heads that each rank computes, by layer; see `equal`."""
    head_dim: int
    """Numbers in one head of one token."""
    element_size: int
    """Bytes of a number of queries, keys, values and outputs."""
    out_channels: int
    """Numbers of a token of the output."""
    cut_keys: tuple[CutKeys, ...] = ()
    """Attention beside the layers' own that concerns all ranks."""
    score_blocks: int | None = None
    """Blocks of the sequence, where block scores are gathered; None: they are not."""
    scored_layers: tuple[int, ...] = ()
    """Layers that gather block scores, from 0."""

    def __post_init__(self) -> None:
        for name in ("batch", "head_dim", "element_size", "out_channels"):
            check_integer(name, getattr(self, name), least=1)
        _check_ranks(tokens=self.tokens, output_tokens=self.output_tokens)
        if not self.heads:
            raise ValueError("`heads` must have a layer, got none.")
        for heads in self.heads:
            _check_ranks(tokens=self.tokens, heads=heads)
        if self.scored_layers and self.score_blocks is None:
            raise ValueError("`score_blocks` must be given with `scored_layers`, got None.")
        for layer in self.scored_layers:
            check_integer("scored_layers", layer, least=0, most=self.layers - 1)

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return len(self.tokens)

    @property
    def layers(self) -> int:
        """Number of self-attention layers."""
        return len(self.heads)

    @classmethod
    def equal(
        cls,
        grid: TokenGrid,
        *,
        ranks: int,
        batch: int,
        heads: int,
        layers: int,
        head_dim: int,
        element_size: int,
        out_channels: int,
        text_apart: bool = False,
        cut_keys: tuple[CutKeys, ...] = (),
        score_blocks: int | None = None,
        scored_layers: tuple[int, ...] = (),
    ) -> SplitPass:
        """Return a pass whose tokens and heads are dealt out in equal parts, as `shares` says.

        Args:
            grid: all tokens.
            ranks: number of processes.
            batch: see the field, as all arguments that are not named here.
            heads: of each layer.
            layers: number of them.
            head_dim: see the field.
            element_size: see the field.
            out_channels: see the field.
            text_apart: see `cut_sequence`.
            cut_keys: see the field.
            score_blocks: see the field.
            scored_layers: see the field.
        """
        tokens, output_tokens = cut_sequence(grid, ranks, text_apart=text_apart)
        return cls(
            batch=batch,
            tokens=tokens,
            output_tokens=output_tokens,
            heads=(shares(heads, ranks),) * layers,
            head_dim=head_dim,
            element_size=element_size,
            out_channels=out_channels,
            cut_keys=cut_keys,
            score_blocks=score_blocks,
            scored_layers=scored_layers,
        )

    def layer_collectives(self, layer: int) -> dict[str, Collective]:
        """Return the collective operations of an attention layer by name, in the order in which they run."""
        batch, tokens, heads = self.batch, self.tokens, self.heads[layer]
        head_dim, element_size = self.head_dim, self.element_size
        named = {
            "queries, keys and values": exchange_heads(
                batch=batch, tokens=tokens, heads=heads, head_dim=head_dim, element_size=element_size
            )
        }
        if layer in self.scored_layers:
            assert self.score_blocks is not None
            named["block scores"] = gather_scores(batch=batch, heads=heads, blocks=self.score_blocks)
        named["attention outputs"] = exchange_outputs(
            batch=batch, tokens=tokens, heads=heads, head_dim=head_dim, element_size=element_size
        )
        return named

    def collectives(self) -> list[Collective]:
        """Return the collective operations of the whole pass."""
        listed = [operation for layer in range(self.layers) for operation in self.layer_collectives(layer).values()]
        for attention in self.cut_keys:
            listed += attention.collectives(batch=self.batch, tokens=self.tokens, element_size=self.element_size)
        output = gather_output(
            batch=self.batch,
            tokens=self.output_tokens,
            out_channels=self.out_channels,
            element_size=self.element_size,
        )
        return [*listed, output, reduce_densities(ranks=self.ranks, layers=self.layers)]

    def layer_sent(self, layer: int) -> tuple[int, ...]:
        """Return the bytes that each rank sends in an attention layer."""
        return _sent(self.layer_collectives(layer).values())

    def sent(self) -> tuple[int, ...]:
        """Return the bytes that each rank sends in the pass; their sum is what all links carry."""
        return _sent(self.collectives())


def _sent(operations: Iterable[Collective]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*(operation.sent for operation in operations))))


def _gather(parts: Sequence[int]) -> Collective:
    """Return an all-gather of parts of so many bytes, which are padded to the largest."""
    bytes_of_each = ((len(parts) - 1) * max(parts),) * len(parts)
    return Collective(sent=bytes_of_each, received=bytes_of_each)


def _check_ranks(**counts: Sequence[int]) -> None:
    """Check that what is given by rank is of the same ranks, and holds counts.

    Raises:
        ValueError: naming the field.
    """
    (first, expected), *others = counts.items()
    for name, values in counts.items():
        if not values or any(value < 0 for value in values):
            raise ValueError(f"`{name}` must be counts by rank, got {tuple(values)}.")
    for name, values in others:
        if len(values) != len(expected):
            raise ValueError(f"`{name}` must be of the {len(expected)} ranks of `{first}`, got {len(values)}.")
