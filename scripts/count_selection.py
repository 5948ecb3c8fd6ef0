"""Count what choosing blocks costs, and predict its time: count_selection.py docs/results/selection-cost."""

import os
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"  # the kernels' operators are called by their shapes alone, without a GPU

import torch
import typer
from blade_kernels.block_selection import importance, selection
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

MEASURED_SECONDS = 0.79e-3
"""Of a selection by two kernels, `as_benchmarked`, on an H200. Source: the same."""

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

    @property
    def floor_seconds(self) -> float:
        """Least time on an H200, by its memory or its products."""
        return max((self.read + self.written) / BANDWIDTH, self.flops / PEAK)

    def predicted_seconds(self, product_rate: float) -> float:
        """Time by the assumptions above, with products at a rate in operations a second."""
        in_memory = (self.read + self.written) / (BANDWIDTH * REACHED_BANDWIDTH)
        return max(LAUNCH_SECONDS, in_memory, self.flops / product_rate)


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


def sampled_importance_work(arguments: tuple[Any, ...], output: Tensor) -> tuple[int, int, int]:
    """Count what `blade::sampled_importance` reads and writes, and its products: two passes over all logits."""
    q, k, query_offsets, key_offsets = arguments[:4]
    batch, heads, query_blocks, key_blocks = output.shape
    queries, keys = query_blocks * query_offsets.shape[-1], key_blocks * key_offsets.shape[-1]
    rows = batch * heads * (queries + keys)
    read = rows * q.shape[-1] * q.element_size() + tensor_bytes((query_offsets, key_offsets))
    return read, tensor_bytes((output,)), 2 * 2 * batch * heads * queries * keys * k.shape[-1]


WORK: dict[str, Callable[..., tuple[int, int, int]]] = {"blade.sampled_importance": sampled_importance_work}
"""Bytes read, bytes written and operations of an operator, of its arguments and outputs, where they are not the whole
of its tensors and no products."""


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
            read, written, flops = WORK[name](args, output)
        else:
            read, written, flops = tensor_bytes((*args, *(kwargs or {}).values())), tensor_bytes((output,)), 0
        if read or written:
            self.launches.append(Launch(name=name, read=read, written=written, flops=flops))
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


def product_rate(launches: list[Launch], seconds: float) -> float:
    """Derive the rate of matrix products from the time of a whole selection, by what a prediction assumes."""
    others = sum(launch.predicted_seconds(PEAK) for launch in launches if not launch.flops)
    return sum(launch.flops for launch in launches) / (seconds - others)


def dense_seconds(tokens: int, heads: int, head_dim: int) -> float:
    """Compute the time of dense attention at `DENSE_RATE`."""
    return 4.0 * tokens**2 * heads * head_dim / DENSE_RATE


def main(
    output: Annotated[Path | None, typer.Argument(help="Folder for selection.json and selection.md.")] = None,
) -> None:
    """Print the tables and write them."""
    if output is not None:
        check_table(output, "selection")
    rate = product_rate(as_benchmarked(), MEASURED_SECONDS)
    headings = [
        "size",
        "launches",
        "MB read",
        "MB written",
        "GFLOP",
        "floor ms",
        "of dense",
        "predicted ms",
        "of dense",
    ]
    rows, records, details = [], [], []
    for name, (preset, grid, heads, head_dim) in SIZES.items():
        launches = count_launches(BladeConfig.from_preset(preset), grid, heads, head_dim)
        dense = dense_seconds(grid.sequence_length, heads, head_dim)
        floor = sum(launch.floor_seconds for launch in launches)
        predicted = sum(launch.predicted_seconds(rate) for launch in launches)
        rows.append(
            [
                f"{name}, {grid.sequence_length:,} tokens, {heads} heads of {head_dim}",
                f"{len(launches)}",
                f"{sum(launch.read for launch in launches) / 1e6:,.0f}",
                f"{sum(launch.written for launch in launches) / 1e6:,.0f}",
                f"{sum(launch.flops for launch in launches) / 1e9:,.0f}",
                f"{floor * 1e3:.3f}",
                f"{floor / dense:.1%}",
                f"{predicted * 1e3:.3f}",
                f"{predicted / dense:.1%}",
            ]
        )
        details += [f"## {name}", "", *_by_operator(launches, rate), ""]
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
    note = (
        "A prediction, not a measurement: bytes and operations counted from the tensors of the operators that "
        "choose a layer's blocks with a preset, batch 1, bfloat16. The floor is each launch at "
        f"{BANDWIDTH / 1e12:g} TB/s or {PEAK / 1e12:g} TFLOP/s; dense attention at {DENSE_RATE / 1e12:g} TFLOP/s. "
        f"Predicted: a launch takes at least {LAUNCH_SECONDS * 1e6:g} µs, memory reaches {REACHED_BANDWIDTH:.0%}, and "
        f"products run at {rate / 1e12:.0f} TFLOP/s, the rate that the selection measured on an H200 comes to."
    )
    lines = [*markdown_table(headings, rows), "", *details]
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
                "product_rate": rate,
                "sizes": records,
            },
        )


def _by_operator(launches: list[Launch], rate: float) -> list[str]:
    """Tabulate launches by operator, the longest first."""
    names = {launch.name for launch in launches}
    groups = {name: [launch for launch in launches if launch.name == name] for name in names}
    seconds = {name: sum(launch.predicted_seconds(rate) for launch in group) for name, group in groups.items()}
    rows = [
        [
            name,
            f"{len(groups[name])}",
            f"{sum(launch.read for launch in groups[name]) / 1e6:,.1f}",
            f"{sum(launch.written for launch in groups[name]) / 1e6:,.1f}",
            f"{sum(launch.flops for launch in groups[name]) / 1e9:,.0f}",
            f"{sum(launch.floor_seconds for launch in groups[name]) * 1e6:,.1f}",
            f"{seconds[name] * 1e6:,.1f}",
        ]
        for name in sorted(names, key=lambda name: (-seconds[name], name))
    ]
    headings = ["operator", "launches", "MB read", "MB written", "GFLOP", "floor µs", "predicted µs"]
    return markdown_table(headings, rows)


if __name__ == "__main__":
    run_script(main)
