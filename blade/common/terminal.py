"""Text on its way to a terminal: prompts and names by others are shown, and never obeyed.

Everything that a command prints goes through `print_line`, everything that the package logs through `logger`.
"""

from __future__ import annotations

import io
import logging
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

OBEYED = ("Cc", "Cs", "Zl", "Zp")
"""Unicode categories of what terminals and encoders act upon: control characters, surrogates, line separators."""

DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of text, so that it reads otherwise than it is."""


def printable(text: str, *, kept: str = "") -> str:
    r"""Return a text in which control characters are written out, an escape as `\x1b`.

    Args:
        text: what is to be shown.
        kept: control characters that stay, such as a newline.
    """
    return "".join(
        character if character in kept or not _is_obeyed(character) else repr(character)[1:-1] for character in text
    )


def print_line(text: object = "", *, file: TextIO | None = None) -> None:
    """Print a text, which may have several lines, at once.

    Args:
        text: what is to be printed.
        file: a stream; None: standard output.
    """
    print(printable(str(text), kept="\n\t"), file=file or sys.stdout, flush=True)


def write_out_what_streams_lack() -> None:
    """Let standard output and errors write out what their encoding lacks, instead of failing.

    On Windows that is most characters, where the output goes to a file or a pipe.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _is_obeyed(character: str) -> bool:
    return character in DIRECTIONS or unicodedata.category(character) in OBEYED


@contextmanager
def printable_records() -> Iterator[None]:
    """Make what any package logs printable: Diffusers, for one, logs the end of a prompt that is too long."""
    before = logging.getLogRecordFactory()

    def make(*args: Any, **options: Any) -> logging.LogRecord:
        record = before(*args, **options)
        with suppress(TypeError, ValueError):  # arguments that do not fit: whoever shows the record reports them
            record.msg, record.args = printable(record.getMessage(), kept="\n\t"), ()
        return record

    logging.setLogRecordFactory(make)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)


class _Printable(logging.Filter):
    """Makes the messages of a logger printable, whoever shows them. Each is one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        return True


logger = logging.getLogger("blade")
"""The package's logger, for all of its modules: filters see what is logged here, not what is logged to a child."""
logger.addFilter(_Printable())
