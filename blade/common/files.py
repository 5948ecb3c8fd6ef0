"""Files that are written whole or not at all; the only place that writes.

What is being written has a temporary name beside its place, which says whose it is, so that what a killed process left
is removed the next time that something is written there.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from blade.common.leftovers import is_temporary, remove, sweep_leftovers, temporary_path
from blade.common.terminal import logger

FULL = tuple(getattr(errno, name) for name in ("ENOSPC", "EDQUOT") if hasattr(errno, name))
"""Error numbers of a full disk, and of a full quota."""

FULL_TEXT = re.compile(r"No space left|Disk quota exceeded|os error (28|122|112)\b")
"""What libraries that lose the number say of it."""

ALMOST_NOTHING = 2**16
"""Free bytes up to which a disk on which PyTorch's writer failed is full: it says no reason."""

WINDOWS = os.name == "nt"

PAUSES = (0.01, 0.05, 0.2, 0.5)
"""Seconds between attempts on Windows, where nothing can be moved that another program has open."""

_swept: set[Path] = set()


class OutputError(OSError):
    """A file that cannot be written."""


def check_writable(*paths: str | Path, needed: int = 0, purpose: str = "it") -> None:
    """Check, before hours are spent on them, that files can be written here.

    Nothing is made, and none of the files is touched; what killed processes left in their folders is removed.

    Args:
        paths: of the files; their folders may be missing.
        needed: bytes that will certainly be written, to the first one's disk.
        purpose: what needs them, for the error.

    Raises:
        OutputError: saying why a file cannot be written, or that there is too little room on the disk.
    """
    by_folder: dict[Path, list[Path]] = {}
    for path in map(Path, paths):
        if os.path.isdir(path):
            raise OutputError(f"`output` {path} is a folder; name a file in it.")
        by_folder.setdefault(path.parent, []).append(path)
    for folder, files in by_folder.items():
        sweep_leftovers(folder)
        with _explained(files[0]):
            existing = _existing(folder)
            _probe(existing)
        longest = max(files, key=_name_bytes)
        with _explained(longest):
            missing = folder.absolute().parts[len(existing.parts) :]
            for name in (longest.name, *missing):
                _probe(existing, len(os.fsencode(name)))
            with suppress(FileNotFoundError):
                longest.lstat()  # asks for the whole path, which the system may refuse
    if by_folder:
        _check_room(next(iter(by_folder)), needed, purpose)


def _existing(folder: Path) -> Path:
    """Return the nearest folder above, or this one, that exists."""
    places = (folder.absolute(), *folder.absolute().parents)
    nearest = next((path for path in places if os.path.lexists(path)), None)
    if nearest is None:  # a drive of Windows that is not there
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(places[-1]))
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
    return nearest


def _probe(folder: Path, length: int = 0) -> None:
    """Make and remove a temporary file whose name has so many bytes."""
    probe = temporary_path(folder / "probe", length)
    try:
        probe.touch(exist_ok=False)
    finally:
        probe.unlink(missing_ok=True)


def _name_bytes(path: Path) -> int:
    return len(os.fsencode(path.name))


def _check_room(folder: Path, needed: int, purpose: str) -> None:
    usage = shutil.disk_usage(_existing(folder))
    if usage.total and usage.free < needed:  # some file systems of networks do not tell
        raise OutputError(
            f"`output` {folder} has {_size(usage.free)} free on its disk, but {purpose} needs about {_size(needed)}."
        )


def _size(count: int) -> str:
    """Return a number of bytes in a unit that suits it."""
    for unit, bytes_each in (("GB", 1e9), ("MB", 1e6)):
        if count >= bytes_each:
            value = count / bytes_each
            return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write all of these files, or none: each goes to a temporary file beside its place, then all are moved.

    Args:
        contents: by path; folders are made if missing.

    Raises:
        OutputError: if one cannot be written, for example on a full disk. All is then as it was before.
    """
    temporary: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            with _explained(path):
                temporary[path] = _fresh(path)
                with temporary[path].open("wb") as file:
                    file.write(content)
                    _sync(file)
        _move(temporary)
    finally:
        for source in temporary.values():
            source.unlink(missing_ok=True)


def _move(sources: Mapping[Path, Path]) -> None:
    """Move files to their places, by place; if one cannot be moved, those that were there come back."""
    kept: dict[Path, Path] = {}
    begun: list[Path] = []
    try:
        for path, source in sources.items():
            with _explained(path):
                if len(sources) > 1 and path.is_file():
                    kept[path] = temporary_path(path)
                    _link(path, kept[path])
                begun.append(path)
                _replace(source, path)
    except BaseException:
        for path in begun if len(sources) > 1 else ():
            if path in kept:
                _replace(kept[path], path)
            elif not sources[path].exists():
                path.unlink(missing_ok=True)
        raise
    finally:
        for backup in kept.values():
            backup.unlink(missing_ok=True)


def _replace(source: Path, target: Path) -> None:
    """Move a file or folder to its place. On Windows, others that look into it just then have a moment to end."""
    for pause in PAUSES if WINDOWS else ():
        try:
            os.replace(source, target)
        except PermissionError:
            time.sleep(pause)
        else:
            return
    os.replace(source, target)


def take_room(path: Path) -> None:
    """Take the room on the disk of a file that is being written, and that has its size, but holes instead of zeros.

    It can be mapped into memory and filled then; for one with holes, a full disk would kill the process.

    Raises:
        OSError: if there is not enough room.
    """
    if hasattr(os, "posix_fallocate"):
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def link_or_copy(source: Path, target: Path) -> None:
    """Put a file at a second path, as a hard link where the file system has them; what is there is replaced.

    Raises:
        OutputError: if it cannot be written.
    """
    with replaced_whole(target) as temporary:
        _link(source, temporary)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def replaced_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, which then takes its place; after an error all is as it was before.

    Args:
        path: its place; the folder that holds it is made if missing.

    Raises:
        OutputError: if it cannot be written.
    """
    with _temporary(path) as temporary:
        yield temporary
        _sync_all(temporary)
        if not path.is_dir():
            _replace(temporary, path)
            return
        with _temporary(path) as former:
            _replace(path, former)
            try:
                _replace(temporary, path)
            except BaseException:
                _replace(former, path)
                raise


@contextmanager
def folder_updated(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, whose files then go into `folder` one by one; after an error none of them does.

    Args:
        folder: made if missing; other files in it stay.

    Raises:
        OutputError: if they cannot be written.
    """
    with _temporary(folder / "update", folder) as temporary:
        temporary.mkdir()
        yield temporary
        _sync_all(temporary)
        sources = {
            folder / source.relative_to(temporary): source
            for source in sorted(temporary.rglob("*"))
            if source.is_file()
        }
        for path in sources:
            path.parent.mkdir(parents=True, exist_ok=True)
        _move(sources)


def append_json_line(path: Path, values: Mapping[str, Any]) -> None:
    """Append a JSON object as a line, whole or not at all; an incomplete line that a kill may have left is removed.

    Raises:
        OutputError: if it cannot be written, for example on a full disk; the file is then as it was before.
    """
    line = json.dumps(values).encode() + b"\n"
    with _explained(path):
        _prepare(path)
        # without a buffer, which would be written once more when the file is closed
        with path.open("a+b", buffering=0) as file:
            complete, needs_break = _complete(file)
            file.truncate(complete)
            rest = b"\n" + line if needs_break else line
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(complete)
                raise


def _complete(file: io.FileIO) -> tuple[int, bool]:
    """Return where the complete lines of a file end, and whether the last one lacks its line break."""
    end = start = file.seek(0, os.SEEK_END)
    tail = b""
    while start and b"\n" not in tail:
        start = max(start - 2**16, 0)
        file.seek(start)
        tail = file.read(end - start)
    rest = tail[tail.rfind(b"\n") + 1 :]
    return (end, True) if rest and _is_json(rest) else (end - len(rest), False)


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines, which may be missing; an incomplete last line is left out, with a warning.

    Raises:
        ValueError: if another line is no JSON object.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        if not _is_json(line) and number < len(lines):
            raise ValueError(f"line {number} of {path} must be a JSON object, got {line[:40]!r}.")
    if lines and not _is_json(lines[-1]):
        logger.warning(f"the last line of {path} is incomplete, as a kill or a full disk leaves it, and is left out")
        lines.pop()
    return [json.loads(line) for line in lines]


@contextmanager
def _temporary(path: Path, named: Path | None = None) -> Iterator[Path]:
    """Yield a path beside another one at which nothing is, neither before nor after; errors name `path` or `named`."""
    with _explained(named or path):
        temporary = _fresh(path)
    try:
        with _explained(named or path):  # while the disk is still full
            yield temporary
    finally:
        remove(temporary)


def _fresh(path: Path) -> Path:
    """Return a temporary path beside another one, whose folder is made, and swept when first written into."""
    _prepare(path)
    return temporary_path(path)


def _prepare(path: Path) -> None:
    folder = path.parent.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if folder not in _swept:
        sweep_leftovers(folder)
        _swept.add(folder)


def _sync(file: IO[bytes]) -> None:
    """Have the system write a file, since some say only then that the disk is full."""
    file.flush()
    os.fsync(file.fileno())


def _sync_all(path: Path) -> None:
    """Do so with the files that a library wrote."""
    for written in path.rglob("*") if path.is_dir() else (path,):
        if written.is_file():
            with written.open("rb+") as file:
                _sync(file)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is written into an `OutputError` that names it."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if _is_full(error, path):
            raise OutputError(f"No space left: the disk of {path} is full.") from error
        if not isinstance(error, OSError) or not _concerns(error, path):
            raise
        raise OutputError(f"`output` {path} cannot be written: {error.strerror or error}.") from error


def _is_full(error: Exception, path: Path) -> bool:
    """Return whether an error is that of a full disk."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    if "inline_container" in str(error):  # PyTorch's writer
        return shutil.disk_usage(path if path.is_dir() else path.parent).free <= ALMOST_NOTHING
    return FULL_TEXT.search(str(error)) is not None


def _concerns(error: OSError, path: Path) -> bool:
    """Return whether an error is of writing a file, and not of another one that was read meanwhile."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    places = {path.absolute(), *path.absolute().parents}
    return not names or any(is_temporary(name) or Path(name).absolute() in places for name in names)
