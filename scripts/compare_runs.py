"""Compare runs of an evaluation in pairs: python scripts/compare_runs.py outputs/evaluate new=old --measure psnr."""

import shlex
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import typer

from blade.cli.command import run_command
from blade.common.files import read_json_lines
from blade.common.tables import check_table, markdown_code, markdown_table, write_table
from blade.metrics.estimates import bootstrap, mean_of_worst, paired_difference


def main(
    folder: Annotated[Path, typer.Argument(help="Folder of `blade-evaluate`.")],
    pairs: Annotated[list[str], typer.Argument(help="RUN=BASE, names of runs that made the same videos.")],
    measure: Annotated[str, typer.Option(help="A recorded number of each video, larger is better.")] = "psnr",
    output: Annotated[Path | None, typer.Option(help="Folder for pairs.json and pairs.md.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Print for each pair the means, those of the worst tenth, the difference with its interval, and how many lose."""
    if output is not None:
        check_table(output, "pairs")
    values = read_values(folder, measure)
    rows, records = [], []
    for pair in pairs:
        name, _, base = pair.partition("=")
        for run in (name, base):
            if run not in values:
                raise ValueError(f"`pairs` must be of the runs {', '.join(sorted(values))}, got {run!r} in {pair!r}.")
        difference = paired_difference(values[name], values[base])
        if difference is None or set(values[name]) != set(values[base]):
            raise ValueError(f"`pairs` must be of runs that made the same videos, got {pair!r}.")
        lost = sum(values[name][video] < value for video, value in values[base].items())
        means = [bootstrap([*values[run].values()]).mean for run in (base, name)]
        worst = [mean_of_worst(values[run].values()) for run in (base, name)]
        known = difference.low is not None
        interval = [f"({difference.low:+.2f} to {difference.high:+.2f})"] if known else []
        rows.append(
            [
                name, base, *(f"{mean:.2f}" for mean in (*means, *worst)),
                " ".join([f"{difference.mean:+.2f}", *interval]),
                f"{lost} of {difference.videos}",
            ]
        )  # fmt: skip
        records.append({"run": name, "base": base, "means": means, "worst": worst, "lost": lost, **vars(difference)})
    headings = ["run", "base", "base's mean", "mean", "base's worst tenth", "worst tenth", "difference", "lower"]
    lines = markdown_table(headings, rows)
    print("\n".join(lines))
    if output is not None:
        command = shlex.join(["python", "scripts/compare_runs.py", *sys.argv[1:]])
        values_written = {"command": command, "measure": measure, "pairs": records}
        note = f"{markdown_code(command)}: {measure}, with 95 % paired bootstrap intervals."
        write_table(output, "pairs", title="Runs in pairs", note=note, lines=lines, values=values_written)


def read_values(folder: Path, measure: str) -> dict[str, dict[tuple[str, int], float]]:
    """Read a measure of every video, by run, and by prompt and seed."""
    values: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for path in sorted(folder.glob("records*.jsonl")):
        for record in read_json_lines(path):
            if record.get(measure) is not None:
                values[record["run"]["name"]][record["prompt"], record["seed"]] = float(record[measure])
    if not values:
        raise ValueError(f"`folder` must hold records with `{measure}` of `blade-evaluate`, got {folder}.")
    return dict(values)


if __name__ == "__main__":
    run_command(main)
