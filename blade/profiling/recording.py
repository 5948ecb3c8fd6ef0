"""Looking into a model's attention while it generates, pass by pass, so that what is stopped can go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blade.attention.adaptive import AdaptivePlan, draw_table, select
from blade.attention.applied import AppliedBlade
from blade.attention.family import ModelFamily, find_family
from blade.attention.pattern_plan import order_places
from blade.attention.patterns import HeadPattern, pattern_blocks
from blade.config import BladeConfig
from blade.profiling.measure import Candidates, LayerMeasurement, column_mass, measure_layer
from blade.token_grid import TokenGrid


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What is measured in every layer."""

    candidates: tuple[HeadPattern, ...]
    """The patterns, `full` first. A `vertical` with a `share` stands for the key blocks that each head attends to
    most."""
    block_size: int
    """Tokens in a block."""
    token_order: str = "raster"
    """Order in which the model's tokens are cut into blocks."""
    sampled_blocks: int | None = None
    """Query blocks that are looked at in a layer, others every step; None: all."""
    adaptive: BladeConfig | None = None
    """What `asa` among the candidates means; None: `BladeConfig()`."""


@dataclass(eq=False)
class RecordingPlan:
    """Attends densely, and measures what candidates would have done. Stands in for the plan of a method."""

    recording: Recording
    grid: TokenGrid
    family: ModelFamily
    attentions: Sequence[nn.Module]
    device: torch.device
    measurements: dict[int, LayerMeasurement] = field(default_factory=dict)
    """Of the pass that is under way, by layer."""
    columns: dict[int, Tensor] = field(default_factory=dict)
    """Of the pass that is under way, by layer: (H, blocks), attention weight that key blocks receive."""

    def __post_init__(self) -> None:
        size, order = self.recording.block_size, self.recording.token_order
        self._groups: dict[str, tuple[list[int], list[Tensor]]] = {order: ([], [])}
        for number, pattern in enumerate(self.recording.candidates):
            if pattern.kind == "asa" or pattern.share is not None:
                continue
            numbers, masks = self._groups.setdefault(pattern.order or order, ([], []))
            numbers.append(number)
            masks.append(pattern_blocks(pattern, self.grid, size, order, self.device).unsqueeze(0))
        self._text = torch.tensor(self.grid.text_blocks(size), device=self.device)
        self._adaptive: AdaptivePlan | None = None
        self._draws: dict[int, Tensor] = {}
        if any(pattern.kind == "asa" for pattern in self.recording.candidates):
            self._adaptive = AdaptivePlan.of(self._adaptive_config, self.grid, self.device)

    @property
    def token_order(self) -> str:
        """The model's token order."""
        return self.recording.token_order

    @property
    def is_full(self) -> bool:
        """Not a run in which nothing happens."""
        return False

    @property
    def moves_heads(self) -> bool:
        """Queries and keys come in the model's order."""
        return False

    def head_places(self, rows: tuple[Tensor, ...]) -> None:
        """All heads have the model's order."""

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: tuple[Tensor, ...],
        key_lengths: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, str]:
        """Attend densely and measure; see `PatternPlan.attend`. `rows` holds the layer and the step."""
        layer, step = (int(number) for number in rows[0])
        with torch.no_grad():
            size = self.recording.block_size
            columns = column_mass(query, key, size, key_lengths=key_lengths)
            self.columns[layer] = columns
            self.measurements[layer] = measure_layer(
                query,
                key,
                value,
                self._candidates(layer, step, query, key, columns, key_lengths),
                candidates=len(self.recording.candidates),
                block_size=size,
                projection=self.family.output_projection(self.attentions[layer]),
                key_lengths=key_lengths,
                query_blocks=self._query_blocks(layer, step),
            )
            return _dense(query, key, value, key_lengths), torch.ones((), device=query.device), "dense"

    def _candidates(
        self, layer: int, step: int, query: Tensor, key: Tensor, columns: Tensor, key_lengths: Tensor | None
    ) -> list[Candidates]:
        recording, groups = self.recording, []
        for order, (numbers, masks) in self._groups.items():
            if order == recording.token_order:
                numbers, masks = list(numbers), list(masks)
                for number, pattern in enumerate(recording.candidates):
                    if pattern.share is not None:
                        masks.append(self._vertical(pattern, columns))
                    elif pattern.kind == "asa":
                        assert self._adaptive is not None
                        draw = self._draw(layer, step, query.shape[2])
                        masks.append(select(query, key, self._adaptive, draw, key_lengths).keep)
                    else:
                        continue
                    numbers.append(number)
            groups.append(Candidates(numbers=tuple(numbers), masks=tuple(masks), tokens=self._tokens(order)))
        return groups

    def _vertical(self, pattern: HeadPattern, columns: Tensor) -> Tensor:
        """(H, blocks, blocks) bool, each head's most attended key blocks."""
        keep = torch.zeros_like(columns, dtype=torch.bool)
        chosen = most_attended(columns, pattern, self._text)
        keep.scatter_(1, chosen, True)
        keep = (keep | self._text).unsqueeze(1).expand(-1, keep.shape[1], -1)
        return keep | self._text[:, None]

    def _tokens(self, order: str) -> Tensor | None:
        """The sequence in another order, as places in the model's."""
        if order == self.recording.token_order:
            return None
        return order_places(self.grid, self.recording.token_order, order, self.device).argsort()

    def _query_blocks(self, layer: int, step: int) -> Tensor | None:
        blocks = -(-self.grid.sequence_length // self.recording.block_size)
        count = self.recording.sampled_blocks
        if count is None or count >= blocks:
            return None
        generator = torch.Generator().manual_seed(1_000_003 * layer + step)
        return torch.randperm(blocks, generator=generator)[:count].sort().values

    @property
    def _adaptive_config(self) -> BladeConfig:
        return self.recording.adaptive or BladeConfig()

    def _draw(self, layer: int, step: int, heads: int) -> Tensor:
        if layer not in self._draws:
            self._draws[layer] = draw_table(self._adaptive_config, layer, heads).to(self.device)
        draws = self._draws[layer]
        return draws[step % len(draws)]


class RecordingMethod:
    """Has every layer measured, at every step."""

    def __init__(self, recording: Recording, family: ModelFamily, transformer: nn.Module) -> None:
        """Take what is measured, and the layers."""
        self._recording, self._family = recording, family
        self._attentions = family.attention_layers(transformer)
        self.latest: RecordingPlan | None = None

    def check(self, layers: int, heads: int) -> None:
        """Every model will do."""

    def rows(self, total: int | None) -> int:
        """One a step; where their number is unknown, one for all."""
        return total or 1

    def tables(self, layer: int, heads: int, rows: int) -> tuple[Tensor, ...]:
        """Layer and step."""
        return (torch.tensor([[layer, step] for step in range(rows)]),)

    def plan(self, grid: TokenGrid, device: torch.device) -> RecordingPlan:
        """Masks of the candidates."""
        self.latest = RecordingPlan(self._recording, grid, self._family, self._attentions, device)
        return self.latest

    def is_sparse(self, layer: int, row: int, rows: int) -> bool:
        """All go through the plan."""
        return True


@contextmanager
def recorded(
    transformer: nn.Module,
    recording: Recording,
    folder: Path,
    pipe: Any = None,
    on_pass: Callable[[int, bool], None] | None = None,
) -> Iterator[None]:
    """Measure every forward pass of a transformer inside a `with` block, and keep it in a file.

    A pass whose file is there is not computed again: its output is read, so that a generation that is started anew
    with the same noise comes quickly to where it was stopped.

    Args:
        transformer: of a family that BLADE knows, without BLADE.
        recording: what is measured.
        folder: where the files lie, `pass-00000.safetensors` and so on; made if missing.
        pipe: the pipeline that drives it, for its scheduler.
        on_pass: called after every pass with its number and whether it was read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    family = find_family(transformer)
    method = RecordingMethod(recording, family, transformer)
    applied = AppliedBlade(transformer, family, BladeConfig(), pipe, method)
    applied.install(transformer)
    inner, count = transformer.forward, 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        number, path = count, folder / f"pass-{count:05d}.safetensors"
        count += 1
        known = path.is_file()
        if known:
            output = load_file(path)["output"].to((args[0] if args else kwargs["hidden_states"]).device)
        else:
            result = inner(*args, **kwargs)
            output = result[0] if isinstance(result, tuple) else result.sample
            _keep(path, output, method.latest)
        if on_pass is not None:
            on_pass(number, known)
        if kwargs.get("return_dict", True):
            from diffusers.models.modeling_outputs import Transformer2DModelOutput

            return Transformer2DModelOutput(sample=output)
        return (output,)

    transformer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        transformer.forward = inner  # type: ignore[method-assign]
        applied.uninstall(transformer)


def read_pass(path: Path) -> tuple[dict[int, LayerMeasurement], dict[int, Tensor]]:
    """What was measured in a pass: by layer the measurements, and (H, blocks) what key blocks receive."""
    measurements: dict[int, dict[str, Tensor]] = {}
    columns: dict[int, Tensor] = {}
    for name, tensor in load_file(path).items():
        if name == "output":
            continue
        layer, what = name.split(".")
        if what == "columns":
            columns[int(layer)] = tensor
        else:
            measurements.setdefault(int(layer), {})[what] = tensor
    return {layer: LayerMeasurement.from_tensors(found) for layer, found in sorted(measurements.items())}, columns


def most_attended(columns: Tensor, pattern: HeadPattern, text: Tensor) -> Tensor:
    """Key blocks of video that each head attends to most, (H, count), for a `vertical` with a `share`."""
    assert pattern.share is not None
    count = max(1, round(pattern.share * int((~text).sum())))
    return columns.masked_fill(text, -1.0).topk(count, dim=-1).indices.sort(-1).values


def _keep(path: Path, output: Tensor, plan: RecordingPlan | None) -> None:
    tensors = {"output": output.detach().cpu().contiguous()}
    if plan is not None:
        for layer, measured in plan.measurements.items():
            tensors |= {f"{layer}.{name}": tensor.contiguous() for name, tensor in measured.tensors().items()}
            tensors[f"{layer}.columns"] = plan.columns[layer].cpu()
        plan.measurements.clear()
        plan.columns.clear()
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


def _dense(query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None) -> Tensor:
    mask = None
    if key_lengths is not None:
        places = torch.arange(key.shape[1], device=key.device)
        mask = (places < key_lengths.unsqueeze(-1))[:, None, None]
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
