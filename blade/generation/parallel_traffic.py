"""The forward passes of a run that several processes make together, and what they send each other in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from blade.attention.config import BladeConfig
from blade.attention.head_deal import deal_heads, equal_deal, slowest
from blade.attention.pattern_plan import PatternPlan
from blade.attention.selectors import find_selector
from blade.attention.sequence_parallel import modules_of_name
from blade.common.checks import check_integer
from blade.families.sequence_split import SequenceSplit
from blade.models.cards import Link
from blade.models.communication import CutKeys, SplitPass
from blade.models.costs import ForwardCost, RunCost, forward_cost
from blade.models.loaded import LatentSize, LoadedModel

LINK_SHARE = 0.8
"""Assumed share of a link's documented peak that collective operations reach. A copy between two H100 reached 380 of
450 GB/s (84 %): https://github.com/NVIDIA/nccl/issues/1264. Not measured here."""

LATENCY = 30e-6
"""Assumed seconds that a collective operation takes beside its bytes. Not measured here."""


@dataclass(frozen=True, kw_only=True)
class PassShape:
    """Facts of a run's forward passes that do not depend on how many processes make them."""

    steps: int
    """Steps of the schedule."""
    skipped_steps: int
    """Those of them, from the start, that the run does not take."""
    batches: tuple[int, ...]
    """Batch items of each call of the transformer in a step."""
    text_apart: bool
    """See `SequenceSplit`."""
    element_size: int
    """Bytes of a number."""
    out_channels: int
    """Numbers of a token of what is put together at the end of a pass."""
    cut_keys: tuple[CutKeys, ...]
    """Attention that other queries pay to tokens of the sequence."""
    table_bytes: int
    """Bytes of tensors of the whole sequence of which every rank keeps its part, such as rotary tables."""
    embeds_whole: bool
    """True if the tokens of the whole sequence are embedded, and the first block cuts them."""
    whole: Mapping[str, float]
    """Operations of a pass of one item by part that every rank does whole: those that do not grow with the video, such
    as products with text outside of the sequence, and with sound."""

    @classmethod
    def of(
        cls,
        model: LoadedModel,
        latent: LatentSize,
        forward: ForwardCost,
        *,
        steps: int,
        skipped_steps: int,
        batches: tuple[int, ...],
    ) -> PassShape:
        """Find the facts out on the meta device.

        Args:
            model: the model without its weights.
            latent: the size of its latent.
            forward: the cost of a pass of one item.
            steps: see the field.
            skipped_steps: see the field.
            batches: see the field.
        """
        transformer = model.transformer
        split = model.family.sequence_split(transformer)
        assert split is not None  # as `check_splits` checks
        cut_keys, table_bytes = _observe(model, latent, split)
        gathered = [part.name for part in split.modules if part.gathered_output is not None]
        whole = {}
        if not forward.grid.text_tokens:  # text in the sequence is cut like video
            frames, height, width = latent
            higher = forward_cost(transformer, (frames, 2 * height, width)).flops
            whole = {part: 2.0 * forward.flops[part] - higher[part] for part in ("linear layers", "other attention")}
        return cls(
            steps=steps,
            skipped_steps=skipped_steps,
            batches=batches,
            text_apart=split.text_apart,
            element_size=transformer.dtype.itemsize,
            out_channels=sum(transformer.get_submodule(name).weight.shape[0] for name in gathered),
            cut_keys=cut_keys,
            table_bytes=table_bytes,
            embeds_whole=not any(not part.name and "hidden_states" in part.inputs for part in split.modules),
            whole=whole,
        )


def _observe(model: LoadedModel, latent: LatentSize, split: SequenceSplit) -> tuple[tuple[CutKeys, ...], int]:
    """Return the sizes of attention to keys that are cut, and the bytes of outputs that are, in a pass without values.

    Args:
        model: the model without its weights.
        latent: the size of its latent.
        split: the places where its sequence is cut.
    """
    transformer, family, seen, sizes = model.transformer, model.family, list[CutKeys](), list[int]()

    def note_keys(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        queries = args[0] if args else kwargs["hidden_states"]
        width = module.to_k.weight.shape[0]
        seen.append(CutKeys(queries=queries.shape[1], heads=module.heads, head_dim=width // module.heads))

    def note_tables(module: Any, args: Any, output: Any) -> None:
        tensors = output if isinstance(output, list | tuple) else [output]
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    handles = [
        module.register_forward_pre_hook(note_keys, with_kwargs=True)
        for name in split.cut_keys
        for module in modules_of_name(transformer, name)
    ]
    handles += [
        module.register_forward_hook(note_tables)
        for part in split.modules
        if part.cut_output is not None
        for module in modules_of_name(transformer, part.name)
    ]
    try:
        with torch.no_grad(), torch.device("meta"), family.without_values():
            transformer(**model.example_inputs(latent))
    finally:
        for handle in handles:
            handle.remove()
    return tuple(seen), sum(sizes)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The forward passes of a run, as the ranks make them together."""

    steps: tuple[tuple[int, tuple[SplitPass, ...]], ...]
    """Steps of each kind: their number, and the calls of the transformer in one."""
    sparse_share: float
    """Share of the work of sparse attention of the rank that has most, on average."""

    @classmethod
    def of(cls, cost: RunCost, config: BladeConfig | None, shape: PassShape, ranks: int) -> Traffic:
        """Work out the traffic of a run.

        Args:
            cost: of its transformer.
            config: of its attention; None is dense.
            shape: of its forward passes.
            ranks: number of processes.

        Raises:
            ValueError: if a rank would have no head.
        """
        forward = cost.forward
        check_integer("parallel", ranks, least=1)
        if ranks > forward.heads:
            raise ValueError(f"`parallel` must be at most the model's {forward.heads} heads, got {ranks}.")
        steps = shape.steps - shape.skipped_steps
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
                text_apart=shape.text_apart,
                cut_keys=shape.cut_keys,
            )
            for batch in shape.batches
        )
        kinds: list[tuple[int, tuple[SplitPass, ...]]] = []
        share = max(plain[0].heads[0]) / forward.heads
        if config is None or not cost.sparse_passes:
            pass
        elif config.attention == "patterns":
            dealt, share = deal_patterns(forward, config, shape, ranks)
            for heads, count in dealt.items():
                kinds.append((count, tuple(replace(split, heads=heads) for split in plain)))
        elif config.asa.budget == "layer" and not find_selector(config.asa.selector).scores_all_heads:
            choosing = -(-(cost.sparse_passes // sum(shape.batches)) // config.asa.reselect_every)
            blocks = -(-forward.grid.sequence_length // config.asa.block_size)
            layers = tuple(layer for layer in range(forward.layers) if layer not in config.dense_layers)
            scored = tuple(replace(split, score_blocks=blocks, scored_layers=layers) for split in plain)
            kinds.append((choosing, scored))
        others = steps - sum(count for count, _ in kinds)
        return cls(steps=((others, plain), *kinds) if others else tuple(kinds), sparse_share=share)

    @property
    def largest(self) -> SplitPass:
        """The call that sends most."""
        return max((split for _, calls in self.steps for split in calls), key=lambda split: max(split.sent()))

    def sent(self) -> tuple[int, ...]:
        """Return the bytes that each rank sends in the run."""
        counted = [[count * sent for sent in split.sent()] for count, calls in self.steps for split in calls]
        return tuple(map(sum, zip(*counted)))

    def seconds(self, link: Link) -> float:
        """Return the seconds that the ranks wait for collective operations.

        Each takes `LATENCY`, and its busiest link's bytes at `LINK_SHARE` of the peak. Nothing is computed meanwhile.

        Args:
            link: what the ranks' cards are connected by.
        """
        speed, total = 1e9 * link.gb_per_second * LINK_SHARE, 0.0
        for count, calls in self.steps:
            for split in calls:
                busiest = [operation.busiest for operation in split.collectives()]
                total += count * sum(LATENCY + size / speed for size in busiest if size)
        return total


def deal_patterns(
    forward: ForwardCost, config: BladeConfig, shape: PassShape, ranks: int
) -> tuple[Mapping[tuple[tuple[int, ...], ...], int], float]:
    """Deal the heads of a table of patterns by their cost, as `AppliedBlade` does.

    Args:
        forward: a forward pass.
        config: the configuration, with its table.
        shape: of the run.
        ranks: number of processes.

    Returns:
        The numbers of heads by rank and layer, each with the number of sparse steps that have them; and the mean share
        of the work of attention that the slowest rank of a layer has.
    """
    plan = PatternPlan.of(config, forward.grid, torch.device("cpu"))
    costs, sparse = plan.pattern_costs(), plan.table.sparse_layers()
    first = max(config.dense_step_count(shape.steps), shape.skipped_steps)
    dealt, whole, most = Counter[tuple[tuple[int, ...], ...]](), 0.0, 0.0
    for group, count in Counter(plan.table.by_step(shape.steps)[first:].tolist()).items():
        counts = []
        for layer in range(forward.layers):
            own = tuple(costs[pattern] for pattern in plan.table.assignment[group, layer])
            by_cost = layer not in config.dense_layers and bool(sparse[group, layer])
            deal = deal_heads(own, ranks) if by_cost else equal_deal(len(own), ranks)
            counts.append(tuple(map(len, deal)))
            if layer not in config.dense_layers:
                whole += count * sum(own)
                most += count * slowest(deal, own)
        dealt[tuple(counts)] += count
    return dealt, most / whole if whole else 1 / ranks
