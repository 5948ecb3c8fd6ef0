"""Applying BLADE to a Diffusers pipeline or transformer, and taking it off again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar, Unpack

from torch import nn

from blade.attention.applied import AppliedBlade, applied_to
from blade.attention.config import BladeConfig, ConfigChanges
from blade.common.rollback import unchanged_on_error
from blade.common.terminal import logger
from blade.families.kinds import PresetKind
from blade.families.registry import available_kind, find_family
from blade.families.transformers import find_transformers

Target = TypeVar("Target")


STUDENT_ATTRIBUTE = "_blade_student"
"""Attribute of pipelines and transformers with a student; its `student` is a `blade.students.description.Student`."""


Configs = BladeConfig | Mapping[str, BladeConfig]
"""One configuration for every transformer, or one for each by its name in the pipeline."""


def apply_blade(
    pipe_or_transformer: Target,
    config: Configs | None = None,
    *,
    kind: PresetKind | None = None,
    **changes: Unpack[ConfigChanges],
) -> Target:
    """Make the self-attention of a pipeline's transformers block-sparse.

    `apply_blade(pipe, sparsity=0.6)` takes the model's preset with another sparsity. `BladeConfig(sparsity=0.6)` is no
    such preset: it has no dense steps or layers, and a warning says so where the preset has some.

    Order with the rest of Diffusers: quantise, load LoRA weights, `apply_blade`, `enable_cache`, compile.

    Args:
        pipe_or_transformer: a Diffusers pipeline, of which every transformer is changed in place, or one transformer.
            With a pipeline, steps are counted by its scheduler.
        config: the configuration, or one for each transformer of a pipeline by name, such as `{"transformer_2": ...}`;
            those not named stay without BLADE. None recognises the model and takes its preset.
        kind: the kind of the preset. By default `training-free`, or `few-step` after `load_student` of a student that
            has no sparse attention of its own.
        changes: fields of `BladeConfig` to change in the configuration, or in the preset.

    Returns:
        The same object. A second call replaces the first.

    Raises:
        ValueError: if the model is of no family that BLADE knows, has no preset of the `kind`, or is split by a
            parallelism; if `dense_layers` names a layer that it doesn't have, a change is no field of `BladeConfig`,
            or both `config` and `kind` are given; or, with `strict`, if a layer cannot be made sparse. Nothing is
            changed then.

    Example:
        ```python
        from blade import apply_blade

        apply_blade(pipe)  # the model's preset
        apply_blade(pipe, sparsity=0.6)  # the preset with another sparsity
        ```
    """
    given = list(config.values()) if isinstance(config, Mapping) else [] if config is None else [config]
    for one in given:
        if not isinstance(one, BladeConfig):
            raise ValueError(f"`config` must be a BladeConfig, or several by name, or None, got {type(one).__name__}.")
    kinds = [kind, *(one.kind for one in given)]
    if "student" in kinds and not hasattr(pipe_or_transformer, STUDENT_ATTRIBUTE):
        warnings.warn(
            "These are a student's values, for weights that were trained with them; on ordinary weights the video "
            'suffers badly. Use a preset of `kind="training-free"` instead.',
            UserWarning,
            stacklevel=2,
        )
    configs = changed_configs(pipe_or_transformer, config, changes, kind)
    if config is None and kind is None and isinstance(configs, Mapping):
        for name, taken in configs.items():
            if taken.kind == "few-step":
                source = _student(pipe_or_transformer).source
                logger.info(f"{name} takes the few-step preset: the student {source} has no sparse attention.")
    if not _warn_of_lost_training(pipe_or_transformer, configs):
        _warn_of_lost_presets(pipe_or_transformer, configs, changes)
    install_blade(pipe_or_transformer, configs)
    return pipe_or_transformer


def remove_blade(pipe_or_transformer: Target) -> Target:
    """Put everything back as it was before `apply_blade`; does nothing where BLADE isn't applied.

    Args:
        pipe_or_transformer: what `apply_blade` was given.

    Returns:
        The same object.

    Raises:
        ValueError: if cache-dit was enabled since; call `cache_dit.disable_cache` first.

    Example:
        ```python
        from blade import apply_blade, remove_blade

        apply_blade(pipe)
        remove_blade(pipe)
        ```
    """
    transformers = find_transformers(pipe_or_transformer).values()
    with unchanged_on_error(*transformers):
        for transformer in transformers:
            applied = applied_to(transformer)
            if applied is not None:
                applied.uninstall(transformer)
    return pipe_or_transformer


@contextmanager
def use_blade(
    pipe_or_transformer: Target,
    config: Configs | None = None,
    *,
    kind: PresetKind | None = None,
    **changes: Unpack[ConfigChanges],
) -> Iterator[Target]:
    """Apply BLADE inside a `with` block; what was applied before is put back at its end.

    Args:
        pipe_or_transformer: see `apply_blade`.
        config: see `apply_blade`.
        kind: see `apply_blade`.
        changes: see `apply_blade`.

    Example:
        ```python
        from blade import use_blade

        with use_blade(pipe, sparsity=0.6):
            pipe("a red ball moving right", height=96, width=96, num_frames=9, num_inference_steps=2)
        ```
    """
    transformers = find_transformers(pipe_or_transformer)
    before = {name: applied_to(transformer) for name, transformer in transformers.items()}
    apply_blade(pipe_or_transformer, config, kind=kind, **changes)
    try:
        yield pipe_or_transformer
    finally:
        remove_blade(pipe_or_transformer)
        with unchanged_on_error(*transformers.values()):
            for name, applied in before.items():
                if applied is not None:
                    applied.install(transformers[name])


def changed_configs(
    pipe_or_transformer: Any, config: Configs | None, changes: Mapping[str, Any], kind: PresetKind | None = None
) -> Configs:
    """Return configurations with changes, those of the presets where none is given.

    Raises:
        ValueError: if a change is no field of `BladeConfig`, there is no such preset, or both are given.
    """
    if kind is not None and config is not None:
        raise ValueError(f"`kind` must not be given with `config`: it names a preset of the model's, got {kind!r}.")
    names = [item.name for item in fields(BladeConfig)]
    unknown = [name for name in changes if name not in names]
    if unknown:
        raise ValueError(f"`{unknown[0]}` must be a field of BladeConfig: {', '.join(names)}.")
    if changes.get("attention") == "asa-gt":  # which says what is pooled, whatever the configuration says of it
        changes = {"pooled_tokens": "all", **changes}
    if isinstance(config, BladeConfig):
        return replace(config, **changes)
    configs = config or {
        name: _preset(part, pipe_or_transformer, kind) for name, part in find_transformers(pipe_or_transformer).items()
    }
    return {name: replace(one, **changes) for name, one in configs.items()}


def _student(pipe_or_transformer: Any) -> Any:
    """Return the student that is loaded onto a pipeline or transformer, or None."""
    return getattr(getattr(pipe_or_transformer, STUDENT_ATTRIBUTE, None), "student", None)


def _preset(transformer: nn.Module, pipe: Any, kind: PresetKind | None = None) -> BladeConfig:
    """Return a transformer's preset of a kind; None: of the one that suits the weights of its pipeline."""
    name, student = find_family(transformer).preset_name(transformer), _student(pipe)
    if kind is None:
        kind = "training-free" if student is None else available_kind(name, student.preset_kind)
    return BladeConfig.from_preset(name, kind)


def _warn_of_lost_training(pipe_or_transformer: Any, configs: Configs) -> bool:
    """Warn of sparse attention in place of the one that a loaded student was trained with; return whether it is."""
    student = _student(pipe_or_transformer)
    trained = None if student is None else student.config
    if trained is None or trained.attention == "dense":
        return False
    for config in [configs] if isinstance(configs, BladeConfig) else configs.values():
        same = {name: getattr(config, name) for name in ("kind", "implementation", "precision", "strict", "seed")}
        if config.attention != "dense" and config != replace(trained, **same):
            warnings.warn(
                f"The student {student.source} was trained with {trained.attention} at sparsity {trained.sparsity:g}, "
                "which this attention replaces. `apply_blade(pipe, student.config)` puts it back, with the `student` "
                "that `load_student` returned.",
                UserWarning,
                stacklevel=3,
            )
            return True
    return False


def _warn_of_lost_presets(pipe_or_transformer: Any, configs: Configs, changes: Mapping[str, Any]) -> None:
    """Warn of a configuration that keeps nothing dense where the model's preset does."""
    if "dense_steps" in changes or "dense_layers" in changes:
        return
    for name, transformer in find_transformers(pipe_or_transformer).items():
        config = configs if isinstance(configs, BladeConfig) else configs.get(name)
        if config is None or config.kind != "training-free" or config.attention != "asa" or config.sparsity == 0:
            continue
        if config.dense_steps or config.dense_layers:
            continue
        preset = _preset(transformer, pipe_or_transformer)
        warnings.warn(
            "This BladeConfig keeps no steps or layers dense, while the model's preset has dense_steps="
            f"{preset.dense_steps}, dense_layers={preset.dense_layers} and blocks of {preset.asa.block_size} tokens. "
            f"`apply_blade(pipe, sparsity={config.sparsity:g})` starts from the preset; "
            "`apply_blade(pipe, config, dense_steps=0)` says that this is meant.",
            UserWarning,
            stacklevel=3,
        )
        return


def install_blade(pipe_or_transformer: Any, config: Configs | None) -> None:
    """Apply BLADE as `apply_blade` does, without asking whether the weights suit the configuration."""
    transformers = find_transformers(pipe_or_transformer)
    pipe = None if isinstance(pipe_or_transformer, nn.Module) else pipe_or_transformer
    if isinstance(config, Mapping) and (unknown := [name for name in config if name not in transformers]):
        raise ValueError(f"`config` must be for {' and '.join(transformers)}, got one for {unknown[0]!r}.")
    with unchanged_on_error(*transformers.values()):
        remove_blade(pipe_or_transformer)
        for name, transformer in transformers.items():
            if isinstance(config, Mapping) and name not in config:
                continue
            own_config = config[name] if isinstance(config, Mapping) else config
            own_config = own_config or _preset(transformer, pipe_or_transformer)
            AppliedBlade(transformer, find_family(transformer), own_config, pipe).install(transformer)
