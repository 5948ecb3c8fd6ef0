"""Layouts of a transformer's file: prefixes, the authors' own keys and ComfyUI's scales, under Diffusers' keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from blade.common.errors import first_line
from blade.common.reading import parse_json
from blade.common.terminal import logger
from blade.models.source import ModelError
from blade.models.transformer_sources import Weights

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""Beginnings of a transformer's keys in ComfyUI's files; keys without them there are of other parts."""

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Types of 8-bit floats that weights are stored in."""

SCALES = (".scale_weight", ".weight_scale")
"""Endings of the scales of 8-bit weights in ComfyUI's files, of its older and its newer format."""

INPUT_SCALES = (".scale_input", ".input_scale")
"""Endings of scales for 8-bit products, which weights that are multiplied in 16 bits do not need."""

FORMAT = ".comfy_quant"
"""Ending of a layer's format, JSON in bytes, in ComfyUI's newer files."""

MARKER = "scaled_fp8"
"""Key that marks ComfyUI's older files with scales."""


@dataclass(frozen=True, eq=False)
class Layout:
    """A file's tensors under Diffusers' keys."""

    weights: Weights
    """As they are stored."""
    scales: Weights = field(default_factory=dict)
    """By the key of an 8-bit weight, the number that it is multiplied with, or (rows, 1), float32."""


def translate_layout(
    kind: Any, config: Mapping[str, Any], expected: Mapping[str, torch.Tensor], tensors: Weights, what: str
) -> Layout:
    """Bring a file's tensors under the keys of Diffusers' class.

    Args:
        kind: the class.
        config: the model's configuration of it.
        expected: the class's own state, for its keys.
        tensors: the file's.
        what: the subject of an error's message.

    Raises:
        ModelError: if it has a layout that is not known.
    """
    weights, scales = _split_scales(_strip(tensors, what), what)
    known = sum(key in expected for key in weights)
    if 2 * known > len(weights):  # Diffusers' own layout, whole or not
        return Layout(weights, scales)
    converted = _convert(kind, config, weights, what)
    if not scales:
        return Layout(converted)
    # a column for each weight goes through the same splits and swaps of rows as the weight itself
    columns = _convert(kind, config, {key: _column(key, tensor, scales) for key, tensor in weights.items()}, what)
    stored = {key: columns[key] for key, weight in converted.items() if weight.dtype in FLOAT8}
    return Layout(converted, {key: _least(column) for key, column in stored.items()})


def _strip(tensors: Weights, what: str) -> Weights:
    """Return the transformer's tensors of a file without the prefix of their keys."""
    prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in tensors)), "")
    others = [key for key in tensors if not key.startswith(prefix) and key != MARKER]
    if others:
        parts = ", ".join(sorted({key.partition(".")[0] for key in others})[:4])
        logger.info(f"{what} also holds {len(others):,} tensors of other parts ({parts}), which are left out")
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _split_scales(tensors: Weights, what: str) -> tuple[Weights, Weights]:
    """Return the weights of a file, and the scales of the 8-bit ones by the weights' keys."""
    weights: Weights = {}
    scales: Weights = {}
    for key, tensor in tensors.items():
        if key == MARKER or key.endswith(INPUT_SCALES):
            continue
        if key.endswith(FORMAT):
            _check_format(key, tensor, what)
            continue
        ending = next((ending for ending in SCALES if key.endswith(ending)), None)
        if ending is None:
            weights[key] = tensor
        else:
            scales[f"{key.removesuffix(ending)}.weight"] = tensor.float()
    for key, scale in scales.items():
        weight = weights.get(key)
        if weight is None or weight.dtype not in FLOAT8 or scale.numel() not in (1, weight.shape[0]):
            stored = "no weight" if weight is None else f"a weight of {tuple(weight.shape)} in {weight.dtype}"
            raise ModelError(
                f"{what} has {scale.numel()} scales for {key}, and {stored}; 8-bit floats with one scale, or one for "
                "each row, can be read."
            )
        scales[key] = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)
    return weights, scales


def _check_format(key: str, tensor: torch.Tensor, what: str) -> None:
    """Refuse a layer that ComfyUI stores otherwise than as 8-bit floats."""
    if tensor.is_meta:  # headers alone; its weight's type is checked like any other
        return
    values = parse_json(bytes(tensor.tolist()), f"{what}: {key}")
    name = values.get("format") if isinstance(values, dict) else values
    if name not in ("float8_e4m3fn", "float8_e5m2"):
        layer = key.removesuffix(FORMAT)
        raise ModelError(
            f"{what} stores {layer} as {name}, which cannot be read; take one in float8_e4m3fn, GGUF or bfloat16."
        )


def _convert(kind: Any, config: Mapping[str, Any], weights: Weights, what: str) -> Weights:
    """Translate the authors' own keys with Diffusers' function for the class."""
    from diffusers.loaders import single_file_model

    name = single_file_model._get_single_file_loadable_mapping_class(kind)
    if name is None:
        raise ModelError(
            f"{what} must have the keys of Diffusers' {kind.__name__}, for which it translates no others, got such as "
            f"{next(iter(weights))}."
        )
    convert = single_file_model.SINGLE_FILE_LOADABLE_CLASSES[name]["checkpoint_mapping_fn"]
    try:
        converted: Weights = convert(checkpoint=dict(weights), config=dict(config))
    except Exception as error:  # a file of another model: whatever Diffusers' function stumbles over
        raise ModelError(
            f"{what} does not fit a {kind.__name__}: Diffusers cannot translate its keys "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
    return converted


def _column(key: str, weight: torch.Tensor, scales: Weights) -> torch.Tensor:
    """Return the scales of a weight's rows, (rows, 1); another tensor as it is."""
    if weight.dtype not in FLOAT8 or weight.ndim == 0:
        return weight
    scale = scales.get(key)
    ones = torch.ones(weight.shape[0], *(1,) * (weight.ndim - 1), device=weight.device)
    return ones if scale is None else ones * scale


def _least(column: torch.Tensor) -> torch.Tensor:
    """Return one number where all rows have the same scale."""
    if column.is_meta:
        return column
    return column.flatten()[0] if bool((column == column.flatten()[0]).all()) else column
