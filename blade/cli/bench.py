"""`blade-bench`: how fast the kernels and whole videos are on this machine."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer

from blade.cli.command import run_command
from blade.cli.progress import progress_line

Number = TypeVar("Number", int, float)

app = typer.Typer(add_completion=False, help="Measure BLADE's kernels, and whole videos, on this machine.")


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help)


@app.command()
def attention(
    *,
    model: Annotated[
        str | None,
        _option(
            "Layers of published models, such as those that an unknown name lists; in place of the next three options."
        ),
    ] = None,
    tokens: Annotated[str, _option("Lengths of the sequence, such as 2048,8192.")] = "8192",
    heads: Annotated[int, _option("Attention heads.")] = 2,
    head_dim: Annotated[int, _option("Numbers in one head of one token.")] = 128,
    density: Annotated[str, _option("Shares of key blocks that a row keeps, in (0, 1], such as 0.5,0.15.")] = "0.15",
    passes: Annotated[
        str | None,
        _option("Of drawn, forward, training, selection, whole; by default drawn on the CPU, and all others on CUDA."),
    ] = None,
    blocks: Annotated[
        str, _option("random: independent in every head and row; patterns: a table of head patterns, of a --model.")
    ] = "random",
    block_size: Annotated[int, _option("Tokens in a block.")] = 128,
    dtype: Annotated[str, _option("float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, _option("cpu, cuda, cuda:1, ...")] = "cpu",
    threads: Annotated[int | None, _option("Threads on the CPU; by default PyTorch's own number.")] = None,
    repeats: Annotated[int, _option("Measured calls, of which the median counts.")] = 5,
    output: Annotated[
        Path | None,
        _option("Folder for attention.json, attention.md and attention.png; by default nothing is written."),
    ] = None,
    debug: Annotated[bool, _option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    """Time block-sparse attention beside the fastest dense attention, and print tables."""
    if output is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("`--output` draws a plot, and matplotlib is not installed: pip install 'blade-video[plots]'.")
    # imported here, so that --help and usage errors don't wait for PyTorch
    from rich.console import Console

    from blade.benchmarks.attention import (
        PASSES,
        AttentionBenchmark,
        AttentionShape,
        model_shapes,
        run_attention_benchmark,
    )
    from blade.benchmarks.attention_report import tables, write_report

    if model is None:
        lengths = _numbers("--tokens", tokens, int)
        shapes = tuple(AttentionShape(tokens=length, heads=heads, head_dim=head_dim) for length in lengths)
    else:
        known = model_shapes()
        unknown = [name for name in model.split(",") if name not in known]
        if unknown:
            raise ValueError(f"`--model` must be of {', '.join(known)}, got {unknown[0]!r}.")
        shapes = tuple(known[name] for name in model.split(","))
    if passes is None:
        passes = ",".join(name for name in PASSES if name != "drawn") if device.startswith("cuda") else "drawn"
    settings = AttentionBenchmark(
        shapes=shapes,
        densities=_numbers("--density", density, float),
        passes=tuple(passes.split(",")),
        blocks=blocks,
        block_size=block_size,
        dtype=dtype,
        device=device,
        threads=threads,
        repeats=repeats,
    )
    console, written = Console(), list[Path]()
    with progress_line() as say:
        say("dense ...")

        def on_case(report: dict[str, Any]) -> None:
            case = report["cases"][-1]
            say(f"{case['tokens']:,} tokens, density {case['density']} done ...")
            if output is not None:
                written[:] = write_report(report, output)

        report = run_attention_benchmark(settings, command=shlex.join(["blade-bench", *sys.argv[1:]]), on_case=on_case)
    _show(console, tables(report))
    if written:
        console.print(*map(str, written), sep="\n")


@app.command()
def generate(
    *,
    model: Annotated[str, _option("The bundled model, a folder, or a Hub id.")] = "bundled",
    random_weights: Annotated[
        bool,
        _option("Random weights: only the configuration files of a Hub id are downloaded.", "--random-weights"),
    ] = False,
    height: Annotated[int | None, _option("Pixels; by default the model's own, as for what follows.")] = None,
    width: Annotated[int | None, _option("Pixels.")] = None,
    frames: Annotated[int | None, _option("Number of frames.")] = None,
    steps: Annotated[int | None, _option("Steps of the runs with guidance.")] = None,
    student_steps: Annotated[str, _option("Steps of the sparse runs without guidance.")] = "8,4",
    sparsity: Annotated[float, _option("Of every layer and step, in [0, 1).")] = 0.8,
    pooled_tokens: Annotated[str, _option("none, all or dropped; inside the budget.")] = "all",
    measured_passes: Annotated[
        int | None, _option("Passes of a run that are measured, the others taken to be as long; by default all.")
    ] = None,
    repeats: Annotated[int, _option("Measured calls of single parts.")] = 3,
    dtype: Annotated[str | None, _option("Of the transformer; by default bfloat16 on CUDA.")] = None,
    device: Annotated[str | None, _option("cpu, cuda, cuda:1, ...; by default CUDA where there is one.")] = None,
    output: Annotated[
        Path | None, _option("Folder for generation.json and generation.md; by default nothing is written.")
    ] = None,
    debug: Annotated[bool, _option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    """Time a model's videos at full size: dense with guidance, sparse with guidance, and sparse with few steps."""
    from rich.console import Console

    from blade.benchmarks.generation import GenerationBenchmark, run_generation_benchmark
    from blade.benchmarks.generation_report import tables, write_report

    if pooled_tokens not in ("none", "all", "dropped"):
        raise ValueError(f"`--pooled-tokens` must be none, all or dropped, got {pooled_tokens!r}.")
    settings = GenerationBenchmark(
        model=model,
        random_weights=random_weights,
        height=height,
        width=width,
        frames=frames,
        steps=steps,
        student_steps=_numbers("--student-steps", student_steps, int),
        sparsity=sparsity,
        pooled_tokens=pooled_tokens,  # type: ignore[arg-type]
        measured_passes=measured_passes,
        repeats=repeats,
        dtype=dtype,
        device=device,
    )
    console = Console()
    with progress_line() as say:
        report = run_generation_benchmark(
            settings,
            command=shlex.join(["blade-bench", *sys.argv[1:]]),
            on_stage=lambda stage: say(f"{stage} ..."),
        )
    _show(console, tables(report))
    if output is not None:
        console.print(*(str(path) for path in write_report(report, output)), sep="\n")


@app.command()
def tune(
    *,
    tokens: Annotated[int, _option("Length of the sequence.")] = 32760,
    heads: Annotated[int, _option("Attention heads.")] = 12,
    head_dim: Annotated[int, _option("64 or 128.")] = 128,
    block_size: Annotated[int, _option("Tokens in a block: 16, 32, 64 or 128.")] = 128,
    density: Annotated[float, _option("Share of key blocks that a row keeps, in (0, 1].")] = 0.2,
    dtype: Annotated[str, _option("bfloat16 or float16.")] = "bfloat16",
    device: Annotated[str, _option("cuda, cuda:1, ...")] = "cuda",
    output: Annotated[
        Path | None, _option("Where to keep what is faster; by default where the kernels look for it.")
    ] = None,
    debug: Annotated[bool, _option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    """Time the Triton kernels' launch configurations on this GPU, and keep those that beat the shipped ones."""
    import torch
    from blade_kernels.block_sparse import launch_table, tuning
    from blade_kernels.triton_support import missing_triton
    from rich.console import Console
    from rich.table import Table

    from blade.models.devices import DTYPES

    if dtype not in DTYPES or dtype == "float32":
        raise ValueError(f"`--dtype` must be bfloat16 or float16, got {dtype!r}.")
    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise ValueError(f"`--device` must be a CUDA device that is there, got {device!r}.")
    missing = missing_triton(device)
    if missing is not None:
        raise ValueError(f"`--device` must run Triton's kernels, got {device!r}: {missing}.")
    case = tuning.TuningCase(
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        block_size=block_size,
        density=density,
        dtype=DTYPES[dtype],
        device=device,
    )
    path = output or launch_table.override_path()
    console = Console()
    with progress_line() as say:
        trials = tuning.tune(
            case,
            on_trial=lambda trial: say(f"{trial.kernel}, {_launch(trial.config)}: {trial.ms or 'failed'}"),
        )
    chosen = tuning.best(trials)
    shown = Table("kernel", "shipped", "ms", "fastest", "ms")
    for kernel, trial in chosen.items():
        shipped = next(other for other in trials if other.kernel == kernel and other.shipped)
        shown.add_row(kernel, _launch(shipped.config), f"{shipped.ms}", _launch(trial.config), f"{trial.ms}")
    console.print(shown)
    tuning.save(chosen, case, path)
    console.print(str(path))


def _show(console: Any, tables: Iterable[Any]) -> None:
    """Print a report's tables."""
    from rich.table import Table

    for table in tables:
        shown = Table(*table.headings, title=table.title, title_justify="left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def _launch(config: Any) -> str:
    """A launch configuration in a few words."""
    return f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages"


def _numbers(name: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    """The numbers of a comma-separated list."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"`{name}` must be numbers separated by commas, got {text!r}.") from None


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `blade-bench` and exit.

    Args:
        arguments: the command line without the program's name; None takes the process's own.
    """
    run_command(app, arguments)
