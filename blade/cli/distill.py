"""`blade-distill`: a student for few steps, trained from prompts alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from blade.cli.command import progress_line, run_command


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
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Distil a video model to few steps, together with sparse attention. A stopped run goes on where it was."""
    # imported here, so that --help and usage errors don't wait for PyTorch
    from accelerate import PartialState

    from blade.distillation.config import load_config
    from blade.distillation.distill import distill

    read = load_config(config, settings or ())
    with progress_line() as say:
        report = distill(read, dry_run=dry_run, random_weights=random_weights, on_progress=say)
    if PartialState().is_main_process:
        print(report)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `blade-distill` and exit.

    Args:
        arguments: the command line without the program's name; None takes the process's own.
    """
    run_command(distill, arguments)


if __name__ == "__main__":
    main()
