"""`blade-evaluate`: how good a model's videos are, with which attention."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from blade.cli.command import run_command
from blade.cli.options import make_command
from blade.cli.progress import progress_line
from blade.cli.tables import print_tables
from blade.common.options import OptionGroup, option, option_names, read_group
from blade.common.terminal import print_line
from blade.fleet.options import FleetOptions, check_local_folder
from blade.generation.options import AccelerationOptions, ModelOptions, VideoOptions

if TYPE_CHECKING:
    from blade.evaluation.plan import Evaluation, EvaluationPlan
    from blade.evaluation.prompts import EvaluationPrompt

DEFAULT_RUNS = ("dense", "preset")
"""Runs that are compared where none is given."""

SEARCHED_RUN = ("preset",)
"""Run whose sparsity is searched where none is given."""

CAPTIONS = 64
"""Captions with one object, and with two, where no number is given."""

SEARCH_CAPTIONS = 4
"""Captions with one object, and with two, of a search where no number is given."""

GENERATION_OPTIONS = ("model", "height", "width", "frames", "device", "dtype", "vae_tiling")
"""Options of a generation that the command has."""

FIRST = ("run", "prompts", "shapes", "protocol", "model", "output")
"""Options that most people need first."""


@dataclass(frozen=True, kw_only=True)
class RunOptions(OptionGroup):
    """The runs that are compared."""

    title: ClassVar[str] = "Runs"

    run: tuple[str, ...] = option(DEFAULT_RUNS)
    """NAME=dense, NAME=preset (the model's training-free preset; few-step with a student that was trained dense) or
    NAME=DIR (a folder or Hub id with a BLADE configuration), each with ,KEY=VALUE,... or without, or
    NAME=KEY=VALUE,...; repeatable. Keys: steps, guidance, attention (dense, preset, asa, asa-gt, asa-dropped, or a
    selector), preset (training-free, few-step, student), selector (a name such as random; a wrong one lists them all),
    config (a DIR), student (a DIR), noise_kept, lora (as blade-generate takes it), sparsity, precision (full, int8,
    fp8), dense_steps, dense_layers (such as 0-1+5, or none). By default dense and preset."""
    steps: int | None = option()
    """Denoising steps of runs that name none; by default the model's."""
    guidance_scale: float | None = option(old_flags=("guidance",))
    """Guidance scale of runs that name none; by default the model's."""
    baseline: str | None = option()
    """Name of the run that the others are compared with; by default the first that is not dense."""


@dataclass(frozen=True, kw_only=True)
class PromptSetOptions(OptionGroup):
    """The prompts and seeds."""

    title: ClassVar[str] = "Prompts"

    prompts: Path | None = option()
    """File of prompts, one a line; lines that begin with # don't count."""
    seeds: str | None = option()
    """With --prompts: seeds such as 0-3,7, each with every prompt. By default 0, or the protocol's."""
    shapes: bool = option(False)
    """Instead of --prompts: captions that the training of moving-shapes models never saw."""
    single: int | None = option()
    """With --shapes: captions with one object. By default 64, with --find-sparsity 4."""
    two: int | None = option()
    """With --shapes: captions with two objects. By default 64, with --find-sparsity 4."""
    repeats: int | None = option()
    """With --shapes: videos of each caption, of which diversity is measured. By default 1."""
    protocol: str | None = option()
    """Compare with dense attention as publications do, such as wan14b-720p; an unknown name lists them all. It sets
    model, size, steps, guidance, dtype and seeds, and makes each sparse --run with 0, 20 and 30 % dense steps unless
    it names them; --prompts takes the file that it selects from. The last line is a row of the common table. Other
    options override it, and are named in the row."""

    def check(self) -> None:
        """Check that there is one source of prompts, and nothing that belongs to the other."""
        if self.protocol is not None and self.shapes:
            raise ValueError(f"`shapes` must not be given with `protocol` {self.protocol}, which has its own prompts.")
        if self.protocol is None and (self.prompts is None) == (not self.shapes):
            raise ValueError("either `prompts` or `shapes` must be given, and not both.")
        missing, names = ("prompts", ("seeds",)) if self.shapes else ("shapes", ("single", "two", "repeats"))
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` must not be given without `{missing}`.")


@dataclass(frozen=True, kw_only=True)
class SearchOptions(OptionGroup):
    """The search for a sparsity."""

    title: ClassVar[str] = "Search for a sparsity"

    find_sparsity: bool = option(False)
    """Instead of comparing runs, find the highest sparsity, in steps of 0.05, whose mean PSNR to dense is at least
    --psnr: of the model's preset, or of the one --run. Makes the videos of at most five sparsities; resumes."""
    psnr: float | None = option()
    """With --find-sparsity: PSNR to dense in dB, such as 30."""

    def check(self) -> None:
        """Check that a search has its target, and that there is none without."""
        if self.find_sparsity and self.psnr is None:
            raise ValueError("`psnr` must be given with `find_sparsity`, such as --psnr 30.")
        if self.psnr is not None and not self.find_sparsity:
            raise ValueError("`psnr` must not be given without `find_sparsity`.")


@dataclass(frozen=True, kw_only=True)
class ResultOptions(OptionGroup):
    """Measures, results and shares of the work."""

    title: ClassVar[str] = "Results"

    measure: tuple[str, ...] = option(())
    """NAME of a measure to take and to report, such as psnr or all_attributes, beside densities and times; repeatable.
    By default all, those of installed packages among them; an unknown name lists them. Videos that are there already
    are not measured again."""
    output: Path | None = option()
    """Folder of records, videos and report, by default outputs/evaluate, or outputs/ and the protocol's name; what is
    there is not made again."""
    shard: str = option("1/1")
    """i/n: take every n-th prompt, so that n processes share the work, best with one thread each."""
    debug: bool = option(False)
    """Show the traceback of an error."""


def evaluate(given: dict[str, Any]) -> None:
    """Compare ways to generate the same videos: closeness to dense, motion, density and time; scores of moving shapes.

    May be stopped and started again, and run as several processes with --shard into one folder.
    """
    compared = read_group(RunOptions, given)
    chosen = read_group(PromptSetOptions, given)
    searched = read_group(SearchOptions, given)
    results = read_group(ResultOptions, given)
    fleet = read_group(FleetOptions, given)
    if results.output is not None:
        check_local_folder(results.output, "blade-evaluate")
    # imported here, so that --help and usage errors don't wait for PyTorch
    from blade.common.errors import first_line
    from blade.evaluation.plan import Evaluation, plan_evaluation

    if searched.find_sparsity and chosen.protocol is not None:
        raise ValueError(f"`protocol` must not be given with `find_sparsity`, got {chosen.protocol}.")
    runs = SEARCHED_RUN if searched.find_sparsity and "run" not in given else compared.run
    videos = _videos(runs, compared, chosen, SEARCH_CAPTIONS if searched.find_sparsity else CAPTIONS)
    folder = Path("outputs") / (chosen.protocol or "evaluate") if results.output is None else results.output
    evaluation = Evaluation(
        folder=folder,
        of_shapes=chosen.shapes,
        baseline=compared.baseline,
        measures=tuple(results.measure) or None,
        shard=_parse_shard(results.shard),
        **videos | {name: given[name] for name in GENERATION_OPTIONS if name in given},
    )
    if searched.psnr is not None:
        _search(evaluation, searched.psnr, fleet)
        return
    plan = plan_evaluation(evaluation)
    failed = _make_videos(plan, fleet)
    _report(plan, failed={name: first_line(error) for name, error in failed.items()})
    for error in failed.values():
        raise error


def _make_videos(plan: EvaluationPlan, fleet: FleetOptions) -> dict[str, Exception]:
    """Make and measure the videos of a plan, here or by workers, and return the errors by run."""
    with progress_line() as say:
        if fleet.is_given:
            from blade.fleet.evaluation import evaluate_many

            return evaluate_many(plan, options=fleet, on_progress=lambda progress: say(str(progress)))
        from blade.evaluation.worker import evaluate_videos

        return evaluate_videos(plan, on_video=lambda progress: say.log(str(progress)))


def _search(evaluation: Evaluation, psnr: float, fleet: FleetOptions) -> None:
    """Find a sparsity, here or by workers, and report it with all that were tried."""
    with progress_line() as say:
        if fleet.is_given:
            from blade.fleet.evaluation import find_sparsity_many

            found = find_sparsity_many(
                evaluation,
                psnr,
                options=fleet,
                on_progress=lambda progress: say(str(progress)),
                on_candidate=print_line,
            )
        else:
            from blade.evaluation.sparsity_search import find_sparsity

            found = find_sparsity(
                evaluation, psnr, on_video=lambda progress: say.log(str(progress)), on_candidate=print_line
            )
    found.save_config()
    _report(found.plan, sparsity_search=found.to_dict())
    print_line(found)


def _report(plan: EvaluationPlan, *, failed: Mapping[str, str] | None = None, **added: Any) -> None:
    """Print and write the report of a plan whose videos are made, or those of the runs that did not fail.

    Args:
        plan: The plan.
        failed: Why runs failed, by name.
        added: More values of the report's JSON.
    """
    from blade.common.locks import file_locked
    from blade.evaluation.pages import write_report
    from blade.evaluation.protocol_rows import protocol_lines
    from blade.evaluation.report import has_protocol_rows, make_report, tables
    from blade.evaluation.videos import lay_out_videos

    failed = failed or {}
    # shards that end together both report, one after the other, so that the last has seen all records
    with file_locked(plan.evaluation.folder / "report.html", wait=True):
        report = make_report(plan, command=shlex.join(["blade-evaluate", *sys.argv[1:]])) | {"failed": failed, **added}
        if report["missing"] and not failed:
            print_line(
                f"{report['missing']} videos of other shards are still missing; the one that ends last reports."
            )
            return
        if not any(run["groups"] for run in report["runs"]):
            return  # every run failed
        print_tables(tables(report, brief=True))
        laid_out = lay_out_videos(plan)
        for path in write_report(report, plan.evaluation.folder, laid_out):
            print_line(path)
        if has_protocol_rows(report):
            print_line("\n".join(["", *protocol_lines(report["protocol"])]))


def _videos(described: Sequence[str], compared: RunOptions, chosen: PromptSetOptions, captions: int) -> dict[str, Any]:
    """Return the fields of an evaluation that say which videos it makes, with the values of the protocol if any."""
    from blade.evaluation.protocols import protocol_generation, protocol_prompts, protocol_runs
    from blade.evaluation.runs import parse_run
    from blade.families.registry import find_comparison_protocol

    settings: dict[str, Any] = {"steps": compared.steps, "guidance": compared.guidance_scale}
    if chosen.protocol is None:
        runs = tuple(parse_run(text, **settings) for text in described)
        return {"runs": runs, "prompts": _prompts(chosen, captions)}
    protocol = find_comparison_protocol(chosen.protocol)
    return {
        "protocol": protocol,
        "runs": protocol_runs(protocol, described, **settings),
        "prompts": protocol_prompts(protocol, chosen.prompts, chosen.seeds),
        **protocol_generation(protocol),
    }


def _prompts(chosen: PromptSetOptions, captions: int) -> tuple[EvaluationPrompt, ...]:
    """Return the prompts, with so many captions of each kind where no number is given."""
    from blade.evaluation.prompts import held_out_prompts, parse_seeds, prompts_with_seeds
    from blade.generation.prompts import read_prompts

    if chosen.prompts is not None:
        return prompts_with_seeds(
            read_prompts(chosen.prompts), parse_seeds("0" if chosen.seeds is None else chosen.seeds)
        )
    single, two, repeats = chosen.single, chosen.two, chosen.repeats
    return held_out_prompts(
        captions if single is None else single, captions if two is None else two, 1 if repeats is None else repeats
    )


def _parse_shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit()):
        raise ValueError(f"`shard` must be i/n, such as 1/2, got {text!r}.")
    return int(number), int(of)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `blade-evaluate` and exit.

    Args:
        arguments: the command line without the program's name; None takes the process's own.
    """
    groups = (
        RunOptions,
        PromptSetOptions,
        ModelOptions,
        VideoOptions,
        AccelerationOptions,
        SearchOptions,
        ResultOptions,
        FleetOptions,
    )
    whole = (RunOptions, PromptSetOptions, SearchOptions, ResultOptions, FleetOptions)
    names = (*GENERATION_OPTIONS, *option_names(*whole))
    run_command(make_command(evaluate, groups, names=names, first=FIRST), arguments)


if __name__ == "__main__":
    main()
