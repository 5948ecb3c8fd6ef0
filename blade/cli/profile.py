"""`blade-profile`: a pattern for every attention head, found offline."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from blade.cli.command import run_command
from blade.cli.options import make_command
from blade.cli.progress import progress_line
from blade.common.checks import check_integer
from blade.common.options import OptionGroup, option, option_names, read_group
from blade.common.terminal import print_line
from blade.fleet.options import FleetOptions, check_local_folder
from blade.generation.options import (
    AccelerationOptions,
    ModelOptions,
    SamplingOptions,
    StudentOptions,
    VideoOptions,
)
from blade.profiling.objectives import OBJECTIVES, Budget

if TYPE_CHECKING:
    from blade.profiling.request import ProfileRequest
    from blade.profiling.workflow import ProfileReport

GENERATION_GROUPS = (ModelOptions, VideoOptions, SamplingOptions, StudentOptions, AccelerationOptions)
"""Groups of a generation's options, of which the command has those that a profile can be made with."""

GENERATION_OPTIONS = (
    "model", "revision", "loras", "height", "width", "frames", "steps", "seed", "guidance_scale", "student", "device",
    "dtype", "offload", "vae_tiling",
)  # fmt: skip
"""Options of a generation that the command has. Each prompt's seed is the first one's plus its number."""


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(OptionGroup):
    """Prompts, measurements and results."""

    title: ClassVar[str] = "Profile"

    prompts: Path | None = option()
    """A text file of a few prompts, one a line; by default 8 of the bundled model's own world."""
    output: Path = option(Path("outputs/profile"))
    """Folder of the results, by default outputs/profile; a stopped run resumes there."""
    sampled_blocks: int = option(8)
    """Query blocks that are looked at in a layer, others every step; 0: all. By default 8."""
    own_orders: bool = option(True, flag="own-orders/--no-own-orders")
    """Let heads have token orders of their own, as by default."""
    costs: str = option("auto", choices=("auto", "operations", "time"))
    """operations, time (on this device), or auto, the default: time on CUDA."""
    influence_prompts: int = option(1)
    """Prompts with which it is measured how much each step and layer matters; by default 1, 0: none."""
    verify_prompts: int = option(1)
    """Prompts that are generated with the result and compared with dense attention; by default 1."""
    parallel: int = option(1)
    """Processes of accelerate launch that make each video together, on a GPU each; by default 1: they share out the
    prompts."""
    debug: bool = option(False)
    """Show the traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions(OptionGroup):
    """Choice of patterns."""

    title: ClassVar[str] = "Search"

    method: str = option("budgeted", choices=("budgeted", "published"))
    """budgeted (the default: least error for all heads together) or published (each by itself)."""
    epsilon: float = option(1.0)
    """Of the published method without a target density: its threshold; by default 1."""
    lambda_: float = option(0.5, flag="lambda")
    """Of the published method: its weight of the cost; by default 0.5."""
    groups: int | None = option()
    """Groups of steps with a pattern each; 1: one for all. By default every step has its own."""


def budget_options() -> type[OptionGroup]:
    """Make a group with an option for every objective that is declared by now."""
    group: type[OptionGroup] = make_dataclass(
        "BudgetOptions",
        [(objective.name, float | None, option(help=objective.help)) for objective in OBJECTIVES.values()],
        bases=(OptionGroup,),
        namespace={"title": "Budget (exactly one)"},
        frozen=True,
        kw_only=True,
    )
    return group


def profile(given: dict[str, Any]) -> None:
    """Find a pattern for every attention head, within exactly one budget, and report what attention looks like."""
    generation = {name: given[name] for name in GENERATION_OPTIONS if name in given}
    budgets = {name: given[name] for name in OBJECTIVES if name in given}
    own = read_group(ProfileOptions, given)
    search = read_group(SearchOptions, given)
    fleet = read_group(FleetOptions, given)
    check_local_folder(own.output, "blade-profile")
    check_integer("parallel", own.parallel, least=1)
    if fleet.is_given and own.parallel > 1:
        raise ValueError("`--parallel` must be 1 with `--workers` or `--ray-address`: a worker is one process.")
    # imported here, so that --help and usage errors don't wait for PyTorch
    from blade.profiling.assignment import GreedyRule
    from blade.profiling.prompts import profile_prompts
    from blade.profiling.report_data import write_attention_report
    from blade.profiling.request import ProfileRequest

    request = ProfileRequest.of(
        generation,
        prompts=profile_prompts(own.prompts, generation.get("model")),
        output=own.output,
        budget=None if search.method == "published" and not budgets else Budget(**budgets),
        method=search.method,
        rule=GreedyRule(weight=search.lambda_, threshold=search.epsilon),
        groups=search.groups,
        own_orders=own.own_orders,
        sampled_blocks=own.sampled_blocks or None,
        costs=own.costs,
        influence_prompts=own.influence_prompts,
        verify_prompts=own.verify_prompts,
    )
    if own.parallel > 1:
        report = _together(request, own.parallel)
    else:
        with progress_line() as say:
            report = _by_workers(request, fleet, say) if fleet.is_given else _in_processes(request, say)
    if report is None:
        return
    path = write_attention_report(report, command=shlex.join(["blade-profile", *sys.argv[1:]]))
    print_line(report)
    print_line(f"report      {path}")


def _by_workers(request: ProfileRequest, fleet: FleetOptions, say: Callable[[str], None]) -> ProfileReport:
    """Record prompts by workers of Ray, and search here."""
    from blade.fleet.profiling import profile_many

    return profile_many(
        request, options=fleet, on_recording=lambda progress: say(f"recording: {progress}"), on_progress=say
    )


def _together(request: ProfileRequest, parallel: int) -> ProfileReport | None:
    """Make each video with all processes, and search in the first; None in the others."""
    from blade.models.parallel import join_team
    from blade.profiling.team import follow
    from blade.profiling.workflow import profile_attention

    with join_team(parallel, request.generation.device) as team:
        assert team is not None
        if not team.is_first:
            follow(team)
            return None
        with progress_line() as say:
            report = profile_attention(request, on_progress=say, team=team)
        team.tell(None)
        return report


def _in_processes(request: ProfileRequest, say: Callable[[str], None]) -> ProfileReport | None:
    """Record in every process of `accelerate launch`, and search in the first; None in the others."""
    from accelerate import PartialState

    from blade.models.devices import resolve_device
    from blade.profiling.workflow import profile_attention

    state = PartialState(cpu=resolve_device(request.generation.device).type == "cpu")
    if state.num_processes > 1:
        share = (state.process_index + 1, state.num_processes)
        one = request.generation
        if one.device is None and state.device.type == "cuda":
            one = replace(one, device=str(state.device))
        profile_attention(replace(request, generation=one, share=share), on_progress=say)
        state.wait_for_everyone()
        if not state.is_main_process:
            return None
    return profile_attention(request, on_progress=say)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `blade-profile` and exit.

    Args:
        arguments: the command line without the program's name; None takes the process's own.
    """
    names = (*GENERATION_OPTIONS, *OBJECTIVES, *option_names(SearchOptions, ProfileOptions, FleetOptions))
    groups = (budget_options(), *GENERATION_GROUPS, SearchOptions, ProfileOptions, FleetOptions)
    run_command(make_command(profile, groups, names=names), arguments)


if __name__ == "__main__":
    main()
