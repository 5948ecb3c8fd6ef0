"""`blade-generate`: a video from a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import typer

from blade.cli.command import run_command
from blade.cli.options import make_command
from blade.cli.progress import progress_line
from blade.common.checks import check_integer
from blade.common.options import OptionGroup, option, option_names, read_group
from blade.common.terminal import logger, print_line
from blade.fleet.options import ADDRESS, FleetOptions
from blade.generation.options import GROUPS, added_groups

if TYPE_CHECKING:
    from blade.generation.request import GenerationRequest

FIRST = ("prompt", "model", "student", "sparsity", "output")
"""Options that most people need first."""

FAILED_EXIT_CODE = 1
"""Exit code where a prompt of a list failed."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions(OptionGroup):
    """Files that are written, and ways of running."""

    title: ClassVar[str] = "Output"

    output: str | None = option()
    """The MP4; a JSON goes beside it. By default outputs/PROMPT-SEED.mp4, with digits added where a video of another
    prompt or other settings has that name. With --workers also an address such as s3://bucket/folder."""
    compare: bool = option(False)
    """Also generate with dense attention, and write both side by side with PSNR and SSIM."""
    prompts: Path | None = option()
    """A text file, one prompt a line; the output is then a folder. Videos of the same settings that are there are
    skipped; several processes share the work."""
    from_json: Path | None = option()
    """Make the video of this JSON again; options given beside it change it."""
    seeds: str | None = option()
    """Several seeds such as 0-3,7: a video of each; the output is then a folder."""
    dry_run: bool = option(False)
    """Make nothing: print tokens, operations and memory, from configuration files alone."""
    card: str | None = option()
    """With --dry-run, also predict the seconds on this GPU: a name such as H200, or the JSON of a blade-bench gpu."""
    memory: float | None = option()
    """With --dry-run, also name weights, offloading and decoding that fit a GPU of so many GiB, such as 24."""
    parallel: int | None = option()
    """Processes of accelerate launch that make each video together, on a GPU each: by default all, or 1 with --prompts
    or --seeds, which they share out. With --dry-run any number: their memory, what they send and their seconds."""
    debug: bool = option(False)
    """Show the traceback of an error."""


def _check_lists(own: OutputOptions, given: dict[str, Any]) -> None:
    """Check that nothing is given that a list of prompts or seeds takes the place of."""
    for listing, value, instead in (("prompts", own.prompts, "prompt"), ("seeds", own.seeds, "seed")):
        for name in (instead, "from_json", "dry_run") if value is not None else ():
            if name in given:
                raise ValueError(f"`--{name.replace('_', '-')}` must not be given with `--{listing}`.")


def _check_plans(own: OutputOptions) -> None:
    """Check that nothing is asked of a plan where a video is to be made, and the number of processes."""
    if own.parallel is not None:
        check_integer("parallel", own.parallel, least=1)
    for name, value in (("card", own.card), ("memory", own.memory)):
        if value is not None and not own.dry_run:
            shown = repr(value) if isinstance(value, str) else f"{value:g}"
            raise ValueError(f"`--{name}` must not be given without `--dry-run`, got {shown}.")


def _check_workers(own: OutputOptions, fleet: FleetOptions) -> None:
    """Check that workers have more than one video to make, and that a bucket has workers."""
    if fleet.is_given and own.prompts is None and own.seeds is None:
        raise ValueError(
            "`--workers` and `--ray-address` need `--prompts` or `--seeds`: each worker makes whole videos."
        )
    if fleet.is_given and own.parallel is not None:
        raise ValueError(
            "`--parallel` must not be given with `--workers` or `--ray-address`: a worker is one process."
        )
    if not fleet.is_given and own.output is not None and ADDRESS.match(own.output):
        raise ValueError(f"`--output` must be a path without `--workers` or `--ray-address`, got {own.output}.")


def generate(given: dict[str, Any]) -> None:
    """Generate a video from a prompt with adaptive block-sparse attention."""
    own, fleet = read_group(OutputOptions, given), read_group(FleetOptions, given)
    _check_plans(own)
    _check_lists(own, given)
    _check_workers(own, fleet)
    added = {name: given[name] for name in option_names(*added_groups()) if name in given}
    given = {name: value for name, value in given.items() if name in option_names(*GROUPS)}
    if added:
        given["added"] = added
    # imported here, so that --help and usage errors don't wait for PyTorch
    import diffusers
    import transformers

    from blade.evaluation.prompts import parse_seeds
    from blade.generation.prompts import read_prompts
    from blade.models.source import BUNDLED

    seeds = None if own.seeds is None else parse_seeds(own.seeds)
    listed = [] if own.prompts is None else read_prompts(own.prompts)
    if listed:
        given["prompt"] = listed[0]
    request = _read_request(own, given)
    if own.dry_run:
        from blade.generation.plan import plan_run

        print_line(plan_run(request, card=own.card, memory_gib=own.memory, parallel=own.parallel))
        return
    if request.model == BUNDLED:
        # loaded in a moment, so that progress bars would only hide what follows
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    if listed or seeds is not None:
        _make_list(own, fleet, request, listed or [request.prompt], seeds)
    else:
        _make_one(own, request)


def _read_request(own: OutputOptions, given: dict[str, Any]) -> GenerationRequest:
    """Return the request of the options, or of a record that they change."""
    from blade.generation.record import read_request
    from blade.generation.request import NO_STUDENT, GenerationRequest, default_student, lost_student

    if own.from_json is None and "prompt" not in given:
        raise ValueError('`--prompt` must be given, such as blade-generate "a red ball moving right".')
    if given.get("student") == NO_STUDENT:
        given["student"] = None
    elif "student" not in given and own.from_json is None:
        if notice := lost_student(given):
            logger.warning(notice)
        given["student"] = default_student(given)
    return GenerationRequest(**given) if own.from_json is None else read_request(own.from_json, given)


def _make_one(own: OutputOptions, request: GenerationRequest) -> None:
    """Make one video, with all processes that were launched."""
    from blade.generation.outputs import generate_files
    from blade.generation.team import follow
    from blade.models.parallel import join_team, launched_processes

    inputs = {} if own.from_json is None else {own.from_json: "from_json"}
    output = None if own.output is None else Path(own.output).expanduser()
    parallel = launched_processes() if own.parallel is None else own.parallel
    with join_team(parallel, request.device) as team:
        if team is not None and not team.is_first:
            follow(team)
            return
        print_line(generate_files(request, output, compare=own.compare, inputs=inputs, team=team))
        if team is not None:
            team.tell(None)


def _make_list(
    own: OutputOptions,
    fleet: FleetOptions,
    request: GenerationRequest,
    prompts: Sequence[str],
    seeds: Sequence[int] | None,
) -> None:
    """Make a video of every prompt and seed: by workers, as one of several processes, or with all of them."""
    from blade.generation.naming import OUTPUT_FOLDER

    inputs = {} if own.prompts is None else {own.prompts: "prompts"}
    output = own.output or str(OUTPUT_FOLDER)
    listed: dict[str, Any] = {"seeds": seeds, "compare": own.compare, "inputs": inputs}
    if fleet.is_given:
        from blade.fleet.generation import generate_many

        with progress_line() as say:
            report = generate_many(
                request, prompts, output, options=fleet, on_progress=lambda progress: say(str(progress)), **listed
            )
        print_line(report)
    else:
        from blade.generation.outputs import generate_list
        from blade.generation.team import follow
        from blade.models.parallel import join_team

        with join_team(own.parallel or 1, request.device) as team:
            if team is not None and not team.is_first:
                follow(team)
                return
            report = generate_list(request, prompts, Path(output).expanduser(), team=team, **listed)
            print_line(report)
            if team is not None:
                team.tell(None)
    if report.failed:
        raise typer.Exit(FAILED_EXIT_CODE)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `blade-generate` and exit.

    Args:
        arguments: the command line without the program's name; None takes the process's own.
    """
    groups = (*GROUPS, *added_groups(), OutputOptions, FleetOptions)
    run_command(make_command(generate, groups, first=FIRST, by_place="prompt"), arguments)


if __name__ == "__main__":
    main()
