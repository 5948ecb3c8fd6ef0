"""The progress of a command: one line that changes on a terminal, a line now and then in a file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from blade.common.terminal import print_line, printable

if TYPE_CHECKING:
    from rich.progress import Progress

SECONDS_BETWEEN_LINES = 30.0
"""Between lines of progress in a file."""


@contextmanager
def progress_line() -> Iterator[ProgressLine]:
    """Yield what shows how far a command is, and take its line away at the end."""
    line = ProgressLine()
    try:
        yield line
    finally:
        line.close()


class ProgressLine:
    """Shows how far a command is, on stderr; call it with a text."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._on_terminal = sys.stderr.isatty() and self._console.is_interactive
        # of several processes with one terminal, the first one has the line
        self._is_quiet = self._on_terminal and os.environ.get("RANK", "0") != "0"
        self._display: Progress | None = None
        self._shown = float("-inf")

    def __call__(self, text: str) -> None:
        """Show a text in place of the one before; in a file, one in every `SECONDS_BETWEEN_LINES`."""
        if self._is_quiet:
            return
        text = printable(text)
        if self._on_terminal:
            self._change(text)
        elif time.monotonic() - self._shown >= SECONDS_BETWEEN_LINES:
            print_line(text, file=sys.stderr)
            self._shown = time.monotonic()

    def log(self, text: str) -> None:
        """Show a line of a log: like any other text on a terminal, but all of them, on stdout, in a file."""
        if self._on_terminal:
            self(text)
        if not (self._on_terminal and sys.stdout.isatty()):
            print_line(text)

    def close(self) -> None:
        """Take the line away."""
        if self._display is not None:
            self._display.stop()
            self._display = None

    def _change(self, text: str) -> None:
        if self._display is None:
            self._display = self._start(text)
        else:
            self._display.update(self._display.task_ids[0], description=text)

    def _start(self, text: str) -> Progress:
        """Begin the line, not before there is a text: until then it may be needed for the bars of downloads."""
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.table import Column

        display = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # what is piped must not appear above the line instead
        )
        display.add_task(text, total=None)
        display.start()
        return display
