"""A request to profile a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blade.common.checks import check_integer
from blade.generation.request import GenerationRequest
from blade.profiling.assignment import GreedyRule
from blade.profiling.objectives import Budget, density_objectives

METHODS = ("budgeted", "published")
"""Search methods: the least error within the budget, or the published rule for every head independently."""


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """A request to profile a model and to search for head patterns."""

    generation: GenerationRequest
    """Model and sampling options; the prompt in it is not used."""
    prompts: tuple[str, ...]
    """Prompts of the recorded generations; each has the seed of `generation` plus its index."""
    output: Path
    """Folder of the results; recordings go into `recordings` there."""
    budget: Budget | None = None
    """Limit of the search; None only with the published method, which then uses its threshold."""
    method: str = "budgeted"
    """One of `METHODS`."""
    rule: GreedyRule = field(default_factory=GreedyRule)
    """The published rule."""
    groups: int | None = None
    """Number of groups of steps that share an assignment; None: every step has its own."""
    sampled_blocks: int | None = 8
    """Query blocks sampled in a layer, different ones in every step; None: all."""
    own_orders: bool = True
    """Allow heads their own token orders."""
    costs: str = "auto"
    """Source of the costs: `operations`, `time` (on the device), or `auto`, which is `time` on CUDA."""
    influence_prompts: int = 1
    """Number of prompts with which the influence of each step and layer is measured; 0: all count the same."""
    verify_prompts: int = 1
    """Number of prompts generated with the finished table and compared with dense attention."""
    share: tuple[int, int] = (1, 1)
    """(i, n): record every n-th prompt from the i-th, as one of n processes, without a search if n > 1."""

    @classmethod
    def of(cls, generation: Mapping[str, Any], *, prompts: Sequence[str], **options: Any) -> ProfileRequest:
        """Make a request from fields of a `GenerationRequest` except its prompt, and other fields of this class."""
        return cls(generation=GenerationRequest(prompt=prompts[0], **generation), prompts=tuple(prompts), **options)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("`prompts` must hold at least one prompt, got none.")
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {self.method!r}.")
        if self.costs not in ("auto", "operations", "time"):
            raise ValueError(f"`costs` must be auto, operations or time, got {self.costs!r}.")
        if self.budget is None and self.method == "budgeted":
            Budget()  # raises an error that lists the objectives
        if self.method == "published" and self.budget is not None and not self.budget.objective.bounds_density:
            raise ValueError(f"{density_objectives()} is the only budget of the published method, got {self.budget}.")
        if self.sampled_blocks is not None:
            check_integer("sampled_blocks", self.sampled_blocks, 1)
        if self.method == "published" and self.share[1] > 1:
            raise ValueError("`method` must be budgeted in several processes, got published, which goes step by step.")
        for name in ("influence_prompts", "verify_prompts"):
            value = getattr(self, name)
            if not 0 <= value <= len(self.prompts):
                raise ValueError(
                    f"`{name}` must be from 0 to {len(self.prompts)}, the number of prompts, got {value}."
                )
