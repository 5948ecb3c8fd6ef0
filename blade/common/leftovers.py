"""Names of what is being written, and what killed processes left of it."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import os
import re
import shutil
import socket
import time
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePath

import psutil

STALE_SECONDS = 7 * 86400
"""Age of a temporary file of another machine, whose processes cannot be asked for, at which it is a leftover."""

CLOCK_SECONDS = 60
"""Tolerated difference of a file server's clock from this machine's."""

_TEMPORARY = re.compile(r"\.blade-[0-9a-f]{8}-(?P<host>[0-9a-f]{4})-(?P<process>\d+)-\d+(-x+)?\.tmp")

_numbers = itertools.count()


def temporary_path(path: Path, length: int = 0) -> Path:
    """Return a path beside a file or folder that nothing else has; its name tells of place, machine and process.

    Args:
        path: the place.
        length: least bytes of the name, which without it are about 40, however long that of the place is.
    """
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    name = f".blade-{digest}-{_host()}-{os.getpid()}-{next(_numbers)}"
    padding = "x" * (length - len(f"{name}-.tmp"))
    return path.with_name(f"{name}-{padding}.tmp" if padding else f"{name}.tmp")


def is_temporary(path: str | PurePath) -> bool:
    """Return whether a path is, or lies in, a file or folder that is being written, or was when a process was killed.

    Args:
        path: relative to the folder that is searched.
    """
    return any(part.startswith(".") and part.endswith(".tmp") for part in PurePath(path).parts)


def files_in(folder: Path, pattern: str = "*") -> list[Path]:
    """Return the files in a folder and its folders, sorted, without what is being written or was when killed."""
    found = []
    for root, folders, names in os.walk(folder):  # which passes over a folder that cannot be read
        folders[:] = [name for name in folders if not is_temporary(name)]
        found += [Path(root, name) for name in fnmatch.filter(names, pattern) if not is_temporary(name)]
    return sorted(path for path in found if path.is_file())


def sweep_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that processes which are gone have left in a folder."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        match = _TEMPORARY.fullmatch(entry.name)
        if match is not None:
            with suppress(OSError):  # another process removes it too, or it is not ours
                if not _is_in_use(match, entry.stat(follow_symlinks=False).st_mtime):
                    remove(Path(entry.path))


def _is_in_use(match: re.Match[str], modified: float) -> bool:
    """Return whether the process that a temporary name tells of may still be writing, by its number and start."""
    if match["host"] != _host():
        return time.time() - modified < STALE_SECONDS
    try:
        began: float = psutil.Process(int(match["process"])).create_time()
        return began <= modified + CLOCK_SECONDS
    except (psutil.NoSuchProcess, OverflowError):
        return False
    except psutil.Error:  # it is there, and another user's
        return True


@cache
def _host() -> str:
    """Return four digits for this machine and, in a container, for its own numbering of processes."""
    try:
        numbering = os.readlink("/proc/self/ns/pid")
    except OSError:
        numbering = ""
    return hashlib.sha256(f"{socket.gethostname()} {numbering}".encode()).hexdigest()[:4]


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
