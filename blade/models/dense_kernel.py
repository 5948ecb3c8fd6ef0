"""The kernel that computes dense attention: Diffusers' backend, and what PyTorch chooses where that leaves it open."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch.utils._python_dispatch import TorchDispatchMode

from blade.models.loaded import LoadedModel

FUSED = re.compile(r"_scaled_dot_product_([a-z]+)_attention")
"""Matches the names of PyTorch's fused operators, such as `aten::_scaled_dot_product_cudnn_attention`."""


@dataclass
class DenseKernel:
    """The kernel of a model's first self-attention layer, known once that has run."""

    backend: str
    """Diffusers' name of the backend, such as "native" or "_flash_3"; "sdpa" where the model takes none."""
    fused: str | None = None
    """The fused kernel that PyTorch's own attention chose, such as "cudnn"; None if none was seen."""

    def __str__(self) -> str:
        return f"{self.backend} ({self.fused})" if self.fused else self.backend


@contextmanager
def watch_dense_kernel(model: LoadedModel) -> Iterator[DenseKernel]:
    """Yield the kernel of the first self-attention layer, filled in by its first forward pass.

    Args:
        model: the loaded model, with dense attention.
    """
    layer = model.family.attention_layers(model.transformer)[0]
    kernel = DenseKernel(_backend(layer))
    with ExitStack() as hooks, ExitStack() as mode:

        def entered(module: Any, args: Any) -> None:
            mode.enter_context(_Watch(kernel))

        def left(module: Any, args: Any, output: Any) -> None:
            mode.close()
            hooks.close()

        for handle in (
            layer.register_forward_pre_hook(entered),
            layer.register_forward_hook(left, always_call=True),
        ):
            hooks.callback(handle.remove)
        yield kernel


def _backend(layer: Any) -> str:
    """Return the name of the backend that a layer takes: its own, or the one that is active."""
    if not hasattr(layer.processor, "_attention_backend"):
        return "sdpa"
    backend = layer.processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
    return str(getattr(backend, "value", backend))


class _Watch(TorchDispatchMode):
    """Notes the first fused attention operator that is called."""

    def __init__(self, kernel: DenseKernel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernel = kernel

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call an operator as it is."""
        if self.kernel.fused is None and (fused := FUSED.search(func.name())):
            self.kernel.fused = fused[1]
        return func(*args, **(kwargs or {}))
