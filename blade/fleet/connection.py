"""Ray: one of this machine's own, that goes away with the command, or a cluster that is joined."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from blade.common.errors import first_line
from blade.common.leftovers import remove, sweep_leftovers, temporary_path
from blade.fleet.crew import Crew, Machine, plan_crew, this_machine
from blade.fleet.options import HOST_AND_PORT, FleetOptions, check_started_once

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is reported to anybody
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # Ray's own lines about lost workers, which are reported here
}
"""Variables of Ray's environment, unless they are set."""

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Variable by which a Ray of one machine listens on the loopback interface alone, on Linux too."""

AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
"""Variables by which a Ray takes those alone who know its token. It sets the first, and without the second would leave
a token in the home folder."""

STORE_BYTES = 200 * 2**20
"""Shared memory in which results wait until they are written; what does not fit goes to the disk."""

LEAST_STORE_BYTES = 80 * 2**20
"""Ray takes no less than 75 MiB."""

ANSWER_SECONDS = 5.0
"""Time for a cluster to take a connection."""


def import_ray() -> ModuleType:
    """Import Ray.

    Raises:
        ValueError: if it is not installed.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise ValueError('`workers` and `ray_address` need Ray: pip install "blade-video[ray]".') from None
    module: ModuleType = ray
    return module


class Connection:
    """A Ray that is joined, or will be started where workers are first needed."""

    def __init__(self, options: FleetOptions, device: str | None) -> None:
        """Join the cluster of the options, if they name one, and plan the workers.

        Raises:
            ValueError: if Ray is missing, no cluster answers, or the workers do not fit.
        """
        check_started_once()
        self.options, self._temporary = options, Path()
        self.exits, self._restore = ExitStack(), ExitStack()
        self._is_owner = False
        if options.ray_address is None:
            for name, value in LOOPBACK.items():
                os.environ.setdefault(name, value)
            ray = import_ray()
            self._ray: ModuleType | None = ray if ray.is_initialized() else None  # by whoever calls this
            machines = [this_machine()] if self._ray is None else _machines(ray)
        else:
            self._ray = import_ray()
            self._join(options.ray_address)
            machines = _machines(self._ray)
        try:
            self.crew = plan_crew(options, machines, device)
        except BaseException:
            self.close()
            raise

    def ray(self) -> ModuleType:
        """Return Ray, connected; where none is joined, one is started on this machine, for it alone."""
        if self._ray is None:
            self._ray = import_ray()
            self._start(self._ray, self.crew)
        return self._ray

    def close(self) -> None:
        """End the workers, and leave the cluster, or end the Ray that was started."""
        self.exits.close()
        if self._ray is not None and self._is_owner:
            with _own_signals():
                self._ray.shutdown()
        self._restore.close()
        if self._temporary.name:
            remove(self._temporary)

    def _start(self, ray: Any, crew: Crew) -> None:
        root = Path("/tmp") if os.name == "posix" else Path(tempfile.gettempdir())  # paths of sockets must be short
        sweep_leftovers(root)
        self._temporary, self._is_owner = temporary_path(root / "ray"), True
        for name in AUTHENTICATION:
            self._restore.callback(_set_variable, name, os.environ.get(name))
        os.environ.setdefault(AUTHENTICATION[1], _token())
        with _own_signals():
            ray.init(
                num_cpus=crew.workers * crew.cpus,
                num_gpus=this_machine().gpus if crew.gpus else 0,
                object_store_memory=_store_bytes(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=str(self._temporary),
            )

    def _join(self, address: str) -> None:
        assert self._ray is not None
        match = HOST_AND_PORT.fullmatch(address)
        if match is not None:
            host, port = match["host"].strip("[]"), int(match["port"])
            try:
                socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
            except (OSError, OverflowError) as error:
                raise ValueError(
                    f"`ray_address` {address} does not answer ({first_line(error)}); start a cluster there with "
                    "`ray start --head`."
                ) from None
        if self._ray.is_initialized():
            return
        self._is_owner = True
        try:
            with _own_signals():
                self._ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # of every layer of Ray, another class
            raise ValueError(f"`ray_address` {address} cannot be joined: {_reason(error, address)}") from None


@contextmanager
def connected(options: FleetOptions, device: str | None) -> Iterator[Connection]:
    """Yield a connection, and close it however the block ends.

    Args:
        options: the options.
        device: see `blade.fleet.crew.plan_crew`.

    Raises:
        ValueError: see `Connection`.
    """
    connection = Connection(options, device)
    try:
        yield connection
    finally:
        connection.close()


def _reason(error: Exception, address: str) -> str:
    """Return why a cluster cannot be joined, in a sentence."""
    text = " ".join(str(error).split())
    if "Could not find any running Ray instance" in text:
        return "no Ray runs on this machine; start one with `ray start --head`, or give HOST:PORT."
    versions = re.findall(r"Ray: (\S+) Python: (\S+)", text)
    if len(versions) == 2:
        (ray, python), (own_ray, own_python) = versions
        return f"it is of Ray {ray} and Python {python}, this is of Ray {own_ray} and Python {own_python}."
    told = f"{text or type(error).__name__}"[:300].rstrip(".")
    return f"{told}; where it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."


def _machines(ray: Any) -> list[Machine]:
    """Return the machines of a cluster."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Machine(cpus=int(each.get("CPU", 0)), gpus=int(each.get("GPU", 0))) for each in resources]


def _store_bytes() -> int:
    """Return the bytes of shared memory for results: less than there are, so that Ray does not refuse."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:  # another system
        return STORE_BYTES
    return max(min(STORE_BYTES, free // 2), LEAST_STORE_BYTES)


@cache
def _token() -> str:
    """Return the token of this process's own Rays; Ray itself remembers the first."""
    return secrets.token_hex(32)


def _set_variable(name: str, value: str | None) -> None:
    """Set a variable of the environment, or remove it."""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
