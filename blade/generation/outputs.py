"""From a request to files: an MP4, a JSON record from which the same video is made again, and a comparison."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
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
    possible_paths,
    record_path,
)
from blade.generation.plan import resolve_without_weights
from blade.generation.prompts import without_repetitions
from blade.generation.record import VIDEO_DIGEST, make_record
from blade.generation.request import NO_STUDENT, GenerationRequest, ResolvedRequest, refused_prompts
from blade.generation.resolve import describe_student
from blade.generation.run import Generation
from blade.generation.team import lead, run_together
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
    video_path: Path
    """The MP4."""
    record_path: Path
    """The JSON beside it."""
    comparison_path: Path | None
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
        _check_comparable(resolved, compare)
        path = plain if output is not None else claim_path(stack, plain, resolved, inputs)
        return _make_files(model, resolved, path, compare=compare, seconds_loading=time.perf_counter() - start)


@dataclass(frozen=True, kw_only=True)
class ListReport:
    """The outcome of a list of prompts; `print` it."""

    made: tuple[GenerationReport, ...]
    """The new videos."""
    skipped: tuple[Path, ...]
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
    failed = refused_prompts(request, prompts)
    prompts = [prompt for prompt in prompts if prompt not in failed]
    if not prompts:
        return ListReport(made=(), skipped=(), failed=failed)
    inputs = {**(inputs or {}), **input_paths(request)}
    if Path(folder).suffix.lower() == ".mp4":
        raise ValueError(f"`output` must be a folder where several videos are made, got {folder}.")
    seeds = (request.seed,) if seeds is None else seeds
    own = [(prompt, seed) for prompt in without_repetitions(prompts) for seed in seeds]
    paths = {
        (prompt, seed): Path(folder) / default_output(replace(request, prompt=prompt, seed=seed)).name
        for prompt, seed in own
    }
    check_outputs(request, [*paths.values()], compare)
    if all(record_path(path).is_file() for path in paths.values()):
        resolved = resolve_without_weights(replace(request, prompt=own[0][0]))[1]
        owns = [(path, replace(resolved, prompt=prompt, seed=seed)) for (prompt, seed), path in paths.items()]
        there = [next(possible_paths(path, own, inputs)) for path, own in owns]
        if all(is_made(path, own, compare) for path, (_, own) in zip(there, owns, strict=True)):
            return ListReport(made=(), skipped=tuple(there), failed=failed)
    start = time.perf_counter()
    model, resolved = lead(replace(request, prompt=own[0][0]), team)
    _check_comparable(resolved, compare)
    work = _ListWork(model, resolved, inputs, compare, time.perf_counter() - start)
    elsewhere = []
    names = {key: key[0] if len(seeds) == 1 else f"{key[0]}, seed {key[1]}" for key in paths}
    for number, (key, path) in enumerate(paths.items(), start=1):
        try:
            work.make(key, path, names[key], f"{number}/{len(paths)} ")
        except InUseError:
            elsewhere.append(key)
    for key in elsewhere:
        work.make(key, paths[key], names[key], wait=True)
    return ListReport(made=tuple(work.made), skipped=tuple(work.skipped), failed=failed | work.failed)


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
                    report = _make_files(
                        self.model, own, path, compare=self.compare, seconds_loading=self.seconds_loading
                    )
                self.made.append(report.without_video())
            except (InUseError, DeviceCrashError):
                raise
            except Exception as error:  # whatever a prompt does to the model; the others have nothing to do with it
                self.failed[name] = first_line(error)
                logger.warning(f"failed: {self.failed[name]}")


def _check_comparable(resolved: ResolvedRequest, compare: bool) -> None:
    if compare and resolved.attention == "dense":
        raise ValueError("`compare` sets sparse attention beside dense, but this request is dense already.")


def _make_files(
    model: LoadedModel, resolved: ResolvedRequest, path: Path, *, compare: bool, seconds_loading: float
) -> GenerationReport:
    if resolved.model == BUNDLED and (warning := prompt_warning(resolved.prompt, resolved.negative_prompt)):
        logger.warning(warning)
    model.pipe.set_progress_bar_config(desc=f"denoising, {resolved.attention}")
    generation = run_together(model, resolved)
    record = make_record(resolved, generation, seconds_loading=seconds_loading)
    record["score"] = _score(resolved, generation)
    video = encode_mp4(generation.video, record["fps"], generation.sound)
    record[VIDEO_DIGEST] = sha256(video).hexdigest()
    comparison: dict[Path, bytes] = {}
    if compare:
        model.pipe.set_progress_bar_config(desc="denoising, dense")
        dense = run_together(model, resolved.dense())
        record |= compare_videos(generation.video, dense.video)
        record["seconds_denoising_dense"] = round(dense.seconds_denoising, 4)
        videos = {
            "dense": dense.video,
            f"{resolved.attention}, density {generation.run_density:.2f}": generation.video,
        }
        comparison[comparison_path(path)] = encode_mp4(side_by_side(videos), record["fps"])
    # the video last: where a kill comes between them, there is none to be taken for that of the record
    write_files({record_path(path): (json.dumps(record, indent=2) + "\n").encode(), **comparison, path: video})
    return GenerationReport(
        generation=generation,
        video_path=path,
        record_path=record_path(path),
        comparison_path=next(iter(comparison), None),
        record=record,
        published_students=_other_students(model, resolved),
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
