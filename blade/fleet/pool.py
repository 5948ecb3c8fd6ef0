"""Workers of Ray, and the tasks that they take from a list as they become free."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from blade.common.errors import first_line
from blade.common.machine import describe_versions
from blade.common.terminal import logger
from blade.fleet.connection import Connection
from blade.fleet.worker import Job, Outcome, worker_class

PACKAGE = "blade-video"
"""Distribution whose version has to be the same on all machines."""

RETRIES = 3
"""Times that a task is done again whose worker was lost."""

STARTS = 4
"""Times that a worker is lost while it loads, until it is given up."""

POLL_SECONDS = 0.5
"""Between looks at the clock while nothing happens."""

PATIENCE_SECONDS = 60.0
"""Time after which is told that no worker has started."""

LEFT_OUT = object()
"""Returned by `Driver.begin` for a task that needs no worker."""


class FleetError(RuntimeError):
    """Workers that cannot work."""


class LostWorkerError(RuntimeError):
    """A task whose workers were lost, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Work for one worker."""

    key: Hashable
    """Tells it from the others."""
    name: str
    """As it is reported."""
    work: float = 1.0
    """Predicted work, in any unit; those with more begin first, and equal ones in their order."""
    group: Hashable = None
    """Tasks of a group are done one after the other, as they need the same weights."""
    after: Hashable = None
    """Key of a task that has to end first; None: nothing has to."""


class Driver(Protocol):
    """What is done about tasks in the process that hands them out."""

    def begin(self, task: Task) -> Any:
        """Return what a worker gets to do a task, or `LEFT_OUT`."""

    def done(self, task: Task, value: Any) -> None:
        """Keep what a task returned."""

    def failed(self, task: Task, error: Exception) -> None:
        """Take down that a task failed; a `LostWorkerError`: by its workers."""


@dataclass(frozen=True, kw_only=True)
class FleetProgress:
    """How far a list of tasks is."""

    done: int
    failed: int
    left_out: int
    """Tasks that needed no worker."""
    total: int
    workers: int
    """Workers that have loaded."""
    per_minute: float | None
    """Tasks a minute since the first began; None before the first has ended."""
    seconds_left: float | None
    """By predicted work; None before the first has ended."""

    def __str__(self) -> str:
        parts = [f"{self.done + self.left_out}/{self.total} done"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.per_minute is not None and self.seconds_left is not None:
            minutes = self.seconds_left / 60
            parts.append(f"{self.per_minute:.3g} a minute")
            parts.append(f"{minutes:.0f} min left" if minutes >= 1.5 else f"{self.seconds_left:.0f} s left")
        parts.append(f"{self.workers} worker{'' if self.workers == 1 else 's'}" if self.workers else "workers load")
        return ", ".join(parts)


def in_order(tasks: Iterable[Task]) -> list[Task]:
    """Return tasks in the order in which they begin: by group, the group of the longest first, then the longest."""
    listed = list(tasks)
    longest: dict[Hashable, float] = {}
    for task in listed:
        longest[task.group] = max(longest.get(task.group, task.work), task.work)
    first = {group: number for number, group in enumerate(longest)}
    return sorted(listed, key=lambda task: (-longest[task.group], first[task.group], -task.work))


@dataclass(eq=False)
class _Member:
    """A worker, as the driver sees it."""

    actor: Any
    host: str = ""
    is_ready: bool = False
    task: Task | None = None
    lost_starts: int = 0


@dataclass
class _Count:
    """Work of one list of tasks."""

    tasks: Sequence[Task]
    began: float | None = None
    done: int = 0
    failed: int = 0
    left_out: int = 0
    work_done: float = 0.0
    work_settled: float = 0.0
    lost: dict[Hashable, int] = field(default_factory=dict)
    unfinished: set[Hashable] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.unfinished |= {task.key for task in self.tasks}

    def settle(self, task: Task, how: str) -> None:
        setattr(self, how, getattr(self, how) + 1)
        self.unfinished.discard(task.key)
        self.work_settled += task.work
        if how == "done":
            self.work_done += task.work

    def progress(self, workers: int) -> FleetProgress:
        seconds = 0.0 if self.began is None else time.monotonic() - self.began
        total = sum(task.work for task in self.tasks)
        left = None if not self.work_done else seconds / self.work_done * max(total - self.work_settled, 0.0)
        return FleetProgress(
            done=self.done,
            failed=self.failed,
            left_out=self.left_out,
            total=len(self.tasks),
            workers=workers,
            per_minute=60 * self.done / seconds if self.done and seconds else None,
            seconds_left=left,
        )


class Pool:
    """Actors that hold what a job has loaded. Ray places them, starts them again, and carries what they return."""

    def __init__(
        self, connection: Connection, job: Job, on_progress: Callable[[FleetProgress], None] | None = None
    ) -> None:
        """Start the workers; each takes its first task once it has loaded.

        Args:
            connection: the connection, at whose end the workers end too.
            job: the job.
            on_progress: called whenever something has happened, and about twice a second.
        """
        self._ray, self._crew = connection.ray(), connection.crew
        self._on_progress = on_progress or (lambda progress: None)
        self._job = self._ray.put(job)
        self._actors = self._ray.remote(worker_class()).options(
            num_cpus=self._crew.cpus,
            num_gpus=self._crew.gpus,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        self._began, self._has_warned = time.monotonic(), False
        self._warnings = set[str]()
        self._waiting: dict[Any, _Member] = {}
        self._members: list[_Member] = []
        connection.exits.callback(self.close)
        for _ in range(self._crew.workers):
            self._members.append(_Member(self._actors.remote()))
            self._greet(self._members[-1])

    def close(self) -> None:
        """End the workers, whatever they do."""
        for member in self._members:
            self._ray.kill(member.actor)
        self._members.clear()

    def run(self, tasks: Sequence[Task], driver: Driver) -> None:
        """Do tasks, as workers become free.

        A task whose worker is lost is done again by the next free one, at most `RETRIES` times.

        Args:
            tasks: the tasks.
            driver: told of each; what it raises ends the run.

        Raises:
            FleetError: if no worker is left.
            ValueError: if a machine has another version of this package, or none of the workers can load.
        """
        pending, count = in_order(tasks), _Count(tasks)
        while True:
            self._hand_out(pending, driver, count)
            busy = [member for member in self._members if member.task is not None]
            if not pending and not busy:
                break
            ready, _ = self._ray.wait(list(self._waiting), num_returns=1, timeout=POLL_SECONDS)
            for reference in ready:
                self._receive(self._waiting.pop(reference), reference, pending, driver, count)
            self._tell(count)
        self._tell(count)

    def _tell(self, count: _Count) -> None:
        if not self._has_warned and not any(member.host for member in self._members):
            self._has_warned = time.monotonic() - self._began > PATIENCE_SECONDS
            if self._has_warned:
                logger.warning("no worker has started yet: Ray waits for machines that have room for one")
        self._on_progress(count.progress(sum(member.is_ready for member in self._members)))

    def _hand_out(self, pending: list[Task], driver: Driver, count: _Count) -> None:
        """Give every free worker a task, as far as there are any whose turn it is."""
        for member in self._members:
            while member.is_ready and member.task is None:
                task = next((task for task in pending if task.after not in count.unfinished), None)
                if task is None:
                    break
                pending.remove(task)
                arguments = driver.begin(task)
                if arguments is LEFT_OUT:
                    count.settle(task, "left_out")
                    continue
                count.began = count.began or time.monotonic()
                member.task = task
                self._waiting[member.actor.run.remote(arguments)] = member

    def _receive(self, member: _Member, reference: Any, pending: list[Task], driver: Driver, count: _Count) -> None:
        """Take what a worker has returned, or its end."""
        errors = self._ray.exceptions
        try:
            value = self._ray.get(reference)
        except errors.RayTaskError as error:  # such as arguments that it cannot read
            value = Outcome(error=RuntimeError(first_line(error.cause or error)))
        except errors.RayError as error:
            if isinstance(error, errors.ActorDiedError):  # Ray does not start it again
                member.actor = self._actors.remote()
            self._lost(member, type(error).__name__, pending, driver, count)
            return
        self._warn(() if isinstance(value, dict) else value.warnings)
        if isinstance(value, dict):
            self._met(member, value)
        elif value.is_crash:
            self._ray.kill(member.actor, no_restart=False)
            self._lost(member, first_line(value.error), pending, driver, count)
        elif member.task is None:
            self._loaded(member, value)
        elif value.error is not None:
            count.settle(member.task, "failed")
            task, member.task = member.task, None
            driver.failed(task, value.error)
        else:
            count.settle(member.task, "done")
            task, member.task = member.task, None
            driver.done(task, value.value)

    def _warn(self, lines: Iterable[str]) -> None:
        """Show warnings of workers, each once."""
        for line in lines:
            if line not in self._warnings:
                self._warnings.add(line)
                logger.warning(line)

    def _greet(self, member: _Member) -> None:
        """Ask a worker who it is, which waits until Ray has started it, however often it has to."""
        self._waiting[member.actor.about.options(max_task_retries=-1).remote()] = member

    def _met(self, member: _Member, about: dict[str, Any]) -> None:
        """Let a worker load, unless its machine has another version; one that was out of reach has loaded."""
        member.host = about["host"]
        own, other = describe_versions((PACKAGE,))[PACKAGE], about["version"]
        if other != own:
            has = f"with BLADE {other}" if other else "without BLADE"
            raise ValueError(
                f"`ray_address` has a machine {has}, {member.host}, and this has {own}: pip install {PACKAGE}=={own} "
                "there."
            )
        if about["has_loaded"]:
            self._loaded(member, Outcome())
        else:
            self._waiting[member.actor.load.remote(self._job, self._crew.device, self._crew.cpus)] = member

    def _loaded(self, member: _Member, outcome: Outcome) -> None:
        """Take a worker that has loaded; without one that could not, the others go on."""
        if outcome.error is None:
            member.is_ready, member.lost_starts = True, 0
            return
        self._dismiss(member, outcome.error)

    def _dismiss(self, member: _Member, error: Exception) -> None:
        """Do without a worker.

        Raises:
            Exception: the error, if none is left.
        """
        self._members.remove(member)
        self._ray.kill(member.actor)
        if not self._members:
            raise error
        logger.warning(f"a worker on {member.host or 'a machine'} is left out: {first_line(error)}")

    def _lost(self, member: _Member, reason: str, pending: list[Task], driver: Driver, count: _Count) -> None:
        """Put the task of a lost worker first again, unless it was lost too often."""
        task, member.task, member.is_ready = member.task, None, False
        if task is None:
            member.lost_starts += 1
            if member.lost_starts >= STARTS:
                why = f"Workers end while they load the model, such as for want of memory ({reason})."
                self._dismiss(member, FleetError(why))
                return
        self._greet(member)
        if task is None:
            return
        count.lost[task.key] = count.lost.get(task.key, 0) + 1
        if count.lost[task.key] <= RETRIES:
            logger.warning(f"the worker of {task.name!r} on {member.host} was lost ({reason}); it is done again")
            pending.insert(0, task)
            return
        count.settle(task, "failed")
        driver.failed(task, LostWorkerError(f"its worker was lost {RETRIES + 1} times ({reason})."))
