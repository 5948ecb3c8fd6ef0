"""Videos in a bucket, by fsspec: uploaded whole, the record last, so that a record there means a finished video."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blade.common.errors import first_line
from blade.common.files import OutputError
from blade.common.reading import parse_json
from blade.fleet.options import ADDRESS
from blade.generation.naming import is_record, record_path

LOCAL_SCHEMES = ("file", "local")
"""Schemes of fsspec that lead to a folder here."""

LOCAL_TO_A_PROCESS = ("memory",)
"""Schemes of fsspec whose files another process does not see."""


def parse_output(output: str | Path) -> Path | Bucket:
    """Return the folder or the bucket that an output names.

    Args:
        output: a folder, or an address such as s3://bucket/folder.

    Raises:
        ValueError: for an address that fsspec cannot open, naming what is missing.
    """
    text = str(output)
    if not ADDRESS.match(text):
        return Path(text).expanduser()
    scheme, _, rest = text.partition("://")
    if isinstance(output, Path) or not rest.strip("/"):
        raise ValueError(f"`output` must be a folder or an address such as s3://bucket/folder, got {text}.")
    if scheme in LOCAL_SCHEMES:
        return Path(f"/{rest.lstrip('/')}")
    if scheme in LOCAL_TO_A_PROCESS:
        raise ValueError(f"`output` must be where all workers can write, got {text}.")
    return Bucket(text.rstrip("/"))


class Bucket:
    """A folder of a bucket, as the files in it were when it was opened, and those uploaded since.

    Only one command at a time may write into it: a bucket has no locks.
    """

    def __init__(self, address: str) -> None:
        """Find the file system.

        Args:
            address: such as s3://bucket/folder; keys and endpoints come from the environment, as fsspec takes them.

        Raises:
            ValueError: if fsspec does not know it, or a package is missing.
        """
        self.address = address
        try:
            import fsspec

            self._system, self._root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise ValueError(f"`output` {address} cannot be opened: {first_line(error)}.") from None
        self._names: set[str] = set()
        self._records: dict[str, dict[str, Any] | None] = {}

    def __reduce__(self) -> tuple[type[Bucket], tuple[str]]:
        return Bucket, (self.address,)

    def look(self) -> None:
        """Look what is there, and check that something can be written.

        Raises:
            OutputError: if the bucket does not answer, is not there, or cannot be written.
        """
        probe = f"{self._root}/.blade-probe-{socket.gethostname()}-{os.getpid()}.tmp"
        with self._explained():
            self._system.invalidate_cache()
            self._system.pipe_file(probe, b"probe")
            self._system.rm_file(probe)
            try:
                listed = self._system.ls(self._root, detail=False)
            except FileNotFoundError:  # there is no file yet
                listed = []
        self._names = {str(name).rstrip("/").rpartition("/")[2] for name in listed}

    def read_ahead(self, paths: Iterable[Path]) -> None:
        """Read the records of videos together, which takes a fraction of the time that one after the other does."""
        keys = {name: f"{self._root}/{name}" for path in paths if (name := record_path(path).name) in self._names}
        with self._explained():
            contents = self._system.cat(list(keys.values()), on_error="return") if keys else {}
        for name, key in keys.items():
            content = contents.get(key)
            self._records[name] = _parsed(content) if isinstance(content, bytes) else None

    def has(self, path: Path) -> bool:
        """Return whether a file is there."""
        return path.name in self._names

    def is_taken(self, path: Path) -> bool:
        """Return whether something is there that must stay: what has no record is an unfinished upload."""
        return path.name in self._names and path.suffix == ".json"

    def record(self, path: Path) -> dict[str, Any] | None:
        """Return the record of a video; None if there is none."""
        name = record_path(path).name
        if name not in self._names:
            return None
        if name not in self._records:
            self.read_ahead([path])
        return self._records[name]

    def is_its_video(self, path: Path, record: Mapping[str, Any]) -> bool:
        """Return true: the record was uploaded after its video."""
        return True

    def locate(self, path: Path) -> str:
        """Return the address of a file."""
        return f"{self.address}/{path.name}"

    def upload(self, files: Iterable[Path]) -> None:
        """Upload files one after the other, each under its name.

        Raises:
            OutputError: if one cannot be.
        """
        for file in files:
            with self._explained():
                self._system.put_file(str(file), f"{self._root}/{file.name}")

    def uploaded(self, paths: Iterable[Path]) -> None:
        """Take down that files are there now."""
        names = {path.name for path in paths}
        self._names |= names
        for name in names:
            self._records.pop(name, None)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn whatever a store raises into an `OutputError` that names it."""
        try:
            yield
        except Exception as error:  # each file system has errors of its own
            raise OutputError(f"`output` {self.address} cannot be written: {first_line(error)}.") from error


def _parsed(content: bytes) -> dict[str, Any] | None:
    """Return the record in a file, None if it is none."""
    try:
        values = parse_json(content, "the record")
    except ValueError:
        return None
    return values if isinstance(values, dict) and is_record(values) else None
