"""From a request to files: an MP4, a JSON record from which the same video is made again, and a comparison."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from blade_kernels.crashes import DeviceCrashError, naming_crashes

from blade.common.errors import first_line
from blade.common.files import write_files
from blade.common.locks import InUseError, file_locked
from blade.common.terminal import logger, printable
from blade.generation.inputs import input_paths
from blade.generation.naming import (
    OUTPUT_FOLDER,
    check_outputs,
    claim_path,
    comparison_path,
    default_output,
    is_made,
    record_path,
)
from blade.generation.plan import resolve_without_weights
from blade.generation.record import VIDEO_DIGEST, make_record
from blade.generation.request import NO_STUDENT, GenerationRequest, ResolvedRequest
from blade.generation.resolve import describe_student
from blade.generation.run import Generation
from blade.generation.team import lead, run_together
from blade.generation.video_list import VideoList
from blade.media.pictures import side_by_side
from blade.media.video import encode_mp4
from blade.metrics.registry import compare_videos, describe_comparison
from blade.models.loaded import LoadedModel
from blade.models.parallel import Team
from blade.models.source import BUNDLED
from blade.moving_shapes.bundled import BUNDLED_DEFAULTS, prompt_warning
from blade.students.loading import published_students
from blade.students.source import BUNDLED_STUDENTS


@dataclass(frozen=True, kw_only=True)
class GenerationReport:
    """A video that was made, its files and its cost; `print` it."""

    generation: Generation | None
    """The video itself; None in a list's report, as the videos of all its prompts would fill the memory."""
    video_path: Path | str
    """The MP4; its address in a bucket."""
    record_path: Path | str
    """The JSON beside it."""
    comparison_path: Path | str | None
    """The dense and the sparse video side by side, if that was asked for."""
    record: Mapping[str, Any]
    """The content of the JSON."""
    published_students: tuple[str, ...] = ()
    """Students of this model that could have been taken, where none was."""

    def without_video(self) -> GenerationReport:
        """Return the report without the video itself, whose memory is then free."""
        return replace(self, generation=None)

    def __str__(self) -> str:
        record = self.record
        lines = [
            f"video       {self.video_path} ({record['frames']} frames of {record['width']}x{record['height']}, "
            f"{record['fps']} a second{_sound(record)})",
            f"record      {self.record_path} (the same again: blade-generate --from-json)",
            f"seconds     text {record['seconds_text']:.2f}, denoising {record['seconds_denoising']:.2f} "
            f"({record['steps']} steps), decoding {record['seconds_decoding']:.2f}; "
            f"loading {record['seconds_loading']:.2f}",
            f"attention   {describe_attention(record)}",
        ]
        if record["transformer"] is not None:
            lines.append(f"file        {record['transformer']}")
        if record["student"] in BUNDLED_STUDENTS.values():
            lines.append(f"student     {record['student']} (the bundled model itself: --student {NO_STUDENT})")
        elif record["student"] is not None:
            lines.append(f"student     {describe_student(record['student'], _kind(record))}")
        for source in self.published_students:
            lines.append(f"student     none; there is one for this model, for fewer steps: --student {source}")
        if record["score"] is not None:
            lines.append(f"scorer      {describe_score(record['score'])}")
        if self.comparison_path is not None:
            lines += [
                f"comparison  {self.comparison_path}",
                f"to dense    {describe_comparison(record)}; "
                f"dense denoising {record['seconds_denoising_dense']:.2f} s",
            ]
        return "\n".join(map(printable, lines))


def generate_files(
    request: GenerationRequest,
    output: str | Path | None = None,
    *,
    compare: bool = False,
    inputs: Mapping[Path, str] | None = None,
    team: Team | None = None,
) -> GenerationReport:
    """Make a video, and write it with its record: all files or none.

    Args:
        request: the request.
        output: path of the MP4, which is replaced if it is there; the record has the same name with ".json". None: see
            `default_output`; a video of other settings that is there stays, and the new one has digits in its name.
        compare: also make it with dense attention and the same seed, and write both side by side.
        inputs: files that are read beside those that the request names, with the options that name them.
        team: the processes that make the video together; this is the first, and the others call `follow`.

    Raises:
        ValueError: for a request that cannot be met, or an output that is an input; found before the model runs.
        InUseError: if another process makes the same video.
        OutputError: if a file cannot be written.
        NonFiniteError: see `blade.generation.run.generate`.
    """
    inputs = {**(inputs or {}), **input_paths(request)}
    plain = default_output(request) if output is None else Path(output)
    check_outputs(request, [plain], compare, None if output is None else inputs)
    start = time.perf_counter()
    with ExitStack() as stack:
        if output is not None:
            stack.enter_context(file_locked(plain))
        model, resolved = lead(request, team)
        check_comparable(resolved, compare)
        path = plain if output is not None else claim_path(stack, plain, resolved, inputs)
        seconds_loading = time.perf_counter() - start
        return make_video(model, resolved, compare=compare, seconds_loading=seconds_loading).write(path)


@dataclass(frozen=True, kw_only=True)
class ListReport:
    """The outcome of a list of prompts; `print` it."""

    made: tuple[GenerationReport, ...]
    """The new videos."""
    skipped: tuple[Path | str, ...]
    """Videos of the same settings that were there before, or that another process made meanwhile."""
    failed: Mapping[str, str]
    """By prompt, and seed where there are several, why it has no video."""

    def __str__(self) -> str:
        lines = [f"{len(self.made)} made, {len(self.skipped)} there before, {len(self.failed)} failed"]
        lines += [f"made        {report.video_path}" for report in self.made]
        lines += [f"failed      {prompt}: {reason}" for prompt, reason in self.failed.items()]
        return "\n".join(map(printable, lines))


def generate_list(
    request: GenerationRequest,
    prompts: Sequence[str],
    folder: str | Path = OUTPUT_FOLDER,
    *,
    seeds: Sequence[int] | None = None,
    compare: bool = False,
    inputs: Mapping[Path, str] | None = None,
    team: Team | None = None,
) -> ListReport:
    """Make a video of every prompt, each as soon as it is there; those that are there with the same settings stay.

    Several processes share the work on one folder: each video is made by one of them.

    A prompt that the model cannot draw, as far as that is known beforehand, is a failed one.

    Args:
        request: everything but the prompts; its own prompt is not used.
        prompts: the prompts; repeated ones are made once.
        folder: where the videos go, each under the name of its prompt and the seed, and of its settings where a video
            of others has that name.
        seeds: seeds of the noise, each with every prompt; None: the request's own.
        compare: see `generate_files`.
        inputs: see `generate_files`.
        team: see `generate_files`.

    Returns:
        The outcome. One failing prompt does not stop the rest.

    Raises:
        ValueError: for a request that cannot be met with any prompt.
        OutputError: if the folder cannot be written.
    """
    listed = VideoList.of(request, prompts, Path(folder), seeds=seeds, compare=compare, inputs=inputs)
    if not listed.paths:
        return ListReport(made=(), skipped=(), failed=listed.failed)
    check_outputs(request, [*listed.paths.values()], compare)
    if listed.may_be_there() and (there := listed.there(resolve_without_weights(listed.request)[1])):
        return ListReport(made=(), skipped=there, failed=listed.failed)
    start = time.perf_counter()
    model, resolved = lead(listed.request, team)
    check_comparable(resolved, compare)
    work = _ListWork(model, resolved, listed.inputs, compare, time.perf_counter() - start)
    elsewhere = []
    for number, (key, path) in enumerate(listed.paths.items(), start=1):
        try:
            work.make(key, path, listed.names[key], f"{number}/{len(listed.paths)} ")
        except InUseError:
            elsewhere.append(key)
    for key in elsewhere:
        work.make(key, listed.paths[key], listed.names[key], wait=True)
    return ListReport(made=tuple(work.made), skipped=tuple(work.skipped), failed=listed.failed | work.failed)


class _ListWork:
    """The videos of a list with one model."""

    def __init__(
        self,
        model: LoadedModel,
        resolved: ResolvedRequest,
        inputs: Mapping[Path, str],
        compare: bool,
        seconds_loading: float,
    ) -> None:
        self.model, self.resolved, self.inputs, self.compare = model, resolved, inputs, compare
        self.seconds_loading = seconds_loading
        self.made: list[GenerationReport] = []
        self.skipped: list[Path] = []
        self.failed: dict[str, str] = {}

    def make(self, key: tuple[str, int], plain: Path, name: str, counted: str = "", *, wait: bool = False) -> None:
        """Make the video of a prompt and a seed unless it is there; see `claim_path`."""
        own = replace(self.resolved, prompt=key[0], seed=key[1])
        with ExitStack() as stack:
            try:
                path = claim_path(stack, plain, own, self.inputs, wait=wait)
                if is_made(path, own, self.compare):
                    self.skipped.append(path)
                    return
                logger.info(f"{counted}{name}")
                with naming_crashes(f"prompt {name!r}", own.device):
                    made = make_video(self.model, own, compare=self.compare, seconds_loading=self.seconds_loading)
                self.made.append(made.write(path).without_video())
            except (InUseError, DeviceCrashError):
                raise
            except Exception as error:  # whatever a prompt does to the model; the others have nothing to do with it
                self.failed[name] = first_line(error)
                logger.warning(f"failed: {self.failed[name]}")


def check_comparable(resolved: ResolvedRequest, compare: bool) -> None:
    """Check that there is something to compare with dense attention.

    Raises:
        ValueError: if the request is dense.
    """
    if compare and resolved.attention == "dense":
        raise ValueError("`compare` sets sparse attention beside dense, but this request is dense already.")


@dataclass(frozen=True, kw_only=True)
class FinishedVideo:
    """A video that was made, as the contents of its files."""

    record: Mapping[str, Any]
    """The content of the JSON."""
    video: bytes
    """The MP4."""
    comparison: bytes | None
    """The MP4 of the comparison, if that was asked for."""
    published_students: tuple[str, ...]
    """See `GenerationReport`."""
    generation: Generation | None
    """The video itself; None where it is not kept."""

    def contents(self, path: Path) -> dict[Path, bytes]:
        """Return the contents of the files by their paths, where the MP4 has this one; the record first."""
        comparison = {} if self.comparison is None else {comparison_path(path): self.comparison}
        text = json.dumps(dict(self.record), indent=2) + "\n"
        return {record_path(path): text.encode(), **comparison, path: self.video}

    def write(self, path: Path) -> GenerationReport:
        """Write the files: all or none.

        Raises:
            OutputError: if one cannot be written.
        """
        # the video last: where a kill comes between them, there is none to be taken for that of the record
        write_files(self.contents(path))
        return self.report(path)

    def report(self, path: Path, locate: Callable[[Path], Path | str] = Path) -> GenerationReport:
        """Return the report of the files.

        Args:
            path: that of the MP4.
            locate: returns where a file is shown to be.
        """
        return GenerationReport(
            generation=self.generation,
            video_path=locate(path),
            record_path=locate(record_path(path)),
            comparison_path=None if self.comparison is None else locate(comparison_path(path)),
            record=self.record,
            published_students=self.published_students,
        )


def make_video(
    model: LoadedModel, resolved: ResolvedRequest, *, compare: bool, seconds_loading: float
) -> FinishedVideo:
    """Make a video with a loaded model, and write nothing.

    Args:
        model: see `blade.generation.prepare.prepare_model`.
        resolved: its request.
        compare: also make it with dense attention.
        seconds_loading: how long loading the model took.

    Raises:
        NonFiniteError: see `blade.generation.run.generate`.
    """
    if resolved.model == BUNDLED and (warning := prompt_warning(resolved.prompt, resolved.negative_prompt)):
        logger.warning(warning)
    model.pipe.set_progress_bar_config(desc=f"denoising, {resolved.attention}")
    generation = run_together(model, resolved)
    record = make_record(resolved, generation, seconds_loading=seconds_loading)
    record["score"] = _score(resolved, generation)
    video = encode_mp4(generation.video, record["fps"], generation.sound)
    record[VIDEO_DIGEST] = sha256(video).hexdigest()
    comparison: bytes | None = None
    if compare:
        model.pipe.set_progress_bar_config(desc="denoising, dense")
        dense = run_together(model, resolved.dense())
        record |= compare_videos(generation.video, dense.video)
        record["seconds_denoising_dense"] = round(dense.seconds_denoising, 4)
        videos = {
            "dense": dense.video,
            f"{resolved.attention}, density {generation.run_density:.2f}": generation.video,
        }
        comparison = encode_mp4(side_by_side(videos), record["fps"])
    return FinishedVideo(
        record=record,
        video=video,
        comparison=comparison,
        published_students=_other_students(model, resolved),
        generation=generation,
    )


def _other_students(model: LoadedModel, resolved: ResolvedRequest) -> tuple[str, ...]:
    """Return the students that could have made a video which none made."""
    if resolved.student is not None:
        return ()
    return tuple(BUNDLED_STUDENTS.values()) if resolved.model == BUNDLED else published_students(model)


def describe_attention(record: Mapping[str, Any]) -> str:
    """Say in one line what a record tells of attention."""
    if record["attention"] == "dense":
        return "dense (density 1)"
    layer = record["layer_density"]
    sparse = "no layer was sparse" if layer is None else f"layer density {layer:.3f} (sparse layers and steps)"
    asked = "" if record["attention"] == "patterns" else f", requested sparsity {record['sparsity']:g}"
    preset = " (few-step preset)" if _kind(record) == "few-step" else ""
    method = f"{record['attention']}{preset}{asked}"
    return f"{method}; {sparse}, run density {record['run_density']:.3f} (dense ones included)"


def _kind(record: Mapping[str, Any]) -> str | None:
    """Return the kind of a record's configuration; None: dense."""
    return (record.get("blade_config") or {}).get("kind")


def _sound(record: Mapping[str, Any]) -> str:
    """Say what sound a video has, as the end of a list."""
    sound = record.get("sound")
    channels = "" if sound is None else "stereo" if sound["channels"] == 2 else "mono"
    return "" if sound is None else f"; {channels} sound of {sound['rate']} Hz"


def describe_score(score: Mapping[str, Any]) -> str:
    """Say in one line what the scorer of the moving-shapes world saw of each object."""
    parts = []
    for number, attributes in enumerate(score["objects"], start=1):
        marks = ", ".join(f"{name} {'right' if right else 'wrong'}" for name, right in attributes.items())
        parts.append(f"object {number}: {marks}" if len(score["objects"]) > 1 else marks)
    parts.append(f"count {'right' if score['count'] else 'wrong'}")
    if score["background"] is not None:
        parts.append(f"background {'right' if score['background'] else 'wrong'}")
    return "; ".join(parts)


def _score(request: ResolvedRequest, generation: Generation) -> dict[str, Any] | None:
    """Return what the scorer saw, if this is a video of the bundled model that it can judge."""
    size_is_known = all(getattr(request, name) == BUNDLED_DEFAULTS[name] for name in ("height", "width", "frames"))
    if request.model != BUNDLED or not size_is_known or prompt_warning(request.prompt):
        return None
    from blade.moving_shapes.scoring import score

    seen = score(generation.video, request.prompt)
    objects = [scored.attributes for scored in seen.objects]
    return {"objects": objects, "count": seen.count, "background": seen.background}
