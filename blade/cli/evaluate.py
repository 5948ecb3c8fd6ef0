"""`blade-evaluate`: how good a model's videos are, with which attention."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from blade.cli.command import run_command

DEFAULT_RUNS = ("dense=steps=30", "asa=steps=30,attention=asa")
"""What is compared where no run is given."""


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help)


def evaluate(
    *,
    shapes: Annotated[
        bool, _option("Evaluate a moving-shapes model on prompts that its training never saw.", "--shapes")
    ] = False,
    run: Annotated[
        list[str] | None,
        _option(
            "NAME=KEY=VALUE,..., repeatable. Keys: steps, guidance, attention (dense, asa, asa-gt, asa-dropped, "
            "mean-pooled, random, local), sparsity, dense_steps, dense_layers (such as 0-1+5). By default "
            + " and ".join(DEFAULT_RUNS)
            + "."
        ),
    ] = None,
    model: Annotated[
        str | None, _option("A folder in Diffusers format or a Hub id; by default the bundled model.")
    ] = None,
    single: Annotated[int, _option("Prompts with one object.")] = 64,
    two: Annotated[int, _option("Prompts with two objects.")] = 64,
    output: Annotated[Path, _option("Folder of records and report; what is there is not made again.")] = Path(
        "outputs/evaluate-shapes"
    ),
    shard: Annotated[
        str, _option("i/n: take every n-th prompt, so that n processes share the work, best with one thread each.")
    ] = "1/1",
    height: Annotated[int, _option("Pixels.")] = 96,
    width: Annotated[int, _option("Pixels.")] = 96,
    frames: Annotated[int, _option("Number of frames.")] = 33,
    device: Annotated[str | None, _option("cpu, cuda, cuda:1, ...; by default CUDA if there is one.")] = None,
    dtype: Annotated[str | None, _option("float32, bfloat16 or float16.")] = None,
    debug: Annotated[bool, _option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    """Compare ways to generate the same videos: scores, realism, closeness to dense, density and time.

    May be stopped and started again, and run as several processes with --shard into one folder.
    """
    if not shapes:
        raise ValueError("`--shapes` must be given: it is what there is to evaluate so far.")
    # imported here, so that --help and usage errors don't wait for PyTorch
    from blade.evaluation.shapes import ShapesEvaluation, evaluate_shapes
    from blade.evaluation.shapes_report import make_report, write_report
    from blade.evaluation.shapes_settings import parse_run
    from blade.models import BUNDLED

    evaluation = ShapesEvaluation(
        runs=tuple(parse_run(text) for text in run or DEFAULT_RUNS),
        folder=output,
        model=model or BUNDLED,
        single=single,
        two=two,
        shard=_parse_shard(shard),
        size={"height": height, "width": width, "frames": frames},
        device=device,
        dtype=dtype,
    )
    evaluate_shapes(evaluation, on_video=lambda progress: print(progress, flush=True))
    report = make_report(evaluation, command=shlex.join(["blade-evaluate", *sys.argv[1:]]))
    if report["missing"]:
        print(f"{report['missing']} videos of other shards are still missing; the one that ends last reports.")
        return
    _print_tables(report)
    for path in write_report(report, output):
        print(path)


def _parse_shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit()):
        raise ValueError(f"`shard` must be i/n, such as 1/2, got {text!r}.")
    return int(number), int(of)


def _print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from blade.evaluation.shapes_report import GROUPS, table

    for group in GROUPS:
        headings, rows = table(report, group, brief=True)
        if not rows:
            continue
        shown = Table(title=f"{group}-object prompts")
        for heading in headings:
            shown.add_column(heading)
        for row in rows:
            shown.add_row(*row)
        Console().print(shown)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `blade-evaluate` and exit.

    Args:
        arguments: The command line without the program's name; None takes the process's own.
    """
    run_command(evaluate, arguments)
