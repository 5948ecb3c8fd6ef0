"""`blade-evaluate`: how good a model's videos are, with which attention."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from blade.cli.command import run_command
from blade.cli.progress import progress_line

if TYPE_CHECKING:
    from blade.evaluation.prompts import EvaluationPrompt

DEFAULT_RUNS = ("dense", "preset")
"""Runs that are compared where none is given."""


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help)


def evaluate(
    *,
    run: Annotated[
        list[str] | None,
        _option(
            "NAME=dense, NAME=preset (the model's training-free preset) or NAME=DIR (a folder or Hub id with a BLADE "
            "configuration), each with ,KEY=VALUE,... or without, or NAME=KEY=VALUE,...; repeatable. Keys: steps, "
            "guidance, attention (dense, preset, asa, asa-gt, asa-dropped, or a selector), selector (a name such as "
            "random; a wrong one lists them all), config (a DIR), student (a DIR), noise_kept, sparsity, dense_steps, "
            "dense_layers (such as 0-1+5, or none). By default " + " and ".join(DEFAULT_RUNS) + "."
        ),
    ] = None,
    prompts: Annotated[
        Path | None, _option("File of prompts, one a line; lines that begin with # don't count.")
    ] = None,
    seeds: Annotated[
        str | None, _option("With --prompts: seeds such as 0-3,7, each with every prompt. By default 0.")
    ] = None,
    shapes: Annotated[
        bool,
        _option("Instead of --prompts: captions that the training of moving-shapes models never saw.", "--shapes"),
    ] = False,
    single: Annotated[int | None, _option("With --shapes: captions with one object. By default 64.")] = None,
    two: Annotated[int | None, _option("With --shapes: captions with two objects. By default 64.")] = None,
    repeats: Annotated[
        int | None, _option("With --shapes: videos of each caption, of which diversity is measured. By default 1.")
    ] = None,
    model: Annotated[
        str | None, _option("A folder in Diffusers format or a Hub id; by default the bundled model.")
    ] = None,
    steps: Annotated[int | None, _option("Denoising steps of runs that name none; by default the model's.")] = None,
    guidance: Annotated[float | None, _option("Guidance of runs that name none; by default the model's.")] = None,
    baseline: Annotated[
        str | None,
        _option("Name of the run that the others are compared with; by default the first that is not dense."),
    ] = None,
    measure: Annotated[
        list[str] | None,
        _option(
            "NAME of a measure to take and to report, such as psnr or all_attributes, beside densities and times; "
            "repeatable. By default all, those of installed packages among them; an unknown name lists them. Videos "
            "that are there already are not measured again."
        ),
    ] = None,
    output: Annotated[Path, _option("Folder of records, videos and report; what is there is not made again.")] = Path(
        "outputs/evaluate"
    ),
    shard: Annotated[
        str, _option("i/n: take every n-th prompt, so that n processes share the work, best with one thread each.")
    ] = "1/1",
    height: Annotated[int | None, _option("Pixels; by default the model's.")] = None,
    width: Annotated[int | None, _option("Pixels; by default the model's.")] = None,
    frames: Annotated[int | None, _option("Number of frames; by default the model's.")] = None,
    device: Annotated[str | None, _option("cpu, cuda, cuda:1, ...; by default CUDA if there is one.")] = None,
    dtype: Annotated[str | None, _option("float32, bfloat16 or float16.")] = None,
    debug: Annotated[bool, _option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    """Compare ways to generate the same videos: closeness to dense, motion, density and time; scores of moving shapes.

    May be stopped and started again, and run as several processes with --shard into one folder.
    """
    if (prompts is None) == (not shapes):
        raise ValueError("either `prompts` or `shapes` must be given, and not both.")
    options = (
        ("seeds", seeds, prompts),
        ("single", single, shapes),
        ("two", two, shapes),
        ("repeats", repeats, shapes),
    )
    for option, value, source in options:
        if value is not None and not source:
            raise ValueError(f"`{option}` must not be given without `{'prompts' if option == 'seeds' else 'shapes'}`.")
    # imported here, so that --help and usage errors don't wait for PyTorch
    from blade.evaluation.pages import write_report
    from blade.evaluation.plan import Evaluation, plan_evaluation
    from blade.evaluation.report import make_report
    from blade.evaluation.runs import parse_run
    from blade.evaluation.videos import lay_out_videos
    from blade.evaluation.worker import evaluate_videos
    from blade.models.source import BUNDLED

    evaluation = Evaluation(
        runs=tuple(parse_run(text, steps=steps, guidance=guidance) for text in run or DEFAULT_RUNS),
        prompts=_prompts(prompts, seeds, single, two, repeats),
        folder=output,
        model=model or BUNDLED,
        of_shapes=shapes,
        baseline=baseline,
        measures=tuple(measure) if measure else None,
        shard=_parse_shard(shard),
        height=height,
        width=width,
        frames=frames,
        device=device,
        dtype=dtype,
    )
    plan = plan_evaluation(evaluation)
    with progress_line() as say:
        evaluate_videos(plan, on_video=lambda progress: say.log(str(progress)))
    report = make_report(plan, command=shlex.join(["blade-evaluate", *sys.argv[1:]]))
    if report["missing"]:
        print(f"{report['missing']} videos of other shards are still missing; the one that ends last reports.")
        return
    _print_tables(report)
    laid_out = lay_out_videos(plan)
    for path in write_report(report, output, laid_out):
        print(path)


def _prompts(
    file: Path | None, seeds: str | None, single: int | None, two: int | None, repeats: int | None
) -> tuple[EvaluationPrompt, ...]:
    from blade.evaluation.prompts import held_out_prompts, parse_seeds, prompts_with_seeds
    from blade.generation.prompts import read_prompts

    if file is not None:
        return prompts_with_seeds(read_prompts(file), parse_seeds("0" if seeds is None else seeds))
    return held_out_prompts(
        64 if single is None else single, 64 if two is None else two, 1 if repeats is None else repeats
    )


def _parse_shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit()):
        raise ValueError(f"`shard` must be i/n, such as 1/2, got {text!r}.")
    return int(number), int(of)


def _print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from blade.evaluation.report import tables

    for table in tables(report, brief=True):
        shown = Table(title=table.title)
        for heading in table.headings:
            shown.add_column(heading, overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        Console().print(shown)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `blade-evaluate` and exit.

    Args:
        arguments: The command line without the program's name; None takes the process's own.
    """
    run_command(evaluate, arguments)
