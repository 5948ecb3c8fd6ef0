"""Optimizers of the trained roles, their learning rates, and the rules by which steps are skipped."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from blade.distillation.config import OptimizerConfig
from blade.distillation.parallel import sharded_like, unsharded

REMEMBERED = 50
"""Number of past gradient norms that the next one is compared with."""

MOST_SKIPPED = 20
"""Number of skipped steps in a row after which training fails."""

FEWEST = 10
"""Fewest past norms for the comparison; before, only steps with non-finite values are skipped."""


class RoleOptimizer:
    """The optimizer of one role."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], config: OptimizerConfig, learning_rate: float, skip_factor: float
    ) -> None:
        """Make the optimizer.

        Args:
            parameters: the trained parameters.
            config: the settings.
            learning_rate: the peak learning rate.
            skip_factor: a step is skipped if its gradient norm exceeds the median of the last ones by this factor.
        """
        self.parameters = list(parameters)
        self.config, self.learning_rate, self.skip_factor = config, learning_rate, skip_factor
        self.optimizer = _make(self.parameters, config, learning_rate)
        self.norms: list[float] = []
        self.skipped = self.skipped_in_a_row = 0

    def set_rate(self, rate: float) -> None:
        """Set the learning rate."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # as in torchao's optimizers
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step(self, loss: float) -> tuple[float, bool]:
        """Clip the gradients and take a step, unless something is not finite or the gradient explodes.

        The gradient's norm is the same on all processes, and so is the decision if `loss` is.

        Args:
            loss: the mean over all processes.

        Returns:
            The norm of the gradient before clipping, and whether the step was taken.

        Raises:
            ArithmeticError: if too many steps in a row were skipped.
        """
        total = nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        explodes = len(self.norms) >= FEWEST and norm > self.skip_factor * median(self.norms)
        taken = math.isfinite(loss) and math.isfinite(norm) and not explodes
        if taken:
            self.optimizer.step()
        else:
            self.skipped += 1
        self.skipped_in_a_row = 0 if taken else self.skipped_in_a_row + 1
        if math.isfinite(norm):
            self.norms = [*self.norms, norm][-REMEMBERED:]
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise ArithmeticError(
                f"The last {MOST_SKIPPED} steps were left out: losses or gradients are not finite, or explode. Resume "
                "from the last checkpoint with lower learning rates."
            )
        return norm, taken

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, unsharded; all processes must call it."""
        return {"optimizer": unsharded(self.optimizer.state_dict()), "norms": self.norms, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        saved = state["optimizer"]
        sharded = {
            number: {name: _like(value, self.parameters[number]) for name, value in values.items()}
            for number, values in saved["state"].items()
        }
        self.optimizer.load_state_dict({**saved, "state": sharded})
        self.norms, self.skipped = list(state["norms"]), state["skipped"]


def learning_rate_share(config: OptimizerConfig, update: int, updates: int, *, decays: bool) -> float:
    """Return the learning rate at an update as a share of the peak.

    Args:
        config: warm-up and schedule.
        update: index of the update, from 0.
        updates: total number of updates.
        decays: apply the schedule, as for the student.
    """
    share = min((update + 1) / (config.warmup_updates + 1), 1.0)
    if decays and config.schedule == "cosine":
        share *= (1 + math.cos(math.pi * update / updates)) / 2
    return share


def _make(parameters: list[nn.Parameter], config: OptimizerConfig, learning_rate: float) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (config.beta1, config.beta2),
        "eps": config.epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, **options)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            '`optimizer.name` adamw-8bit needs the extra `quantize`: pip install "blade-video[quantize]".'
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **options)
    return optimizer


def _like(value: Any, parameter: nn.Parameter) -> Any:
    return sharded_like(value, parameter) if isinstance(value, torch.Tensor) else value
