"""LoRAs: loading them onto a model, one file for all transformers or a file each, and merging them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blade.common.checks import shortened
from blade.common.errors import first_line
from blade.common.rollback import unchanged_on_error
from blade.common.terminal import logger
from blade.families.transformers import Transformer
from blade.models.adapters import Reach, check_reach
from blade.models.choices import parse_lora
from blade.models.loaded import LoadedModel
from blade.models.lora_files import LoraFile, peek_lora, read_lora
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
class Part:
    """Changes that a file makes to a transformer."""

    transformer: Transformer
    """The transformer."""
    translation: Translation
    """The change; its pairs are an adapter of the transformer."""

    def apply_whole(self, strength: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Change whole parameters at once, as no adapter can.

        Args:
            strength: 1 for the change as the file has it.

        Returns:
            The parameters and their values before.
        """
        changes = [(parameter, difference, False) for parameter, difference in self.translation.differences]
        changes += [(parameter, value, True) for parameter, value in self.translation.replacements]
        before = [(parameter, parameter.detach().clone()) for parameter, _, _ in changes]
        try:
            for parameter, tensor, replaces in changes:
                tensor = tensor.to(parameter)
                if replaces:
                    parameter.data.lerp_(tensor, strength)  # which gives the tensor itself at 1
                else:
                    parameter.data.add_(tensor, alpha=strength)
        except BaseException:
            put_back(before)
            raise
        return before


def put_back(before: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give parameters the values that they had before; the later changes are undone first.

    Args:
        before: parameters and values, in the order of their changes.
    """
    for parameter, value in reversed(before):
        parameter.data.copy_(value)


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
    adapters: dict[str, list[tuple[Part, float]]] = {}
    with unchanged_on_error(model.pipe):
        for number, choice in enumerate(map(parse_lora, loras)):
            adapter, reach = f"lora_{number}", dict.fromkeys(model.transformers, 0)
            adapters[adapter] = []
            for source, strength, part in zip(choice.sources, choice.strengths, reach, strict=False):
                loaded = load_part(model, read_lora(source), adapter, part, f"`loras` {source}")
                adapters[adapter].append((loaded, strength))
                reach[part] = len(loaded.translation.modules)
            check_reach(f"`loras` {choice.name}", reach, BOTH_LORAS)
            reached[choice.name] = reach
        _activate(model, adapters)
    for changed, strength in (item for parts in adapters.values() for item in parts):  # nothing fails any more
        changed.apply_whole(strength)
    return reached


def peek_loras(model: LoadedModel, loras: Sequence[str]) -> None:
    """Check that LoRAs exist, can be read and fit a model, without loading or downloading them.

    Args:
        model: the model, with its weights or without.
        loras: see `load_loras`.

    Raises:
        ValueError: see `load_loras`; of those on the Hub that are not in its cache, only the names are checked.
    """
    check_sources(model, loras)
    for choice in map(parse_lora, loras):
        reach = dict.fromkeys(model.transformers, 0)
        for source, part in zip(choice.sources, reach, strict=False):
            file = peek_lora(source)
            translation = None if file is None else translate_part(model, file, part, f"`loras` {source}")
            reach[part] = 1 if translation is None else len(translation.modules)
        check_reach(f"`loras` {choice.name}", reach, BOTH_LORAS)


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


def load_part(model: LoadedModel, file: LoraFile, adapter: str, part: str, what: str) -> Part:
    """Load a file's pairs of matrices onto a transformer, and return all that it is to change there.

    Args:
        model: the model.
        file: the LoRA.
        adapter: name of the adapter.
        part: the transformer's name in the pipeline.
        what: the subject of the errors' messages, such as "`loras` FILE".

    Raises:
        ValueError: if it does not fit, or must not be used without what BLADE lacks.
    """
    translation = translate_part(model, file, part, what)
    if translation.pairs:
        _load_pairs(model, what, adapter, part, translation.pairs)
    return Part(model.transformers[part], translation)


def translate_part(model: LoadedModel, file: LoraFile, part: str, what: str) -> Translation:
    """Return what a LoRA changes in a transformer; what it leaves out is named in a warning.

    The arguments and errors are those of `load_part`.
    """
    if file.is_whole:
        raise ValueError(
            f"{what} holds whole weights and no LoRA, such as {next(iter(file.tensors))}: give it as `student`."
        )
    translation = translate(file, model.transformers[part], model.family)
    check_refused(translation, what)
    unused = translation.unused | translation.needless
    count = len(translation.modules) + len(unused)
    if not translation.modules:
        raise ValueError(
            f"{what} cannot be loaded onto this model: none of its {count:,} modules fits {part}: "
            f"{shown_modules(unused) or 'the file is empty'}. Take a LoRA that was trained from this model."
        )
    if unused:
        logger.warning(f"{what}: {len(unused):,} of {count:,} modules are left out of {part}: {shown_modules(unused)}")
    return translation


def check_refused(translation: Translation, what: str) -> None:
    """Check that a file holds no weights that change the output and cannot be used.

    Args:
        translation: what it changes.
        what: the subject of the error's message.

    Raises:
        ValueError: if it does; the message names the modules and what to do.
    """
    if translation.refused:
        raise ValueError(
            f"{what} must not be used without {len(translation.refused):,} of its modules, which BLADE does not "
            f"compute: {shown_modules(dict(list(translation.refused.items())[:1]))}."
        )


def shown_modules(reasons: Mapping[str, str]) -> str:
    """Return the first of some modules with their reasons."""
    shown = ", ".join(f"{module} ({reason})" for module, reason in list(reasons.items())[:SHOWN_MODULES])
    return shown + (", ..." if len(reasons) > SHOWN_MODULES else "")


def _load_pairs(model: LoadedModel, what: str, adapter: str, part: str, pairs: Mapping[str, Pair]) -> None:
    """Load pairs of matrices with Diffusers, in its own layout, and set their scales."""
    state, plain = {}, [module for module, pair in pairs.items() if pair.magnitude is None]
    for module, pair in pairs.items():
        state[f"transformer.{module}.lora_A.weight"] = pair.down.contiguous()
        state[f"transformer.{module}.lora_B.weight"] = pair.up.contiguous()
        if pair.magnitude is not None:
            state[f"transformer.{module}.lora_magnitude_vector"] = pair.magnitude.contiguous()
    if 0 < len(plain) < len(pairs):
        raise ValueError(
            f"{what} cannot be loaded onto this model: {len(pairs) - len(plain):,} of its {len(pairs):,} pairs are "
            f"DoRA and others, such as {plain[0]}, are not, which PEFT does not load together; make it two LoRAs."
        )
    into = {"load_into_transformer_2": True} if part == "transformer_2" else {}
    try:
        with warnings.catch_warnings():
            for message in EXPECTED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            model.pipe.load_lora_weights(state, adapter_name=adapter, **into)
    except Exception as error:  # whatever Diffusers and PEFT raise
        raise ValueError(f"{what} cannot be loaded onto this model: {first_line(error)}") from error
    for module, pair in pairs.items():
        layer: Any = model.transformers[part].get_submodule(module)
        layer.lora_alpha[adapter] = pair.scale * layer.r[adapter]


def _activate(model: LoadedModel, adapters: Mapping[str, Sequence[tuple[Part, float]]]) -> None:
    """Make the adapters active together, each with its strength in each transformer."""
    for transformer in model.transformers.values():
        strengths = {
            adapter: strength
            for adapter, parts in adapters.items()
            for part, strength in parts
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
