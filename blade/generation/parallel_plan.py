"""A run that several processes make together: what each holds, sends and computes, and the seconds that follow.

Every process has all weights, encodes the text and decodes by itself. The transformer's work is split: by tokens where
they are treated one by one, by heads in self-attention; see `blade.models.communication`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from blade.attention.config import BladeConfig
from blade.common.checks import check_integer
from blade.common.machine import GIB
from blade.generation.prediction import Prediction, predict, seconds_text
from blade.models.cards import CardRates, Link
from blade.models.communication import FLOAT32, SplitPass
from blade.models.costs import ForwardCost, RunCost, forward_cost
from blade.models.loaded import LatentSize, LoadedModel

LINK_SHARE = 0.8
"""Assumed share of a link's documented peak that collective operations reach. A copy between two H100 reached 380 of
450 GB/s (84 %): https://github.com/NVIDIA/nccl/issues/1264. Not measured here."""

LATENCY = 30e-6
"""Assumed seconds that a collective operation takes beside its bytes. Not measured here."""

LOCAL_TENSORS = 5
"""Tensors of a rank's tokens and all heads beside those that are exchanged: the residual stream, its norm, queries,
keys and values before they are packed."""


@dataclass(frozen=True, kw_only=True)
class PassShape:
    """Facts of a run's forward passes that do not depend on how many processes make them."""

    batches: tuple[int, ...]
    """Batch items of each call of the transformer in a step."""
    whole_sequence: bool
    """See `ModelFamily.whole_sequence`."""
    element_size: int
    """Bytes of a number."""
    out_channels: int
    """Numbers that the transformer puts out for a video token."""
    whole_linear: float
    """Operations of matrix products with weights in a pass of one item that every rank does whole: with text outside
    of the sequence, which no rank has a part of."""

    @classmethod
    def of(cls, model: LoadedModel, latent: LatentSize, forward: ForwardCost, batches: tuple[int, ...]) -> PassShape:
        """Find the facts out on the meta device.

        Args:
            model: the model without its weights.
            latent: the size of its latent.
            forward: the cost of a pass of one item.
            batches: see the field.
        """
        transformer, family = model.transformer, model.family
        inputs = model.example_inputs(latent)
        with torch.no_grad(), torch.device("meta"), family.without_values():
            output = transformer(**inputs)[0]
        apart, tokens = 0.0, inputs["encoder_hidden_states"].shape[1]
        if not forward.grid.text_tokens:  # the operations grow with the text, which is halved to find out how fast
            half = forward_cost(transformer, latent, text_tokens=tokens // 2)
            saved = forward.flops["linear layers"] - half.flops["linear layers"]
            apart = saved / (tokens - tokens // 2) * tokens
        return cls(
            batches=batches,
            whole_sequence=family.whole_sequence,
            element_size=transformer.dtype.itemsize,
            out_channels=output.numel() // forward.grid.video_tokens,
            whole_linear=apart,
        )


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The forward passes of a run, as the ranks make them together."""

    plain: tuple[SplitPass, ...]
    """The calls of the transformer in a step."""
    choosing: tuple[SplitPass, ...]
    """The same in a step in which sparse layers gather block scores."""
    plain_steps: int
    """Steps of the first kind."""
    choosing_steps: int
    """Steps of the second kind."""

    @classmethod
    def of(cls, cost: RunCost, config: BladeConfig | None, shape: PassShape, ranks: int) -> Traffic:
        """Work out the traffic of a run.

        Args:
            cost: of its transformer.
            config: of its attention; None is dense.
            shape: of its forward passes.
            ranks: number of processes.

        Raises:
            ValueError: if a rank would have no head, or heads are dealt by cost.
        """
        forward = cost.forward
        check_integer("parallel", ranks, least=1)
        if ranks > forward.heads:
            raise ValueError(f"`parallel` must be at most the model's {forward.heads} heads, got {ranks}.")
        if config is not None and config.attention == "patterns":
            raise ValueError(
                "`parallel` must not be given for a dry run with head patterns: which heads a process computes "
                "follows from their cost, which the prediction does not know."
            )
        steps, choosing, blocks = cost.passes // sum(shape.batches), 0, None
        layers: tuple[int, ...] = ()
        if config is not None and cost.sparse_passes and config.asa.budget == "layer":
            choosing = -(-(cost.sparse_passes // sum(shape.batches)) // config.asa.reselect_every)
            blocks = -(-forward.grid.sequence_length // config.asa.block_size)
            layers = tuple(layer for layer in range(forward.layers) if layer not in config.dense_layers)
        plain = tuple(
            SplitPass.equal(
                forward.grid,
                ranks=ranks,
                batch=batch,
                heads=forward.heads,
                layers=forward.layers,
                head_dim=forward.head_dim,
                element_size=shape.element_size,
                out_channels=shape.out_channels,
                whole_sequence=shape.whole_sequence,
                score_blocks=blocks,
            )
            for batch in shape.batches
        )
        return cls(
            plain=plain,
            choosing=tuple(replace(split, scored_layers=layers) for split in plain),
            plain_steps=steps - choosing,
            choosing_steps=choosing,
        )

    @property
    def largest(self) -> SplitPass:
        """The call that sends most."""
        calls = self.choosing if self.choosing_steps else self.plain
        return max(calls, key=lambda split: split.batch)

    def sent(self) -> tuple[int, ...]:
        """Return the bytes that each rank sends in the run."""
        totals = [0] * self.plain[0].ranks
        for steps, calls in ((self.plain_steps, self.plain), (self.choosing_steps, self.choosing)):
            for split in calls if steps else ():
                totals = [total + steps * sent for total, sent in zip(totals, split.sent())]
        return tuple(totals)

    def seconds(self, link: Link) -> float:
        """Return the seconds that the ranks wait for collective operations.

        Each takes `LATENCY`, and its busiest link's bytes at `LINK_SHARE` of the peak. Nothing is computed meanwhile.

        Args:
            link: what the ranks' cards are connected by.
        """
        speed, total = 1e9 * link.gb_per_second * LINK_SHARE, 0.0
        for steps, calls in ((self.plain_steps, self.plain), (self.choosing_steps, self.choosing)):
            for split in calls if steps else ():
                busiest = [operation.busiest for operation in split.collectives()]
                total += steps * sum(LATENCY + count / speed for count in busiest if count)
        return total


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
        heads = split.heads[0]
        uneven = f", so that attention is split with an efficiency of {100 * even_heads(split):.0f} %"
        layer, run = split.layer_sent(split.layers - 1), self.traffic.sent()
        parts = ", ".join(f"{part} {gib:.2f}" for part, gib in self.activations_gib.items())
        lines = [
            f"{self.ranks} processes of at most {max(split.tokens):,} tokens and {max(heads)} of {sum(heads)} heads"
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
    own = rank_cost(cost, plan.traffic.largest, whole_linear=plan.shape.whole_linear)
    return ParallelPrediction(
        alone=predict(cost, text_flops, decoding_flops, rates),
        rank=predict(own, text_flops, decoding_flops, rates),
        waiting=plan.traffic.seconds(link),
        link=link,
        ranks=plan.ranks,
    )


def even_heads(split: SplitPass) -> float:
    """Return the efficiency of attention: the mean number of a rank's heads as a share of the largest."""
    return sum(split.heads[0]) / split.ranks / max(split.heads[0])


def rank_cost(cost: RunCost, split: SplitPass, *, whole_linear: float) -> RunCost:
    """Return the operations of the rank that has most.

    Self-attention and the choice of blocks are split by heads, other attention and matrix products with weights by
    tokens. Patch embeddings are computed whole by every rank.

    Args:
        cost: of the whole run.
        split: a forward pass of it.
        whole_linear: see `PassShape`.
    """
    tokens, heads = max(split.tokens) / sum(split.tokens), max(split.heads[0]) / sum(split.heads[0])
    by = {"self-attention": heads, "block selection": heads, "other attention": tokens, "linear layers": tokens}
    flops = {part: by.get(part, 1.0) * count for part, count in cost.flops.items()}
    flops["linear layers"] += (1 - tokens) * whole_linear * cost.passes
    own = {part: round(by.get(part, 1.0) * count) for part, count in cost.forward.flops.items()}
    return replace(cost, flops=flops, forward=replace(cost.forward, flops=own))


def rank_activations_gib(activations_gib: float, split: SplitPass) -> float:
    """Return about the most memory beside the weights in a rank's forward pass.

    The most of two: the share by tokens of the whole pass's, and attention, with tensors of all tokens of a rank's
    heads beside those of its own tokens. To both are added the embedded tokens of the whole sequence, which the first
    block takes its piece of, and the gathered block scores.

    Args:
        activations_gib: of the same pass on one device.
        split: the pass.
    """
    if split.ranks == 1:
        return activations_gib
    length, tokens, heads = sum(split.tokens), max(split.tokens), max(split.heads[0])
    count = sum(split.heads[0])
    number = split.batch * split.head_dim * split.element_size
    attention = number * ((LOCAL_TENSORS + 3) * tokens * count + 3 * length * heads) / GIB
    beside: float = number * length * count
    if split.scored_layers:
        assert split.score_blocks is not None
        beside += split.batch * count * split.score_blocks**2 * FLOAT32
    return max(activations_gib * tokens / length, attention) + beside / GIB


def bytes_text(count: float) -> str:
    """Return a number of bytes for people, in units of 1000."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    size, unit = next(((size, unit) for size, unit in units if count >= size), (1.0, "bytes"))
    return f"{count / size:.3g} {unit}"
