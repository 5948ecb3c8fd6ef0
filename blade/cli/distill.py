"""`blade-distill`: a student for few steps, trained from prompts alone."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from blade.cli.command import run_command
from blade.cli.progress import progress_line
from blade.common.terminal import print_line


def distill(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe.", show_default=False)],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as trajectory.steps=[8] or run.updates=100.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only measure what it takes, by two updates; nothing is written.")
    ] = False,
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="With --dry-run: of the model's size, from configuration files alone."),
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="With --dry-run: a JSON file for what was measured.", show_default=False)
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Distil a video model to few steps, together with sparse attention. A stopped run resumes bit-exactly."""
    # imported here, so that --help and usage errors don't wait for PyTorch
    from accelerate import PartialState

    from blade.common.files import check_writable, write_files
    from blade.common.names import check_no_input
    from blade.distillation.recipes import load_config
    from blade.distillation.reports import Estimate
    from blade.distillation.workflow import distill

    if report is not None and not dry_run:
        raise ValueError("`report` must not be given without `dry_run`; a training writes a log.")
    read = load_config(config, settings or ())
    if report is not None:
        check_no_input([report], {Path(config): "config", Path(read.prompts or config): "prompts"}, "report")
        check_writable(report)
    with progress_line() as say:
        found = distill(read, dry_run=dry_run, random_weights=random_weights, on_progress=say, on_update=say.log)
    if not PartialState().is_main_process:
        return
    print_line(found)
    if report is not None:
        assert isinstance(found, Estimate)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        command = shlex.join(["blade-distill", *sys.argv[1:]])
        values = {"date": now, "command": command, **found.to_dict(), "config": read.to_dict()}
        write_files({report: (json.dumps(values, indent=2) + "\n").encode()})


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `blade-distill` and exit.

    Args:
        arguments: the command line without the program's name; None takes the process's own.
    """
    run_command(distill, arguments)


if __name__ == "__main__":
    main()
