"""Parallelism of Diffusers, as commands and trainings enable it: several processes compute one video together.

Diffusers' `enable_parallelism` needs an accelerator and a plan of its own for the model; BLADE's hooks need neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from blade.attention.applied import applied_to
from blade.families.registry import find_family
from blade.families.transformers import Transformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DATA, RING, ULYSSES = "data", "ring", "ulysses"
"""Dimensions of the mesh: processes with videos of their own, and, as Diffusers names them, those that share one."""


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
    """Undo `split_transformer`, before BLADE is applied anew.

    Args:
        transformer: the transformer, in every process, with BLADE.
    """
    applied = applied_to(transformer)
    assert applied is not None
    transformer._parallel_config = None
    applied.parallelism.follow(transformer)
