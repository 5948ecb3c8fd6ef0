"""Applying BLADE to a Diffusers pipeline or transformer, and taking it off again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from blade.attention.applied import AppliedBlade, applied_to
from blade.attention.config import BladeConfig
from blade.families.registry import find_family
from blade.families.transformers import find_transformers

Target = TypeVar("Target")


STUDENT_ATTRIBUTE = "_blade_student"
"""Attribute of a pipeline that a student was loaded onto."""


Configs = BladeConfig | Mapping[str, BladeConfig]
"""One configuration for every transformer, or one for each by its name in the pipeline."""


def apply_blade(pipe_or_transformer: Target, config: Configs | None = None) -> Target:
    """Make the self-attention of a pipeline's transformers block-sparse.

    Order with the rest of Diffusers: quantise, load LoRA weights, `apply_blade`, `enable_cache`, compile.

    Args:
        pipe_or_transformer: a Diffusers pipeline, of which every transformer is changed in place, or one transformer.
            With a pipeline, steps are counted by its scheduler.
        config: the configuration, or one for each transformer of a pipeline by name, such as `{"transformer_2": ...}`;
            those not named stay without BLADE. None recognises the model and takes its training-free preset.

    Returns:
        The same object. A second call replaces the first.

    Raises:
        ValueError: if the model is of no family that BLADE knows, `dense_layers` names a layer that it doesn't have,
            it is split by a parallelism, a cache that wraps the whole transformer is enabled, or, with `strict`, a
            layer cannot be made sparse. Nothing is changed then.
    """
    given = list(config.values()) if isinstance(config, Mapping) else [] if config is None else [config]
    for one in given:
        if not isinstance(one, BladeConfig):
            raise ValueError(f"`config` must be a BladeConfig, or several by name, or None, got {type(one).__name__}.")
    if any(one.kind == "student" for one in given) and not hasattr(pipe_or_transformer, STUDENT_ATTRIBUTE):
        warnings.warn(
            "These are a student's values, for weights that were trained with them; on ordinary weights the video "
            'suffers badly. Use a preset of `kind="training-free"` instead.',
            UserWarning,
            stacklevel=2,
        )
    install_blade(pipe_or_transformer, config)
    return pipe_or_transformer


def remove_blade(pipe_or_transformer: Target) -> Target:
    """Put everything back as it was before `apply_blade`; does nothing where BLADE isn't applied.

    Args:
        pipe_or_transformer: what `apply_blade` was given.

    Returns:
        The same object.

    Raises:
        ValueError: if a cache that wraps the whole transformer (FasterCache) was enabled since.
    """
    for transformer in find_transformers(pipe_or_transformer).values():
        applied = applied_to(transformer)
        if applied is not None:
            applied.uninstall(transformer)
    return pipe_or_transformer


@contextmanager
def use_blade(pipe_or_transformer: Target, config: Configs | None = None) -> Iterator[Target]:
    """Apply BLADE inside a `with` block; what was applied before is put back at its end.

    Args:
        pipe_or_transformer: see `apply_blade`.
        config: see `apply_blade`.
    """
    transformers = find_transformers(pipe_or_transformer)
    before = {name: applied_to(transformer) for name, transformer in transformers.items()}
    apply_blade(pipe_or_transformer, config)
    try:
        yield pipe_or_transformer
    finally:
        remove_blade(pipe_or_transformer)
        _install(transformers, before)


def install_blade(pipe_or_transformer: Any, config: Configs | None) -> None:
    """Apply BLADE as `apply_blade` does, without asking whether the weights suit the configuration."""
    transformers = find_transformers(pipe_or_transformer)
    pipe = None if isinstance(pipe_or_transformer, nn.Module) else pipe_or_transformer
    before = {name: applied_to(transformer) for name, transformer in transformers.items()}
    if isinstance(config, Mapping) and (unknown := [name for name in config if name not in transformers]):
        raise ValueError(f"`config` must be for {' and '.join(transformers)}, got one for {unknown[0]!r}.")
    remove_blade(pipe_or_transformer)
    new: dict[str, AppliedBlade | None] = dict.fromkeys(transformers)
    try:
        for name, transformer in transformers.items():
            if isinstance(config, Mapping) and name not in config:
                continue
            family = find_family(transformer)
            own_config = config[name] if isinstance(config, Mapping) else config
            own_config = own_config or BladeConfig.from_preset(family.preset_name(transformer))
            new[name] = AppliedBlade(transformer, family, own_config, pipe)
    except Exception:
        _install(transformers, before)
        raise
    _install(transformers, new)


def _install(transformers: dict[str, nn.Module], applied: dict[str, AppliedBlade | None]) -> None:
    for name, transformer in transformers.items():
        hook = applied[name]
        if hook is not None:
            hook.install(transformer)
