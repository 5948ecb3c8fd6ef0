"""Which implementation of block selection is taken."""

from __future__ import annotations

import torch

IMPLEMENTATIONS = ("auto", "triton", "reference")


def takes_triton(implementation: str, device: torch.device, problem: str | None) -> bool:
    """Whether the Triton kernels are taken, rather than plain PyTorch.

    Args:
        implementation: "auto", which takes them on CUDA where they can; "triton" or "reference".
        device: where the tensors are.
        problem: why the kernels can not compute what is asked; None if they can.

    Raises:
        ValueError: the implementation does not exist.
        NotImplementedError: the kernels were asked for and can not.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"`implementation` must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}.")
    if implementation == "triton" and problem is not None:
        raise NotImplementedError(f"`implementation='triton'` can not compute this: {problem}. Use 'auto'.")
    return implementation == "triton" or (implementation == "auto" and device.type == "cuda" and problem is None)
