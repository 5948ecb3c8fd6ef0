"""LoRA adapters of transformers: what they change, and which are active."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blade.families.transformers import Transformer

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

Reach = Mapping[str, int]
"""Number of modules that a LoRA or student changes, by transformer."""


def adapter_layers(transformer: Transformer, adapter: str) -> list[LoraLayer]:
    """Return the modules of a transformer that an adapter changes."""
    return [layer for layer in _lora_layers(transformer) if adapter in layer.scaling]


def check_reach(what: str, reach: Reach, mend: str) -> None:
    """Check that a LoRA or student changes every transformer of a model.

    Args:
        what: the subject of the error's message, such as "`loras` FILE".
        reach: the modules that it changes, of every transformer.
        mend: how weights are given for all transformers; a sentence.

    Raises:
        ValueError: if it leaves a transformer as it is.
    """
    missed = [name for name, modules in reach.items() if modules == 0]
    if len(missed) == len(reach):
        raise ValueError(f"{what} holds no weights for this model's {' and '.join(reach)}.")
    if missed:
        reached = " and ".join(f"{modules} modules of {name}" for name, modules in reach.items() if modules)
        raise ValueError(f"{what} changes {reached} and nothing in {' and '.join(missed)}. {mend}")


def active_adapters(transformer: Transformer) -> list[str]:
    """Return the names of the adapters that are active in a transformer."""
    return list(transformer.active_adapters()) if getattr(transformer, "peft_config", None) else []


def activate_adapters(transformer: Transformer, names: Sequence[str], weights: Mapping[str, float]) -> None:
    """Make adapters active together; Diffusers' own way would set the strength of all of them anew.

    Args:
        transformer: the transformer.
        names: the adapters that are active then, and no others.
        weights: strengths of adapters that are to have another one.
    """
    for layer in _lora_layers(transformer):
        layer.set_adapter([name for name in names if name in layer.scaling])
        for name, weight in weights.items():
            if name in layer.scaling:
                layer.set_scale(name, weight)


def adapter_weight(transformer: Transformer, adapter: str) -> float:
    """Return the strength of an adapter, as Diffusers' `set_adapters` takes it."""
    layer: Any = adapter_layers(transformer, adapter)[0]
    rank = layer.r[adapter]
    full = layer.lora_alpha[adapter] / (math.sqrt(rank) if layer.use_rslora.get(adapter, False) else rank)
    return float(layer.scaling[adapter] / full)


def _lora_layers(transformer: Transformer) -> Iterator[LoraLayer]:
    from peft.tuners.lora import LoraLayer

    return (module for module in transformer.modules() if isinstance(module, LoraLayer))
