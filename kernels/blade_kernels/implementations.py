"""The names of the implementations, the same for every operator of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IMPLEMENTATIONS = ("auto", "triton", "cpu", "naive")
"""Implementations that every operator has.

`auto`: the fastest that can compute what is asked; never `naive`. `triton`: kernels for NVIDIA GPUs. `cpu`: PyTorch's
own operations, arranged for a CPU; runs on every device. `naive`: the specification, written to be read and to test
the others against.
"""


def current_name(implementation: str) -> str:
    """Translate the name of an implementation from earlier versions, in which `cpu` was called `reference`."""
    return "cpu" if implementation == "reference" else implementation


def check_implementation(implementation: str, implementations: Sequence[str] = IMPLEMENTATIONS) -> str:
    """Return the current name of an implementation.

    Args:
        implementation: name as given.
        implementations: names that exist.

    Raises:
        ValueError: the implementation does not exist.
    """
    name = current_name(implementation)
    if name not in implementations:
        raise ValueError(f"`implementation` must be one of {', '.join(implementations)}, got {implementation!r}.")
    return name


def choose_implementation(implementation: str, device: torch.device, triton_problem: str | None) -> str:
    """Choose among `triton`, `cpu` and `naive`.

    Args:
        implementation: one of `IMPLEMENTATIONS`; "auto" takes Triton on CUDA where it can, and otherwise "cpu".
        device: device of the tensors.
        triton_problem: why the Triton kernels cannot compute what is asked; None if they can.

    Raises:
        ValueError: the implementation does not exist.
        NotImplementedError: the Triton kernels were asked for and cannot compute this.
    """
    name = check_implementation(implementation)
    if name == "triton" and triton_problem is not None:
        raise NotImplementedError(f"`implementation='triton'` can not compute this: {triton_problem}. Use 'auto'.")
    if name == "auto":
        return "triton" if device.type == "cuda" and triton_problem is None else "cpu"
    return name
