"""Caches: Diffusers' and cache-dit's reuse of what changes little from step to step."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import diffusers

from blade.common.errors import first_line
from blade.common.rollback import unchanged_on_error
from blade.families.transformers import Transformer
from blade.models.choices import parse_cache
from blade.models.loaded import LoadedModel

ONE_STATE = ("pyramid", "faster")
"""Caches that keep one state for all passes of a step."""

OF_ATTENTION = ("taylor-seer", "pyramid", "faster")
"""Caches that skip attention, where they know it."""

STATE_BY_CONTEXT = ("first-block", "mag", "sea", "taylor-seer")
"""Caches that tell the passes of a step apart by the name that the pipeline gives each, `cache_context(name)`."""

MOST_FIRST_BLOCKS = 8
"""Blocks that cache-dit computes at every step, where the model has several times as many; its own default."""


def enable_cache(model: LoadedModel, text: str, *, steps: int, guidance: bool) -> None:
    """Enable a cache on all transformers of a model.

    Args:
        model: the model.
        text: one of `CACHES`, with "=NUMBER" or without.
        steps: denoising steps of a run.
        guidance: whether every step has two passes, for classifier-free guidance.

    Raises:
        ValueError: if there is no such cache, it does not know this model, is wrong with it, or needs what is not
            there. Nothing is changed then.
    """
    name, number = parse_cache(text)
    _check(model, name, guidance=guidance)
    with unchanged_on_error(model.pipe, *model.transformers.values()):
        if name == "cache-dit":
            _enable_cache_dit(model, number, guidance=guidance)
            return
        for transformer in model.transformers.values():
            kind = type(transformer).__name__
            try:
                transformer.enable_cache(_config(model, transformer, name, number, steps=steps, guidance=guidance))
            except (ValueError, AttributeError, NotImplementedError) as error:
                known = f"`cache` {name} is not known to Diffusers for a {kind}"
                raise ValueError(f"{known}: {first_line(error)}") from error
            if name in OF_ATTENTION and not _attention_hooks(model, transformer):
                raise ValueError(f"`cache` {name} does not know the attention of a {kind}; use another cache.")
            if name == "sea" and transformer._diffusers_hook.get_hook("sea_cache_root").raw_vision_callback is None:
                raise ValueError(f"`cache` sea is not known to Diffusers for this {kind}; use another cache.")


def _check(model: LoadedModel, name: str, *, guidance: bool) -> None:
    """Refuse what Diffusers would do wrongly, or fail at in the middle of a run."""
    family, pipeline = model.family, type(model.pipe).__name__
    for transformer in model.transformers.values():
        problem = family.cache_problem(transformer, name)
        if problem is not None:
            raise ValueError(f"`cache` must not be {name}: {problem}; use another cache.")
    if name in ONE_STATE and guidance:
        if family.batched_guidance is None:
            raise ValueError(
                f"`cache` must not be {name} with guidance: a {pipeline} runs its passes one after the other, and "
                "Diffusers keeps one state for all, so that each would get another's attention. Use another cache, "
                "or a `guidance_scale` of 1."
            )
        if name == "faster" and family.batched_guidance == "tokens":
            raise ValueError(
                f"`cache` must not be faster with guidance: it takes latents of height and width, and a {pipeline} "
                "packs them into tokens. Use another cache, or a `guidance_scale` of 1."
            )
    if name in STATE_BY_CONTEXT and not _names_passes(model.pipe):
        raise ValueError(
            f"`cache` must not be {name}: a {pipeline} does not name its passes (`cache_context`), which this cache "
            "tells apart by their names."
        )
    if name == "mag" and model.preset_name not in family.data.magnitude_ratios:
        raise ValueError(
            f"`cache` mag needs the magnitude ratios of these weights, and none are known for {model.preset_name}; "
            "use another cache. `scripts/calibrate_mag_cache.py` measures them, for MagCacheConfig(mag_ratios=...)."
        )


def _names_passes(pipe: Any) -> bool:
    """Return whether a pipeline's call names its passes; those made of blocks, whose call says nothing of it, do."""
    if not isinstance(pipe, diffusers.DiffusionPipeline):
        return True
    calls = [inspect.unwrap(vars(base)["__call__"]) for base in type(pipe).__mro__ if "__call__" in vars(base)]
    return any("cache_context" in call.__code__.co_names for call in calls)


def _config(
    model: LoadedModel, transformer: Transformer, name: str, number: float, *, steps: int, guidance: bool
) -> Any:
    """Return Diffusers' configuration of a cache for a transformer."""

    def time_now() -> Any:
        return model.pipe.current_timestep

    kinds: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        "first-block": ("FirstBlockCacheConfig", lambda: {"threshold": number}),
        "mag": (
            "MagCacheConfig",
            lambda: {
                "threshold": number,
                "num_inference_steps": steps,
                "mag_ratios": list(model.family.data.magnitude_ratios[model.preset_name]),
            },
        ),
        "sea": ("SeaCacheConfig", lambda: {"threshold": number}),
        "taylor-seer": (
            "TaylorSeerCacheConfig",
            # by itself it looks for names that end in "attn", which most transformers do not have
            lambda: {"cache_interval": int(number), "cache_identifiers": _attention_names(model, transformer)},
        ),
        "pyramid": (
            "PyramidAttentionBroadcastConfig",
            lambda: {"spatial_attention_block_skip_range": int(number), "current_timestep_callback": time_now},
        ),
        "faster": (
            "FasterCacheConfig",
            lambda: {
                "spatial_attention_block_skip_range": int(number),
                "current_timestep_callback": time_now,
                "is_guidance_distilled": not guidance,
                "tensor_format": model.family.batched_guidance if guidance else "BCFHW",
                "attention_weight_callback": lambda module: 0.5,  # Diffusers' default, which it warns of
            },
        ),
    }
    config, options = kinds[name]
    if not hasattr(diffusers, config):
        raise ValueError(f"Diffusers {diffusers.__version__} has no {config}")
    return getattr(diffusers, config)(**options())


def _attention_hooks(model: LoadedModel, transformer: Transformer) -> list[str]:
    """Return the names of Diffusers' hooks on a transformer's self-attention modules."""
    registries = [vars(module).get("_diffusers_hook") for module in model.family.attention_layers(transformer)]
    return [name for registry in registries if registry is not None for name in registry.hooks]


def _attention_names(model: LoadedModel, transformer: Transformer) -> list[str]:
    """Return patterns of the names of a transformer's self-attention modules."""
    attentions = set(model.family.attention_layers(transformer))
    return [re.escape(name) for name, module in transformer.named_modules() if module in attentions]


def _enable_cache_dit(model: LoadedModel, threshold: float, *, guidance: bool) -> None:
    """Enable cache-dit's DBCache.

    Raises:
        ValueError: if cache-dit is not installed, or does not know the pipeline.
    """
    try:
        import cache_dit
    except ImportError:
        raise ValueError('`cache` cache-dit needs cache-dit: pip install "blade-video[cache-dit]".') from None
    blocks = min(len(model.family.blocks(transformer)) for transformer in model.transformers.values())
    config = cache_dit.DBCacheConfig(
        residual_diff_threshold=threshold,
        Fn_compute_blocks=max(1, min(MOST_FIRST_BLOCKS, blocks // 4)),
        enable_separate_cfg=guidance and model.family.batched_guidance is None,
    )
    try:
        cache_dit.enable_cache(model.pipe, cache_config=config)
    except (ValueError, AssertionError, KeyError) as error:
        cache_dit.disable_cache(model.pipe)
        pipeline = type(model.pipe).__name__
        raise ValueError(f"`cache` cache-dit does not know a {pipeline}: {first_line(error)}") from error
