"""Prompts and names by others are shown on a terminal, which obeys nothing in them."""

from __future__ import annotations

import ast
import io
import logging
import re
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from blade.cli.command import run_command
from blade.cli.progress import progress_line
from blade.cli.tables import print_tables
from blade.common.tables import Table
from blade.common.terminal import logger, print_line, printable
from blade.generation.outputs import ListReport

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = "a \x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J\r\x08 \u202ecba \ud800 [red]x[/] [/nothing] \x7f"
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def test_control_characters_are_written_out() -> None:
    shown = printable(HOSTILE)
    assert not OBEYED.search(shown)
    assert shown.startswith(r"a \x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J\r\x08 \u202ecba \ud800 [red]x[/]")
    assert printable("one\ntwo\tthree") == r"one\ntwo\tthree"
    assert printable("one\ntwo", kept="\n") == "one\ntwo"


@pytest.mark.parametrize(
    "text",
    [
        "eine Kuh, \u00e9\u00df",
        "\u4e00\u53ea\u732b",
        "\U0001f468\u200d\U0001f469",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    ],
)
def test_what_people_write_stays(text: str) -> None:
    assert printable(text) == text


def test_log_lines_are_harmless_whoever_shows_them(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        with caplog.at_level(logging.INFO, "blade"):
            logger.info(f"1/2 {HOSTILE}\n2/2 forged")
            logger.warning("model %s", HOSTILE)
    finally:
        logger.removeHandler(handler)
    assert not OBEYED.search(stream.getvalue()) and len(stream.getvalue().splitlines()) == 2
    assert r"\n2/2 forged" in caplog.messages[0]


def test_every_way_to_the_terminal_is_harmless() -> None:
    def command() -> None:
        logger.info(HOSTILE)
        logging.getLogger("blade_pipelines").warning(HOSTILE)
        sys.stderr.write(warnings.formatwarning(UserWarning(HOSTILE), UserWarning, "file.py", 1))
        with progress_line() as say:
            say(HOSTILE)
            say.log(HOSTILE)
        print_line(HOSTILE)
        print_line(ListReport(made=(), skipped=(), failed={f"{HOSTILE}\nmade        forged.mp4": HOSTILE}))
        raise ValueError(f"`prompt` must not be {HOSTILE}.")

    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors), pytest.raises(SystemExit):
        run_command(command, [])
    for written in (output.getvalue(), errors.getvalue()):
        assert r"\x1b[31mred" in written
        assert not OBEYED.search(written), repr(OBEYED.search(written))
    assert errors.getvalue().count(r"\x1b[31mred") == 5
    assert "\nmade        forged" not in output.getvalue()


def test_what_other_packages_log_is_harmless() -> None:
    stream, factory = io.StringIO(), logging.getLogRecordFactory()
    handler, other = logging.StreamHandler(stream), logging.getLogger("another_package")
    other.addHandler(handler)

    def command() -> None:
        other.warning("this part was truncated: %s", [HOSTILE])
        other.warning("this part was truncated: %s", HOSTILE)

    with redirect_stderr(io.StringIO()), pytest.raises(SystemExit):
        run_command(command, [])
    other.removeHandler(handler)
    assert stream.getvalue().count(r"\x1b[31mred") == 2 and not OBEYED.search(stream.getvalue())
    assert logging.getLogRecordFactory() is factory


def test_progress_on_a_terminal_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "400")
    terminal = Terminal()
    with redirect_stderr(terminal), progress_line() as say:
        say(HOSTILE)
        say(HOSTILE)
    assert r"\x1b[31mred" in terminal.getvalue() and "[red]x[/] [/nothing]" in terminal.getvalue()
    for sequence in ("\x1b[31mred", "\x1b]0;", "\x9b", "\x07", "\u202e"):
        assert sequence not in terminal.getvalue()


def test_cells_of_tables_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "600")
    output = io.StringIO()
    with redirect_stdout(output):
        print_tables([Table(HOSTILE, ["run", HOSTILE], [["[red]name[/red]", HOSTILE]])])
    written = output.getvalue()
    assert not OBEYED.search(written) and "[red]name[/red]" in written
    assert written.count("[red]x[/] [/nothing]") == 3


def test_a_traceback_is_harmless() -> None:
    code = (
        "from blade.cli.command import run_command\n"
        "def command(debug: bool = False) -> None:\n    raise ValueError('a \\x1b[31mred ball')\n"
        "run_command(command, ['--debug'])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "Traceback" in result.stderr
    assert r"ValueError: a \x1b[31mred ball" in result.stderr and "\x1b" not in result.stderr


def test_nothing_is_printed_or_logged_otherwise() -> None:
    found = []
    for path in sorted((ROOT / "blade").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Name) and node.id == "print":
                found.append(path.relative_to(ROOT).as_posix())
        if 'getLogger("blade")' in text:
            found.append(path.relative_to(ROOT).as_posix())
    assert found == ["blade/common/terminal.py"] * 2
