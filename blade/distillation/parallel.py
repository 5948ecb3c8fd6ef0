"""Several processes: who computes what, and how gradients and weights come together."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from blade.distillation.roles import Network
from blade.families.protocol import ModelFamily


class Processes:
    """The processes of a training; also where there is only one."""

    def __init__(self, state: Any, parallel: str, device: torch.device | None = None) -> None:
        """Take the state of the processes.

        Args:
            state: accelerate's `PartialState`, or what has its attributes.
            parallel: `ddp` or `fsdp`.
            device: of this one, instead of the state's.
        """
        self.device: torch.device = device or state.device
        self.index: int = state.process_index
        self.count: int = state.num_processes
        self.parallel = parallel
        self._state = state

    @property
    def is_first(self) -> bool:
        """Whether this one writes."""
        return self.index == 0

    @property
    def shares_weights(self) -> bool:
        """Whether a pass of one process needs the others."""
        return self.count > 1 and self.parallel == "fsdp"

    def wait(self) -> None:
        """Wait for all."""
        self._state.wait_for_everyone()

    def wrap(self, networks: Sequence[Network], family: ModelFamily) -> None:
        """Make trained networks share their gradients, or, with `fsdp`, all of them share out their weights too.

        Must be called before optimizers are made, since `fsdp` replaces the parameters.
        """
        if self.count == 1:
            return
        for network in networks:
            trains = any(parameter.requires_grad for parameter in network.transformer.parameters())
            if self.parallel == "fsdp":
                from torch.distributed.fsdp import fully_shard

                # nothing is written into the output
                warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
                for block in family.blocks(network.transformer):
                    fully_shard(block)
                # otherwise its own weights would stay whole after a pass without a backward pass
                fully_shard(network.transformer, reshard_after_forward=True)
            elif trains:
                kind = nn.parallel.DistributedDataParallel
                newer = "forward_sync_buffers" in inspect.signature(kind).parameters
                sync: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
                network.wrapped = kind(
                    network.transformer,
                    device_ids=[self.device] if self.device.type == "cuda" else None,
                    # the adapter of the other role has no part in a pass
                    find_unused_parameters=True,
                    **sync,
                )

    @contextmanager
    def accumulating(self, network: Network, last: bool) -> Iterator[None]:
        """Around a forward and a backward pass: gradients come together in the last one of an update only."""
        wrapped = network.wrapped
        if self.shares_weights:
            network.transformer.set_requires_gradient_sync(last)
        if isinstance(wrapped, nn.parallel.DistributedDataParallel) and not last:
            with wrapped.no_sync():
                yield
        else:
            yield

    def mean(self, values: Sequence[float]) -> list[float]:
        """The means over all processes, the same on each."""
        together = torch.tensor(list(values), dtype=torch.float64)
        if self.count > 1:
            together = together.to(self.device, torch.float32)
            torch.distributed.all_reduce(together)
            together = together / self.count
        return together.tolist()


def whole(value: Any) -> Any:
    """Bring what processes share out together, on the CPU: a tensor, or any nesting of dicts and lists of them.

    All processes must call it.
    """
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: whole(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(one) for one in value)
    return value


def shared_out_like(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Share a whole tensor out as another one of its shape is, on that one's device."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


@torch.no_grad()
def put_weights(parameters: dict[str, nn.Parameter], weights: dict[str, torch.Tensor]) -> None:
    """Give parameters whole weights.

    Raises:
        ValueError: if the names or shapes differ.
    """
    missing, unknown = parameters.keys() - weights.keys(), weights.keys() - parameters.keys()
    if missing or unknown:
        name = sorted(missing or unknown)[0]
        problem = "lack it" if missing else "have it, and the network does not"
        raise ValueError(f"The weights must be of the network's parameters, got {name} wrong: they {problem}.")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(f"{name} must be {tuple(parameter.shape)}, got {tuple(weights[name].shape)}.")
        parameter.copy_(shared_out_like(weights[name], parameter))
