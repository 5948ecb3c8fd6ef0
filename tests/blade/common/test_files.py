"""Files and folders are written whole or not at all, and nothing half-written is ever left."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blade.common import files
from blade.common.files import (
    OutputError,
    append_json_line,
    check_writable,
    folder_updated,
    link_or_copy,
    read_json_lines,
    replaced_whole,
    take_room,
    write_files,
)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file in a folder, by its path there."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fails_at(real: Callable[..., object], number: int) -> Callable[..., object]:
    """Return a function that finds the disk full in its n-th call."""
    calls: list[object] = []

    def wrapped(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == number:
            full()
        return real(*arguments, **options)

    return wrapped


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
    with pytest.raises(OutputError, match=r"^No space left: the disk of .*a\.json is full\.$"):
        write_files({tmp_path / "a.mp4": b"video", tmp_path / "a.json": b"{}"})
    assert [item.name for item in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"of an earlier run"


def test_a_write_that_the_system_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # not on Windows
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


def test_a_check_leaves_nothing_and_touches_nothing(tmp_path: Path) -> None:
    (tmp_path / "b.mp4").write_bytes(b"of an earlier run")
    check_writable(tmp_path / "new" / "folder" / "a.mp4", tmp_path / "b.mp4")
    assert [item.name for item in tmp_path.iterdir()] == ["b.mp4"]
    assert (tmp_path / "b.mp4").read_bytes() == b"of an earlier run"


@pytest.mark.parametrize("name", ["x" * 251 + ".mp4", "中" * 83 + "ab.mp4", "a.mp4"])
def test_a_name_that_the_system_takes_can_be_written(tmp_path: Path, name: str) -> None:
    """However long it is: the temporary name beside it has a length of its own."""
    check_writable(tmp_path / name)
    write_files({tmp_path / name: b"video"})
    with replaced_whole(tmp_path / name) as temporary:
        temporary.write_bytes(b"again")
    assert (tmp_path / name).read_bytes() == b"again"


@pytest.mark.parametrize(
    "name", ["x" * 252 + ".mp4", "中" * 84 + ".mp4", "y" * 256 + "/a.mp4", "/".join(["z" * 250] * 17)]
)
def test_a_name_that_is_too_long_is_found_beforehand(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="cannot be written: File name too long"):
        check_writable(tmp_path / "short.mp4", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_too_little_room_is_found_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=12_345_678)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    path = tmp_path / "new" / "a.mp4"
    with pytest.raises(OutputError) as raised:
        check_writable(path, needed=340_000_000, purpose="the training")
    assert str(raised.value) == (
        f"`output` {path.parent} has 12.3 MB free on its disk, but the training needs about 340 MB."
    )
    check_writable(path, needed=12_345_678)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=0, free=0))  # it does not tell
    check_writable(path, needed=340_000_000)


@pytest.mark.parametrize("name", ["file/a.mp4", "folder", "/proc/a.mp4", "/dev/null/a.mp4"])
def test_an_unwritable_output_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"`output` .*(cannot be written|is a folder)") as raised:
        check_writable(tmp_path / name, tmp_path / name / "longer than it")
    assert str(raised.value).startswith(f"`output` {tmp_path / name} ")


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


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_move_that_fails_brings_back_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "a.mp4").write_bytes(b"old video")
    (tmp_path / "a.json").write_bytes(b"old record")
    before = contents(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fails_at(os.replace, number))
        with pytest.raises(OutputError, match="No space left: the disk of"):
            write_files({tmp_path / name: b"new" for name in ("a.mp4", "new.mp4", "a.json")})
    assert contents(tmp_path) == before
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fails_at(os.replace, 2))
        with pytest.raises(OutputError), folder_updated(tmp_path) as temporary:
            (temporary / "a.json").write_bytes(b"new")
            (temporary / "a.mp4").write_bytes(b"new")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("number", [1, 2])
def test_a_folder_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", fails_at(os.replace, number))
    with pytest.raises(OutputError), replaced_whole(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "other").write_bytes(b"new")
    monkeypatch.undo()
    assert contents(tmp_path) == {"model/weights": b"old"}


def test_an_error_of_something_else_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"), replaced_whole(tmp_path / "a") as temporary:
        shutil.copyfile(tmp_path / "missing", temporary)
    with pytest.raises(RuntimeError, match="divided"), replaced_whole(tmp_path / "a"):
        raise RuntimeError("divided by zero")
    assert list(tmp_path.iterdir()) == []


def save_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10**6)
    take_room(path)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(bytes(10**6)),
        lambda path: torch.save({"weight": torch.zeros(10**6)}, path),
        lambda path: save_file({"weight": torch.zeros(10**6)}, path),
        save_sparse,
    ],
    ids=["Python", "PyTorch", "safetensors", "mapped"],
)
def test_a_disk_that_is_full_is_named(
    small_disk: Callable[[int], Path], write: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_disk(200)
    path = folder / "a"
    path.write_bytes(b"old")
    with (
        pytest.raises(OutputError, match=rf"^No space left: the disk of {path} is full\.$"),
        replaced_whole(path) as new,
    ):
        write(new)
    with (
        pytest.raises(OutputError, match=rf"^No space left: the disk of {folder} is full\.$"),
        folder_updated(folder) as temporary,
    ):
        write(temporary / "a")
    with pytest.raises(OutputError, match=r"^No space left: the disk of .*new is full\.$"):
        write_files({path: b"new", folder / "new": bytes(10**6)})
    assert contents(folder) == {"a": b"old"}
    with pytest.raises(OutputError, match=r"has .* free on its disk, but it needs about 1 MB"):
        check_writable(path, needed=10**6)


def test_a_link_replaces_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"new")
    for number in range(2):
        (tmp_path / "b").write_bytes(b"old")
        link_or_copy(tmp_path / "a", tmp_path / "b")
        link_or_copy(tmp_path / "a", tmp_path / "b")
        assert contents(tmp_path) == {"a": b"new", "b": b"new"}
        assert ((tmp_path / "a").stat().st_ino == (tmp_path / "b").stat().st_ino) == (number == 0)
        monkeypatch.setattr(os, "link", full)
        (tmp_path / "b").unlink()


def test_a_line_is_appended_whole_or_not_at_all(small_disk: Callable[[int], Path]) -> None:
    path = small_disk(64) / "log.jsonl"
    written = 0
    with pytest.raises(OutputError, match=rf"^No space left: the disk of {path} is full\.$"):
        while written < 1000:
            append_json_line(path, {"step": written, "text": "x" * 900})
            written += 1
    assert 10 < written < 100
    assert [line["step"] for line in read_json_lines(path)] == list(range(written))
    assert path.read_bytes().endswith(b"}\n")


def test_a_line_that_is_interrupted_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    append_json_line(path, {"step": 1})

    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "fsync", interrupt)
        append_json_line(path, {"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize(
    ("rest", "steps"), [(b'{"step": 2, "lo', [1]), (b'{"step": 2}', [1, 2]), (b"\x00\x00", [1]), (b"", [1])]
)
def test_the_last_line_alone_may_be_incomplete(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rest: bytes, steps: list[int]
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n' + rest)
    with caplog.at_level(logging.WARNING, "blade"):
        assert [line["step"] for line in read_json_lines(path)] == steps
    assert bool(caplog.records) == (rest not in (b"", b'{"step": 2}'))
    if caplog.records:
        assert str(path) in caplog.text and "last line" in caplog.text
    append_json_line(path, {"step": 9})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*steps, 9]
    path.write_bytes(b'{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*log\.jsonl must be a JSON object"):
        read_json_lines(path)


def test_a_long_incomplete_line_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"text": "' + b"x" * 200_000)
    append_json_line(path, {"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert read_json_lines(tmp_path / "missing") == []


def test_a_folder_is_swept_when_it_is_first_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_swept", set())
    swept: list[Path] = []
    monkeypatch.setattr(files, "sweep_leftovers", swept.append)
    for name in ("a", "b"):
        write_files({tmp_path / name: b""})
        append_json_line(tmp_path / name, {})
        with folder_updated(tmp_path / "folder") as temporary:
            (temporary / name).touch()
    assert swept == [tmp_path, tmp_path / "folder"]


def test_on_windows_a_file_that_others_read_is_replaced_when_they_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virus scanner has it open, then no longer. What stays open is an error; elsewhere nothing is tried twice."""
    path, refused, move = tmp_path / "a", [], os.replace

    def replace(source: Path, target: Path) -> None:
        if len(refused) < most:
            refused.append(source)
            raise PermissionError(13, "in use", str(target))
        move(source, target)

    path.write_bytes(b"before")
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(files.os, "replace", replace)
    monkeypatch.setattr(files, "WINDOWS", True)
    most = 2
    write_files({path: b"after"})
    assert path.read_bytes() == b"after" and len(refused) == 2
    for windows, attempts in ((True, len(files.PAUSES) + 1), (False, 1)):
        monkeypatch.setattr(files, "WINDOWS", windows)
        most = 100
        refused.clear()
        with pytest.raises(OutputError, match="cannot be written: in use"):
            write_files({path: b"later"})
        assert len(refused) == attempts and os.listdir(tmp_path) == ["a"] and path.read_bytes() == b"after"


def test_a_drive_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    with pytest.raises(OutputError, match=r"c\.mp4 cannot be written: No such file or directory"):
        check_writable(tmp_path / "b" / "c.mp4")
