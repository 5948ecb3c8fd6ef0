"""Files and folders are written whole or not at all, and nothing half-written is ever left."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from blade.common.files import OutputError, check_writable, folder_updated, replaced_whole, write_files

SOURCES = Path(__file__).resolve().parents[3]


def test_files_are_written_whole_with_ordinary_permissions(tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    reference.touch()
    write_files({tmp_path / "a.mp4": b"video", tmp_path / "a.json": b"{}"})
    assert (tmp_path / "a.mp4").read_bytes() == b"video"
    assert (tmp_path / "a.mp4").stat().st_mode == reference.stat().st_mode
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.json", "a.mp4", "reference"]


def test_a_full_disk_leaves_nothing_of_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"of an earlier run")
    real, calls = os.fsync, []

    def full_at_the_second(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full_at_the_second)
    with pytest.raises(OutputError, match=r"a\.json cannot be written: No space left on device"):
        write_files({tmp_path / "a.mp4": b"video", tmp_path / "a.json": b"{}"})
    assert [item.name for item in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"of an earlier run"


def test_a_write_that_the_system_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"a\.mp4 cannot be written: File too large"):
            write_files({tmp_path / "a.mp4": bytes(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_files({tmp_path / "a.mp4": b"video"})
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_is_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder" / "a.mp4")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.parametrize("name", ["file/a.mp4", "folder", "/proc/a.mp4", "/dev/null/a.mp4"])
def test_an_unwritable_output_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"`output` .*(cannot be written|is a folder)"):
        check_writable(tmp_path / name)


@pytest.mark.parametrize("before", [None, "file", "folder"])
def test_a_file_or_folder_is_replaced_at_the_end(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "model"
    if before == "file":
        path.write_text("old")
    elif before == "folder":
        path.mkdir()
        (path / "left over").touch()
    with replaced_whole(path) as temporary:
        assert temporary.parent == tmp_path and not temporary.exists()
        if before == "folder":
            temporary.mkdir()
            (temporary / "weights").write_text("new")
        else:
            temporary.write_text("new")
        assert path.exists() == (before is not None)
    assert [item.name for item in tmp_path.iterdir()] == ["model"]
    if before == "folder":
        assert [item.name for item in path.iterdir()] == ["weights"]
    else:
        assert path.read_text() == "new"


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_what_fails_leaves_what_was_there(tmp_path: Path, failure: type[BaseException]) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(failure), replaced_whole(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise failure
    with pytest.raises(failure), folder_updated(tmp_path) as temporary:
        (temporary / "a").write_text("half")
        raise failure
    assert [item.name for item in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_what_a_kill_left_is_overwritten(tmp_path: Path) -> None:
    names = []
    for _ in range(2):
        with replaced_whole(tmp_path / "a") as temporary:
            names.append(temporary)
            temporary.write_text("new")
        temporary.write_text("of a run that was killed")
    assert names[0] == names[1] and (tmp_path / "a").read_text() == "new"
    (tmp_path / "a").unlink()
    for number in range(2):
        with folder_updated(tmp_path / "folder") as temporary:
            assert not list(temporary.iterdir())
            (temporary / "b").write_text(str(number))
        temporary.mkdir()
        (temporary / "of a run that was killed").touch()
    assert (tmp_path / "folder" / "b").read_text() == "1"


def test_a_folder_keeps_its_other_files(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    (folder / "scheduler").mkdir(parents=True)
    (folder / "log").write_text("kept")
    (folder / "scheduler" / "a").write_text("old")
    with folder_updated(folder) as temporary:
        (temporary / "scheduler").mkdir()
        (temporary / "scheduler" / "a").write_text("new")
        (temporary / "b").write_text("new")
        assert (folder / "scheduler" / "a").read_text() == "old"
    written = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert written == {"log": "kept", "scheduler/a": "new", "b": "new"}
    assert sorted(item.name for item in folder.iterdir()) == ["b", "log", "scheduler"]


def test_nothing_else_renames_temporary_files() -> None:
    """In `kernels`, which cannot import this package, one place does it by itself."""
    paths = [path for folder in ("blade", "scripts") for path in (SOURCES / folder).rglob("*.py")]
    assert len(paths) > 100
    renaming = {
        path.relative_to(SOURCES).as_posix()
        for path in paths
        if any(sign in path.read_text(encoding="utf-8") for sign in ("os.replace", "os.rename", ".tmp", ".rename("))
    }
    assert renaming == {"blade/common/files.py"}
