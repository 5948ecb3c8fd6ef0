"""Count what choosing blocks costs, and predict its time: count_selection.py docs/results/selection-cost."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"  # the kernels' operators are called by their shapes alone, without a GPU

import torch
import typer
from blade_kernels.block_selection import importance, selection, triton_launch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from blade import BladeConfig
from blade.attention.adaptive import AdaptivePlan, draw_table, select
from blade.cli.command import run_script
from blade.common.machine import describe_versions
from blade.common.tables import check_table, markdown_table, write_table
from blade.token_grid import TokenGrid

SIZES: dict[str, tuple[str, TokenGrid, int, int]] = {
    "Wan2.1-1.3B 480p": ("wan2.1-t2v-1.3b", TokenGrid(21, 30, 52), 12, 128),
    "Wan2.1-14B 720p": ("wan", TokenGrid(21, 45, 80), 40, 128),
    "CogVideoX-5B 480 x 720": ("cogvideox-5b", TokenGrid(13, 30, 45, text_after=226), 48, 64),
}
"""Preset, tokens of one layer, heads, and the size of a head."""

BANDWIDTH, PEAK = 4.8e12, 989e12
"""Bytes and bfloat16 operations a second of an H200. Source: its data sheet."""

DENSE_RATE = 642e12
"""Operations a second of dense attention on an H200, cuDNN. Source: docs/results/h200/attention-before-tuning."""

FORWARD_RATE = 455e12
"""Operations a second of the block-sparse forward kernel on an H200. Source: docs/results/h200/attention-64."""

BEFORE = Path(__file__).resolve().parents[1] / "docs" / "results" / "selection-cost" / "before" / "selection.json"
"""Count of the selection that was measured on an H200, 0.79 ms (docs/results/h200/attention-before-tuning), with the
rate of its products: what that time leaves for them."""

LAUNCH_SECONDS, REACHED_BANDWIDTH = 3e-6, 0.75
"""What a prediction assumes: the least time of a launch, and the share of the bandwidth that one reaches."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One operator that does work on the device."""

    name: str
    """Of the operator."""
    read: int
    """Bytes that it reads from memory, each once."""
    written: int
    """Bytes that it writes."""
    flops: int
    """Operations of its matrix products."""
    launches: int = 1
    """Launches that share this work."""

    @property
    def floor_seconds(self) -> float:
        """Least time on an H200, by its memory or its products."""
        return max((self.read + self.written) / BANDWIDTH, self.flops / PEAK)

    def predicted_seconds(self, product_rate: float) -> float:
        """Time by the assumptions above, with products at a rate in operations a second."""
        in_memory = (self.read + self.written) / (BANDWIDTH * REACHED_BANDWIDTH)
        return max(LAUNCH_SECONDS * self.launches, in_memory, self.flops / product_rate)


def tensor_bytes(values: Iterable[Any]) -> int:
    """Count the bytes of the distinct elements of tensors, also those in lists."""
    count = 0
    for value in values:
        if isinstance(value, Tensor):
            elements = 1
            for size, stride in zip(value.shape, value.stride(), strict=True):
                elements *= size if stride else 1
            count += elements * value.element_size() if value.numel() else 0
        elif isinstance(value, list | tuple):
            count += tensor_bytes(value)
    return count


def sampled_importance_work(arguments: tuple[Any, ...], scores: Tensor) -> list[Launch]:
    """Count `blade::sampled_importance`: the sampled keys gathered, then one pass over all logits."""
    q, _, query_offsets, key_offsets = arguments[:4]
    batch, heads, query_blocks, key_blocks = scores.shape
    queries, keys = query_offsets.shape[-1], key_offsets.shape[-1]
    blocks = triton_launch.KEYS_TOGETHER // keys
    padded = -(-key_blocks // blocks) * blocks
    rows = triton_launch.QUERIES_TOGETHER[q.element_size()]
    row_tiles = -(-query_blocks // (rows // queries))
    row = q.shape[-1] * q.element_size()
    sampled = batch * heads * key_blocks * keys * row
    gathered, drawn = (batch * heads * padded * keys * size for size in (row, 1))
    statistics = batch * heads * row_tiles * rows * padded * 4
    read = sampled + tensor_bytes((key_offsets,))
    gather = Launch(name="gather_keys_kernel", read=read, written=gathered + drawn, flops=0)
    read = gathered + batch * heads * query_blocks * queries * row + tensor_bytes((query_offsets,)) + statistics
    flops = 2 * batch * heads * query_blocks * queries * padded * keys * q.shape[-1]
    written = statistics + tensor_bytes((scores,))
    launches = -(-heads // triton_launch.heads_together(batch * row_tiles * rows * padded, heads))
    score = Launch(name="sampled_importance_kernel", read=read, written=written, flops=flops, launches=launches)
    return [gather, score]


def key_offsets_work(arguments: tuple[Any, ...], offsets: Tensor) -> list[Launch]:
    """Count `blade::largest_key_offsets`: the mean of the keys, then the keys of each block."""
    k, drawn = arguments[:2]
    choose = tensor_bytes((k, drawn)) + _totals_bytes(k)
    return [
        *_sums_work(k, offsets.shape[2], squares=False),
        Launch(name="largest_offsets_kernel", read=choose, written=tensor_bytes((offsets,)), flops=0),
    ]


def value_spread_work(arguments: tuple[Any, ...], spread: Tensor) -> list[Launch]:
    """Count `blade::value_spread`: sums of blocks, then their spread."""
    v = arguments[0]
    sums = _totals_bytes(v) * spread.shape[2]
    read = sums + tensor_bytes((spread,)) + _totals_bytes(v)
    return [
        *_sums_work(v, spread.shape[2], squares=True),
        Launch(name="value_spread_kernel", read=read, written=tensor_bytes((spread,)), flops=0),
    ]


def _sums_work(x: Tensor, blocks: int, *, squares: bool) -> list[Launch]:
    sums = _totals_bytes(x) * blocks
    squared = x.shape[0] * x.shape[2] * blocks * 4 if squares else 0
    return [
        Launch(name="block_sums_kernel", read=tensor_bytes((x,)), written=sums + squared, flops=0),
        Launch(name="aten.sum", read=sums, written=_totals_bytes(x), flops=0),
    ]


def _totals_bytes(x: Tensor) -> int:
    """Count the bytes of a float32 vector a head."""
    return x.shape[0] * x.shape[2] * x.shape[3] * 4


def select_over_heads_work(arguments: tuple[Any, ...], mask: tuple[Tensor, Tensor, Tensor]) -> list[Launch]:
    """Count `blade::select_over_heads`: bits, three digits of the threshold, and the rows."""
    scores, forced, flags = arguments[0], *arguments[4:6]
    bits, ties = tensor_bytes((mask[2],)), tensor_bytes((mask[1],))
    batch = scores.shape[0]
    histograms = [4 * batch * values for _, values in triton_launch.DIGITS]
    state, text = 12 * batch, tensor_bytes((flags,))
    launches = [
        Launch(name="aten.zeros", read=0, written=sum(histograms), flops=0),
        Launch(name="rank_kernel", read=tensor_bytes((scores, forced)) + text, written=bits, flops=0),
    ]
    for digit, histogram in enumerate(histograms):
        before = 0 if digit == 0 else 4 * batch
        counted = Launch(name="digit_histogram_kernel", read=bits + before, written=histogram, flops=0)
        read = histogram + (text if digit == 0 else 8 * batch)
        launches += [counted, Launch(name="next_digit_kernel", read=read, written=state, flops=0)]
    return [
        *launches,
        Launch(name="count_ties_kernel", read=bits + 4 * batch, written=ties, flops=0),
        Launch(name="keep_kernel", read=bits + state + text, written=tensor_bytes(mask), flops=0),
    ]


WORK: dict[str, Callable[[tuple[Any, ...], Any], list[Launch]]] = {
    "blade.sampled_importance": sampled_importance_work,
    "blade.largest_key_offsets": key_offsets_work,
    "blade.value_spread": value_spread_work,
    "blade.select_over_heads": select_over_heads_work,
}
"""Launches of an operator of several kernels, of its arguments and outputs."""


class Counter(TorchDispatchMode):
    """Record the operators that run inside; those that make a view of a tensor, or only allocate one, are left out."""

    def __init__(self) -> None:
        """Begin with no launches."""
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count it."""
        output = func(*args, **(kwargs or {}))
        name = str(func).rpartition(".")[0]
        allocates = (
            name == "prim.device" or "empty" in name or "alias" in name or name.endswith(("detach", "lift_fresh"))
        )
        views = func.is_view or (name.endswith(("reshape", "_to_copy")) and output is args[0])
        if allocates or views:
            return output
        if name in WORK:
            self.launches += WORK[name](args, output)
            return output
        read, written = tensor_bytes((*args, *(kwargs or {}).values())), tensor_bytes((output,))
        if read or written:
            self.launches.append(Launch(name=name, read=read, written=written, flops=0))
        return output


def count_launches(config: BladeConfig, grid: TokenGrid, heads: int, head_dim: int, *, batch: int = 1) -> list[Launch]:
    """List the launches of choosing the blocks of one layer with the kernels, in bfloat16."""
    plan = AdaptivePlan.of(config, grid, torch.device("cpu"))
    draw = draw_table(config, layer=1, heads=heads, steps=1)[0]
    with ExitStack() as stack:
        for module in (importance, selection):  # on a GPU `auto` takes the kernels
            stack.enter_context(patch.object(module, "choose_implementation", lambda *arguments: "triton"))
        stack.enter_context(torch.no_grad())
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        shape = (batch, grid.sequence_length, heads, head_dim)
        q, k, v = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(3))
        with Counter() as counter:
            select(q, k, v, plan, mode.from_tensor(draw))
    return counter.launches


def as_benchmarked() -> list[Launch]:
    """List the launches of the selection that was measured: drawn keys, the largest weight, a budget for each row."""
    preset, grid, heads, head_dim = SIZES["Wan2.1-1.3B 480p"]
    asa = {
        "probe_keys": "drawn", "statistic": "max", "value_weighting": False, "budget": "row", "rounding": "floor",
    }  # fmt: skip
    config = BladeConfig.from_preset(preset)
    details = {**config.to_dict(), "sparsity": 0.8, "pooled_tokens": "none"}
    details["asa"] = {**details["asa"], **asa}
    return count_launches(BladeConfig.from_dict(details), grid, heads, head_dim)


def measured_rate() -> float:
    """Return the rate of products that the measured selection came to, with the assumptions of a prediction."""
    return float(json.loads(BEFORE.read_text(encoding="utf-8"))["product_rate"])


def dense_seconds(tokens: int, heads: int, head_dim: int) -> float:
    """Compute the time of dense attention at `DENSE_RATE`."""
    return 4.0 * tokens**2 * heads * head_dim / DENSE_RATE


def main(
    output: Annotated[Path | None, typer.Argument(help="Folder for selection.json and selection.md.")] = None,
) -> None:
    """Print the tables and write them."""
    if output is not None:
        check_table(output, "selection")
    rates = (measured_rate(), FORWARD_RATE / 2)
    cases = {name: (size, count_launches(BladeConfig.from_preset(size[0]), *size[1:])) for name, size in SIZES.items()}
    first = next(iter(SIZES))
    cases[f"{first}, as `blade-bench attention` measures it"] = SIZES[first], as_benchmarked()
    rows, records, details = [], [], []
    for name, ((preset, grid, heads, head_dim), launches) in cases.items():
        dense = dense_seconds(grid.sequence_length, heads, head_dim)
        floor = sum(launch.floor_seconds for launch in launches)
        predicted = [sum(launch.predicted_seconds(rate) for launch in launches) for rate in rates]
        rows.append(
            [
                f"{name}, {grid.sequence_length:,} tokens, {heads} heads of {head_dim}",
                f"{sum(launch.launches for launch in launches)}",
                f"{sum(launch.read for launch in launches) / 1e6:,.0f}",
                f"{sum(launch.written for launch in launches) / 1e6:,.0f}",
                f"{sum(launch.flops for launch in launches) / 1e9:,.0f}",
                *(f"{seconds * 1e3:.3f} ({seconds / dense:.1%})" for seconds in (floor, *predicted)),
            ]
        )
        details += [f"## {name}", "", *_by_operator(launches, rates), ""]
        records.append(
            {
                "size": name,
                "preset": preset,
                "tokens": grid.sequence_length,
                "heads": heads,
                "head_dim": head_dim,
                "dense_seconds": dense,
                "floor_seconds": floor,
                "predicted_seconds": predicted,
                "launches": [asdict(launch) for launch in launches],
            }
        )
    rated = [f"ms at {rate / 1e12:.0f} TFLOP/s" for rate in rates]
    lines = markdown_table(["size", "launches", "MB read", "MB written", "GFLOP", "floor, ms", *rated], rows)
    lines += ["", *details]
    note = (
        "A prediction, not a measurement: bytes and operations counted from the tensors of the operators that "
        "choose a layer's blocks with a preset, batch 1, bfloat16. The floor is each launch at "
        f"{BANDWIDTH / 1e12:g} TB/s or {PEAK / 1e12:g} TFLOP/s. Predicted: a launch takes at least "
        f"{LAUNCH_SECONDS * 1e6:g} µs, memory reaches {REACHED_BANDWIDTH:.0%}, and products run at "
        f"{rates[0] / 1e12:.0f} TFLOP/s, the rate that the selection measured on an H200 comes to, or at "
        f"{rates[1] / 1e12:.0f}, half of the forward kernel's, which has two products to each exponential. In "
        f"brackets the share of dense attention at {DENSE_RATE / 1e12:g} TFLOP/s."
    )
    print("\n".join([note, "", *lines]))
    if output is not None:
        write_table(
            output,
            "selection",
            title="Cost of choosing blocks",
            note=note,
            lines=lines,
            values={
                "command": shlex.join(["python", *sys.argv]),
                "versions": describe_versions(("torch",)),
                "product_rates": rates,
                "sizes": records,
            },
        )


def _by_operator(launches: list[Launch], rates: Sequence[float]) -> list[str]:
    """Tabulate launches by operator, the longest first."""
    groups: dict[str, list[Launch]] = {}
    for launch in launches:
        groups.setdefault(launch.name, []).append(launch)
    seconds = {
        name: [sum(launch.predicted_seconds(rate) for launch in group) for rate in rates]
        for name, group in groups.items()
    }
    rows = [
        [
            name,
            f"{sum(launch.launches for launch in groups[name])}",
            f"{sum(launch.read for launch in groups[name]) / 1e6:,.1f}",
            f"{sum(launch.written for launch in groups[name]) / 1e6:,.1f}",
            f"{sum(launch.flops for launch in groups[name]) / 1e9:,.0f}",
            f"{sum(launch.floor_seconds for launch in groups[name]) * 1e6:,.1f}",
            *(f"{predicted * 1e6:,.1f}" for predicted in seconds[name]),
        ]
        for name in sorted(groups, key=lambda name: (-seconds[name][0], name))
    ]
    rated = [f"µs at {rate / 1e12:.0f} TFLOP/s" for rate in rates]
    return markdown_table(["operator", "launches", "MB read", "MB written", "GFLOP", "floor, µs", *rated], rows)


if __name__ == "__main__":
    run_script(main)
