"""A worker: a process of Ray's that loads a model once and does task after task."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

from blade_kernels.crashes import DeviceCrashError

from blade.common.errors import first_line
from blade.common.terminal import logger


class Job(Protocol):
    """The work that all tasks have in common; it is sent to every worker, pickled."""

    def load(self, device: str) -> Callable[[Any], Any]:
        """Load what the tasks need, and return what does one; its argument and result are pickled.

        Args:
            device: cpu or cuda.
        """


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a call to a worker that has survived it."""

    value: Any = None
    """The result."""
    error: Exception | None = None
    """The error instead, which is of the task and not of the worker."""
    is_crash: bool = False
    """True if the worker's GPU has crashed, so that only a new process can go on."""
    warnings: tuple[str, ...] = ()
    """What this package warned of meanwhile."""


def worker_class() -> type:
    """Return the class of Ray's actors.

    It is made in a function, so that it is sent whole: a machine without this package, or with another version of it,
    can still say so.
    """

    class Worker:
        """Holds what a job has loaded; what a method needs is imported in it."""

        def about(self) -> dict[str, Any]:
            """Return the machine's name and the version of this package, None where it is missing."""
            import socket
            from importlib.metadata import PackageNotFoundError, version

            try:
                own = version("blade-video")
            except PackageNotFoundError:
                own = None
            return {"host": socket.gethostname(), "version": own, "has_loaded": hasattr(self, "work")}

        def load(self, job: Any, device: str, threads: int) -> Any:
            """Load what the tasks of a job need."""
            from dataclasses import replace

            from blade.fleet.worker import load

            outcome = load(job, device, threads)
            if outcome.error is None:
                self.work = outcome.value
            return replace(outcome, value=None)

        def run(self, arguments: Any) -> Any:
            """Do a task."""
            from blade.fleet.worker import survive

            return survive(self.work, arguments)

    return Worker


def load(job: Job, device: str, threads: int) -> Outcome:
    """Prepare this process, and load what the tasks of a job need.

    Args:
        job: the job.
        device: cpu or cuda.
        threads: of PyTorch, whatever the environment says, so that results are those of a process with as many.
    """
    import torch

    from blade.common.allocator import keep_freed_memory

    torch.set_num_threads(threads)
    keep_freed_memory()
    return survive(job.load, device)


def survive(function: Callable[[Any], Any], argument: Any) -> Outcome:
    """Call a function, and return its result or its error, without what the error holds of memory."""
    told = _Warnings(logging.WARNING)
    logger.addHandler(told)
    try:
        return Outcome(value=function(argument), warnings=tuple(told.lines))
    except Exception as error:  # whatever a task does; the others have nothing to do with it
        is_crash = isinstance(error, DeviceCrashError)
        return Outcome(error=portable(error), is_crash=is_crash, warnings=tuple(told.lines))
    finally:
        logger.removeHandler(told)


class _Warnings(logging.Handler):
    """Takes down warnings, which would end in a file of Ray's."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.lines[record.getMessage()] = None


def portable(error: Exception) -> Exception:
    """Return an error as another process can read it, with its traceback as a note."""
    text = "".join(traceback.format_exception(error))
    told: Any = None
    if all(isinstance(argument, str | int | float | None) for argument in error.args):
        try:
            told = copy(error)
        except Exception:  # a class whose arguments are not its message
            told = None
    if type(told) is not type(error) or str(told) != str(error):
        told = RuntimeError(f"{type(error).__name__}: {first_line(error)}")
    told.add_note(f"In a worker:\n{text}")
    return told  # type: ignore[no-any-return]
