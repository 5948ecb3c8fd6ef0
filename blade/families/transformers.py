"""The transformers of a pipeline."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import nn

Transformer: TypeAlias = Any
"""A transformer of Diffusers: an `nn.Module` whose attributes, `config` among them, are typed nowhere."""


def find_transformers(pipe_or_transformer: Any) -> dict[str, Transformer]:
    """Return the transformers of a pipeline by their component's name, or the one given as "transformer".

    One that a pipeline holds under both names is returned once, under the first.

    Raises:
        ValueError: if this is neither a transformer nor a pipeline that holds one.
    """
    if isinstance(pipe_or_transformer, nn.Module):
        # what `torch.compile` returns stands around the transformer
        return {"transformer": getattr(pipe_or_transformer, "_orig_mod", pipe_or_transformer)}
    found: dict[str, Transformer] = {}
    for name in ("transformer", "transformer_2", "transformer_ref"):
        transformer = getattr(pipe_or_transformer, name, None)
        if isinstance(transformer, nn.Module):
            transformer = getattr(transformer, "_orig_mod", transformer)
            if not any(transformer is other for other in found.values()):
                found[name] = transformer
    if not found:
        raise ValueError(
            "`pipe_or_transformer` must be a Diffusers pipeline with a `transformer`, or a transformer, got "
            f"{type(pipe_or_transformer).__name__}."
        )
    return found
