"""Locks on folders and files, so that two processes neither do the same work nor spoil each other's.

The operating system frees a lock when its holder ends, however it ends. Beside the lock's file, which others cannot
read everywhere, a JSON says who holds it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from blade.common.files import OutputError, write_files
from blade.common.names import short_hash
from blade.common.terminal import logger

PATTERN = ".blade-*.lock"
"""Names of all locks' files, which begin with a dot and have nothing of the names of results."""

SHARE = re.compile(r"\.blade-(\d+)-of-(\d+)\.lock")
"""Name of the lock on a folder, or on a share of the work in it."""

PATIENCE_SECONDS = 0.3
"""Time for a process that has just got a lock to say who it is, and for one that looks for dead ones to let go."""

UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""Errors of file systems without locks."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock."""

    pid: int
    host: str
    since: str
    """Local date and time."""
    note: str = ""
    """What it does there, for programs."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class InUseError(OSError):
    """A folder or file that another process is writing."""

    def __init__(self, message: str, holder: Holder | None) -> None:
        super().__init__(message)
        self.holder = holder


@contextmanager
def folder_locked(
    folder: Path, field: str = "output", *, share: tuple[int, int] = (1, 1), wait: bool = False
) -> Iterator[None]:
    """Keep other processes from doing the same work in a folder.

    Args:
        folder: the folder; made if missing, and removed again if it stays empty.
        field: the option that names it, for the message.
        share: (i, n): only the i-th of n shares of the work. Different shares of the same n go together.
        wait: wait for the other process instead of refusing.

    Raises:
        InUseError: if another process holds the lock.
        OutputError: if the folder cannot be written.
    """
    made = not os.path.isdir(folder)
    subject, advice = f"`{field}` {folder} is in use by", "wait for it or choose another folder"
    lock = _Lock(folder / ".blade-{}-of-{}.lock".format(*share), subject, advice)
    try:
        with lock.held(wait) as others:
            for other in others:
                match = SHARE.fullmatch(other.path.name)
                if match and int(match[2]) != share[1]:
                    raise other.in_use("{}/{}".format(*match.groups()))
            yield
    finally:
        if made:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def file_locked(path: Path, field: str = "output", *, note: str = "", wait: bool = False) -> Iterator[None]:
    """Keep other processes from making the same file.

    Args:
        path: the file, whose folder is made if missing.
        field: the option that names it, for the message.
        note: told to those who find the lock held.
        wait: wait for the other process instead of refusing.

    Raises:
        InUseError: if another process holds the lock.
        OutputError: if the folder cannot be written.
    """
    name = f".blade-{short_hash(path.name, 12)}.lock"
    lock = _Lock(path.parent / name, f"`{field}` {path} is being made by", "wait for it or choose another name")
    with lock.held(wait, note):
        yield


class _Lock:
    """A lock by its file."""

    def __init__(self, path: Path, subject: str, advice: str) -> None:
        self.path, self.facts = path, path.with_suffix(".json")
        self.subject, self.advice = subject, advice
        self._lock = FileLock(path)

    @contextmanager
    def held(self, wait: bool, note: str = "") -> Iterator[list[_Lock]]:
        """Hold the lock, and yield the others in the folder that are held; dead ones are removed."""
        if not self._taken(wait):
            yield []
            return
        try:
            self._tell(note)
            yield [other for other in self._others() if not other._is_dead()]
        finally:
            self._free()

    def _taken(self, wait: bool) -> bool:
        """Take the lock; False where the file system has none."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._acquired(PATIENCE_SECONDS):
                return True
            if wait:
                logger.info(f"waiting: {self.subject} {self._holder() or 'another process'}")
                return self._acquired(-1)
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
                reason = error.strerror or error
                raise OutputError(f"`output` {self.path.parent} cannot be written: {reason}.") from error
            logger.warning(f"{self.path.parent} cannot be locked ({error}): let no other process write there.")
            return False
        raise self.in_use()

    def _others(self) -> list[_Lock]:
        """Return the other locks in the folder."""
        paths = sorted(self.path.parent.glob(PATTERN))
        return [_Lock(path, self.subject, self.advice) for path in paths if path != self.path]

    def _is_dead(self) -> bool:
        """Return whether nobody holds the lock, and remove what its last holder has left."""
        try:
            free = self._acquired(0)
        except OSError:
            return False
        if free:
            self._free()
        return free

    def in_use(self, share: str | None = None) -> InUseError:
        """Return the error for a lock that another process holds."""
        holder = self._holder()
        does = "" if share in (None, "1/1") else f", which makes share {share}"
        return InUseError(f"{self.subject} {holder or 'another process'}{does}; {self.advice}.", holder)

    def _holder(self) -> Holder | None:
        """Return who holds the lock, as far as it is told."""
        try:
            facts: dict[str, Any] = json.loads(self.facts.read_text(encoding="utf-8"))
            return Holder(**facts)
        except (OSError, ValueError, TypeError):
            return None

    def _acquired(self, seconds: float) -> bool:
        try:
            self._lock.acquire(timeout=seconds)
        except Timeout:
            return False
        return True

    def _tell(self, note: str) -> None:
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        holder = Holder(pid=os.getpid(), host=socket.gethostname(), since=now, note=note)
        with suppress(OSError):  # the lock counts without it
            write_files({self.facts: (json.dumps(asdict(holder)) + "\n").encode()})

    def _free(self) -> None:
        """Remove the files while the lock is held: `filelock` takes no lock on a file that is no longer there."""
        for path in (self.facts, self.path):
            with suppress(OSError):  # Windows: an open file cannot be removed; `filelock` does when it is closed
                path.unlink(missing_ok=True)
        self._lock.release()
