"""Attention that is measured while a model generates: dense, or with the patterns of the published search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from blade.attention.adaptive import AdaptivePlan, draw_table, keep_own_heads, layer_importance
from blade.attention.config import AdaptiveConfig, BladeConfig
from blade.attention.frame_keys import FrameKeys
from blade.attention.layer import Plan
from blade.attention.pattern_plan import PatternPlan, order_places
from blade.attention.pattern_table import uniform_table
from blade.attention.patterns import HeadPattern, pattern_blocks
from blade.attention.reuse import Kept
from blade.attention.sequence_parallel import HeadShare
from blade.families.protocol import ModelFamily
from blade.profiling.assignment import GreedyRule
from blade.profiling.measure import Candidates, LayerMeasurement, column_mass, measure_layer
from blade.token_grid import TokenGrid, canonical_order


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Options of a recording: the candidates, and how they are measured."""

    candidates: tuple[HeadPattern, ...]
    """The patterns, `full` first; no `asa`."""
    block_size: int
    """Tokens in a block."""
    token_order: str = "raster"
    """Token order in which the model's blocks are cut."""
    sampled_blocks: int | None = None
    """Query blocks sampled in a layer, different ones in every step; None: all."""
    adaptive: tuple[BladeConfig, ...] = ()
    """Adaptive methods measured in addition to the patterns, without pooled tokens, each in its own token order. In a
    measurement they follow the patterns."""
    calibrated: bool = True
    """If true, a `vertical` with a `share` keeps the key blocks that each head attends to most, instead of evenly
    spaced ones."""
    rule: GreedyRule | None = None
    """Rule of the published search: each head continues with the pattern that it gives. None: with full attention."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_order", canonical_order(self.token_order))
        if not self.candidates or self.candidates[0].kind != "full":
            raise ValueError("`candidates` must begin with the full pattern.")
        if any(pattern.kind == "asa" for pattern in self.candidates):
            raise ValueError("`candidates` must be static patterns; give `asa` as `adaptive`.")
        for config in self.adaptive:
            if config.asa.block_size != self.block_size:
                raise ValueError(
                    f"`adaptive` must have blocks of {self.block_size} tokens too, got {config.asa.block_size}."
                )

    @property
    def measured(self) -> int:
        """Number of measured patterns and adaptive methods."""
        return len(self.candidates) + len(self.adaptive)


@dataclass(eq=False)
class RecordingPlan:
    """The plan of `RecordingMethod`: it attends, and measures the errors of all candidates."""

    recording: Recording
    grid: TokenGrid
    family: ModelFamily
    attentions: Sequence[nn.Module]
    device: torch.device
    step: int = 0
    """Step of the latest pass."""
    measurements: dict[int, LayerMeasurement] = field(default_factory=dict)
    """Measurements of the current pass, by layer."""
    columns: dict[int, Tensor] = field(default_factory=dict)
    """Attention weight that key blocks receive in the current pass, by layer: (H, blocks)."""

    def __post_init__(self) -> None:
        size, order = self.recording.block_size, self.recording.token_order
        self._groups: dict[str, tuple[list[int], list[Tensor]]] = {order: ([], [])}
        for number, pattern in enumerate(self.recording.candidates):
            if pattern.share is not None:
                continue
            numbers, masks = self._groups.setdefault(pattern.order or order, ([], []))
            numbers.append(number)
            masks.append(pattern_blocks(pattern, self.grid, size, order, self.device).unsqueeze(0))
        for config in self.recording.adaptive:
            self._groups.setdefault(config.asa.token_order, ([], []))
        # the sequence in each order, as positions in the model's order; None: the model's order itself
        self._tokens: dict[str, Tensor | None] = {order: None}
        for other in self._groups:
            if other != order:
                self._tokens[other] = order_places(self.grid, order, other, self.device).argsort()
        self._text = torch.tensor(self.grid.text_blocks(size), device=self.device)
        self._adaptive = [AdaptivePlan.of(config, self.grid, self.device) for config in self.recording.adaptive]
        self._draws: dict[tuple[AdaptiveConfig, int], Tensor] = {}
        self._patterns: PatternPlan | None = None

    @property
    def token_order(self) -> str:
        """The model's token order."""
        return self.recording.token_order

    @property
    def is_full(self) -> bool:
        """False: every layer is measured."""
        return False

    @property
    def moves_heads(self) -> bool:
        """False: queries and keys come in the model's order."""
        return False

    def head_places(self, rows: tuple[Tensor, ...]) -> None:
        """Return None: all heads have the model's order."""

    def rows_of_heads(self, rows: tuple[Tensor, ...], heads: Tensor) -> tuple[Tensor, ...]:
        """Return the layer and the step, whatever the heads."""
        return rows

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: tuple[Tensor, ...],
        key_lengths: Tensor | None = None,
        places: Tensor | None = None,
        kept: Kept | None = None,
        beside: FrameKeys | None = None,
        share: HeadShare | None = None,
    ) -> tuple[Tensor, Tensor, str]:
        """Attend and measure; see `PatternPlan.attend`. `rows` holds the layer and the step.

        Every rank measures its own heads, and has the measurements of all afterwards.

        Raises:
            ValueError: if frames have keys beside the sequence, which no measurement knows.
        """
        if beside is not None:
            raise ValueError("This model cannot be profiled: its frames attend to keys beside the sequence.")
        layer, self.step = (int(number) for number in rows[0])
        recording = self.recording
        with torch.no_grad():
            columns = column_mass(query, key, recording.block_size, key_lengths=key_lengths)
            measured = measure_layer(
                query,
                key,
                value,
                self._candidates(layer, query, key, value, columns, key_lengths, share),
                candidates=recording.measured,
                block_size=recording.block_size,
                projection=self._projection(layer, share),
                key_lengths=key_lengths,
                query_blocks=self._query_blocks(layer),
            )
            if share is None:
                self.columns[layer], self.measurements[layer] = columns, measured
            else:
                self.columns[layer] = share.gather_heads(columns.unsqueeze(0)).squeeze(0)
                self.measurements[layer] = measured.of_all_heads(share)
            if recording.rule is None:
                return _dense(query, key, value, key_lengths)
            errors = (measured.head_error / measured.queries).cpu().numpy()
            chosen = recording.rule.choose(errors, np.array(self.densities))
            return self.patterns.attend(query, key, value, (torch.from_numpy(chosen).to(query.device),), key_lengths)

    def _projection(self, layer: int, share: HeadShare | None) -> Tensor | None:
        """Return the weights of a layer's output projection, (channels, H * D), of this rank's heads."""
        projection = self.family.output_projection(self.attentions[layer])
        if share is None or projection is None:
            return projection
        by_head: Tensor = projection.unflatten(1, (sum(share.counts), -1))
        return by_head.index_select(1, share.heads).flatten(1)

    @property
    def patterns(self) -> PatternPlan:
        """The plan that attends with the candidates, whose stripes are evenly spaced."""
        if self._patterns is None:
            recording = self.recording
            table = uniform_table(
                HeadPattern(kind="full"), 1, 1, block_size=recording.block_size, token_order=recording.token_order
            )
            config = BladeConfig(attention="patterns", patterns=replace(table, patterns=recording.candidates))
            self._patterns = PatternPlan.of(config, self.grid, self.device)
        return self._patterns

    @property
    def densities(self) -> list[float]:
        """Share of all pairs that each candidate computes."""
        return [1.0 if density is None else density for density in self.patterns.densities]

    @property
    def adaptive_densities(self) -> list[float]:
        """Planned share of all pairs that each adaptive method computes."""
        return [plan.budget.density for plan in self._adaptive]

    def _candidates(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        columns: Tensor,
        key_lengths: Tensor | None,
        share: HeadShare | None,
    ) -> list[Candidates]:
        recording, groups = self.recording, []
        for order, (static_numbers, static_masks) in self._groups.items():
            tokens = self._tokens[order]
            numbers, masks = list(static_numbers), list(static_masks)
            if order == recording.token_order:
                for number, pattern in enumerate(recording.candidates):
                    if pattern.share is not None:
                        numbers.append(number)
                        masks.append(self._vertical(pattern, columns))
            inputs = (query, key, value)
            q, k, v = inputs if tokens is None else (x.index_select(1, tokens) for x in inputs)
            scores: dict[AdaptiveConfig, Tensor] = {}  # shared by all sparsities
            for number, plan in enumerate(self._adaptive):
                if plan.token_order != order:
                    continue
                if plan.config not in scores:
                    heads = query.shape[2] if share is None else sum(share.counts)
                    draw = self._draw(plan.config, layer, heads)
                    if share is not None:
                        draw = plan.selector.of_heads(draw, share.heads)
                    scores[plan.config] = layer_importance(q, k, v, plan, draw, key_lengths, share)
                numbers.append(len(recording.candidates) + number)
                masks.append(keep_own_heads(scores[plan.config], plan, share).keep)
            groups.append(Candidates(numbers=tuple(numbers), masks=tuple(masks), tokens=tokens))
        return groups

    def _vertical(self, pattern: HeadPattern, columns: Tensor) -> Tensor:
        """Return the mask of a vertical pattern: each head's most attended key blocks, or evenly spaced ones.

        Returns:
            (H or 1, blocks, blocks) bool.
        """
        if not self.recording.calibrated:
            size, order = self.recording.block_size, self.recording.token_order
            return pattern_blocks(pattern, self.grid, size, order, self.device).unsqueeze(0)
        assert pattern.share is not None
        keep = torch.zeros_like(columns, dtype=torch.bool)
        for head, weights in enumerate(columns.cpu().numpy()):
            keep[head, list(most_attended_blocks(weights, pattern.share, self._text.cpu().numpy()))] = True
        keep = (keep | self._text).unsqueeze(1).expand(-1, keep.shape[1], -1)
        return keep | self._text[:, None]

    def _query_blocks(self, layer: int) -> Tensor | None:
        blocks = -(-self.grid.sequence_length // self.recording.block_size)
        count = self.recording.sampled_blocks
        if count is None or count >= blocks:
            return None
        # every block gets its turn, in an order that differs between layers
        shuffled = torch.randperm(blocks, generator=torch.Generator().manual_seed(layer))
        return shuffled[(self.step * count + torch.arange(count)) % blocks].sort().values

    def _draw(self, details: AdaptiveConfig, layer: int, heads: int) -> Tensor:
        if (details, layer) not in self._draws:
            self._draws[details, layer] = draw_table(BladeConfig(asa=details), layer, heads).to(self.device)
        draws = self._draws[details, layer]
        return draws[self.step % len(draws)]


class RecordingMethod:
    """The method of a recording: every layer is measured in every step."""

    def __init__(self, recording: Recording, family: ModelFamily, transformer: nn.Module) -> None:
        """Take the options of the recording, and find the attention layers."""
        self._recording, self._family = recording, family
        self._attentions = family.attention_layers(transformer)
        self.latest: RecordingPlan | None = None

    def check(self, layers: int, heads: int) -> None:
        """Accept every model."""

    def rows(self, total: int | None) -> int:
        """Return one row per step, or a single row if the number of steps is unknown."""
        return total or 1

    def tables(self, layer: int, heads: int, rows: int) -> tuple[Tensor, ...]:
        """Return the layer and the step of each row."""
        return (torch.tensor([[layer, step] for step in range(rows)]),)

    def plan(self, grid: TokenGrid, device: torch.device) -> RecordingPlan:
        """Make the plan that attends and measures."""
        self.latest = RecordingPlan(self._recording, grid, self._family, self._attentions, device)
        return self.latest

    def is_sparse(self, layer: int, row: int, rows: int) -> bool:
        """Return true: every layer goes through the plan."""
        return True

    def head_costs(self, layer: int, row: int, rows: int, plan: Plan) -> None:
        """Return None: all heads cost the same."""


def most_attended_blocks(columns: np.ndarray, share: float, text: np.ndarray) -> tuple[int, ...]:
    """Return the key blocks of video that a head attends to most, ascending, for a `vertical` with a `share`.

    Args:
        columns: (blocks,), attention weight that key blocks receive.
        share: share of the blocks of video.
        text: (blocks,) bool, true for blocks that hold text.
    """
    count = max(1, round(share * int((~text).sum())))
    ranked = np.argsort(-np.where(text, -1.0, columns), kind="stable")
    return tuple(sorted(int(block) for block in ranked[:count]))


def _dense(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None) -> tuple[Tensor, Tensor, str]:
    density = torch.ones((), device=query.device)
    if query.shape[2] == 0:  # a rank without heads
        return query, density, "dense"
    mask = None
    if key_lengths is not None:
        positions = torch.arange(key.shape[1], device=key.device)
        mask = (positions < key_lengths.unsqueeze(-1))[:, None, None]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # heads before tokens
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)
    return output, density, "dense"
