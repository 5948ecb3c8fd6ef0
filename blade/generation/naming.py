"""Paths of videos: unique for what was asked for, and never an input.

They are paths of files here, or names in a bucket: `VideoFiles` says what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

from blade.common.files import check_writable
from blade.common.locks import InUseError, file_locked
from blade.common.names import check_no_input, file_name, is_same_file, short_hash
from blade.common.reading import read_json
from blade.common.terminal import logger
from blade.generation.record import VIDEO_DIGEST, changed_fields, deciding_fields
from blade.generation.request import GenerationRequest, ResolvedRequest
from blade.media.video import least_mp4_bytes
from blade.models.source import BUNDLED
from blade.moving_shapes.bundled import BUNDLED_DEFAULTS

OUTPUT_FOLDER = Path("outputs")
"""Folder of videos that are given no path."""

SETTINGS_DIGITS = 8
"""Hexadecimal digits of a request's hash in the name of a video beside one of other settings."""


class VideoFiles(Protocol):
    """The files that are where videos go, in a folder or in a bucket."""

    def has(self, path: Path) -> bool:
        """Return whether a file is there."""

    def is_taken(self, path: Path) -> bool:
        """Return whether something is there that no video without a record may replace."""

    def record(self, path: Path) -> dict[str, Any] | None:
        """Return the record of a video; None if there is none."""

    def is_its_video(self, path: Path, record: Mapping[str, Any]) -> bool:
        """Return whether a file is the video that a record was written with."""


class LocalFiles:
    """Files of this machine."""

    def has(self, path: Path) -> bool:
        """Return whether a file is there."""
        return path.is_file()

    def is_taken(self, path: Path) -> bool:
        """Return whether anything is there, a broken link too."""
        return os.path.lexists(path)

    def record(self, path: Path) -> dict[str, Any] | None:
        """Return the record of a video; see `read_record`."""
        return read_record(path)

    def is_its_video(self, path: Path, record: Mapping[str, Any]) -> bool:
        """Return whether a file has the digest of its record; records of 0.1.0 do not tell it."""
        if VIDEO_DIGEST not in record:
            return True
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return bool(digest == record[VIDEO_DIGEST])


LOCAL_FILES = LocalFiles()


def default_output(request: GenerationRequest) -> Path:
    """Return the path of a video that is given none: prompt and seed, in `OUTPUT_FOLDER`."""
    return OUTPUT_FOLDER / f"{file_name(request.prompt)}-{request.seed}.mp4"


def record_path(path: Path) -> Path:
    """Return the path of a video's record."""
    return path.with_suffix(".json")


def comparison_path(path: Path) -> Path:
    """Return the path of the comparison of a video with a dense one."""
    return path.with_name(f"{path.stem}-compare.mp4")


def files_of(path: Path, compare: bool) -> list[Path]:
    """Return the files that go with a video, itself first."""
    return [path, record_path(path), *([comparison_path(path)] if compare else [])]


def check_outputs(
    request: GenerationRequest, paths: Sequence[Path], compare: bool, inputs: Mapping[Path, str] | None = None
) -> None:
    """Check, before anything is loaded, that videos and their files can be written.

    Args:
        request: the request that makes them, but for the prompt.
        paths: of the MP4s.
        compare: see `files_of`.
        inputs: the options that name files, by path, where these paths were asked for and have to be taken.

    Raises:
        ValueError: for another extension, an input, or a file in the record's place that is none.
        OutputError: if they cannot be written, such as for the length of a name, or there is too little room on the
            disk.
    """
    for path in paths:
        if path.suffix.lower() != ".mp4":
            raise ValueError(f"`output` must end in .mp4, got {path}.")
    files = [file for path in paths for file in files_of(path, compare)]
    needed = len(paths) * _least_bytes(request) * (3 if compare else 1)  # a comparison shows two
    check_writable(*files, needed=needed, purpose=f"{len(paths)} video(s)")
    if inputs is None:
        return
    check_no_input(files, inputs)
    for path in paths:
        other = record_path(path)
        if other.exists() and read_record(path) is None:
            raise ValueError(
                f"`output` {path} would replace {other}, which is not a video's record; take another name."
            )


def _least_bytes(request: GenerationRequest) -> int:
    """Return the bytes that a video will certainly take; next to nothing where its size is not known yet."""
    sizes = {name: getattr(request, name) for name in ("frames", "height", "width")}
    known = {name: BUNDLED_DEFAULTS[name] if request.model == BUNDLED else 1 for name in sizes}
    return least_mp4_bytes(**{name: int(known[name] if size is None else size) for name, size in sizes.items()})


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record of a video; None if there is none."""
    try:
        record = read_json(record_path(path), "the record")
    except ValueError:
        return None
    return record if is_record(record) else None


def is_record(values: Mapping[str, Any]) -> bool:
    """Return whether a JSON object is a video's record."""
    return {"prompt", "seed", "steps"} <= values.keys()


def is_made(path: Path, request: ResolvedRequest, compare: bool, files: VideoFiles = LOCAL_FILES) -> bool:
    """Return whether a video is there whose record says this request, with all of its files."""
    if not all(files.has(file) for file in files_of(path, compare)):
        return False
    record = files.record(path)
    return record is not None and not changed_fields(record, request) and files.is_its_video(path, record)


def settings_hash(request: ResolvedRequest) -> str:
    """Return digits that change with anything that decides a video."""
    return short_hash(json.dumps(deciding_fields(request), sort_keys=True), SETTINGS_DIGITS)


def possible_paths(
    plain: Path, request: ResolvedRequest, inputs: Mapping[Path, str], files: VideoFiles = LOCAL_FILES
) -> Iterator[Path]:
    """Yield the paths that a video may have: the first of them that is free, or has this very video.

    Args:
        plain: the first.
        request: its request, whose hash is in the others.
        inputs: paths that must not be written.
        files: what is there.
    """
    stem = f"{plain.stem}-{settings_hash(request)}"
    others = (plain.with_name(f"{stem}{'' if number == 1 else f'-{number}'}{plain.suffix}") for number in count(1))
    for path in chain((plain,), others):
        if _may_be_written(path, request, inputs, files):
            yield path


def _may_be_written(
    path: Path, request: ResolvedRequest, inputs: Mapping[Path, str], files: VideoFiles = LOCAL_FILES
) -> bool:
    """Return whether nothing is in a video's place but the same video, and none of its files is an input."""
    named = files_of(path, True)
    if any(is_same_file(file, source) for file in named for source in inputs):
        return False
    record = files.record(path)
    if record is not None:
        return not changed_fields(record, request) and not (files.has(path) and not files.is_its_video(path, record))
    return not any(files.is_taken(file) for file in named)


def claim_path(
    stack: ExitStack, plain: Path, request: ResolvedRequest, inputs: Mapping[Path, str], *, wait: bool = False
) -> Path:
    """Return the path of a video, locked until the stack is closed.

    Args:
        stack: takes the lock.
        plain: the path, unless a video of other settings or an input is there.
        request: its request.
        inputs: see `possible_paths`.
        wait: wait for another process that makes this very video.

    Raises:
        InUseError: if another process makes this very video.
    """
    note = settings_hash(request)
    for path in possible_paths(plain, request, inputs):
        try:
            stack.enter_context(file_locked(path, note=note))
        except InUseError as error:
            if error.holder is not None and error.holder.note != note:
                continue  # the other one is of other settings
            if not wait:
                raise
            stack.enter_context(file_locked(path, note=note, wait=True))
        if _may_be_written(path, request, inputs):
            if path != plain and not path.exists():
                logger.info(f"{plain} stays: {_reason(plain, request, inputs)}; this video is {path.name}")
            return path
        stack.close()  # another process was quicker
    raise AssertionError("there are numbers without end")


def _reason(plain: Path, request: ResolvedRequest, inputs: Mapping[Path, str]) -> str:
    """Say why a video does not take its plain path."""
    if any(is_same_file(file, source) for file in files_of(plain, True) for source in inputs):
        return "it is an input"
    if _may_be_written(plain, request, inputs):
        return "another process is making one of other settings"
    record = read_record(plain)
    if record is None:
        return "it has no record"
    changed = changed_fields(record, request)
    return f"it was made with another `{changed[0]}`" if changed else "it is not the video of its record"
