"""Memory of models and of calls, counted without weights: on PyTorch's meta device nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from blade.models.repeats import once_per_shape


def weight_bytes(model: nn.Module, *, recurse: bool = True) -> int:
    """Return the bytes of a model's parameters and buffers as they are stored.

    Args:
        model: the model, with its weights or without.
        recurse: with those of its submodules.
    """
    tensors = (*model.parameters(recurse), *model.buffers(recurse))
    return sum(_tensor_bytes(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _tensor_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor; of one that stands for several, as torchao's do, of all of them."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(_tensor_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def peak_bytes(function: Callable[[], object], repeated: nn.Module | None = None) -> int:
    """Return the most memory that a call on the meta device would hold beside what there was before it.

    Attention is taken to hold its output and no logits, as every fused implementation does.

    Args:
        function: the call.
        repeated: a module that it calls many times with equal shapes; see `once_per_shape`.
    """
    memory = Allocations()
    with torch.no_grad(), torch.device("meta"), _FusedAttention(), memory, once_per_shape(repeated, memory):
        function()
    return int(memory.peak)


@contextmanager
def weights_by_leaf(*models: nn.Module, ahead: bool) -> Iterator[None]:
    """Hold the weights of models on the meta device in `peak_bytes` while they are needed, layer by layer.

    As offloading does that brings every layer by itself: a module's own weights are there while it runs.

    Args:
        models: the models, whose weights are otherwise taken to be elsewhere.
        ahead: whether the next layer's weights are brought while one runs.
    """
    layers = [module for model in models for module in model.modules() if weight_bytes(module, recurse=False)]
    following = dict(pairwise(layers)) if ahead else {}
    held: dict[nn.Module, torch.Tensor] = {}

    def bring(module: nn.Module, args: Any) -> None:
        for layer in (module, following.get(module)):
            if layer is not None and layer not in held:
                held[layer] = torch.empty(weight_bytes(layer, recurse=False), dtype=torch.uint8, device="meta")

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        held.pop(module, None)

    handles = [hook for layer in layers for hook in _hooks(layer, bring, leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(layer: nn.Module, before: Any, after: Any) -> Iterable[Any]:
    return layer.register_forward_pre_hook(before), layer.register_forward_hook(after)


class _FusedAttention(TorchFunctionMode):
    """Lets attention make its output alone."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _attended(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


class Allocations(TorchDispatchMode):
    """Follows the storages that are made on a device, until they are freed."""

    def __init__(self, device: str | None = None) -> None:
        """Begin with nothing.

        Args:
            device: a type of device, others not being counted; None counts all.
        """
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's
        self.device = device
        self.live = self.peak = self._before = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((*args, *kwargs.values())):  # what was there before, weights among it
            self._follow(tensor, new=False)
        result = operation(*args, **kwargs)
        for tensor in _tensors((result,)):
            self._follow(tensor, new=True)
        self.peak = max(self.peak, self.live)
        return result

    def _follow(self, tensor: torch.Tensor, *, new: bool) -> None:
        """Note a tensor's storage, if it is not known yet, until it is freed."""
        if self.device not in (None, tensor.device.type):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if new else 0
        self._known.add(key)
        self.live += size
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def begin(self) -> int:
        """Begin a call, whose own peak is found; see `Gauge`."""
        self._before, self.peak = self.peak, self.live
        return self.live

    def end(self, began: int) -> int:
        """Return the peak of the call beside what there was before it."""
        own, self.peak = self.peak - began, max(self.peak, self._before)
        return own

    def repeat(self, cost: int) -> None:
        """Take the same peak again, beside what there is now."""
        self.peak = max(self.peak, self.live + cost)


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among the arguments or results of an operation."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
