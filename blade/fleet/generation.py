"""Many videos by many workers: a list of prompts, into a folder or a bucket."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from blade_kernels.crashes import naming_crashes

from blade.common.errors import first_line
from blade.common.files import write_files
from blade.common.locks import InUseError
from blade.common.terminal import logger
from blade.fleet.connection import Connection, connected
from blade.fleet.options import FleetOptions
from blade.fleet.pool import LEFT_OUT, FleetProgress, Pool, Task
from blade.fleet.storage import Bucket, parse_output
from blade.generation.naming import OUTPUT_FOLDER, check_outputs, claim_path, is_made, possible_paths
from blade.generation.outputs import FinishedVideo, GenerationReport, ListReport, check_comparable, make_video
from blade.generation.plan import resolve_without_weights
from blade.generation.prepare import prepare_model
from blade.generation.record import deciding_fields
from blade.generation.request import GenerationRequest, ResolvedRequest
from blade.generation.video_list import VideoKey, VideoList
from blade.models.loaded import LoadedModel


def generate_many(
    request: GenerationRequest,
    prompts: Sequence[str],
    output: str | Path = OUTPUT_FOLDER,
    *,
    options: FleetOptions,
    seeds: Sequence[int] | None = None,
    compare: bool = False,
    inputs: Mapping[Path, str] | None = None,
    on_progress: Callable[[FleetProgress], None] | None = None,
) -> ListReport:
    """Make a video of every prompt by workers of Ray; those that are there with the same settings stay.

    Into a folder the workers send their videos here, where they are written, so that only this process needs it; other
    processes may work into it at the same time. Into a bucket every worker uploads its own.

    Args:
        request: everything but the prompts; its own prompt is not used.
        prompts: see `blade.generation.outputs.generate_list`.
        output: a folder, or an address that fsspec opens, such as s3://bucket/folder.
        options: the workers.
        seeds: see `blade.generation.outputs.generate_list`.
        compare: see `blade.generation.outputs.generate_files`.
        inputs: see `blade.generation.outputs.generate_files`.
        on_progress: called about twice a second.

    Returns:
        The outcome. Neither a failing prompt nor a lost worker stops the rest.

    Raises:
        ValueError: for a request that cannot be met with any prompt, or workers that cannot be had.
        FleetError: if all workers are lost.
        OutputError: if the output cannot be written.
    """
    place = parse_output(output)
    if isinstance(place, Bucket) and place.address.lower().endswith(".mp4"):
        raise ValueError(f"`output` must be a folder where several videos are made, got {place.address}.")
    bucket = place if isinstance(place, Bucket) else None
    listed = VideoList.of(
        request, prompts, place if isinstance(place, Path) else Path(), seeds=seeds, compare=compare, inputs=inputs
    )
    if not listed.paths:
        return ListReport(made=(), skipped=(), failed=listed.failed)
    if bucket is None:
        check_outputs(request, [*listed.paths.values()], compare)
    else:
        listed = replace(listed, files=bucket, inputs={})
        bucket.look()
        bucket.read_ahead(listed.paths.values())
    with connected(options, request.device) as connection:
        device = connection.crew.device
        resolved = resolve_without_weights(listed.request, device=torch.device(device))[1]
        check_comparable(resolved, compare)
        if listed.may_be_there() and (there := listed.there(resolved)):
            return ListReport(made=(), skipped=_shown(there, bucket), failed=listed.failed)
        job = GenerationJob(request=replace(listed.request, device=device), resolved=resolved, compare=compare)
        driver = _ListDriver(listed, resolved, bucket)
        _run(connection, job, driver, on_progress)
    order = {key: number for number, key in enumerate(listed.paths)}
    return ListReport(
        made=tuple(driver.made[key] for key in sorted(driver.made, key=order.__getitem__)),
        skipped=_shown([driver.skipped[key] for key in sorted(driver.skipped, key=order.__getitem__)], bucket),
        failed=listed.failed | driver.failures,
    )


def _run(
    connection: Connection,
    job: GenerationJob,
    driver: _ListDriver,
    on_progress: Callable[[FleetProgress], None] | None,
) -> None:
    """Make the videos of a list, those that another process is making last."""
    tasks = [Task(key=key, name=name) for key, name in driver.listed.names.items()]
    pool = Pool(connection, job, on_progress)
    try:
        pool.run(tasks, driver)
        if driver.elsewhere:
            driver.waits = True
            pool.run(driver.elsewhere.copy(), driver)
    finally:
        driver.release()


def _shown(paths: Sequence[Path], bucket: Bucket | None) -> tuple[Path | str, ...]:
    return tuple(paths) if bucket is None else tuple(bucket.locate(path) for path in paths)


@dataclass(frozen=True, kw_only=True)
class VideoOrder:
    """A video that a worker is to make."""

    request: ResolvedRequest
    """The request, resolved where the command runs."""
    path: Path
    """Where the video goes; of a bucket, its name in it."""
    bucket: Bucket | None
    """The bucket that the worker uploads it to; None: it is sent back."""


class _ListDriver:
    """The videos of a list, in the process that hands them out: names, locks and files."""

    def __init__(self, listed: VideoList, resolved: ResolvedRequest, bucket: Bucket | None) -> None:
        self.listed, self.resolved, self.bucket = listed, resolved, bucket
        self.made: dict[VideoKey, GenerationReport] = {}
        self.skipped: dict[VideoKey, Path] = {}
        self.failures: dict[str, str] = {}
        self.elsewhere: list[Task] = []
        self.waits = False
        """True: wait for other processes that make the same videos."""
        self._claimed: dict[Any, tuple[Path, ExitStack]] = {}

    def begin(self, task: Task) -> Any:
        """Claim a video's name, and return the order to make it, unless it is there."""
        key: VideoKey = task.key  # type: ignore[assignment]
        own = replace(self.resolved, prompt=key[0], seed=key[1])
        if key not in self._claimed:
            stack, plain = ExitStack(), self.listed.paths[key]
            try:
                path = self._claim(stack, plain, own)
                is_there = is_made(path, own, self.listed.compare, self.listed.files)
            except InUseError:
                self.elsewhere.append(task)
                return LEFT_OUT
            except BaseException:
                stack.close()
                raise
            if is_there:
                stack.close()
                self.skipped[key] = path
                return LEFT_OUT
            self._claimed[key] = (path, stack)
        return VideoOrder(request=own, path=self._claimed[key][0], bucket=self.bucket)

    def done(self, task: Task, value: FinishedVideo) -> None:
        """Write a video, or take down that it was uploaded."""
        key: VideoKey = task.key  # type: ignore[assignment]
        path, stack = self._claimed.pop(key)
        with stack:
            if self.bucket is not None:
                self.bucket.uploaded(value.contents(path))
                self.made[key] = value.report(path, self.bucket.locate)
                return
            try:
                self.made[key] = value.write(path)
            except OSError as error:
                self._take_down(task, error)

    def failed(self, task: Task, error: Exception) -> None:
        """Take down why a video was not made."""
        self._claimed.pop(task.key)[1].close()
        self._take_down(task, error)

    def release(self) -> None:
        """Let go of the names of videos that were not finished."""
        for _, stack in self._claimed.values():
            stack.close()
        self._claimed.clear()

    def _claim(self, stack: ExitStack, plain: Path, own: ResolvedRequest) -> Path:
        if self.bucket is not None:  # which has no locks
            return next(possible_paths(plain, own, self.listed.inputs, self.bucket))
        return claim_path(stack, plain, own, self.listed.inputs, wait=self.waits)

    def _take_down(self, task: Task, error: Exception) -> None:
        self.failures[task.name] = first_line(error)
        logger.warning(f"failed: {task.name}: {first_line(error)}")


@dataclass(frozen=True, kw_only=True)
class GenerationJob:
    """What the workers of a list have in common."""

    request: GenerationRequest
    """The request of the first video."""
    resolved: ResolvedRequest
    """The same, resolved where the command runs."""
    compare: bool
    """True if dense videos are made as well."""

    def load(self, device: str) -> Callable[[VideoOrder], FinishedVideo]:
        """Load the model, and return what makes a video.

        Raises:
            ValueError: if the model is another one here than where the command runs, or cannot be had.
        """
        start = time.perf_counter()
        model, resolved = prepare_model(replace(self.request, device=device))
        _check_same(self.resolved, resolved)
        maker = _VideoMaker(model, resolved, self.compare, time.perf_counter() - start)
        return maker.make


class _VideoMaker:
    """A loaded model in a worker."""

    def __init__(self, model: LoadedModel, resolved: ResolvedRequest, compare: bool, seconds_loading: float) -> None:
        self.model, self.resolved, self.compare = model, resolved, compare
        self.seconds_loading = seconds_loading

    def make(self, order: VideoOrder) -> FinishedVideo:
        """Make a video; one for a bucket is uploaded, and returned without its contents."""
        own = replace(order.request, device=self.resolved.device, offload=self.resolved.offload)
        with naming_crashes(f"prompt {own.prompt!r}", own.device):
            made = make_video(self.model, own, compare=self.compare, seconds_loading=self.seconds_loading)
        made = replace(made, generation=None)
        if order.bucket is None:
            return made
        with tempfile.TemporaryDirectory(prefix="blade-") as scratch:
            contents = made.contents(Path(scratch) / order.path.name)
            write_files(contents)
            record, *videos = contents
            order.bucket.upload([*videos, record])
        return replace(made, video=b"", comparison=None if made.comparison is None else b"")


def _check_same(there: ResolvedRequest, here: ResolvedRequest) -> None:
    """Check that a request is resolved alike on two machines, whose files may have other dates.

    Raises:
        ValueError: naming what differs.
    """
    told, own = deciding_fields(there), deciding_fields(here)
    for name, value in told.items():
        if name != "inputs" and own[name] != value:
            raise ValueError(
                f"`{name}` is {own[name]!r} on this machine, and {value!r} where the command runs: its model or its "
                "packages are others."
            )
