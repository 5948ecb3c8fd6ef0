"""Options of a fleet of workers. Imports nothing heavy, so that a command's help does not wait for it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import ClassVar

from blade.common.checks import check_integer, check_number
from blade.common.options import OptionGroup, option

MOST_WORKERS = 10_000

AUTO = "auto"
"""Value of `ray_address` that finds the cluster of this machine."""

HOST_AND_PORT = re.compile(r"(?P<host>[^\s/:]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""Beginning of an address, as a path on this machine has it only by mistake; `Path` makes "//" one slash."""


@dataclass(frozen=True, kw_only=True)
class FleetOptions(OptionGroup):
    """Workers that share the work, by Ray."""

    title: ClassVar[str] = "Many workers (Ray)"

    workers: int | None = option()
    """Workers that share the work, each with the model loaded: on this machine, or on the cluster of --ray-address, by
    default one on each GPU, or on each machine if there is no GPU. Needs the extra `ray`."""
    ray_address: str | None = option()
    """Ray cluster to join: auto, or HOST:PORT."""
    gpus_per_worker: float | None = option()
    """GPUs of a worker, above 0 and at most 1, such as 0.5 for two workers on each; by default 1."""
    cpus_per_worker: int | None = option()
    """CPUs, and threads of PyTorch, of a worker; by default the CPUs divided by the workers."""

    def check(self) -> None:
        """Check ranges, and that nothing is said of workers where there are none."""
        if self.workers is not None:
            check_integer("workers", self.workers, 1, MOST_WORKERS)
        if self.cpus_per_worker is not None:
            check_integer("cpus_per_worker", self.cpus_per_worker, 1, MOST_WORKERS)
        if self.gpus_per_worker is not None:
            check_number("gpus_per_worker", self.gpus_per_worker, "above 0 and at most 1", lambda x: 0 < x <= 1)
        for name in ("gpus_per_worker", "cpus_per_worker"):
            if getattr(self, name) is not None and not self.is_given:
                raise ValueError(f"`{name}` must not be given without `workers` or `ray_address`.")
        if self.ray_address not in (None, AUTO) and not HOST_AND_PORT.fullmatch(str(self.ray_address)):
            raise ValueError(f"`ray_address` must be auto or HOST:PORT, got {self.ray_address!r}.")

    @property
    def is_given(self) -> bool:
        """True if there are to be workers."""
        return self.workers is not None or self.ray_address is not None


def check_started_once() -> None:
    """Check that this process is the only one of its command, which starts the others.

    Raises:
        ValueError: under `accelerate launch` or `torchrun`.
    """
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ValueError(f"`workers` must not be given in one of {processes} processes of a launcher; start one.")


def check_local_folder(output: object, command: str) -> None:
    """Check that an output is a folder here, and no address.

    Raises:
        ValueError: if it is one; only `blade-generate` writes to a bucket.
    """
    if ADDRESS.match(str(output)):
        raise ValueError(f"`output` must be a folder, got {output}: {command} reports from files on this machine.")
