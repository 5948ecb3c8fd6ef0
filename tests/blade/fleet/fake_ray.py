"""What a pool asks of Ray, in this process: calls are carried out one after the other, in the order that they came."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from blade.common.machine import describe_versions
from blade.fleet.crew import Crew
from blade.fleet.worker import Outcome, survive


class RayError(Exception):
    """The root of Ray's errors."""


class RayTaskError(RayError):
    """An error that a call raised."""

    cause: Exception | None = None


class ActorUnavailableError(RayError):
    """A worker that has ended, or cannot be reached."""


class ActorDiedError(RayError):
    """A worker that is not started again."""


class Lost(BaseException):
    """Raised in a worker: it ends."""


class OutOfReach(BaseException):
    """Raised in a worker: it cannot be reached for a moment."""


class FakeJob:
    """A job whose tasks call a function."""

    def __init__(self, function: Callable[[Any], Any], loaded: Callable[[], None] = lambda: None) -> None:
        self.function, self.loaded = function, loaded

    def load(self, device: str) -> Callable[[Any], Any]:
        """Load nothing."""
        self.loaded()
        return self.function


class FakeActor:
    """A worker."""

    def __init__(self, ray: FakeRay) -> None:
        self.ray, self.work = ray, None
        self.about = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: self.call(self._about)))
        self.load = SimpleNamespace(remote=lambda *arguments: self.call(self._load, *arguments))
        self.run = SimpleNamespace(remote=lambda arguments: self.call(self._run, arguments))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return a reference to the result of a call."""

        def carry_out() -> Any:
            try:
                return function(*arguments)
            except Lost:
                self.work = None
                raise ActorUnavailableError from None
            except OutOfReach:
                raise ActorUnavailableError from None

        return carry_out

    def _about(self) -> dict[str, Any]:
        return {"host": "here", "version": self.ray.version, "has_loaded": self.work is not None}

    def _run(self, arguments: Any) -> Outcome:
        return self.ray.sent(survive(self.work, self.ray.sent(arguments)))

    def _load(self, job: Any, device: str, threads: int) -> Outcome:
        outcome = survive(job.load, device)
        self.work = outcome.value
        return replace(outcome, value=None)


class FakeRay:
    """The module."""

    exceptions = SimpleNamespace(
        RayError=RayError, RayTaskError=RayTaskError, ActorUnavailableError=ActorUnavailableError,
        ActorDiedError=ActorDiedError,
    )  # fmt: skip

    def __init__(self, pickles: bool) -> None:
        self.pickles = pickles
        self.version = describe_versions(("blade-video",))["blade-video"]
        self.killed: list[bool] = []

    def put(self, value: Any) -> Any:
        """Return a value as a worker gets it."""
        return self.sent(value)

    def sent(self, value: Any) -> Any:
        """Return what comes out of a journey to another process."""
        from ray import cloudpickle

        return cloudpickle.loads(cloudpickle.dumps(value)) if self.pickles else value

    def get(self, reference: Callable[[], Any]) -> Any:
        """Carry out a call."""
        return reference()

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        """Return the oldest call as ended."""
        return references[:1], references[1:]

    def remote(self, actor_class: type) -> Any:
        """Return what makes actors."""
        made = SimpleNamespace(remote=lambda: FakeActor(self))
        made.options = lambda **_: made
        return made

    def kill(self, actor: FakeActor, no_restart: bool = True) -> None:
        """End an actor, which may be started again."""
        actor.work = None
        self.killed.append(no_restart)


class FakeConnection:
    """A connection to it."""

    def __init__(self, workers: int, *, pickles: bool = False) -> None:
        self.fake = FakeRay(pickles)
        self.crew = Crew(workers=workers, cpus=1, gpus=0.0)
        self.exits = SimpleNamespace(callback=lambda function: None)

    def ray(self) -> FakeRay:
        """Return the module."""
        return self.fake


@contextmanager
def fake_connected(options: Any, device: str | None) -> Iterator[FakeConnection]:
    """Yield a connection in place of `connected`, whose workers are in this process, and get what can be sent."""
    yield FakeConnection(options.workers, pickles=True)
