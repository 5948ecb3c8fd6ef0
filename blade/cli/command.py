"""Running a Typer command so that every failure ends in one line on stderr and a non-zero exit code."""

from __future__ import annotations

import _thread
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from types import FrameType, TracebackType
from typing import Any, NoReturn

import typer

from blade.common.allocator import keep_freed_memory
from blade.common.files import FULL
from blade.common.terminal import print_line, printable, printable_records, write_out_what_streams_lack

FAILURE_EXIT_CODE = 1
"""Of what was begun and failed: a full disk, too little memory, a folder that another process uses, ..."""

USAGE_EXIT_CODE = 2
"""Of what cannot be done as it was asked for: an option, a value, a file or a model that it names."""

INTERRUPTED_EXIT_CODE = 130
"""128 + SIGINT, as shells have it."""

REPEAT_SECONDS = 0.05
"""Time after which a Ctrl-C that a finalizer swallowed is raised again."""

TERMINATED_EXIT_CODE = 143
"""128 + SIGTERM."""

DEBUG = "--debug"

HELP_OPTIONS = ["-h", "--help"]

VERSION = "--version"

SPIN_COUNT_VARIABLE = "GOMP_SPINCOUNT"

SPIN_COUNT = 5000
"""Rounds that a waiting thread of GNU's OpenMP spins before it sleeps: some microseconds, instead of milliseconds."""

WAITING = {SPIN_COUNT_VARIABLE, "OMP_WAIT_POLICY"}
"""Variables of the environment that say how threads wait."""

QUANTIZERS = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao", "bitsandbytes")
"""Loggers of what imports of torchao and bitsandbytes say. Diffusers and Transformers import them wherever they are
there."""

READABLE = (ValueError, OSError, ArithmeticError, NotImplementedError, MemoryError)
"""Errors whose message says by itself what is wrong."""


def run_command(function: Callable[..., Any] | typer.Typer, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a function, or an application of several commands, as a command line and exit.

    Args:
        function: a function returning None that Typer can make a command of, or an application made of such. Their
            options include `--debug`, with which errors keep their traceback.
        arguments: the command line without the program's name; None takes the process's own.

    Raises:
        SystemExit: always; 0 if the function returned, 2 for a command line that makes no sense and for a
            `ValueError`, which says what would be right, 130 for Ctrl-C, 143 for SIGTERM, and 1 for everything else.
    """
    write_out_what_streams_lack()
    with ended_by_sigterm():
        _run(function, arguments)


def _run(function: Callable[..., Any] | typer.Typer, arguments: Sequence[str] | None) -> NoReturn:
    keep_freed_memory()
    wait_asleep()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == [VERSION]:
        print_line(f"blade-video {version('blade-video')}")
        sys.exit(0)
    try:
        with _plain_messages(), printable_records():
            code = make_click_command(function).main(arguments, standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        # Typer brings its own copy of Click in newer versions, so that usage errors have no one class
        if hasattr(error, "format_message"):
            _fail(error.format_message(), USAGE_EXIT_CODE)
        if DEBUG in arguments:
            sys.excepthook = _print_traceback
            raise
        _fail(describe(error), USAGE_EXIT_CODE if isinstance(error, ValueError) else FAILURE_EXIT_CODE)
    if code == INTERRUPTED_EXIT_CODE:  # newer versions of Typer return it instead of raising
        raise KeyboardInterrupt
    sys.exit(code or 0)


def make_click_command(function: Callable[..., Any] | typer.Typer) -> Any:
    """Return Click's command of a function or of an application of several, whose help has a short option too."""
    if isinstance(function, typer.Typer):
        app = function
    else:
        app = typer.Typer()
        app.command()(function)
    command = typer.main.get_command(app)
    command.epilog = f"{VERSION}, as the only option, prints the version."
    for one in (command, *getattr(command, "commands", {}).values()):
        one.context_settings["help_option_names"] = HELP_OPTIONS
    return command


def run_script(function: Callable[..., Any] | typer.Typer) -> None:
    """Run a function or an application as the command line of a script, whose errors keep their traceback.

    Raises:
        SystemExit: always; see `run_command`.
    """
    write_out_what_streams_lack()
    with ended_by_sigterm():
        make_click_command(function)()


def interrupt_main_thread() -> None:
    """Send the main thread what Ctrl-C sends, which wakes it from a wait where the operating system can do that."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        _thread.interrupt_main()


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end what is inside as Ctrl-C does, so that nothing half-written is left.

    Either may arrive while Python runs a finalizer, which swallows the exception; it is then raised again.

    Raises:
        SystemExit: 143 after SIGTERM, 130 after Ctrl-C.
    """
    received: list[int] = []
    repeated: list[threading.Timer] = []
    report = sys.unraisablehook

    def repeat(swallowed: sys.UnraisableHookArgs) -> None:
        if not issubclass(swallowed.exc_type, KeyboardInterrupt):
            report(swallowed)
            return
        repeated.append(threading.Timer(REPEAT_SECONDS, interrupt_main_thread))  # here it would be swallowed as well
        repeated[-1].daemon = True
        repeated[-1].start()

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    # only the main thread may set a handler; one that ignores the signal was set on purpose
    is_handled = threading.current_thread() is threading.main_thread()
    is_handled = is_handled and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if is_handled:
        signal.signal(signal.SIGTERM, interrupt)
        sys.unraisablehook = repeat
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as end:
        if received:
            _fail("terminated", TERMINATED_EXIT_CODE)
        if isinstance(end, KeyboardInterrupt):
            _fail("interrupted", INTERRUPTED_EXIT_CODE)
        raise
    finally:
        if is_handled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.unraisablehook = report
            for timer in repeated:
                timer.cancel()


def wait_asleep() -> None:
    """Let threads of OpenMP that wait for others sleep soon, unless the environment says how they wait.

    They would spin for milliseconds, and beside other busy processes keep those from running that they wait for. Does
    nothing once PyTorch is loaded.
    """
    if not os.environ.keys() & WAITING:
        os.environ[SPIN_COUNT_VARIABLE] = str(SPIN_COUNT)


def describe(error: Exception) -> str:
    """Return one line for an error: its message alone where that is meant to be read, else with its class."""
    if isinstance(error, OSError) and error.errno in FULL:  # of what others write, such as downloads
        return f"No space left: the disk of {error.filename or 'a folder that the system does not name'} is full."
    message = " ".join(str(error).split())
    if isinstance(error, READABLE) and message:
        return message
    return f"{type(error).__name__}: {message} ({DEBUG} shows where)".replace(": (", " (")


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an error that ends the process."""
    print_line("".join(traceback.format_exception(kind, error, trace)).rstrip(), file=sys.stderr)


def _fail(message: str, code: int) -> NoReturn:
    print_line(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


class _StderrHandler(logging.Handler):
    """Prints to what is stderr at the time, which is another stream while a line of progress is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print_line(self.format(record), file=sys.stderr)


@contextmanager
def _plain_messages() -> Iterator[None]:
    """Show warnings, and what BLADE logs, as plain lines on stderr, and not what imports of quantizers say."""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    loggers = [logging.getLogger(name) for name in ("blade", "blade_kernels", "blade_pipelines")]
    format_before = warnings.formatwarning
    warnings.formatwarning = lambda message, category, *where: f"{category.__name__}: {printable(str(message))}\n"
    silenced = {logger: logger.level for logger in map(logging.getLogger, QUANTIZERS)}
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    for logger in silenced:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        warnings.formatwarning = format_before
        for logger, level in silenced.items():
            logger.setLevel(level)
        for logger in loggers:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)
