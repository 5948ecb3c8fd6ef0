"""Diffusers' context parallelism of a transformer, as BLADE takes it over while it is applied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks import HookRegistry
from torch import nn

from blade.attention.head_deal import deal_heads
from blade.attention.hook_order import is_wrapped_by_cache_dit, remove_hook
from blade.attention.layer import SparseLayer
from blade.attention.sequence_parallel import CutKeys, HeadShare, Ranks, SplitHooks, TokenShards, modules_of_name
from blade.common.terminal import logger
from blade.families.protocol import Inputs, ModelFamily
from blade.families.transformers import Transformer
from blade.token_grid import TokenGrid

HOOK_PREFIXES = ("cp_input", "cp_output")
"""Beginnings of the names of Diffusers' hooks that cut and put together."""

CACHES_BY_VALUE = {"fbc_leader_block_hook": "first-block", "sea_cache_root": "sea"}
"""Caches that skip blocks by what tensors hold, by the names of Diffusers' hooks."""


class Parallelism:
    """How one transformer's tokens and heads are shared out to ranks.

    Diffusers' `enable_parallelism` says who takes part. While BLADE is applied, the sequence is cut by its own hooks:
    tokens are put in order before, parts may be unequal, and models that Diffusers has no plan for can be split.
    """

    def __init__(self, family: ModelFamily) -> None:
        self._family = family
        self._config: Any = None
        self._ranks: Ranks | None = None
        self._hooks: SplitHooks | None = None
        self._removed: list[tuple[nn.Module, str, Any]] = []
        self._processors: list[Any] = []
        self._replaced: list[tuple[Any, Any, Any]] = []  # modules, their processors, and those before
        self._text_apart = False
        self._shards: dict[TokenGrid, TokenShards] = {}
        self._shares: dict[Any, HeadShare] = {}
        self.shards: TokenShards | None = None
        """The tokens of the latest pass; None on one rank."""

    @property
    def is_split(self) -> bool:
        """True if several ranks compute one video."""
        return self._ranks is not None

    def prepare(self, transformer: Transformer) -> None:
        """Keep Diffusers from cutting the sequence itself where parallelism is enabled later."""
        if self._family.sequence_split(transformer) is not None:
            transformer._cp_plan = {}  # on the transformer alone; the class keeps its plan

    def follow(self, transformer: Transformer) -> None:
        """Take over the parallelism that is enabled, or notice that none is.

        Raises:
            ValueError: if it is of another kind than Ulysses, the model cannot be split, or a cache would let ranks
                skip different blocks.
        """
        config = getattr(transformer, "_parallel_config", None)
        if config is not None:
            self._refuse_caches_by_value(transformer)
        if config is self._config and self.is_split == (config is not None):  # which `release` ends
            return
        self._forget()
        if config is not None:
            self._take_over(transformer)
        self._config = config

    def _refuse_caches_by_value(self, transformer: Transformer) -> None:
        registries = [
            vars(module).get("_diffusers_hook") for module in (transformer, *self._family.blocks(transformer))
        ]
        hooks = {name for registry in registries if registry is not None for name in registry.hooks}
        caches = [cache for hook, cache in CACHES_BY_VALUE.items() if hook in hooks]
        if is_wrapped_by_cache_dit(transformer):
            caches.append("cache-dit")
        if caches:
            raise ValueError(
                f"`cache` must not be {caches[0]} where several ranks compute one video: it skips blocks by what a "
                "rank's own tensors hold, so that some would wait for others without end. Use another cache."
            )

    def _take_over(self, transformer: Transformer) -> None:
        ranks, plan = ranks_of(transformer), self._family.sequence_split(transformer)
        if plan is None:
            raise ValueError(
                f"`parallel_config` must be None: a {type(transformer).__name__} cannot be split among GPUs, as there "
                "is no plan for its sequence."
            )
        self._ranks = ranks
        for module in transformer.modules():
            registry = vars(module).get("_diffusers_hook")
            for name in () if registry is None else tuple(registry.hooks):
                if name.startswith(HOOK_PREFIXES):
                    self._removed.append((module, name, registry.hooks[name]))
                    remove_hook(registry, name)
        for module in transformer.modules():
            processor: Any = getattr(module, "processor", None)
            if hasattr(processor, "_parallel_config"):
                self._processors.append(processor)
                processor._parallel_config = None
        for name, make in plan.cut_keys.items():
            for attention in modules_of_name(transformer, name):
                previous = attention.processor
                attention.set_processor(make(CutKeys(lambda: self.shards), previous))
                self._replaced.append((attention, attention.processor, previous))
        self._hooks = SplitHooks(transformer, plan, lambda: self.shards)
        self._text_apart = plan.text_apart

    def _forget(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = self._ranks = self.shards = None
        for attention, processor, previous in self._replaced:
            if attention.processor is processor:  # somebody else's, set since, stays
                attention.set_processor(previous)
        self._removed, self._processors, self._replaced = [], [], []
        self._shards.clear()
        self._shares.clear()

    def release(self, transformer: Transformer) -> None:
        """Give the sequence back to Diffusers, as `enable_parallelism` would have cut it."""
        transformer.__dict__.pop("_cp_plan", None)
        if self._ranks is None or getattr(transformer, "_parallel_config", None) is None:
            self._forget()
            return
        context, plan = _ulysses(self._config), type(transformer)._cp_plan
        removed, processors = self._removed, self._processors
        self._forget()
        if plan is None:
            logger.warning(
                f"Diffusers cannot split a {type(transformer).__name__}: without BLADE, every rank computes the whole "
                "video."
            )
            return
        for processor in processors:
            processor._parallel_config = self._config
        for module, name, hook in removed:
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
        if not removed:
            from diffusers.hooks.context_parallel import apply_context_parallel

            apply_context_parallel(transformer, context, plan)

    def begin(self, grid: TokenGrid) -> None:
        """Split the tokens of a pass.

        Raises:
            ValueError: if there are fewer tokens than ranks.
        """
        assert self._ranks is not None
        if grid not in self._shards:
            text = grid.text_tokens if self._text_apart else 0
            video = grid.sequence_length - text
            if video < self._ranks.count:
                raise ValueError(
                    f"`ulysses_degree` must be at most the number of tokens, {video} here, got {self._ranks.count}."
                )
            self._shards[grid] = TokenShards(self._ranks, video, text)
        self.shards = self._shards[grid]

    def share(self, heads: int, costs: tuple[float, ...] | None, device: torch.device) -> HeadShare | None:
        """Deal the heads of a layer, by cost where costs are given; None on one rank."""
        if self.shards is None:
            return None
        key = (self.shards, heads, costs, device)
        if key not in self._shares:
            deal = deal_heads(costs or (1.0,) * heads, self.shards.ranks.count)
            self._shares[key] = HeadShare(self.shards, deal, device)
        return self._shares[key]

    def split_inputs(self, inputs: Inputs) -> Inputs:
        """Return the transformer's inputs, in token order, as this rank has them."""
        return inputs if self._hooks is None else self._hooks.split_inputs(inputs)

    @torch.no_grad()
    def sum_densities(self, layers: Sequence[SparseLayer]) -> None:
        """Note in every layer the density of a pass over the heads of all ranks."""
        if self._ranks is None:
            return
        parts = torch.cat([layer.density_part for layer in layers])
        dist.all_reduce(parts, group=self._ranks.group)
        for layer, density in zip(layers, parts.split(1)):
            layer.tally[0:1].add_(density)
            layer.density_part.zero_()


def ranks_of(transformer: nn.Module) -> Ranks | None:
    """Return the ranks that compute one video together with a transformer; None: it is whole on one.

    Raises:
        ValueError: if it is split by another parallelism than Ulysses.
    """
    config = getattr(transformer, "_parallel_config", None)
    if config is None:
        return None
    context = _ulysses(config)
    mesh = context._ulysses_mesh
    return Ranks(mesh.get_group(), mesh.get_local_rank(), context.ulysses_degree)


def _ulysses(config: Any) -> Any:
    """Return Diffusers' configuration of the context parallelism.

    Raises:
        ValueError: if it is a ring's, or tensor parallelism.
    """
    context = getattr(config, "context_parallel_config", config)
    if context is None:
        raise ValueError(
            "`parallel_config` must be a ContextParallelConfig with BLADE, got tensor parallelism, which cuts the "
            "projections whose heads BLADE reads."
        )
    if context.ring_degree > 1:
        raise ValueError(
            f"`ring_degree` must be 1 with BLADE, got {context.ring_degree}: a ring shows a rank a part of the keys "
            "at a time, while a head's key blocks are chosen among all keys. Give `ulysses_degree` instead."
        )
    return context
