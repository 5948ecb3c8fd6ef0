"""Layouts of LoRA files: the keys of every common trainer, translated into the modules of a transformer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from blade.families.transformers import Transformer
from blade.models.lora_files import LoraFile
from blade.models.stored_weights import weight_shape

PREFIXES = (
    "base_model.model.",
    "model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
"""Beginnings of keys before the module's name: of PEFT, ComfyUI, Diffusers, DiffSynth, kohya's trainers, LyCORIS."""

ENDINGS = {
    "down": r"\.(lora_A|lora_down|lora\.down)(\.default)?\.weight",
    "up": r"\.(lora_B|lora_up|lora\.up)(\.default)?\.weight",
    "up_bias": r"\.(lora_B|lora_up|lora\.up)(\.default)?\.bias",
    "alpha": r"\.alpha",
    "weight": r"\.diff",
    "bias": r"\.diff_b",
}
"""Endings of keys behind the module's name, by what the tensor is; `weight` and `bias` are differences."""

OTHER_KINDS = re.compile(r"\.(dora_scale|lora_magnitude_vector|lora_mid|lokr_\w+|hada_\w+|oft_\w+|set_weight)\b.*$")
"""Endings of adapters that are no plain LoRA."""

UNKNOWN = "unknown"
"""Kind of a tensor whose key ends in nothing known."""

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules that take a pair of matrices."""

Parts = dict[str, torch.Tensor]
"""What a file has for a module, by the names of `ENDINGS`."""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two matrices whose product, times the scale, is added to a module's weight."""

    down: torch.Tensor
    """(rank, columns)"""
    up: torch.Tensor
    """(rows, rank)"""
    scale: float
    """Alpha over rank, or 1."""


@dataclass(frozen=True, eq=False)
class Translation:
    """What a LoRA's file changes in a transformer."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    """By module."""
    differences: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Whole parameters and what is added to them: norms, biases, and weights that the file has in full."""
    unused: dict[str, str] = field(default_factory=dict)
    """Modules that cannot be changed, as the file names them, with the reason."""
    modules: set[str] = field(default_factory=set)
    """All modules that are changed."""


def translate(file: LoraFile, transformer: Transformer, original_names: Sequence[tuple[str, str]]) -> Translation:
    """Assign the tensors of a LoRA to the modules of a transformer.

    A module whose tensors do not all fit is left as it is, and is in `unused`.

    Args:
        file: the LoRA.
        transformer: the transformer, with or without adapters.
        original_names: see `ModelFamily.original_names`.
    """
    names, result = LoraNames(transformer, original_names), Translation()
    for module, parts in _by_module(file.tensors).items():
        bare, targets = names.find(module)
        try:
            if result.modules & set(targets):
                raise _UnusableError("the file has this module twice")
            change = _Change(parts, [_Target(transformer, name) for name in targets], file, bare)
        except _UnusableError as reason:
            result.unused[module] = str(reason)
            continue
        result.pairs.update(change.pairs)
        result.differences.extend(change.differences)
        result.modules.update(targets)
    return result


class _UnusableError(Exception):
    """Why a module cannot be changed."""


class LoraNames:
    """Names of a transformer's modules and parameters in every layout."""

    def __init__(self, transformer: Transformer, original_names: Sequence[tuple[str, str]]) -> None:
        plain = {name: (name,) for name in _changeable(transformer)}
        originals: dict[str, list[tuple[int, str]]] = {}
        for name in plain:
            original, first = name, len(original_names)
            for number, (pattern, replacement) in enumerate(original_names):
                original, count = re.subn(pattern, replacement, original)
                first = min(first, number) if count else first
            originals.setdefault(original, []).append((first, name))
        self.originals = {name: tuple(target for _, target in sorted(ranked)) for name, ranked in originals.items()}
        """The modules by their name in the authors' own code; several are the rows of a fused one, in their order."""
        self.modules = self.originals | plain
        self.flat = {name.replace(".", "_"): targets for name, targets in self.modules.items()}

    def find(self, name: str) -> tuple[str, tuple[str, ...]]:
        """Return a file's name for a module without prefixes, and the modules that it stands for, if there are any."""
        while True:
            targets = self.modules.get(name) or self.flat.get(name)
            prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
            if targets or prefix is None:
                return name, targets or ()
            name = name.removeprefix(prefix)


def _changeable(transformer: Transformer) -> Iterator[str]:
    """Yield the modules that have a weight, and the parameters that are no module's weight or bias."""
    for name, module in transformer.named_modules():
        inside = any(part == "base_layer" or part.startswith("lora_") for part in name.split("."))
        if name and not inside and isinstance(getattr(module, "weight", None), torch.Tensor):
            yield name
    for name, _ in transformer.named_parameters():
        if name.rpartition(".")[2] not in ("weight", "bias"):
            yield name


def _by_module(tensors: Mapping[str, torch.Tensor]) -> dict[str, Parts]:
    """Sort the tensors of a file by module; those of other kinds are under their own ending."""
    modules: dict[str, Parts] = {}
    for key, tensor in tensors.items():
        for kind, ending in ENDINGS.items():
            if match := re.search(f"{ending}$", key):
                modules.setdefault(key[: match.start()], {})[kind] = tensor
                break
        else:
            match = OTHER_KINDS.search(key)
            modules.setdefault(key[: match.start()] if match else key, {})[match[1] if match else UNKNOWN] = tensor
    return modules


class _Target:
    """A module, or a parameter that is no module's weight, as what a file holds is added to it."""

    def __init__(self, transformer: Transformer, name: str) -> None:
        owner, _, last = name.rpartition(".")
        item: Any = getattr(transformer.get_submodule(owner), last)
        self.name = name
        self.layer = None if isinstance(item, torch.Tensor) else getattr(item, "base_layer", item)  # in an adapter
        self.weight: torch.Tensor = item if self.layer is None else self.layer.weight
        self.shape = self.weight.shape if self.layer is None else weight_shape(self.layer)
        self.bias: torch.Tensor | None = getattr(self.layer, "bias", None)


class _Change:
    """What a file has for a module, which may be fused of several targets, each with rows of its own.

    Raises:
        _UnusableError: with the reason, if not all of it fits.
    """

    def __init__(self, parts: Parts, targets: Sequence[_Target], file: LoraFile, name: str) -> None:
        self.parts, self.targets = parts, targets
        self.pairs: dict[str, Pair] = {}
        self.differences: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._check_kinds()
        scale = self._scale(file, name)
        if "down" in parts:
            for target, up in zip(targets, self._rows(parts["up"]), strict=True):
                self.pairs[target.name] = _fitting(target, Pair(parts["down"], up, scale))
        for kind, factor in (("weight", 1.0), ("bias", 1.0), ("up_bias", scale)):
            if kind in parts:
                for target, rows in zip(targets, self._rows(parts[kind]), strict=True):
                    self._add(target.weight if kind == "weight" else target.bias, rows, factor)

    def _check_kinds(self) -> None:
        others = sorted(set(self.parts) - set(ENDINGS))
        if UNKNOWN in others or not self.targets:
            raise _UnusableError("no such module")
        if others:
            raise _UnusableError(f"{others[0]} is of no plain LoRA")
        if ("down" in self.parts) != ("up" in self.parts):
            raise _UnusableError(f"its lora_{'B' if 'down' in self.parts else 'A'} is missing")
        if not set(self.parts) & {"down", "weight", "bias"}:
            raise _UnusableError(f"{' and '.join(sorted(self.parts))} alone")

    def _scale(self, file: LoraFile, name: str) -> float:
        if "down" not in self.parts:
            return 1.0
        rank, alpha = self.parts["down"].shape[0], self.parts.get("alpha")
        if alpha is None:
            return file.scale(name, rank)
        if alpha.numel() != 1:
            raise _UnusableError(f"its alpha has {alpha.numel()} values")
        return float(alpha) / rank

    def _rows(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split a tensor into the rows of each target."""
        rows = [target.shape[0] for target in self.targets]
        if tensor.ndim == 0 or (len(rows) > 1 and tensor.shape[0] != sum(rows)):
            raise _UnusableError(f"{_size(tensor.shape)} instead of {sum(rows)} rows")
        return tensor.split(rows) if len(rows) > 1 else [tensor]

    def _add(self, parameter: torch.Tensor | None, difference: torch.Tensor, factor: float) -> None:
        if parameter is None:
            raise _UnusableError("it has no bias here")
        if not parameter.is_floating_point():
            raise _UnusableError("its weights are stored in fewer bits, to which nothing can be added")
        if parameter.shape != difference.shape:
            raise _UnusableError(f"{_size(difference.shape)} instead of {_size(parameter.shape)}")
        self.differences.append((parameter, difference if factor == 1 else difference.float() * factor))


def _fitting(target: _Target, pair: Pair) -> Pair:
    """Return a pair that fits a module.

    Raises:
        _UnusableError: if it does not.
    """
    if not isinstance(target.layer, LINEAR):
        raise _UnusableError("it takes no pair of matrices here")
    rank = pair.down.shape[0] if pair.down.ndim else 0
    kernel = (1,) * (len(target.shape) - 2)
    product = (*pair.up.shape[:1], *pair.down.shape[1:])
    if product != target.shape or pair.up.shape[1:] != (rank, *kernel) or rank == 0:
        raise _UnusableError(f"{_size(product)} of rank {rank} instead of {_size(target.shape)}")
    return pair


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a number"
