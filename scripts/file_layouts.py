"""Load small files of every layout, and tabulate what comes of them: file_layouts.py docs/results/file-layouts."""

from __future__ import annotations

import logging
import shlex
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from foreign_attention import branch_differences
from layout_models import FileOf
from layout_rows import ROWS, Layout

from blade.cli.command import run_script
from blade.common.machine import describe_versions
from blade.common.tables import check_table, markdown_table, write_table
from blade.models.loaded import LoadedModel
from blade.models.loras import load_loras, merge_loras
from blade.students.loading import load_student

SEED = 0


@dataclass(frozen=True)
class Result:
    """Result of a layout."""

    layout: str
    what: str
    """LoRA or student, and of which model."""
    source: str
    """Source of the names of the keys."""
    modules: int | None = None
    """Number of modules that were changed; None: refused."""
    change: float | None = None
    """Largest change of a weight that the file stands for."""
    difference: float | None = None
    """Largest difference of a weight from what it is to be."""
    untouched: bool | None = None
    """All weights that the file does not name are the same, bit by bit."""
    steps: tuple[int, ...] | None = None
    """Numbers of steps that the student brings."""
    refusal: str | None = None


def load(row: Layout, folder: Path) -> Result:
    """Write the files of a layout, load them, and compare all weights.

    Args:
        row: the layout.
        folder: an empty one.
    """
    torch.manual_seed(SEED)
    pipe = row.pipe()
    model = LoadedModel(pipe)
    files = [write(transformer) for write, transformer in zip(row.files, model.transformers.values(), strict=False)]
    before = [dict(file.expected) for file in map(FileOf, model.transformers.values())]
    source = ":".join(str(row.save(file, folder, number)) for number, file in enumerate(files))
    try:
        if row.is_student:
            student = load_student(pipe, source)
            reach, steps = student.reach, student.step_counts
        else:
            (reach,), steps = load_loras(model, [source]).values(), None
    except ValueError as error:
        return Result(
            row.name, row.what, row.source, refusal=str(error).replace(f"{folder}/", "").replace(f"{folder}", "FOLDER")
        )
    merge_loras(model)
    changes, differences, untouched = [0.0], [0.0], True
    for file, transformer, first in zip(files, model.transformers.values(), before, strict=False):
        for name, weight in transformer.named_parameters():
            expected = file.expected[name]
            untouched = untouched and (not torch.equal(expected, first[name]) or torch.equal(weight, first[name]))
            changes.append((expected - first[name]).abs().max().item())
            differences.append((weight - expected).abs().max().item())
    modules = sum(reach.values())
    return Result(row.name, row.what, row.source, modules, max(changes), max(differences), untouched, steps)


def load_all() -> list[Result]:
    """Return what comes of every layout."""
    results = []
    logging.disable(logging.WARNING)
    try:
        for row in ROWS:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results.append(load(row, Path(folder)))
    finally:
        logging.disable(logging.NOTSET)
    return results


def row_of(result: Result) -> list[str]:
    """Return a line of the table."""
    if result.refusal is not None:
        outcome = f"refused: {result.refusal}"
    else:
        steps = "" if result.steps is None else f", {' or '.join(map(str, result.steps))} steps"
        outcome = (
            f"loaded: {result.modules} modules{steps}; change at most {result.change:.2f}, off by at most "
            f"{result.difference:.1e}"
        )
    return [result.layout, result.what, outcome]


def main(
    output: Annotated[Path | None, typer.Argument(help="Folder for layouts.json and layouts.md.")] = None,
) -> None:
    """Print a table and write it."""
    if output is not None:
        check_table(output, "layouts")
    results, branches = load_all(), branch_differences()
    lines = markdown_table(["layout", "what it is", "result"], list(map(row_of, results)))
    lines += [
        "",
        *markdown_table(
            ["attention of a student", "relative difference from BLADE's"],
            [
                [name, "0" if value == 0 else f"{value:.1e}" if value < 1e-3 else f"{value:.2f}"]
                for name, value in branches.items()
            ],
        ),
    ]
    print("\n".join(lines))
    if output is None:
        return
    write_table(
        output,
        "layouts",
        title="Files of LoRAs and students",
        note="Small files with random numbers, in the layouts that are published, loaded into small models: the "
        "number of modules that are changed, the largest change of a weight that the file stands for, and the largest "
        "difference of any weight from what it is to be; or the message of the refusal. No published file was loaded. "
        "The second table sets the attention that some students were trained with beside BLADE's.",
        lines=lines,
        values={
            "command": shlex.join(["python", *sys.argv]),
            "versions": describe_versions(("torch", "diffusers", "peft")),
            "seed": SEED,
            "layouts": [asdict(result) for result in results],
            "branches": branches,
        },
    )


if __name__ == "__main__":
    run_script(main)
