"""`blade-bench`: how fast the kernels and whole videos are on this machine."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

import typer

from blade.cli.command import run_command
from blade.cli.options import make_command
from blade.cli.progress import progress_line
from blade.cli.tables import print_tables
from blade.common.checks import check_integer
from blade.common.files import check_writable
from blade.common.options import OptionGroup, option, option_names, read_group
from blade.common.tables import Table
from blade.common.terminal import print_line
from blade.generation.options import ModelOptions, VideoOptions
from blade.models.choices import DTYPE_NAMES

Number = TypeVar("Number", int, float)

MODEL_AND_SIZE = ("model", "height", "width", "frames")
"""Options of a generation that `blade-bench generate` has."""


@dataclass(frozen=True, kw_only=True)
class DebugOptions(OptionGroup):
    """Errors."""

    title: ClassVar[str] = "Errors"

    debug: bool = option(False)
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class LayerOptions(OptionGroup):
    """The attention layer."""

    title: ClassVar[str] = "Layer"

    model: str | None = option()
    """Layers of published models, such as those that an unknown name lists; in place of the next three options."""
    tokens: str = option("8192")
    """Lengths of the sequence, such as 2048,8192. By default 8192."""
    heads: int = option(2)
    """Attention heads; by default 2."""
    head_dim: int = option(128)
    """Channels of a head; by default 128."""
    density: str = option("0.15")
    """Shares of key blocks that a row keeps, in (0, 1], such as 0.5,0.15. By default 0.15."""
    blocks: str = option("random", choices=("random", "patterns"))
    """random (the default): independent in every head and row; patterns: a table of head patterns, of a --model."""
    block_size: int = option(128)
    """Tokens in a block; by default 128."""
    dtype: str = option("float32", choices=DTYPE_NAMES)
    """float32 (the default), bfloat16 or float16."""


@dataclass(frozen=True, kw_only=True)
class LayerTimingOptions(OptionGroup):
    """How a layer is timed, and where results go."""

    title: ClassVar[str] = "Measurement"

    passes: str | None = option()
    """Of drawn, forward, training, selection, whole; by default drawn on the CPU, and all others on CUDA."""
    device: str = option("cpu")
    """cpu (the default), cuda, cuda:1, ..."""
    threads: int | None = option()
    """Threads on the CPU; by default PyTorch's own number."""
    repeats: int = option(5)
    """Measured calls, of which the median counts; by default 5."""
    output: Path | None = option()
    """Folder for attention.json, attention.md and attention.png; by default nothing is written."""


@dataclass(frozen=True, kw_only=True)
class WholeRunOptions(OptionGroup):
    """Runs, and how they are timed."""

    title: ClassVar[str] = "Runs"

    random_weights: bool = option(False)
    """Random weights: only the configuration files of a Hub id are downloaded."""
    steps: int | None = option()
    """Steps of the runs with guidance; by default the model's."""
    student_steps: str = option("8,4")
    """Steps of the sparse runs without guidance; by default 8,4."""
    sparsity: float = option(0.8)
    """Of every layer and step, in [0, 1); by default 0.8."""
    pooled_tokens: str = option("all", choices=("none", "all", "dropped"))
    """none, all (the default) or dropped; inside the budget."""
    measured_passes: int | None = option()
    """Passes of a run that are measured, the others taken to be as long; by default all."""
    repeats: int = option(3)
    """Measured calls of single parts; by default 3."""
    device: str | None = option()
    """cpu, cuda, cuda:1, ...; by default CUDA if there is one."""
    dtype: str | None = option(choices=DTYPE_NAMES)
    """Type of the transformer; by default bfloat16 on CUDA and float32 elsewhere."""
    parallel: int | None = option()
    """Processes that compute every pass together, on a GPU each; by default all that were launched."""
    output: Path | None = option()
    """Folder for generation.json and generation.md; by default nothing is written."""

    def check(self) -> None:
        """Check the pooled tokens, and the number of processes."""
        if self.parallel is not None:
            check_integer("parallel", self.parallel, least=1)
        if self.pooled_tokens not in ("none", "all", "dropped"):
            raise ValueError(f"`pooled_tokens` must be none, all or dropped, got {self.pooled_tokens!r}.")


@dataclass(frozen=True, kw_only=True)
class TuningOptions(OptionGroup):
    """The layer to tune for, and where the result goes."""

    title: ClassVar[str] = "Tuning"

    tokens: int = option(32760)
    """Length of the sequence; by default 32760."""
    heads: int = option(12)
    """Attention heads; by default 12."""
    head_dim: int = option(128)
    """64 or 128 (the default)."""
    block_size: int = option(128)
    """Tokens in a block: 16, 32, 64 or 128 (the default)."""
    density: float = option(0.2)
    """Share of key blocks that a row keeps, in (0, 1]; by default 0.2."""
    dtype: str = option("bfloat16", choices=("bfloat16", "float16"))
    """bfloat16 (the default) or float16."""
    device: str = option("cuda")
    """cuda (the default), cuda:1, ..."""
    output: Path | None = option()
    """File for what is faster; by default where the kernels look for it."""

    def check(self) -> None:
        """Check the type."""
        if self.dtype not in ("bfloat16", "float16"):
            raise ValueError(f"`dtype` must be bfloat16 or float16, got {self.dtype!r}.")


@dataclass(frozen=True, kw_only=True)
class CardOptions(OptionGroup):
    """The card, the time, and where results go."""

    title: ClassVar[str] = "Card"

    minutes: float = option(4.0)
    """Time in which to measure, best first; by default 4. Ctrl-C before that loses nothing either."""
    device: str = option("cuda")
    """cuda (the default), cuda:1, ...; on cpu all is measured in small, to try the command."""
    output: Path = option(Path("outputs/gpu"))
    """Folder for CARD-DATE.json, .md and .png, by default outputs/gpu; compared with the card's last report there."""


def attention(given: dict[str, Any]) -> None:
    """Time block-sparse attention beside the fastest dense attention, and print tables."""
    layer, timing = read_group(LayerOptions, given), read_group(LayerTimingOptions, given)
    output = timing.output
    if output is not None and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("`output` draws a plot, and matplotlib is not installed: pip install 'blade-video[plots]'.")
    # imported here, so that --help and usage errors don't wait for PyTorch
    from blade.benchmarks.attention import PASSES, AttentionBenchmark, run_attention_benchmark
    from blade.benchmarks.attention_report import FILES, tables, write_report
    from blade.benchmarks.layers import AttentionShape, model_shapes

    if layer.model is None:
        lengths = _numbers("tokens", layer.tokens, int)
        shapes = tuple(AttentionShape(tokens=length, heads=layer.heads, head_dim=layer.head_dim) for length in lengths)
    else:
        known = model_shapes()
        unknown = [name for name in layer.model.split(",") if name not in known]
        if unknown:
            raise ValueError(f"`model` must be of {', '.join(known)}, got {unknown[0]!r}.")
        shapes = tuple(known[name] for name in layer.model.split(","))
    if timing.passes is not None:
        passes = tuple(timing.passes.split(","))
    else:
        passes = tuple(name for name in PASSES if name != "drawn") if timing.device.startswith("cuda") else ("drawn",)
    settings = AttentionBenchmark(
        shapes=shapes,
        densities=_numbers("density", layer.density, float),
        passes=passes,
        blocks=layer.blocks,
        block_size=layer.block_size,
        dtype=layer.dtype,
        device=timing.device,
        threads=timing.threads,
        repeats=timing.repeats,
    )
    _check_writable(output, FILES)
    written: list[Path] = []
    with progress_line() as say:
        say("dense ...")

        def on_case(report: dict[str, Any]) -> None:
            case = report["cases"][-1]
            say(f"{case['tokens']:,} tokens, density {case['density']} done ...")
            if output is not None:
                written[:] = write_report(report, output)

        report = run_attention_benchmark(settings, command=shlex.join(["blade-bench", *sys.argv[1:]]), on_case=on_case)
    print_tables(tables(report))
    for path in written:
        print_line(path)


def generate(given: dict[str, Any]) -> None:
    """Time a model's videos at full size: dense with guidance, sparse with guidance, and sparse with few steps."""
    options = read_group(WholeRunOptions, given)
    from blade.benchmarks.generation import GenerationBenchmark, run_generation_benchmark
    from blade.benchmarks.generation_report import FILES, tables, write_report
    from blade.models.parallel import join_team, launched_processes

    _check_writable(options.output, FILES)
    settings = GenerationBenchmark(
        **{name: given[name] for name in MODEL_AND_SIZE if name in given},
        random_weights=options.random_weights,
        steps=options.steps,
        student_steps=_numbers("student_steps", options.student_steps, int),
        sparsity=options.sparsity,
        pooled_tokens=options.pooled_tokens,  # type: ignore[arg-type]
        measured_passes=options.measured_passes,
        repeats=options.repeats,
        dtype=options.dtype,
        device=options.device,
    )
    command = shlex.join(["blade-bench", *sys.argv[1:]])
    parallel = launched_processes() if options.parallel is None else options.parallel
    with join_team(parallel, options.device) as team:
        if team is not None and not team.is_first:
            run_generation_benchmark(settings, team=team)
            return
        with progress_line() as say:
            report = run_generation_benchmark(
                settings, command=command, on_stage=lambda stage: say(f"{stage} ..."), team=team
            )
    print_tables(tables(report))
    if options.output is not None:
        for path in write_report(report, options.output):
            print_line(path)


def tune(given: dict[str, Any]) -> None:
    """Time the Triton kernels' launch configurations on this GPU, and keep those that beat the shipped ones."""
    options = read_group(TuningOptions, given)
    import torch
    from blade_kernels.block_sparse import launch_table, tuning
    from blade_kernels.triton_support import missing_triton

    from blade.models.devices import DTYPES

    device = options.device
    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise ValueError(f"`device` must be a CUDA device that is there, got {device!r}.")
    missing = missing_triton(device)
    if missing is not None:
        raise ValueError(f"`device` must run Triton's kernels, got {device!r}: {missing}.")
    case = tuning.TuningCase(
        tokens=options.tokens,
        heads=options.heads,
        head_dim=options.head_dim,
        block_size=options.block_size,
        density=options.density,
        dtype=DTYPES[options.dtype],
        device=device,
    )
    path = options.output or launch_table.override_path()
    _check_writable(path.parent, (path.name,))
    with progress_line() as say:
        trials = tuning.tune(
            case,
            on_trial=lambda trial: say(f"{trial.kernel}, {_launch(trial.config)}: {trial.ms or 'failed'}"),
        )
    chosen = tuning.best(trials)
    rows = []
    for kernel, trial in chosen.items():
        shipped = next(other for other in trials if other.kernel == kernel and other.shipped)
        rows.append([kernel, _launch(shipped.config), f"{shipped.ms}", _launch(trial.config), f"{trial.ms}"])
    print_tables([Table("Launch configurations", ["kernel", "shipped", "ms", "fastest", "ms"], rows)])
    tuning.save(chosen, case, path)
    print_line(path)


def gpu(given: dict[str, Any]) -> None:
    """Measure all about a GPU in a few minutes: correctness, attention, whole videos, distillation, tuning."""
    options = read_group(CardOptions, given)
    from datetime import datetime

    from blade.benchmarks.card.benchmark import CardBenchmark, run_card_benchmark
    from blade.benchmarks.card.report import compare, find_previous, report_files, tables, write_report

    settings = CardBenchmark(minutes=options.minutes, device=options.device)
    stamp = f"{datetime.now():%Y-%m-%d-%H%M%S}"
    _check_writable(options.output, [path.name for path in report_files(options.output, "card", stamp).values()])
    found: dict[str, Any] = {}
    written: list[Path] = []

    def on_report(report: dict[str, Any]) -> None:
        card = report["machine"]["device"]
        paths = report_files(options.output, card, stamp)
        if "previous" not in found:  # before this one is there
            found["previous"] = find_previous(options.output, card)
        if found["previous"] is not None:
            name, before = found["previous"]
            report = compare(report, before, name)
        found["report"] = report
        written[:] = write_report(report, paths)

    try:
        with progress_line() as say:
            run_card_benchmark(
                settings,
                command=shlex.join(["blade-bench", *sys.argv[1:]]),
                on_step=lambda name: say(f"{name} ..."),
                on_report=on_report,
            )
    finally:
        if "report" in found:
            print_tables(tables(found["report"]))
            for path in written:
                print_line(path)
    for name in (found.get("report", {}).get("compared") or {}).get("slower", []):
        print_line(f"slower than before: {name}")


def _check_writable(folder: Path | None, names: Sequence[str]) -> None:
    """Check, before hours of measurements, that their files can be written, if any are to be."""
    if folder is not None:
        check_writable(*(folder / name for name in names))


def _launch(config: Any) -> str:
    """A launch configuration in a few words."""
    return f"{config.block_m}x{config.block_n}, {config.num_warps} warps, {config.num_stages} stages"


def _numbers(name: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    """The numbers of a comma-separated list."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"`{name}` must be numbers separated by commas, got {text!r}.") from None


def _application() -> typer.Typer:
    """Return the application with its four commands."""
    app = typer.Typer(help="Measure BLADE's kernels, and whole videos, on this machine.")
    app.command()(make_command(attention, (LayerOptions, LayerTimingOptions, DebugOptions)))
    names = (*MODEL_AND_SIZE, *option_names(WholeRunOptions, DebugOptions))
    app.command()(make_command(generate, (ModelOptions, VideoOptions, WholeRunOptions, DebugOptions), names=names))
    app.command()(make_command(tune, (TuningOptions, DebugOptions)))
    app.command()(make_command(gpu, (CardOptions, DebugOptions)))
    return app


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `blade-bench` and exit.

    Args:
        arguments: the command line without the program's name; None takes the process's own.
    """
    run_command(_application(), arguments)


if __name__ == "__main__":
    main()
