"""Videos that several processes make together: the first leads, and the others follow it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blade.common.errors import first_line
from blade.common.terminal import logger
from blade.generation.prepare import prepare_model
from blade.generation.request import GenerationRequest, ResolvedRequest
from blade.generation.run import Generation, run_request
from blade.models.loaded import LoadedModel
from blade.models.parallel import Team


def lead(request: GenerationRequest, team: Team | None) -> tuple[LoadedModel, ResolvedRequest]:
    """Load a model as `prepare_model` does, in all processes of a team, of which this is the first."""
    if team is not None:
        team.tell(request)
    return prepare_model(request, team)


def run_together(model: LoadedModel, request: ResolvedRequest) -> Generation:
    """Make a video as `run_request` does, with all processes of the model's team, of which this is the first."""
    if model.team is not None:
        model.team.tell(request)
    return run_request(model, request)


def follow(team: Team, make: Callable[[LoadedModel, Any], Any] = run_request) -> None:
    """Take part in the videos that the first process makes, until it has made all.

    Of a video that fails, the first process says so; where it does not, as the fault is this process's own, this one
    ends with the error, and the launcher ends the others.

    Args:
        team: the processes.
        make: makes what the first process says, with the model that it has named.
    """
    request = team.hear()
    if request is None:
        return
    model, _ = prepare_model(request, team)
    model.pipe.set_progress_bar_config(disable=True)
    while (request := team.hear()) is not None:
        try:
            make(model, request)
        except (ValueError, ArithmeticError) as error:  # as in the first process, which goes on with its list
            logger.debug(first_line(error))
