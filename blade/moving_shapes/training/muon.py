"""Muon in float32, for matrices and convolutions (torch.optim.Muon computes in bfloat16, which a CPU emulates)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz iterations, scaled to the size of an AdamW update.

    Parameters of more than two dimensions are taken as matrices of shape (first, all others).

    Source: Muon (Jordan et al. 2024); the scale is 0.2 sqrt(max(rows, columns)), "Muon is scalable for LLM training",
    arXiv 2502.16982, section 2.2.

    Args:
        params: Parameters of two or more dimensions.
        lr: Learning rate, of the size that suits AdamW.
        momentum: Nesterov momentum.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient; those of one shape together."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    same_shape[parameter.shape].append(parameter)
            for parameters in same_shape.values():
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        updates = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            gradient = parameter.grad
            assert gradient is not None  # as `step` has seen to
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            updates.append(gradient.lerp(state["momentum"], group["momentum"]).flatten(1))
        orthogonal = orthogonalise(torch.stack(updates))
        scale = 0.2 * math.sqrt(max(orthogonal.shape[1:]))
        for parameter, update in zip(parameters, orthogonal, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


def muon_and_adamw(
    module: torch.nn.Module, hidden: list[torch.nn.Parameter], muon_lr: float, adamw_lr: float
) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for a module's hidden weights and AdamW for all its other parameters."""
    chosen = {id(parameter) for parameter in hidden}
    others = [parameter for parameter in module.parameters() if id(parameter) not in chosen]
    return (
        Muon([{"params": hidden, "base_lr": muon_lr}], weight_decay=0.01),
        torch.optim.AdamW([{"params": others, "base_lr": adamw_lr}], betas=(0.9, 0.95), weight_decay=0.0),
    )


def set_learning_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set each learning rate to its base times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["base_lr"]


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of (N, rows, columns) matrices close to 1."""
    a, b, c = COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x: torch.Tensor = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT
