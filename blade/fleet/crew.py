"""How many workers of which size fit the machines."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from blade.fleet.options import FleetOptions


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a machine has for workers."""

    cpus: int
    gpus: int


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Workers of one size."""

    workers: int
    cpus: int
    """CPUs of each, and its threads of PyTorch."""
    gpus: float
    """GPUs of each; 0: it computes on the CPU."""

    @property
    def device(self) -> str:
        """The device of each, which has no number: Ray shows it no other."""
        return "cuda" if self.gpus else "cpu"


def this_machine() -> Machine:
    """Return the CPUs and the CUDA devices that this process may use."""
    import torch

    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(cpus=cpus, gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0)


def plan_crew(options: FleetOptions, machines: Sequence[Machine], device: str | None) -> Crew:
    """Return the workers that the options ask for.

    Args:
        options: the options.
        machines: the machines that they run on.
        device: of a request: cpu, cuda, or None for CUDA where there is any.

    Raises:
        ValueError: if they do not fit; says what would.
    """
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"`device` must be cpu or cuda with `workers`, which Ray gives their GPUs, got {device!r}.")
    gpus, cpus = sum(machine.gpus for machine in machines), sum(machine.cpus for machine in machines)
    where = "this machine has" if options.ray_address is None else f"the cluster of {len(machines)} has"
    on_gpus = device != "cpu" and gpus > 0
    if not on_gpus and (device == "cuda" or options.gpus_per_worker is not None):
        named = "`device`" if device == "cuda" else "`gpus_per_worker`"
        raise ValueError(f"{named} needs GPUs, but {where} none{' for `device` cpu' if gpus else ''}.")
    each = (options.gpus_per_worker or 1.0) if on_gpus else 0.0
    places = _places(machines, each, 1)
    workers = options.workers or (places if on_gpus else len(machines))
    if on_gpus and workers > sum(_on_gpus(machine, each) for machine in machines):
        raise ValueError(
            f"`workers` must be at most {sum(_on_gpus(machine, each) for machine in machines)} with "
            f"{each:g} GPU each, got {workers}: {where} {gpus} GPU{'s' if gpus > 1 else ''}. With "
            f"--gpus-per-worker {_share(workers, gpus):g} each GPU would be shared by {math.ceil(workers / gpus)}, "
            "as far as its memory holds so many models."
        )
    most = max(cpus // workers, 1) if options.cpus_per_worker is None else options.cpus_per_worker
    fitting = [count for count in range(most, 0, -1) if _places(machines, each, count) >= workers]
    threads = fitting[0] if fitting else 0
    if not threads or (options.cpus_per_worker is not None and threads < options.cpus_per_worker):
        wanted = options.cpus_per_worker or 1
        raise ValueError(
            f"`workers` must be at most {_places(machines, each, wanted)} with {wanted} "
            f"CPU{'s' if wanted > 1 else ''} each, got {workers}: {where} {cpus} CPU{'s' if cpus > 1 else ''}."
        )
    return Crew(workers=workers, cpus=threads, gpus=each)


def _on_gpus(machine: Machine, each: float) -> int:
    """Return how many workers the GPUs of a machine hold; none is spread over two of them."""
    return machine.gpus * math.floor(1 / each + 1e-9)


def _places(machines: Sequence[Machine], gpus: float, cpus: int) -> int:
    """Return how many workers of a size fit."""
    return sum(min(machine.cpus // cpus, _on_gpus(machine, gpus) if gpus else machine.cpus) for machine in machines)


def _share(workers: int, gpus: int) -> float:
    """Return the share of a GPU with which so many workers fit, rounded down to two digits."""
    return math.floor(100 / math.ceil(workers / gpus)) / 100
