"""Names of the implementations, shared by all operators of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IMPLEMENTATIONS = ("auto", "triton", "cpu", "naive")
"""Implementations of every operator.

`auto`: the fastest one that supports the call; never `naive`. `triton`: kernels for NVIDIA GPUs. `cpu`: PyTorch
operations, arranged for a CPU but valid on every device. `naive`: the specification, written for readability and used
to test the others.
"""


def current_name(implementation: str) -> str:
    """Translate an implementation name of earlier versions, in which `cpu` was called `reference`."""
    return "cpu" if implementation == "reference" else implementation


def check_implementation(implementation: str, implementations: Sequence[str] = IMPLEMENTATIONS) -> str:
    """Return the current name of an implementation.

    Args:
        implementation: requested name.
        implementations: valid names.

    Raises:
        ValueError: unknown implementation.
    """
    name = current_name(implementation)
    if name not in implementations:
        raise ValueError(f"`implementation` must be one of {', '.join(implementations)}, got {implementation!r}.")
    return name


def choose_implementation(implementation: str, device: torch.device, triton_problem: str | None) -> str:
    """Choose among `triton`, `cpu` and `naive`.

    Args:
        implementation: one of `IMPLEMENTATIONS`; "auto" picks Triton on CUDA where possible, else "cpu".
        device: device of the tensors.
        triton_problem: why the Triton kernels cannot compute this, or None if they can.

    Raises:
        ValueError: unknown implementation.
        NotImplementedError: the Triton kernels were requested and cannot compute this.
    """
    name = check_implementation(implementation)
    if name == "triton" and triton_problem is not None:
        raise NotImplementedError(f"`implementation='triton'` cannot compute this: {triton_problem}. Use 'auto'.")
    if name == "auto":
        return "triton" if device.type == "cuda" and triton_problem is None else "cpu"
    return name
