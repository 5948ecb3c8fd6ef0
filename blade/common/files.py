"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
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
