"""From a request to files: an MP4, a JSON record from which the same video is made again, and a comparison."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blade.common.errors import first_line
from blade.common.files import check_writable, write_files
from blade.common.terminal import logger, printable
from blade.generation.prepare import prepare_model
from blade.generation.prompts import file_stem
from blade.generation.record import make_record
from blade.generation.request import NO_STUDENT, GenerationRequest, ResolvedRequest, refused_prompts
from blade.generation.resolve import describe_student
from blade.generation.run import Generation, run_request
from blade.media.pictures import side_by_side
from blade.media.video import encode_mp4
from blade.metrics.registry import compare_videos, describe_comparison
from blade.models.loaded import LoadedModel
from blade.models.source import BUNDLED
from blade.moving_shapes.bundled import BUNDLED_DEFAULTS, prompt_warning
from blade.students.loading import published_students
from blade.students.source import BUNDLED_STUDENTS

OUTPUT_FOLDER = Path("outputs")
"""Folder of videos that are given no path."""


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
            f"{record['fps']} a second)",
            f"record      {self.record_path} (the same again: blade-generate --from-json)",
            f"seconds     text {record['seconds_text']:.2f}, denoising {record['seconds_denoising']:.2f} "
            f"({record['steps']} steps), decoding {record['seconds_decoding']:.2f}; "
            f"loading {record['seconds_loading']:.2f}",
            f"attention   {describe_attention(record)}",
        ]
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
    request: GenerationRequest, output: str | Path | None = None, *, compare: bool = False
) -> GenerationReport:
    """Make a video, and write it with its record: all files or none.

    Args:
        request: the request.
        output: path of the MP4; the record has the same name with ".json". None: see `default_output`.
        compare: also make it with dense attention and the same seed, and write both side by side.

    Raises:
        ValueError: for a request that cannot be met; found before the model runs.
        OutputError: if a file cannot be written.
        NonFiniteError: see `blade.generation.run.generate`.
    """
    path = _checked_output(default_output(request) if output is None else Path(output))
    start = time.perf_counter()
    model, resolved = prepare_model(request)
    _check_comparable(resolved, compare)
    return _make_files(model, resolved, path, compare=compare, seconds_loading=time.perf_counter() - start)


@dataclass(frozen=True, kw_only=True)
class ListReport:
    """The outcome of a list of prompts; `print` it."""

    made: tuple[GenerationReport, ...]
    """The new videos."""
    skipped: tuple[Path, ...]
    """Videos that were there before."""
    failed: Mapping[str, str]
    """By prompt, why it has no video."""

    def __str__(self) -> str:
        lines = [f"{len(self.made)} made, {len(self.skipped)} there before, {len(self.failed)} failed"]
        lines += [f"made        {report.video_path}" for report in self.made]
        lines += [f"failed      {prompt}: {reason}" for prompt, reason in self.failed.items()]
        return "\n".join(map(printable, lines))


def generate_list(
    request: GenerationRequest, prompts: Sequence[str], folder: str | Path = OUTPUT_FOLDER, *, compare: bool = False
) -> ListReport:
    """Make a video of every prompt, each as soon as it is there; videos that exist are left as they are.

    A prompt that the model cannot draw, as far as that is known beforehand, is a failed one.

    Args:
        request: everything but the prompts; its own prompt is not used.
        prompts: the prompts.
        folder: where the videos go, each under the name of its prompt and the seed.
        compare: see `generate_files`.

    Returns:
        The outcome. One failing prompt does not stop the rest.

    Raises:
        ValueError: for a request that cannot be met with any prompt.
        OutputError: if the folder cannot be written.
    """
    failed = refused_prompts(request, prompts)
    prompts = [prompt for prompt in prompts if prompt not in failed]
    paths = {prompt: Path(folder) / default_output(replace(request, prompt=prompt)).name for prompt in prompts}
    waiting = {prompt: path for prompt, path in paths.items() if not _is_there(path)}
    skipped = tuple(path for prompt, path in paths.items() if prompt not in waiting)
    if not waiting:
        return ListReport(made=(), skipped=skipped, failed=failed)
    for path in waiting.values():
        _checked_output(path)
    start = time.perf_counter()
    model, resolved = prepare_model(replace(request, prompt=next(iter(waiting))))
    _check_comparable(resolved, compare)
    seconds_loading = time.perf_counter() - start
    made = []
    for number, (prompt, path) in enumerate(waiting.items(), start=1):
        logger.info(f"{number}/{len(waiting)} {prompt}")
        try:
            own = replace(resolved, prompt=prompt)
            report = _make_files(model, own, path, compare=compare, seconds_loading=seconds_loading)
            made.append(report.without_video())
        except Exception as error:  # whatever a prompt does to the model; the others have nothing to do with it
            failed[prompt] = first_line(error)
            logger.warning(f"failed: {failed[prompt]}")
    return ListReport(made=tuple(made), skipped=skipped, failed=failed)


def _is_there(path: Path) -> bool:
    return path.is_file() and path.with_suffix(".json").is_file()


def _checked_output(path: Path) -> Path:
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"`output` must end in .mp4, got {path}.")
    check_writable(path)
    return path


def _check_comparable(resolved: ResolvedRequest, compare: bool) -> None:
    if compare and resolved.attention == "dense":
        raise ValueError("`compare` sets sparse attention beside dense, but this request is dense already.")


def _make_files(
    model: LoadedModel, resolved: ResolvedRequest, path: Path, *, compare: bool, seconds_loading: float
) -> GenerationReport:
    if resolved.model == BUNDLED and (warning := prompt_warning(resolved.prompt, resolved.negative_prompt)):
        logger.warning(warning)
    model.pipe.set_progress_bar_config(desc=f"denoising, {resolved.attention}")
    generation = run_request(model, resolved)
    record = make_record(resolved, generation, seconds_loading=seconds_loading)
    record["score"] = _score(resolved, generation)
    files = {path: encode_mp4(generation.video, record["fps"])}
    comparison_path = None
    if compare:
        model.pipe.set_progress_bar_config(desc="denoising, dense")
        dense = run_request(model, resolved.dense())
        record |= compare_videos(generation.video, dense.video)
        record["seconds_denoising_dense"] = round(dense.seconds_denoising, 4)
        videos = {
            "dense": dense.video,
            f"{resolved.attention}, density {generation.run_density:.2f}": generation.video,
        }
        comparison_path = path.with_name(f"{path.stem}-compare.mp4")
        files[comparison_path] = encode_mp4(side_by_side(videos), record["fps"])
    record_path = path.with_suffix(".json")
    files[record_path] = (json.dumps(record, indent=2) + "\n").encode()
    write_files(files)
    return GenerationReport(
        generation=generation,
        video_path=path,
        record_path=record_path,
        comparison_path=comparison_path,
        record=record,
        published_students=_other_students(model, resolved),
    )


def _other_students(model: LoadedModel, resolved: ResolvedRequest) -> tuple[str, ...]:
    """Return the students that could have made a video which none made."""
    if resolved.student is not None:
        return ()
    return tuple(BUNDLED_STUDENTS.values()) if resolved.model == BUNDLED else published_students(model)


def default_output(request: GenerationRequest) -> Path:
    """Return the path of a video that is given none: prompt and seed, in `OUTPUT_FOLDER`."""
    return OUTPUT_FOLDER / f"{file_stem(request.prompt)}-{request.seed}.mp4"


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
