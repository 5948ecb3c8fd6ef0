"""Diffusers' caches in two settings each, one that never skips, and one that skips some of four steps."""

from __future__ import annotations

import inspect
import re
from contextlib import nullcontext

import diffusers
import pytest
import torch
from diffusers import CacheMixin

from blade.families.registry import find_family

ATTENTION_HOOKS = {"pyramid_attention_broadcast", "faster_cache_block"}
STEPS = 4
TIMES = (900.0, 700.0, 500.0, 300.0)


def attention_names(transformer):
    """Patterns of the names of the self-attention modules."""
    wanted = {id(module) for module in find_family(transformer).attention_layers(transformer)}
    return [re.escape(name) for name, module in transformer.named_modules() if id(module) in wanted]


def _latents(module, args, kwargs):
    """Latents that SeaCache's indicator is made of: (C, T, H, W) each, of whatever shape the latents are."""
    return [latent.reshape(latent.shape[0], -1, 1, 1) for latent in kwargs["hidden_states"]]


def first_block(transformer, skips):
    return {"threshold": 1e9 if skips else -1.0}


def mag(transformer, skips):
    return {
        "mag_ratios": [1.0] * STEPS,
        "num_inference_steps": STEPS,
        "retention_ratio": 0.0,
        "max_skip_steps": 1 if skips else 0,
    }


def taylor_seer(transformer, skips):
    return {
        "cache_interval": 2 if skips else 1,
        "disable_cache_before_step": 1,
        "taylor_factors_dtype": torch.float32,
        "cache_identifiers": attention_names(transformer),
    }


def taylor_seer_lite(transformer, skips):
    return {
        "cache_interval": 2 if skips else 1,
        "disable_cache_before_step": 1,
        "taylor_factors_dtype": torch.float32,
        "use_lite_mode": True,
    }


def pyramid(transformer, skips):
    return {
        "spatial_attention_block_skip_range": 2 if skips else 1,
        "current_timestep_callback": lambda: transformer.time_now,
    }


def faster(transformer, skips):
    return {
        "is_guidance_distilled": True,
        "spatial_attention_timestep_skip_range": (-1, 681) if skips else (-1, -1),
        "current_timestep_callback": lambda: transformer.time_now,
    }


def sea(transformer, skips):
    return {"threshold": 1e9 if skips else 0.0, "cache_end_steps": 0, "raw_vision_callback": _latents}


CACHES = {
    "first-block": ("FirstBlockCacheConfig", first_block),
    "mag": ("MagCacheConfig", mag),
    "taylor-seer": ("TaylorSeerCacheConfig", taylor_seer),
    "taylor-seer-lite": ("TaylorSeerCacheConfig", taylor_seer_lite),
    "pyramid": ("PyramidAttentionBroadcastConfig", pyramid),
    "faster": ("FasterCacheConfig", faster),
    "sea": ("SeaCacheConfig", sea),
}
"""Name of the configuration in Diffusers, and its values."""


def enable(transformer, cache, skips):
    """Enable a cache, or skip the test where this Diffusers lacks it or does not know the transformer."""
    name, _ = CACHES[cache]
    if not hasattr(diffusers, name):
        pytest.skip(f"Diffusers {diffusers.__version__} has no {name}")
    problem = find_family(transformer).cache_problem(transformer, cache)
    if problem is not None:
        pytest.skip(f"refused: {problem}")
    enable_unchecked(transformer, cache, skips)
    if cache in ("pyramid", "faster") and not set(hooks_of(transformer)) & ATTENTION_HOOKS:
        pytest.skip("Diffusers' cache does not know the attention of this transformer")
    return transformer


def enable_unchecked(transformer, cache, skips):
    """Enable a cache, or skip the test where Diffusers does not know the transformer; it may be broken there."""
    name, values = CACHES[cache]
    try:
        transformer.enable_cache(getattr(diffusers, name)(**values(transformer, skips)))
    except (ValueError, AttributeError) as error:
        pytest.skip(f"Diffusers' cache does not know this transformer: {error}")
    return transformer


def steps_of(family, **options):
    """Inputs of four steps: latents that change slowly, lower and lower times, one condition."""
    first = family.inputs(**options, timestep=TIMES[0])
    noise = torch.randn(first["hidden_states"].shape, generator=torch.Generator().manual_seed(5))
    return [
        {
            **first,
            "hidden_states": first["hidden_states"] + 0.2 * index * noise,
            "timestep": family.inputs(**options, timestep=time)["timestep"],
        }
        for index, time in enumerate(TIMES)
    ]


def context(transformer, name, index):
    """The context in which a pipeline names a pass and its step, as far as this Diffusers takes them."""
    if len(inspect.signature(CacheMixin.cache_context).parameters) == 2:  # itself and a name
        return transformer.cache_context(name)
    return transformer.cache_context(name, step_index=index, num_inference_steps=STEPS, sigma=TIMES[index] / 1000)


def run_steps(transformer, steps, names=("cond",)):
    """Outputs of all steps, each with a pass for every name; the caches start over, as at a pipeline's end."""
    outputs = []
    for index, (inputs, time) in enumerate(zip(steps, TIMES)):
        transformer.time_now = time
        passes = inputs if isinstance(inputs, list) else [inputs]
        for name, given in zip(names, passes):
            with context(transformer, name, index) if name else nullcontext(), torch.no_grad():
                outputs.append(transformer(**given).sample)
    transformer._reset_stateful_cache()
    return torch.stack(outputs)


def hooks_of(transformer):
    """Names of all hooks of Diffusers on a transformer and its modules."""
    registries = [vars(module).get("_diffusers_hook") for module in transformer.modules()]
    return [name for registry in registries if registry is not None for name in registry.hooks]
