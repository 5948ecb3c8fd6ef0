"""Several processes: the distribution of work, gradients and weights among them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import reduce
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from blade.common.locks import folder_locked
from blade.distillation.roles import Network
from blade.families.protocol import ModelFamily
from blade.models.parallel import make_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Processes:
    """The processes of a training, possibly only one.

    Accelerate provides `PartialState` and `reduce`. Its `Accelerator` (1.15) does not wrap the networks. Under FSDP2
    it takes one model, together with an optimizer, while here the frozen networks are sharded too; it shards
    embeddings and norms separately, and leaves the root's weights gathered after a pass without gradients. For DDP it
    does not pass on `forward_sync_buffers`, and would add a second global state beside `PartialState` for one call.
    """

    def __init__(
        self, state: Any, parallel: str, device: torch.device | None = None, sequence_parallel: int = 1
    ) -> None:
        """Take the state of the processes.

        Args:
            state: Accelerate's `PartialState`, or an object with its attributes.
            parallel: `ddp` or `fsdp`.
            device: device of this process, instead of the state's.
            sequence_parallel: processes in a group, which computes each of its samples together.

        Raises:
            ValueError: if the number of processes is no multiple of `sequence_parallel`.
        """
        self.device: torch.device = device or state.device
        self.index: int = state.process_index
        self.count: int = state.num_processes
        self.parallel = parallel
        self.group_size = sequence_parallel
        self._state = state
        if self.count % sequence_parallel:
            raise ValueError(
                f"`run.sequence_parallel` must divide the number of processes, {self.count}, got {sequence_parallel}."
            )

    @property
    def groups(self) -> int:
        """Number of groups, each of which has samples of its own."""
        return self.count // self.group_size

    @property
    def group(self) -> int:
        """Index of this process's group; neighbours are one group."""
        return self.index // self.group_size

    @property
    def is_first_of_group(self) -> bool:
        """True if this process writes the files of its group's samples."""
        return self.index % self.group_size == 0

    @property
    def is_first(self) -> bool:
        """True if this process writes files."""
        return self.index == 0

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The processes in their groups; all processes must ask for it."""
        return make_mesh(self.device, self.group_size)

    @property
    def shards_weights(self) -> bool:
        """True if weights are sharded, so that all processes must take part in every pass."""
        return self.count > 1 and self.parallel == "fsdp"

    def wait(self) -> None:
        """Wait for all processes."""
        self._state.wait_for_everyone()

    @contextmanager
    def locked(self, folder: Path, field: str, *, wait: bool = False) -> Iterator[None]:
        """Keep other trainings out of a folder; the first process holds the lock for all, which wait for it.

        Args:
            folder: see `folder_locked`.
            field: see `folder_locked`.
            wait: see `folder_locked`; several processes do not, as those that wait for the first would time out.
        """
        with folder_locked(folder, field, wait=wait and self.count == 1) if self.is_first else nullcontext():
            self.wait()
            yield

    def wrap(self, networks: Sequence[Network], family: ModelFamily) -> None:
        """Make trained networks average their gradients or, with `fsdp`, shard the weights of all networks too.

        Must be called before optimizers are made, since `fsdp` replaces the parameters.
        """
        if self.count == 1:
            return
        for network in networks:
            trains = any(parameter.requires_grad for parameter in network.transformer.parameters())
            if self.parallel == "fsdp":
                from torch.distributed.fsdp import fully_shard

                # the warning concerns in-place changes of the output, of which there are none
                warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
                for block in family.blocks(network.transformer):
                    fully_shard(block)
                # otherwise its own weights would stay gathered after a pass without a backward pass
                fully_shard(network.transformer, reshard_after_forward=True)
            elif trains:
                kind = nn.parallel.DistributedDataParallel
                newer = "forward_sync_buffers" in inspect.signature(kind).parameters
                sync: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
                network.wrapped = kind(
                    network.transformer,
                    device_ids=[self.device] if self.device.type == "cuda" else None,
                    # the other role's adapter takes no part in a pass
                    find_unused_parameters=True,
                    **sync,
                )

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward pass of a loss, which is the same in all processes of a group.

        Each of them has the gradients of its own part of the sample, of which the sum is wanted, while `wrap` averages
        over all processes.
        """
        (loss * self.group_size).backward()

    @contextmanager
    def accumulating(self, network: Network, last: bool) -> Iterator[None]:
        """Synchronize gradients only in the last forward and backward pass of an update."""
        wrapped = network.wrapped
        if self.shards_weights:
            network.transformer.set_requires_gradient_sync(last)
        if isinstance(wrapped, nn.parallel.DistributedDataParallel) and not last:
            with wrapped.no_sync():
                yield
        else:
            yield

    def mean(self, values: Sequence[float]) -> list[float]:
        """Average values over all processes; the result is the same on each."""
        means = torch.tensor(list(values), dtype=torch.float64)
        if self.count > 1:
            means = reduce(means.to(self.device, torch.float32), "mean")
        return means.tolist()


def unsharded(value: Any) -> Any:
    """Gather sharded tensors and copy all to the CPU: a tensor, or any nesting of dicts and lists of them.

    All processes must call it.
    """
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: unsharded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(unsharded(item) for item in value)
    return value


def sharded_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shard a tensor like another one of the same shape, on that one's device."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


@torch.no_grad()
def copy_weights(parameters: dict[str, nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    """Copy unsharded weights into parameters.

    Raises:
        ValueError: if the names or shapes differ.
    """
    missing, unexpected = parameters.keys() - weights.keys(), weights.keys() - parameters.keys()
    if missing:
        raise ValueError(f"The state dict lacks key {min(missing)}.")
    if unexpected:
        raise ValueError(f"The state dict has the unexpected key {min(unexpected)}.")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(f"{name} must be {tuple(parameter.shape)}, got {tuple(weights[name].shape)}.")
        parameter.copy_(sharded_like(weights[name], parameter))
