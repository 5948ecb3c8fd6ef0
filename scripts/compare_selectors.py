"""Compare ways to choose key blocks: python scripts/compare_selectors.py docs/results/selectors.

Queries, keys and values are captured from the bundled model in dense generations, or made up (attention_heads.py); the
methods are in selector_methods.py. Nothing is generated sparsely: see compare_runs.py for videos.
"""

import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from attention_heads import SYNTHETIC, Heads, captured_heads, synthetic_heads
from selector_methods import METHODS, Method

from blade.cli.command import run_command
from blade.common.machine import describe_versions
from blade.common.tables import check_table, markdown_table, write_table

DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05)
"""Shares of all pairs that attention may compute, pooled ones included."""

EXCESS = 1.05
"""Realised density over the asked one from which on a result is left out of the tables."""

WORST = 0.1
"""Share of the heads whose mean error is the worst tenth's."""

PROMPTS = (
    "a red ball moving right",
    "a small striped green triangle moving up slowly over a checkered background",
    "a blue square moving left and a yellow ball moving down",
)
"""Captions of the captured generations."""


def measure(method: Method, sets: Sequence[Heads], density: float, *, with_selection: bool) -> dict[str, Any] | None:
    """Measure a method on heads.

    Args:
        method: the method.
        sets: layers of heads.
        density: share of the pairs, or of the operations of dense attention, that may be spent.
        with_selection: pay the operations of the choice from the budget.

    Returns:
        Mean and worst tenth of the output's relative error, recall (the share of attention in what is kept), density;
        None if the choice alone costs more than the budget.
    """
    errors, recalls, densities = [], [], []
    for heads in sets:
        pairs = density * heads.tokens
        if with_selection:
            pairs -= method.operations(heads) / (4 * heads.size * heads.tokens)
        least = heads.blocks + heads.block if method.pooled else heads.block
        if pairs < least:
            return None
        keep = method.choose(heads, pairs)
        output = heads.attend(keep, method.pooled, second_order=method.second_order)
        errors.append(heads.errors(output))
        recalls.append((heads.weights * keep).sum(-1).mean())
        densities.append(heads.density(keep, method.pooled))
    error = torch.cat(errors).sort(descending=True).values
    return {
        "error": float(error.mean()),
        "worst_tenth": float(error[: max(1, round(len(error) * WORST))].mean()),
        "recall": float(torch.stack(recalls).mean()),
        "density": sum(densities) / len(densities),
        "heads": len(error),
    }


def selection_cost(method: Method, heads: Heads, repeats: int = 3) -> dict[str, float]:
    """Return the operations of a choice as a share of dense attention's, and its milliseconds here for one layer."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        method.choose(heads, 0.2 * heads.tokens)
        seconds.append(time.perf_counter() - began)
    share = method.operations(heads) / (4 * heads.size * heads.tokens**2)
    return {"operations": share, "milliseconds": 1000 * median(seconds)}


def fits(found: dict[str, Any] | None, density: float) -> bool:
    """Return whether a method met a density."""
    return found is not None and found["density"] <= EXCESS * density


def table(title: str, results: dict[str, dict[str, Any]], costs: dict[str, dict[str, float]] | None) -> list[str]:
    """Return a table of methods and densities, with the least error of a density in bold, oracles apart."""
    rows = []
    for method in METHODS:
        row = [method.name]
        for density in DENSITIES:
            found = results[method.name][str(density)]
            if not fits(found, density):
                row.append("")
                continue
            others = (results[other.name][str(density)] for other in METHODS if not other.is_oracle)
            least = min(other["error"] for other in others if fits(other, density))
            is_least = not method.is_oracle and found["error"] == least
            mean = f"**{found['error']:.3f}**" if is_least else f"{found['error']:.3f}"
            row.append(f"{mean} / {found['worst_tenth']:.2f}")
        if costs is not None:
            recall = results[method.name]["0.2"]
            row.append("" if recall is None else f"{recall['recall']:.2f}")
            cost = costs[method.name]
            row += ["", ""] if method.is_oracle else [f"{cost['operations']:.1%}", f"{cost['milliseconds']:.1f}"]
        rows.append(row)
    headings = ["method", *(f"{density:g}" for density in DENSITIES)]
    if costs is not None:
        headings += ["recall at 0.2", "choice, operations", "choice, ms"]
    return [f"## {title}", "", *markdown_table(headings, rows), ""]


def all_tables(results: dict[str, Any]) -> list[str]:
    """Return the tables of all sets of heads."""
    lines: list[str] = []
    for name, values in results.items():
        lines += table(f"{name}: equal density", values["density"], values["choice"])
        lines += table(f"{name}: equal operations, the choice included", values["operations"], None)
    return lines


def main(
    output: Annotated[Path, typer.Argument(help="Folder for selectors.json and selectors.md.")],
    tokens: Annotated[int, typer.Option(help="Length of the synthetic sequences.")] = 8192,
    prompts: Annotated[int, typer.Option(help="Captions to capture from, of three.")] = len(PROMPTS),
    steps: Annotated[int, typer.Option(help="Denoising steps of the captured generations.")] = 30,
    block: Annotated[int, typer.Option(help="Tokens in a block of the captured heads.")] = 16,
    tables_only: Annotated[bool, typer.Option(help="Write the tables of an existing selectors.json again.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Measure all methods on captured and synthetic heads, at equal density and at equal operations."""
    check_table(output, "selectors")
    if tables_only:
        found = json.loads((output / "selectors.json").read_text(encoding="utf-8"))
    else:
        command = shlex.join(["python", "scripts/compare_selectors.py", *sys.argv[1:]])
        results = measure_all(tokens, prompts, steps, block)
        versions = describe_versions(("blade-video", "torch"))
        found = {"command": command, "threads": torch.get_num_threads(), "versions": versions, "results": results}
    note = (
        "Relative error of a head's output, mean / worst tenth of the heads. At equal density, which counts pooled "
        "pairs, or at equal operations, those of choosing included. Empty: the choice alone costs more, or the method "
        "keeps more than it may. Bold: the least of those that are no oracle. Milliseconds are of one layer on a CPU "
        "that other work shared."
    )
    lines = all_tables(found["results"])
    write_table(output, "selectors", title="Selectors by the error of attention", note=note, lines=lines, values=found)


def measure_all(tokens: int, prompts: int, steps: int, block: int) -> dict[str, Any]:
    """Measure all methods on all sets of heads, and print their tables; for the arguments see `main`."""
    at = [int(steps * share) for share in (0.4, 0.87)]
    sets = {
        "the bundled model": captured_heads(PROMPTS[:prompts], block=block, token_order="gilbert", steps=steps, at=at)
    }
    for kind in SYNTHETIC:
        sets[f"synthetic, {kind.replace('_', '-')}"] = [synthetic_heads(kind, tokens=tokens)]
    results: dict[str, Any] = {}
    for name, layers in sets.items():
        results[name] = {
            budget: {
                method.name: {
                    str(density): measure(method, layers, density, with_selection=budget == "operations")
                    for density in DENSITIES
                }
                for method in METHODS
            }
            for budget in ("density", "operations")
        }
        results[name]["choice"] = {method.name: selection_cost(method, layers[0]) for method in METHODS}
        print("\n".join(all_tables({name: results[name]})), flush=True)
    return results


if __name__ == "__main__":
    run_command(main)
