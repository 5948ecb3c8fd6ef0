"""The place of BLADE's hook: innermost, next to the transformer's own forward.

Whatever else stands around the forward then sees tokens in raster order, whichever came first: caches of Diffusers
that wrap the whole transformer (FasterCache, SeaCache), and offloading.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook

from blade.families.transformers import Transformer


def register_innermost(transformer: Transformer, hook: ModelHook, name: str) -> Any:
    """Put a hook beneath all others of Diffusers, and beneath Accelerate's.

    Args:
        transformer: the transformer.
        hook: a hook without a `new_forward`.
        name: its name in the registry.

    Returns:
        The forward that runs the hook.
    """
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    if not registry._fn_refs:
        with _beneath_offloading(transformer):
            registry.register_hook(hook, name)
            innermost = transformer.forward
        _let_cache_dit_put_back(innermost)
        return innermost
    above, outermost = registry._fn_refs[0], transformer.forward
    calls = "forward" if above.original_forward is None else "original_forward"
    transformer.forward = getattr(above, calls)
    registry.register_hook(hook, name)
    innermost, transformer.forward = transformer.forward, outermost
    setattr(above, calls, innermost)
    for listed in (registry._hook_order, registry._fn_refs):
        listed.insert(0, listed.pop())
    return innermost


def remove_innermost(transformer: Transformer, name: str, innermost: Any) -> None:
    """Take such a hook off; whatever stands around it stays.

    Args:
        transformer: the transformer.
        name: the hook's name in the registry.
        innermost: what `register_innermost` returned.

    Raises:
        ValueError: if cache-dit was enabled since; it holds on to the forward that it has wrapped.
    """
    if is_wrapped_by_cache_dit(transformer) and transformer._original_forward is innermost:
        raise ValueError("cache-dit was enabled after `apply_blade`: call `cache_dit.disable_cache` first.")
    registry = transformer._diffusers_hook
    if registry._hook_order[-1] != name:
        remove_hook(registry, name)
        return
    with _beneath_offloading(transformer):
        current = transformer.forward
        registry.remove_hook(name, recurse=False)
        if current is not innermost:  # somebody has put another forward there since, which stays
            transformer.forward = current


def remove_hook(registry: HookRegistry, name: str) -> None:
    """Take a hook off a module alone; the `new_forward` of a hook above, which Diffusers would lose, stays."""
    above = registry._fn_refs[registry._hook_order.index(name) + 1 :]
    replaced = above[0].forward if above else None
    registry.remove_hook(name, recurse=False)
    if above and above[0].original_forward is not None:
        above[0].original_forward, above[0].forward = above[0].forward, replaced


def _let_cache_dit_put_back(forward: Any) -> None:
    """Give a forward the `__get__` that `cache_dit.disable_cache` calls, and a `partial` lacks before Python 3.14."""

    def bound(transformer: Transformer) -> Any:
        if transformer._original_forward is not forward:  # a hook above has copied this attribute
            raise AttributeError("__get__")
        return forward

    forward.__get__ = bound


def is_wrapped_by_cache_dit(transformer: Transformer) -> bool:
    """Return whether cache-dit is enabled on a transformer."""
    return hasattr(transformer, "_original_forward") and getattr(transformer, "_is_cached", False) is True


@contextmanager
def _beneath_offloading(transformer: Transformer) -> Iterator[None]:
    """Lift Accelerate's offloading hook off for a moment, so that ours goes beneath it.

    Accelerate puts back the forward that it found whenever it takes its hook off, which `enable_model_cpu_offload`
    does after every generation: a hook above it would then be lost.
    """
    if not hasattr(transformer, "_old_forward"):
        yield
        return
    outer = transformer.forward
    transformer.forward = transformer._old_forward
    try:
        yield
    finally:
        transformer._old_forward = transformer.forward
        transformer.forward = outer
