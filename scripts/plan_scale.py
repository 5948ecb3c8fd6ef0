"""Predict what one video takes on 1, 2, 4 and 8 H200: plan_scale.py docs/results/scale --page docs/scale.md.

Bytes follow from configurations, seconds from kernels that were timed on one H200 and from the documented speed of its
links. Nothing is run on several cards.
"""

import datetime
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from blade.cli.command import run_script
from blade.common.checks import check_number
from blade.common.files import check_writable, write_files
from blade.common.machine import describe_versions
from blade.common.reading import read_json
from blade.common.tables import check_table, markdown_table, write_table
from blade.generation.parallel_plan import ParallelPlan, predict_parallel, rank_activations_gib
from blade.generation.parallel_traffic import LATENCY, LINK_SHARE, Traffic
from blade.generation.plan import RunPlan, plan_run
from blade.generation.request import GenerationRequest
from blade.models.cards import CardRates, CardReport, Link, Rate, documented_cards

ROOT = Path(__file__).resolve().parents[1]

KERNELS = ROOT / "docs" / "results" / "h200" / "attention-64" / "attention.json"
"""Seconds of attention and of matrix products on an H200."""

CARD = "H200"

GPUS = (1, 2, 4, 8)

ATTENTIONS = {"dense": {"attention": "dense"}, "preset": {}}
"""Options of a run: dense attention, and the model's preset."""

PRICE = 3.0
"""Dollars of a GPU's hour: an example."""


@dataclass(frozen=True)
class Clip:
    """A clip of a published model."""

    title: str
    """The model, its size and its frames."""
    model: str
    """Hub id, whose configuration comes with BLADE."""
    size: Mapping[str, int] = field(default_factory=dict)
    """Height, width and frames, where they are not the model's defaults."""


CLIPS = (
    Clip("Wan2.1 14B, 720x1280, 81 frames", "Wan-AI/Wan2.1-T2V-14B-Diffusers", {"height": 720, "width": 1280}),
    Clip("Wan2.1 1.3B, 480x832, 81 frames", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", {"height": 480, "width": 832}),
    Clip("HunyuanVideo, 720x1280, 129 frames", "hunyuanvideo-community/HunyuanVideo", {"height": 720, "width": 1280}),
    Clip("LTX-2.3, 704x1280, 121 frames", "diffusers/LTX-2.3-Diffusers", {"height": 704, "width": 1280}),
    Clip("MiniMax-H3, 768x1344, 124 frames", "MiniMaxAI/MiniMax-H3", {"height": 768, "width": 1344}),
)


def main(
    output: Annotated[Path | None, typer.Argument(help="Folder for scale.json and scale.md.")] = None,
    page: Annotated[Path | None, typer.Option(help="A page to write the tables into.")] = None,
    price: Annotated[float, typer.Option(help="Dollars of a GPU's hour.")] = PRICE,
) -> None:
    """Print three tables and write them."""
    check_number("price", price, "above 0 and finite", lambda x: x > 0)
    if output is not None:
        check_table(output, "scale")
    if page is not None:
        check_writable(page)
    values = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "versions": describe_versions(("torch", "diffusers")),
        **predict_clips(price),
    }
    tables = make_tables(values)
    lines = [line for title, table in tables.items() for line in (f"## {title.capitalize()}", "", *table, "")]
    print("\n".join(lines))
    if output is not None:
        write_table(
            output,
            "scale",
            title="One video on several H200",
            note="Predicted, not measured: [what follows from what](../../scale.md).",
            lines=lines,
            values=values,
        )
    if page is not None:
        write_files({page: with_tables(page.read_text(encoding="utf-8"), tables).encode()})


def predict_clips(price: float) -> dict[str, Any]:
    """Return what is assumed, and the runs of all clips, dense and by their preset."""
    link = documented_cards()[CARD].link
    runs = [predict_clip(clip, attention, link) for clip in CLIPS for attention in ATTENTIONS]
    return {
        "assumed": {
            "card": CARD,
            "link": link.name,
            "gb_per_second": link.gb_per_second,
            "link_share": LINK_SHARE,
            "latency_seconds": LATENCY,
            "kernels": KERNELS.relative_to(ROOT).as_posix(),
            "price_of_gpu_hour": price,
        },
        "runs": runs,
    }


def kernel_rates(tokens: int, density: float) -> CardRates:
    """Return the speed of an H200 as it was timed, and of its decoder as it is documented.

    Args:
        tokens: length of the sequence.
        density: of sparse attention.

    Raises:
        ValueError: if no layer near this length was timed.
    """
    timed = read_json(KERNELS, "the times of kernels")
    report = CardReport(KERNELS.name, {"machine": timed["machine"], "steps": [{"part": "attention", "result": timed}]})
    measured = report.rates(torch.bfloat16, torch.float32, tokens, density)
    if {"dense attention", "sparse attention"} - set(measured.rates):
        raise ValueError(f"`tokens` must be near a layer that was timed, got {tokens}.")
    documented = documented_cards()[CARD].rates(torch.bfloat16, torch.float32, tokens, density).rates
    return CardRates(
        card=measured.card,
        measured=True,
        source=measured.source,
        rates={
            **measured.rates,
            "linear layers": Rate(tflops=timed["matrix_peak_tflops"], of="square matrices"),
            "decoder": documented["decoder"],
        },
    )


def predict_clip(clip: Clip, attention: str, link: Link) -> dict[str, Any]:
    """Return the record of a clip: its cost on one card, and what follows for several."""
    request = GenerationRequest(
        prompt="a cat", model=clip.model, dtype="bfloat16", device="cpu", **clip.size, **ATTENTIONS[attention]
    )
    plan = plan_run(request, parallel=1)
    assert plan.parallel is not None
    forward = plan.cost.forward
    rates = kernel_rates(forward.grid.sequence_length, plan.cost.density)
    return {
        "clip": clip.title,
        "model": clip.model,
        "attention": attention,
        "steps": plan.request.steps,
        "passes": plan.cost.passes,
        "video_tokens": forward.grid.video_tokens,
        "text_tokens": forward.grid.text_tokens,
        "layers": forward.layers,
        "heads": forward.heads,
        "head_dim": forward.head_dim,
        "text_apart": plan.parallel.shape.text_apart,
        "batches": list(plan.parallel.shape.batches),
        "density": plan.cost.density,
        "sparse_passes": plan.cost.sparse_passes,
        "flops": plan.flops,
        "tflops_per_second": {name: rate.tflops for name, rate in rates.rates.items()},
        "weights_gib": sum(plan.weights_gib.values()),
        "by_gpus": [predict_split(plan, ranks, rates, link) for ranks in GPUS],
    }


def predict_split(plan: RunPlan, ranks: int, rates: CardRates, link: Link) -> dict[str, Any]:
    """Return the record of a run on so many cards; bytes are those of the card that sends most."""
    assert plan.parallel is not None
    shape = plan.parallel.shape
    traffic = Traffic.of(plan.cost, plan.request.blade_config, shape, ranks)
    split = traffic.largest
    own = rank_activations_gib(plan.activations_gib["transformer"], split, shape)
    parallel = ParallelPlan(
        shape=shape,
        traffic=traffic,
        weights_gib=sum(plan.weights_gib.values()),
        activations_gib={**plan.activations_gib, "transformer": own},
    )
    prediction = predict_parallel(plan.cost, plan.text_flops, plan.decoding_flops, rates, link, parallel)
    seconds = prediction.rank.seconds
    return {
        "gpus": ranks,
        "tokens": max(split.tokens),
        "heads": max(split.heads[0]),
        "layer_bytes": max(split.layer_sent(split.layers - 1)),
        "pass_bytes": max(split.sent()),
        "run_bytes": max(traffic.sent()),
        "activations_gib": own,
        "transformer_seconds": seconds["transformer"],
        "link_seconds": prediction.waiting,
        "whole_seconds": seconds["text encoder"] + seconds["decoder"],
        "clip_seconds": prediction.seconds,
        "speed_up": prediction.speed_up,
        "efficiency": prediction.efficiency,
    }


def make_tables(values: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the lines of the tables by title, from a record alone."""
    price = values["assumed"]["price_of_gpu_hour"]
    return {
        "bytes": _bytes_table(values["runs"]),
        "seconds": _seconds_table(values["runs"], price),
        "throughput": _throughput_table(values["runs"], price),
    }


def _bytes_table(runs: list[dict[str, Any]]) -> list[str]:
    headings = [
        "clip",
        "attention",
        "GPUs",
        "tokens",
        "heads",
        "MB a layer",
        "GB a pass",
        "TB a run",
        "GiB beside weights",
    ]
    rows = [
        [
            run["clip"], run["attention"], f"{split['gpus']}", f"{split['tokens']:,}",
            f"{split['heads']} of {run['heads']}", f"{split['layer_bytes'] / 1e6:,.0f}",
            f"{split['pass_bytes'] / 1e9:.2f}", f"{split['run_bytes'] / 1e12:.3f}", f"{split['activations_gib']:.2f}",
        ]
        for run in runs
        for split in run["by_gpus"]
        if split["gpus"] > 1
    ]  # fmt: skip
    return markdown_table(headings, rows)


def _seconds_table(runs: list[dict[str, Any]], price: float) -> list[str]:
    headings = [
        "clip", "attention", "GPUs", "transformer s", "links s", "text and decoder s", "clip s", "times as fast",
        "efficiency", "GPU-seconds", f"cost at ${price:.2f} an hour",
    ]  # fmt: skip
    rows = [
        [
            run["clip"], run["attention"], f"{split['gpus']}", f"{split['transformer_seconds']:.1f}",
            f"{split['link_seconds']:.1f}", f"{split['whole_seconds']:.1f}", f"{split['clip_seconds']:.1f}",
            f"{split['speed_up']:.2f}", f"{100 * split['efficiency']:.0f} %", f"{_gpu_seconds(split):,.0f}",
            f"${_gpu_seconds(split) * price / 3600:.3f}",
        ]
        for run in runs
        for split in run["by_gpus"]
    ]  # fmt: skip
    return markdown_table(headings, rows)


def _throughput_table(runs: list[dict[str, Any]], price: float) -> list[str]:
    """Compare two uses of the most GPUs: a video on each, and all on one video."""
    most = max(GPUS)
    headings = [
        "clip", "attention", f"s, a video on each of {most}", f"s, one video on {most}", "clips an hour, one on each",
        "clips an hour, one on all", "cost of one on each", "cost of one on all",
    ]  # fmt: skip
    rows = []
    for run in runs:
        each, together = run["by_gpus"][0], run["by_gpus"][-1]
        seconds = [each["clip_seconds"], together["clip_seconds"]]
        hourly = [most * 3600 / seconds[0], 3600 / seconds[1]]
        costs = [_gpu_seconds(split) * price / 3600 for split in (each, together)]
        cells = [f"{x:.1f}" for x in seconds] + [f"{x:,.0f}" for x in hourly] + [f"${x:.3f}" for x in costs]
        rows.append([run["clip"], run["attention"], *cells])
    return markdown_table(headings, rows)


def _gpu_seconds(split: Mapping[str, Any]) -> float:
    seconds: float = split["gpus"] * split["clip_seconds"]
    return seconds


def with_tables(page: str, tables: Mapping[str, list[str]]) -> str:
    """Return a page with its tables made anew.

    Raises:
        ValueError: if the page lacks the lines around a table.
    """
    for title, lines in tables.items():
        begin, end = f"<!-- begin table of {title} -->\n", f"<!-- end table of {title} -->\n"
        before, begun, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        if not begun or not ended:
            raise ValueError(f"the page must have the lines {begin.strip()!r} and {end.strip()!r}.")
        page = "".join((before, begin, "\n", *(f"{line}\n" for line in lines), "\n", end, after))
    return page


if __name__ == "__main__":
    run_script(main)
