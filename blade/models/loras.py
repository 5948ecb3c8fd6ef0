"""LoRAs: loading them onto a model, one file for all transformers or a file each, and merging them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blade.common.checks import shortened
from blade.common.errors import first_line
from blade.common.rollback import unchanged_on_error
from blade.common.terminal import logger
from blade.families.transformers import Transformer
from blade.models.adapters import Reach, check_reach
from blade.models.choices import parse_lora
from blade.models.loaded import LoadedModel
from blade.models.lora_files import read_lora
from blade.models.lora_layouts import Pair, Translation, translate
from blade.models.stored_weights import packed_layers

BOTH_LORAS = (
    "Name a source for each transformer: `--lora FIRST:SECOND=STRENGTH`, in Python "
    '`loras=("FIRST:SECOND=STRENGTH",)`; =STRENGTH:STRENGTH gives each its own, and 0 leaves a transformer as it is.'
)
"""Advice for a LoRA that is for one of two transformers."""

EXPECTED_WARNINGS = ("Already found a `peft_config`", "While injecting the PEFT adapters, an inconsistency")
"""Beginnings of PEFT's warnings of several adapters, and of names that end alike, of which the file has some alone."""

SHOWN_MODULES = 4
"""Most modules of a LoRA that a message names."""


@dataclass(frozen=True, eq=False)
class _Part:
    """What a file of a LoRA changes in a transformer."""

    transformer: Transformer
    translation: Translation
    strength: float


def load_loras(model: LoadedModel, loras: Sequence[str]) -> dict[str, Reach]:
    """Load LoRAs onto a pipeline, all active together, or none if one of them fails.

    Files are read in every common layout (`blade.models.lora_layouts`). Modules of a file that the model lacks, or
    that have another shape, are named in a warning. Differences of whole parameters are added to the weights at once.

    Args:
        model: the model.
        loras: folders, files or Hub ids, each with "=STRENGTH" or without; "FIRST:SECOND" for two transformers.

    Returns:
        By source, the number of modules that it changes in each transformer.

    Raises:
        ValueError: if one cannot be loaded onto this model, is pickled, or is for one of two transformers only.
    """
    check_sources(model, loras)
    reached: dict[str, Reach] = {}
    adapters: dict[str, list[_Part]] = {}
    with unchanged_on_error(model.pipe):
        for number, choice in enumerate(map(parse_lora, loras)):
            adapter, reach = f"lora_{number}", dict.fromkeys(model.transformers, 0)
            adapters[adapter] = []
            for source, strength, part in zip(choice.sources, choice.strengths, reach, strict=False):
                translation = _load_source(model, source, adapter, part)
                adapters[adapter].append(_Part(model.transformers[part], translation, strength))
                reach[part] = len(translation.modules)
            check_reach(f"`loras` {choice.name}", reach, BOTH_LORAS)
            reached[choice.name] = reach
        _activate(model, adapters)
    for changed in (changed for parts in adapters.values() for changed in parts):  # nothing fails any more
        for parameter, difference in changed.translation.differences:
            parameter.data.add_(difference.to(parameter), alpha=changed.strength)
    return reached


def check_sources(model: LoadedModel, loras: Sequence[str]) -> None:
    """Check that Diffusers loads LoRAs onto a model, and that none names two sources for one transformer.

    Args:
        model: the model, with its weights or without.
        loras: see `load_loras`.

    Raises:
        ValueError: if it does not, or one does.
    """
    if loras and not hasattr(model.pipe, "load_lora_weights"):
        raise ValueError(
            f"`loras` must not be given for a {type(model.pipe).__name__}: Diffusers loads no LoRAs onto it, got "
            f"{shortened(loras[0])}; merge it into the transformer's weights."
        )
    for choice in map(parse_lora, loras):
        if len(choice.sources) > len(model.transformers):
            raise ValueError(
                f"`loras` must name one source for a model of one transformer, got {choice.sources[0]} and "
                f"{choice.sources[1]}; give each its own `--lora` to load both."
            )


def _load_source(model: LoadedModel, source: str, adapter: str, part: str) -> Translation:
    """Load a file's pairs of matrices onto a transformer, and return all that it is to change there."""
    file, transformer = read_lora(source), model.transformers[part]
    translation = translate(file, transformer, model.family.original_names)
    unused = translation.unused
    shown = ", ".join(f"{module} ({reason})" for module, reason in list(unused.items())[:SHOWN_MODULES])
    shown += ", ..." if len(unused) > SHOWN_MODULES else ""
    count = len(translation.modules) + len(unused)
    if not translation.modules:
        raise ValueError(
            f"`loras` {source} cannot be loaded onto this model: none of its {count:,} modules fits {part}: "
            f"{shown or 'the file is empty'}. Take a LoRA that was trained from this model."
        )
    if unused:
        logger.warning(f"`loras` {source}: {len(unused):,} of {count:,} modules are left out of {part}: {shown}")
    if translation.pairs:
        _load_pairs(model, source, adapter, part, translation.pairs)
    return translation


def _load_pairs(model: LoadedModel, source: str, adapter: str, part: str, pairs: Mapping[str, Pair]) -> None:
    """Load pairs of matrices with Diffusers, in its own layout, and set their scales."""
    state = {}
    for module, pair in pairs.items():
        state[f"transformer.{module}.lora_A.weight"] = pair.down.contiguous()
        state[f"transformer.{module}.lora_B.weight"] = pair.up.contiguous()
    into = {"load_into_transformer_2": True} if part == "transformer_2" else {}
    try:
        with warnings.catch_warnings():
            for message in EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            model.pipe.load_lora_weights(state, adapter_name=adapter, **into)
    except Exception as error:  # whatever Diffusers and PEFT raise
        raise ValueError(f"`loras` {source} cannot be loaded onto this model: {first_line(error)}") from error
    for module, pair in pairs.items():
        layer: Any = model.transformers[part].get_submodule(module)
        layer.lora_alpha[adapter] = pair.scale * layer.r[adapter]


def _activate(model: LoadedModel, adapters: Mapping[str, Sequence[_Part]]) -> None:
    """Make the adapters active together, each with its strength in each transformer."""
    for transformer in model.transformers.values():
        strengths = {
            adapter: part.strength
            for adapter, parts in adapters.items()
            for part in parts
            if part.transformer is transformer and part.translation.pairs
        }
        if strengths:
            transformer.set_adapters(list(strengths), list(strengths.values()))


def merge_loras(model: LoadedModel) -> None:
    """Add all LoRAs, a student's too, to the transformers' weights, where they cost no time; none can be taken off.

    They stay beside weights that are stored in fewer bits, in which their sum would have to be rounded.

    Args:
        model: the model, its LoRAs loaded.
    """
    if any(next(packed_layers(transformer), None) for transformer in model.transformers.values()):
        return
    names = [name for name, transformer in model.transformers.items() if getattr(transformer, "peft_config", None)]
    if names:  # by the pipeline, which notes what it has merged
        model.pipe.fuse_lora(components=names)
        model.pipe.unload_lora_weights()
