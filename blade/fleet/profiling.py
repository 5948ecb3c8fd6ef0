"""The recordings of a profile by many workers; the search afterwards is made once, where the command runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blade.common.errors import first_line
from blade.common.files import write_files
from blade.common.leftovers import files_in
from blade.common.locks import folder_locked
from blade.common.terminal import logger
from blade.fleet.connection import connected
from blade.fleet.options import FleetOptions
from blade.fleet.pool import FleetProgress, Pool, Task
from blade.models.devices import resolve_device
from blade.profiling.record_prompts import SOURCE_NAME, recording_path
from blade.profiling.request import ProfileRequest
from blade.profiling.workflow import (
    RECORDINGS_NAME,
    ProfileReport,
    check_profile,
    load_recorder,
    profile_attention,
)


def profile_many(
    request: ProfileRequest,
    *,
    options: FleetOptions,
    on_recording: Callable[[FleetProgress], None] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> ProfileReport:
    """Profile a model's attention as `profile_attention` does, with prompts recorded by workers of Ray.

    A recording is whole or lost: a prompt whose worker was lost is recorded again from its first step.

    Args:
        request: the request, with the budgeted method.
        options: the workers, which end before the search.
        on_recording: called about twice a second while prompts are recorded.
        on_progress: see `profile_attention`.

    Raises:
        ValueError: for a request that cannot be met or shared, or workers that cannot be had.
        RuntimeError: if a prompt's workers were lost too often, or all are; the other recordings are kept.
        InUseError: if another process profiles into the same folder.
        OutputError: if the folder cannot be written.
    """
    if request.method == "published":
        raise ValueError("`method` must be budgeted with `workers`, got published, which goes step by step.")
    check_profile(request)
    folder = request.output / RECORDINGS_NAME
    with folder_locked(request.output):
        missing = [number for number in range(len(request.prompts)) if not recording_path(folder, number).is_file()]
        if missing:
            _record(request, options, missing, on_recording)
    report = profile_attention(request, on_progress)
    assert report is not None  # as there is one share
    return report


def _record(
    request: ProfileRequest,
    options: FleetOptions,
    missing: list[int],
    on_recording: Callable[[FleetProgress], None] | None,
) -> None:
    """Record prompts by workers.

    Raises:
        Exception: the first error of a prompt, once the others are recorded.
    """
    device = request.generation.device
    with connected(options, device) as connection:
        if resolve_device(device).type != connection.crew.device:
            raise ValueError(
                f"`workers` compute on {connection.crew.device}, but this machine has no GPU for the search after the "
                "recording; start the command on one that has, or give `device` cpu."
            )
        driver = _RecordingDriver(request.output / RECORDINGS_NAME)
        tasks = [Task(key=number, name=request.prompts[number]) for number in missing]
        Pool(connection, RecordingJob(request=request), on_recording).run(tasks, driver)
    for error in driver.failures.values():
        raise error


@dataclass(frozen=True, kw_only=True)
class RecordingOrder:
    """A prompt that a worker is to record."""

    number: int
    """Of the prompt, from 0."""
    source: bytes | None
    """The file that says what the folder's recordings are of, where there are any."""


class _RecordingDriver:
    """The recordings of a folder, in the process that hands them out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failures: dict[str, Exception] = {}

    def begin(self, task: Task) -> Any:
        """Return the order of a prompt."""
        source = self.folder / SOURCE_NAME
        return RecordingOrder(
            number=task.key,  # type: ignore[arg-type]
            source=source.read_bytes() if source.is_file() else None,
        )

    def done(self, task: Task, value: dict[str, bytes]) -> None:
        """Write a recording: all of its files, or none."""
        files = {self.folder / name: content for name, content in value.items()}
        if (self.folder / SOURCE_NAME).is_file():
            del files[self.folder / SOURCE_NAME]
        write_files(files)

    def failed(self, task: Task, error: Exception) -> None:
        """Take down why a prompt was not recorded."""
        self.failures[task.name] = error
        logger.warning(f"failed: {task.name}: {first_line(error)}")


@dataclass(frozen=True, kw_only=True)
class RecordingJob:
    """What the workers of a recording have in common."""

    request: ProfileRequest

    def load(self, device: str) -> Callable[[RecordingOrder], dict[str, bytes]]:
        """Load the model, and return what records a prompt into files, by their names."""
        generation = replace(self.request.generation, device=device)
        record = load_recorder(replace(self.request, generation=generation))
        prompts = len(self.request.prompts)

        def make(order: RecordingOrder) -> dict[str, bytes]:
            with tempfile.TemporaryDirectory(prefix="blade-") as scratch:
                folder = Path(scratch)
                if order.source is not None:
                    write_files({folder / SOURCE_NAME: order.source})
                record(folder, (order.number + 1, prompts))
                return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files_in(folder)}

        return make
