"""Progress is one line that changes on a terminal, and a line now and then in a file."""

from __future__ import annotations

import io
import logging
import re
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest

from blade.cli import progress
from blade.cli.command import run_command
from blade.cli.progress import progress_line

SEQUENCE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")
WIDTH = 60


def screen(written: str) -> list[str]:
    """Return the lines that a terminal shows, without empty ones at the end."""
    lines, row, column, place = [""], 0, 0, 0
    while place < len(written):
        sequence, character = SEQUENCE.match(written, place), written[place]
        if sequence is not None:
            number, kind = sequence.groups()
            if kind == "A":
                row -= int(number or 1)
            elif kind == "K":
                lines[row] = "" if number == "2" else lines[row][:column]
            else:
                assert kind in "mhl", sequence.group()  # colours and the cursor
            place = sequence.end()
            continue
        if character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row].ljust(column)[:column] + character + lines[row][column + 1 :]
            column += 1
        place += 1
    while lines and not lines[-1].strip():
        lines.pop()
    return lines


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True

    def lines(self, wait: float = 0.4) -> list[str]:
        """What its screen shows; the line of progress is drawn ten times a second."""
        time.sleep(wait)
        return [line.strip() for line in screen(self.getvalue())]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal to be made stderr."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    for name in ("TTY_INTERACTIVE", "TTY_COMPATIBLE", "NO_COLOR", "FORCE_COLOR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def test_progress_in_a_file_comes_now_and_then(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress_line() as say:
        say("first")
        say("second")
        now[0] = 31.0
        say("third")
    assert capsys.readouterr().err == "first\nthird\n"


def test_a_log_in_a_file_is_whole_and_on_stdout(capsys):
    with progress_line() as say:
        say.log("update 1")
        say.log("update 2")
    captured = capsys.readouterr()
    assert captured.out == "update 1\nupdate 2\n" and captured.err == ""


def test_progress_on_a_terminal_is_one_line_that_changes_and_goes(terminal):
    with redirect_stderr(terminal), progress_line() as say:
        assert terminal.lines(0) == []
        say("first [bold]thing[/]")
        (line,) = terminal.lines()
        assert "first [bold]thing[/]" in line
        say("second")
        (line,) = terminal.lines()
        assert "second" in line and "first" not in line
        say("third " + 100 * "long ")
        (line,) = terminal.lines()
        assert "third long" in line and "…" in line and len(line) <= WIDTH
    assert terminal.lines(0) == []


def test_a_log_on_a_terminal_is_progress_too_and_what_is_piped_is_whole(terminal, capsys):
    with redirect_stderr(terminal), progress_line() as say:
        say.log("update 1")
        say.log("update 2")
        print("a result")
        (line,) = terminal.lines()
        assert "update 2" in line
    assert capsys.readouterr().out == "update 1\nupdate 2\na result\n"


def test_a_log_where_all_is_a_terminal_is_progress_alone(terminal):
    with redirect_stdout(terminal), redirect_stderr(terminal), progress_line() as say:
        say.log("update 1")
        say.log("update 2")
        print("a result")
        above, line = terminal.lines()
        assert above == "a result" and "update 2" in line
    assert terminal.lines(0) == ["a result"]


def test_messages_stand_above_the_line(terminal):
    seen = []

    def command() -> None:
        with progress_line() as say:
            say("working")
            logging.getLogger("blade.test").info("something to know")
            print("of another library", file=sys.stderr)
            seen.extend(terminal.lines())

    with redirect_stderr(terminal), pytest.raises(SystemExit) as ended:
        run_command(command, [])
    assert ended.value.code == 0
    *above, line = seen
    assert above == ["something to know", "of another library"] and "working" in line
    assert terminal.lines(0) == above


def test_of_several_processes_the_first_has_the_line(terminal, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with redirect_stderr(terminal), progress_line() as say:
        say("first")
        assert terminal.getvalue() == ""


def test_an_error_takes_the_line_away(terminal):
    with redirect_stderr(terminal):
        with pytest.raises(KeyboardInterrupt), progress_line() as say:
            say("first")
            raise KeyboardInterrupt
        assert sys.stderr is terminal
    assert terminal.lines(0) == []


def test_a_terminal_that_cannot_change_a_line_is_a_file(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with redirect_stderr(terminal), progress_line() as say:
        say("first")
        say("second")
    assert terminal.getvalue() == "first\n"
