"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class OutputError(OSError):
    """A file that cannot be written."""


def check_writable(path: str | Path) -> None:
    """Check, before hours are spent on it, that a file can be written here; the folder is made if missing.

    Raises:
        OutputError: saying why it cannot.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"`output` {path} is a folder; name a file in it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"`output` {path} cannot be written: {error.strerror or error}.") from error


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write all of these files, or none: each goes to a temporary file beside its place, then all are moved.

    Raises:
        OutputError: if one cannot be written, for example on a full disk. Nothing of them is left then.
    """
    temporary: dict[Path, Path] = {}
    path = Path()
    try:
        for path, content in contents.items():
            temporary[path] = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            with temporary[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, source in temporary.items():
            os.replace(source, path)
    except OSError as error:
        raise OutputError(f"`output` {path} cannot be written: {error.strerror or error}.") from error
    finally:
        for source in temporary.values():
            source.unlink(missing_ok=True)


@contextmanager
def replaced_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder, which then takes its place; after an error all is as it was before.

    Its name is always the same, so that what a kill leaves behind is overwritten the next time. For files that several
    processes may write at once there is `write_files`.
    """
    with _temporary(path.with_name(f".{path.name}.tmp")) as temporary:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)


@contextmanager
def folder_updated(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, whose files then go into `folder` one by one; after an error none of them does.

    Args:
        folder: made if missing; other files in it stay.
    """
    with _temporary(folder / ".tmp") as temporary:
        temporary.mkdir(parents=True)
        yield temporary
        for source in sorted(temporary.rglob("*")):
            if source.is_file():
                path = folder / source.relative_to(temporary)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, path)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield a path at which nothing is, neither before nor after."""
    try:
        _remove(path)
        yield path
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
