"""Telling a network which of several trajectories, or which step, it is on: a vector added to the time's embedding.

Source: TDM, arXiv 2503.06674, steps as a condition. The vectors begin at zero, so that the network begins as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blade.common.errors import first_line
from blade.models.loaded import LoadedModel
from blade.students.scheduler import FewStepScheduler

ATTRIBUTE = "step_condition"
"""Name under which it is a part of the module that embeds the time."""


class StepCondition(nn.Module):
    """Vectors of each role, and the hook that adds the one in force."""

    def __init__(self, time_embedding: nn.Module, sizes: dict[str, int]) -> None:
        """Make the vectors and put them into a transformer.

        Args:
            time_embedding: the module that makes the embedding of the time, (B, channels).
            sizes: number of vectors of each role.
        """
        super().__init__()
        like = next(weight for weight in reversed(list(time_embedding.parameters())))
        *_, channels = (module.out_features for module in time_embedding.modules() if isinstance(module, nn.Linear))
        self.vectors = nn.ModuleDict({role: nn.Embedding(size, channels) for role, size in sizes.items()})
        for weight in self.vectors.parameters():
            nn.init.zeros_(weight)
        self.to(like.device)
        self.choose: Callable[[], tuple[str, torch.Tensor] | None] = lambda: None
        """Says which role's vectors are added, and which of them, (B,) or (1,) int64; None: none."""
        time_embedding.add_module(ATTRIBUTE, self)
        handle = time_embedding.register_forward_hook(self._add)

        def remove() -> None:
            handle.remove()
            delattr(time_embedding, ATTRIBUTE)

        self.remove = remove
        """Takes it out of the transformer."""

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Return an embedding as it is, where the time embedding is a sequence of modules that this one ends."""
        return embedding

    def _add(self, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor | None:
        chosen = self.choose()
        if chosen is None or chosen[0] not in self.vectors:
            return None
        role, index = chosen
        added: torch.Tensor = self.vectors[role](index.to(output.device))
        # with a time for each token or frame, those are rows of the embedding, or a dimension of its own
        added = added.repeat_interleave(len(output) // len(added), dim=0).to(output.dtype)
        return output + added.view(len(added), *[1] * (output.ndim - 2), -1)


def load_condition(pipe: Any, path: Path, sampler: Any, role: str, what: str) -> StepCondition:
    """Load the vectors that tell a student for several numbers of steps how many there are.

    Args:
        pipe: the pipeline, whose scheduler says how many there are.
        path: the file.
        sampler: the student's.
        role: the student's.
        what: the subject of the errors' messages, such as "`source` FOLDER".

    Raises:
        ValueError: if it cannot be loaded onto this model, or is not sampled by a `FewStepScheduler`.
    """
    from safetensors.torch import load_file

    model = LoadedModel(pipe)
    if len(model.transformers) > 1:
        raise ValueError(f"{what} has a {path.name}, which is for models with one transformer; this one has two.")
    if not isinstance(sampler, FewStepScheduler):
        kind = type(pipe.scheduler if sampler is None else sampler).__name__
        raise ValueError(f"{what} has a {path.name}, which is for a FewStepScheduler; it is sampled by a {kind}.")
    counts = [len(grid) for grid in sampler.config.grids]
    condition = StepCondition(model.family.time_embedding(model.transformer), {role: len(counts)})
    vectors = condition.vectors[role].get_parameter("weight").requires_grad_(False)
    try:
        weight = load_file(path)["weight"]
        if weight.shape != vectors.shape:
            raise ValueError(f"`weight` must be of shape {tuple(vectors.shape)}, got {tuple(weight.shape)}")
        vectors.copy_(weight)
    except Exception as error:  # whatever safetensors raises for a broken file
        raise ValueError(f"{what} has a {path.name} that cannot be loaded: {first_line(error)}") from error

    def choose() -> tuple[str, torch.Tensor] | None:
        count = len(pipe.scheduler.timesteps)
        return (role, torch.tensor([counts.index(count)])) if count in counts else None

    condition.choose = choose
    return condition
