"""Locks between real processes."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from blade.common import locks
from blade.common.files import OutputError
from blade.common.locks import InUseError, file_locked, folder_locked

Hold = Callable[..., subprocess.Popen[str]]


def test_a_folder_in_use_is_refused_with_the_other_process(hold: Hold, tmp_path: Path) -> None:
    other = hold(tmp_path)
    with pytest.raises(InUseError) as refused, folder_locked(tmp_path):
        pass
    message = str(refused.value)
    assert message.startswith(f"`output` {tmp_path} is in use by process {other.pid} on {socket.gethostname()} since ")
    assert message.endswith("; wait for it or choose another folder.")


def test_a_folder_is_free_when_its_holder_has_ended_or_was_killed(hold: Hold, tmp_path: Path) -> None:
    other = hold(tmp_path)
    assert list(tmp_path.iterdir())
    other.communicate("end")
    assert other.returncode == 0 and not list(tmp_path.iterdir())  # a lock leaves nothing
    killed = hold(tmp_path)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert list(tmp_path.iterdir())
    with folder_locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_leaves_is_removed_with_the_next_lock_of_another_name(
    hold: Hold, tmp_path: Path
) -> None:
    killed = hold(tmp_path, (2, 3))
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    with file_locked(tmp_path / "video.mp4"):
        assert len(list(tmp_path.iterdir())) == 2
    assert not list(tmp_path.iterdir())


def test_shares_of_one_number_go_together_and_no_others(hold: Hold, tmp_path: Path) -> None:
    other = hold(tmp_path, (1, 2))
    with folder_locked(tmp_path, share=(2, 2)):
        pass
    with pytest.raises(InUseError, match=f"is in use by process {other.pid} "), folder_locked(tmp_path, share=(1, 2)):
        pass
    for share in ((1, 1), (2, 3)):
        with pytest.raises(InUseError, match="which makes share 1/2; wait"), folder_locked(tmp_path, share=share):
            pass
    assert other.poll() is None


def test_a_process_that_waits_goes_on_when_the_other_ends(hold: Hold, tmp_path: Path, caplog) -> None:
    other = hold(tmp_path)
    timer = threading.Timer(0.8, other.stdin.close)
    timer.start()
    with caplog.at_level(logging.INFO, logger="blade"), folder_locked(tmp_path, wait=True):
        assert other.wait(timeout=30) == 0
    timer.join()
    assert f"waiting: `output` {tmp_path} is in use by process {other.pid} on" in caplog.text


def test_a_file_is_made_by_one(tmp_path: Path) -> None:
    with file_locked(tmp_path / "a.mp4", note="settings"):
        with file_locked(tmp_path / "b.mp4"):
            pass
        with pytest.raises(InUseError) as refused, file_locked(tmp_path / "a.mp4"):
            pass
    assert f"a.mp4 is being made by process {os.getpid()} on" in str(refused.value)
    assert str(refused.value).endswith("wait for it or choose another name.")
    assert refused.value.holder is not None and refused.value.holder.note == "settings"


def test_a_folder_that_stays_empty_is_not_left(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), folder_locked(tmp_path / "new"):
        raise ValueError("wrong")
    assert not (tmp_path / "new").exists()


def test_a_holder_that_says_nothing_is_another_process(hold: Hold, tmp_path: Path) -> None:
    hold(tmp_path)
    (facts,) = tmp_path.glob(".blade-*.json")
    for content in ("", "[]", '{"pid": 1, "stranger": 2}', "\x00"):
        facts.write_text(content)
        with pytest.raises(InUseError, match="is in use by another process; wait"), folder_locked(tmp_path):
            pass


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch, caplog) -> None:
    def refuse(self, timeout):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    with folder_locked(tmp_path):
        (tmp_path / "made").touch()
    assert "cannot be locked" in caplog.text and "No locks available" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"`output` .*file.* cannot be written"), folder_locked(tmp_path / "file"):
        pass


def test_locks_take_no_part_in_a_student(tmp_path: Path) -> None:
    from fnmatch import fnmatch

    from blade.students.source import STUDENT_FILES

    with folder_locked(tmp_path):
        for path in tmp_path.iterdir():
            assert not any(fnmatch(path.name, pattern) for pattern in STUDENT_FILES)
