"""LoRAs: loading them onto a model, one file for all transformers or a file each, and merging them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from blade.common.errors import first_line
from blade.common.rollback import unchanged_on_error
from blade.common.terminal import logger
from blade.families.transformers import Transformer
from blade.models.adapters import Reach, adapter_layers, check_reach, unused_keys
from blade.models.choices import LoraChoice, parse_lora
from blade.models.loaded import LoadedModel
from blade.models.untrusted import find_lora

BOTH_LORAS = (
    "Name a source for each transformer: `--lora FIRST:SECOND=STRENGTH`, in Python "
    '`loras=("FIRST:SECOND=STRENGTH",)`; =STRENGTH:STRENGTH gives each its own, and 0 leaves a transformer as it is.'
)
"""Advice for a LoRA that is for one of two transformers."""

LOADERS = tuple(map(logging.getLogger, ("diffusers.loaders.peft", "diffusers.utils.peft_utils")))
"""Loggers of what Diffusers says about a LoRA's keys, in different versions."""

SHOWN_KEYS = 4
"""Most keys of a LoRA that a message names."""


def load_loras(model: LoadedModel, loras: Sequence[str]) -> dict[str, Reach]:
    """Load LoRAs onto a pipeline, all active together, or none if one of them fails.

    Keys of their files that match no module are told in a warning.

    Args:
        model: the model.
        loras: folders, files or Hub ids, each with "=STRENGTH" or without; "FIRST:SECOND" for two transformers.

    Returns:
        By source, the number of modules that it changes in each transformer.

    Raises:
        ValueError: if one cannot be loaded onto this model, is pickled, or is for one of two transformers only.
    """
    choices = [parse_lora(text) for text in loras]
    check_sources(model, loras)
    reached: dict[str, Reach] = {}
    with unchanged_on_error(model.pipe):
        for number, choice in enumerate(choices):
            reached[choice.name] = _load_lora(model, choice, f"lora_{number}")
        if choices:
            strengths = [_strengths(model, choice, f"lora_{number}") for number, choice in enumerate(choices)]
            model.pipe.set_adapters([f"lora_{number}" for number in range(len(choices))], strengths)
    return reached


def check_sources(model: LoadedModel, loras: Sequence[str]) -> None:
    """Check that no LoRA names two sources for a model of one transformer.

    Args:
        model: the model, with its weights or without.
        loras: see `load_loras`.

    Raises:
        ValueError: if one does.
    """
    for choice in map(parse_lora, loras):
        if len(choice.sources) > len(model.transformers):
            raise ValueError(
                f"`loras` must name one source for a model of one transformer, got {choice.sources[0]} and "
                f"{choice.sources[1]}; give each its own `--lora` to load both."
            )


def _load_lora(model: LoadedModel, choice: LoraChoice, adapter: str) -> Reach:
    """Load a LoRA's one or two files, and return how many modules they change in each transformer."""
    if len(choice.sources) == 1:
        _load_source(model, choice.sources[0], adapter, model.transformers)
    else:
        for source, (part, transformer) in zip(choice.sources, model.transformers.items(), strict=True):
            _load_source(model, source, adapter, {part: transformer})
    reach = {part: len(adapter_layers(transformer, adapter)) for part, transformer in model.transformers.items()}
    for source, part in zip(choice.sources, reach, strict=False):
        if len(choice.sources) > 1 and reach[part] == 0:
            raise ValueError(f"`loras` {source} holds no weights for this model's {part}.")
    check_reach(f"`loras` {choice.name}", reach, BOTH_LORAS)
    return reach


def _load_source(model: LoadedModel, source: str, adapter: str, transformers: Mapping[str, Transformer]) -> None:
    """Load a file onto the first of the transformers that it may change."""
    place = find_lora(source, f"`loras` {source}")
    into = {"load_into_transformer_2": True} if next(iter(transformers)) == "transformer_2" else {}
    try:
        with _without_unexpected_keys():  # which `_tell_unused` tells shorter, those of other parts too
            model.pipe.load_lora_weights(**place, adapter_name=adapter, **into)
    except Exception as error:  # whatever Diffusers, PEFT, safetensors and the Hub's client raise
        raise ValueError(f"`loras` {source} cannot be loaded onto this model: {first_line(error)}") from error
    _tell_unused(model, source, place, adapter, transformers)


def _strengths(model: LoadedModel, choice: LoraChoice, adapter: str) -> float | dict[str, float]:
    """Return what Diffusers' `set_adapters` takes for a LoRA: a strength, or those of the transformers it changes."""
    if len(set(choice.strengths)) == 1:
        return choice.strengths[0]
    return dict(zip(model.transformers, choice.strengths, strict=True))


@contextmanager
def _without_unexpected_keys() -> Iterator[None]:
    """Keep Diffusers from listing every key of a LoRA that matches nothing."""

    def is_other(record: logging.LogRecord) -> bool:
        return "unexpected keys" not in record.getMessage()

    for log in LOADERS:
        log.addFilter(is_other)
    try:
        yield
    finally:
        for log in LOADERS:
            log.removeFilter(is_other)


def _tell_unused(
    model: LoadedModel,
    source: str,
    place: Mapping[str, Any],
    adapter: str,
    transformers: Mapping[str, Transformer],
) -> None:
    """Warn of the keys of a LoRA's file that have no use."""
    state = model.pipe.lora_state_dict(**place)
    keys = state[0] if isinstance(state, tuple) else state
    unused = unused_keys(keys, transformers, adapter)
    if 0 < len(unused) < len(keys):  # where all of them are unknown, they are named in another way
        shown = ", ".join(unused[:SHOWN_KEYS]) + (", ..." if len(unused) > SHOWN_KEYS else "")
        logger.warning(
            f"`loras` {source}: {len(unused):,} of {len(keys):,} keys match no module of "
            f"{' or '.join(transformers)} and are left out: {shown}"
        )


def merge_loras(model: LoadedModel) -> None:
    """Add all LoRAs, a student's too, to the transformers' weights, where they cost no time; none can be taken off.

    Args:
        model: the model, its LoRAs loaded.
    """
    names = [name for name, transformer in model.transformers.items() if getattr(transformer, "peft_config", None)]
    if names:  # by the pipeline, which notes what it has merged
        model.pipe.fuse_lora(components=names)
        model.pipe.unload_lora_weights()
