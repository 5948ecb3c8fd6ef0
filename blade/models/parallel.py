"""Parallelism of Diffusers, as commands and trainings enable it: several processes compute one video together.

Diffusers' `enable_parallelism` needs an accelerator and a plan of its own for the model; BLADE's hooks need neither.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from blade.attention.applied import applied_to
from blade.families.registry import find_family
from blade.families.transformers import Transformer
from blade.models.devices import resolve_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DATA, RING, ULYSSES = "data", "ring", "ulysses"
"""Dimensions of a mesh: processes with videos of their own, and, as Diffusers names them, those that share one."""


def make_mesh(device: torch.device, degree: int) -> DeviceMesh:
    """Arrange all processes in groups that compute one video together; neighbours are one group.

    Args:
        device: a device of the kind that they have.
        degree: processes in a group.

    Raises:
        ValueError: if the number of processes is no multiple of it.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    processes = dist.get_world_size()
    if processes % degree:
        raise ValueError(f"`parallel` must divide the number of processes, {processes}, got {degree}.")
    return init_device_mesh(device.type, (processes // degree, 1, degree), mesh_dim_names=(DATA, RING, ULYSSES))


def split_transformer(transformer: Transformer, mesh: DeviceMesh) -> None:
    """Let a group of processes share out a transformer's sequence, once BLADE is applied to it.

    Args:
        transformer: the transformer, in every process.
        mesh: the processes, as `make_mesh` arranges them.

    Raises:
        ValueError: if there is no plan for its sequence, or Diffusers is too old.
    """
    import torch.distributed as dist
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig

    check_splits(transformer)
    context = ContextParallelConfig(ulysses_degree=mesh[ULYSSES].size(), mesh=mesh[RING, ULYSSES])
    config: Any = ParallelConfig(context_parallel_config=context)
    device = next(transformer.parameters()).device
    config.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh[RING, ULYSSES])
    transformer._parallel_config = config


def check_splits(transformer: Transformer, field: str = "parallel", *, trained: bool = False) -> None:
    """Check that a transformer's sequence can be split.

    Args:
        transformer: the transformer, with or without weights.
        field: the option that asks for it.
        trained: ask for gradients too.

    Raises:
        ValueError: if it cannot.
    """
    plan, name = find_family(transformer).sequence_split(transformer), type(transformer).__name__
    if plan is None:
        raise ValueError(f"`{field}` must be 1 for a {name}, as there is no plan for its sequence.")
    if trained and plan.cut_keys:
        raise ValueError(
            f"`{field}` must be 1 for a {name}, which cannot be trained while it is split: a part of it is whole on "
            "every GPU."
        )


def join_transformer(transformer: Transformer) -> None:
    """Undo `split_transformer`, before BLADE is applied anew, so that Diffusers does not cut the sequence in between.

    Args:
        transformer: the transformer, in every process, with BLADE.
    """
    applied = applied_to(transformer)
    assert applied is not None
    transformer._parallel_config = None
    applied.parallelism.follow(transformer)


def launched_processes() -> int:
    """Return the number of processes that accelerate or torchrun launched with this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Team:
    """The processes that make one video together: all that were launched, on a GPU each or on the CPU."""

    def __init__(self, parallel: int, device: str | None) -> None:
        """Join the others.

        Args:
            parallel: their number.
            device: "cpu" or "cuda", of which every process takes its own; None takes CUDA if there is one.

        Raises:
            ValueError: if another number of processes was launched, or the device has a number.
        """
        launched = launched_processes()
        if parallel != launched:
            raise ValueError(
                f"`parallel` must be the number of processes that were launched, {launched}, got {parallel}: "
                f"accelerate launch --num_processes {parallel} -m blade.cli.generate ..."
            )
        kind = resolve_device(device).type
        if device not in (None, kind):
            raise ValueError(f"`device` must be {kind} where every process takes its own, got {device}.")
        from accelerate import PartialState

        state = PartialState(cpu=kind == "cpu")
        self.index: int = state.process_index
        self.count: int = parallel
        self.device: torch.device = state.device
        self.mesh: DeviceMesh = make_mesh(self.device, parallel)

    @property
    def is_first(self) -> bool:
        """True if this process writes files and reports."""
        return self.index == 0

    @contextmanager
    def splitting(self, transformers: Iterable[Transformer]) -> Iterator[None]:
        """Share out the sequences of transformers inside a `with` block, in which BLADE is applied to them.

        Raises:
            ValueError: if one cannot be split.
        """
        split = list(transformers)
        try:
            for transformer in split:
                split_transformer(transformer, self.mesh)
            yield
        finally:
            for transformer in split:
                transformer._parallel_config = None

    def tell(self, task: Any) -> None:
        """Hand the others what to do next, as the first process; None: nothing more."""
        self._broadcast(task)

    def hear(self) -> Any:
        """Wait for what the first process says is to be done next; None: nothing more.

        Raises:
            ConnectionError: if the first process has ended.
        """
        try:
            return self._broadcast(None)
        except RuntimeError as error:
            raise ConnectionError("The first of the processes has ended; it says why.") from error

    def _broadcast(self, task: Any) -> Any:
        import torch.distributed as dist

        tasks = [task]
        dist.broadcast_object_list(tasks, src=0, device=self.device)
        return tasks[0]


@contextmanager
def join_team(parallel: int, device: str | None) -> Iterator[Team | None]:
    """Join the processes that make each video together inside a `with` block; None where `parallel` is 1.

    Where one fails, whoever launched them ends the others.

    Args:
        parallel: number of processes.
        device: the device that was asked for.

    Raises:
        ValueError: see `Team`.
    """
    if parallel == 1:
        yield None
        return
    import torch.distributed as dist

    yield Team(parallel, device)
    dist.destroy_process_group()
