"""A run that several processes make together: what each holds, sends and computes, and the seconds that follow.

Every process has all weights, encodes the text and decodes by itself. The transformer's work is split: by tokens where
they are treated one by one, by heads in self-attention; see `blade.models.communication`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from blade.attention.head_deal import shares
from blade.common.machine import GIB
from blade.generation.parallel_traffic import LATENCY, LINK_SHARE, PassShape, Traffic
from blade.generation.prediction import Prediction, predict, seconds_text
from blade.models.cards import CardRates, Link
from blade.models.communication import FLOAT32, SplitPass
from blade.models.costs import RunCost

TENSORS_AT_ONCE = ((10, 4), (7, 7))
"""Tensors that are there at once in attention, of a rank's own tokens and all heads, and of all tokens and a rank's
heads: while queries, keys and values are exchanged (the residual stream, its norm, those three, and what is sent and
received), and while what was received is put together; each with what a family keeps beside.
See `blade.attention.sequence_parallel.HeadShare.to_heads`."""


@dataclass(frozen=True, kw_only=True)
class ParallelPrediction:
    """Seconds of a run on several cards; `print` it."""

    alone: Prediction
    """On one card."""
    rank: Prediction
    """Of the rank that has most to compute, without waiting for links."""
    waiting: float
    """Seconds for collective operations."""
    link: Link
    """What the cards are connected by."""
    ranks: int
    """Number of cards."""

    @property
    def seconds(self) -> float:
        """Seconds of the run."""
        return self.rank.total + self.waiting

    @property
    def speed_up(self) -> float:
        """How many times as fast as one card."""
        return self.alone.total / self.seconds

    @property
    def efficiency(self) -> float:
        """The speed-up as a share of the number of cards."""
        return self.speed_up / self.ranks

    def __str__(self) -> str:
        link = self.link
        return (
            f"by the same speeds {seconds_text(self.seconds)}, {seconds_text(self.waiting)} of it for the links: "
            f"{self.speed_up:.2f} times as fast as one, efficiency {100 * self.efficiency:.0f} % "
            f"({link.name}, {link.gb_per_second:g} GB/s in each direction; assumed: {100 * LINK_SHARE:.0f} % of it, "
            f"{1e6 * LATENCY:g} µs an operation, nothing computed meanwhile)"
        )


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """A run on several cards; `print` it."""

    shape: PassShape
    """Facts of its forward passes."""
    traffic: Traffic
    """What the processes send each other."""
    weights_gib: float
    """Memory of all weights, which each of them has."""
    activations_gib: Mapping[str, float]
    """Most memory beside the weights in one process: of the transformer's forward pass, and of decoding."""
    prediction: ParallelPrediction | None = None
    """Seconds, if a card was named whose speed and link are known."""
    unpredicted: str | None = None
    """Why there are none, though a card was named."""

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.traffic.largest.ranks

    @property
    def needed_gib(self) -> float:
        """Memory of one process: all weights, and the activations of whichever part takes most."""
        return self.weights_gib + max(self.activations_gib.values())

    def __str__(self) -> str:
        split = self.traffic.largest
        most = max(max(heads) for heads in split.heads)
        uneven = f", so that attention is split with an efficiency of {100 * even_heads(split):.0f} %"
        layer, run = split.layer_sent(split.layers - 1), self.traffic.sent()
        parts = ", ".join(f"{part} {gib:.2f}" for part, gib in self.activations_gib.items())
        lines = [
            f"{self.ranks} processes of at most {max(split.tokens):,} tokens and {most} of {sum(split.heads[0])} heads"
            + (uneven if even_heads(split) < 1 else ""),
            f"{self.needed_gib:.2f} GiB in each with all parts on its device; beside the weights {parts}",
            f"each sends at most {bytes_text(max(layer))} in an attention layer, {bytes_text(max(split.sent()))} in a "
            f"forward pass, {bytes_text(max(run))} in the run",
        ]
        if self.prediction is not None:
            lines.append(str(self.prediction))
        elif self.unpredicted is not None:
            lines.append(f"no prediction: {self.unpredicted}")
        return "\n".join(f"{'' if number else 'parallel':<12}{line}" for number, line in enumerate(lines))


def predict_parallel(
    cost: RunCost, text_flops: float, decoding_flops: float, rates: CardRates, link: Link, plan: ParallelPlan
) -> ParallelPrediction:
    """Predict the seconds of a run on several cards, which wait for each other and for their links.

    Args:
        cost: of the transformer, on one card.
        text_flops: operations of the text encoders.
        decoding_flops: operations of the decoder.
        rates: the speed of a card, which has all that the run needs.
        link: what the cards are connected by.
        plan: how the run is split.
    """
    own = rank_cost(cost, plan.traffic, plan.shape)
    return ParallelPrediction(
        alone=predict(cost, text_flops, decoding_flops, rates),
        rank=predict(own, text_flops, decoding_flops, rates),
        waiting=plan.traffic.seconds(link),
        link=link,
        ranks=plan.ranks,
    )


def even_heads(split: SplitPass) -> float:
    """Return the efficiency of dense attention: the mean number of a rank's heads as a share of the largest."""
    heads = shares(sum(split.heads[0]), split.ranks)
    return sum(heads) / split.ranks / max(heads)


def rank_cost(cost: RunCost, traffic: Traffic, shape: PassShape) -> RunCost:
    """Return the operations of the rank that has most.

    Self-attention and the choice of blocks are split by heads, other attention and matrix products with weights by
    tokens, but for what every rank does whole, patch embeddings among it.

    Args:
        cost: of the whole run.
        traffic: how it is split.
        shape: of its forward passes.
    """
    split = traffic.largest
    tokens, dense = max(split.tokens) / sum(split.tokens), 1 / (split.ranks * even_heads(split))
    flops = dict(cost.flops)
    for part in ("linear layers", "other attention"):
        whole = shape.whole.get(part, 0.0) * cost.passes
        flops[part] = whole + tokens * (flops[part] - whole)
    sparse = cost.sparse_self_attention
    flops["self-attention"] = dense * (flops["self-attention"] - sparse) + traffic.sparse_share * sparse
    if "block selection" in flops:
        flops["block selection"] *= traffic.sparse_share
    own = {**cost.forward.flops}
    own["self-attention"] = round(traffic.sparse_share * own["self-attention"])  # which says what is sparse
    return replace(cost, flops=flops, forward=replace(cost.forward, flops=own))


def rank_activations_gib(activations_gib: float, split: SplitPass, shape: PassShape) -> float:
    """Return about the most memory beside the weights in a rank's forward pass.

    The most of two: the share by tokens of the whole pass's, and attention with the tensors that an exchange takes.
    To both are added the embedded tokens of the whole sequence, where the first block takes its piece of them, its
    part of rotary tables, and the gathered block scores. What a block keeps beside attention is not known here.

    Args:
        activations_gib: of the same pass on one device.
        split: the pass.
        shape: of the run's passes.
    """
    if split.ranks == 1:
        return activations_gib
    length, tokens, count = sum(split.tokens), max(split.tokens), sum(split.heads[0])
    heads = max(max(counts) for counts in split.heads)
    number = split.batch * split.head_dim * split.element_size
    at_once = max(own * tokens * count + whole * length * heads for own, whole in TENSORS_AT_ONCE)
    attention = number * at_once / GIB
    beside = shape.embeds_whole * number * length * count + shape.table_bytes * tokens / length
    if split.scored_layers:
        assert split.score_blocks is not None
        beside += split.batch * count * split.score_blocks**2 * FLOAT32
    return max(activations_gib * tokens / length, attention) + beside / GIB


def bytes_text(count: float) -> str:
    """Return a number of bytes for people, in units of 1000."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    size, unit = next(((size, unit) for size, unit in units if count >= size), (1.0, "bytes"))
    return f"{count / size:.3g} {unit}"
