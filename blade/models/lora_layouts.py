"""Layouts of LoRA files: the keys of every common trainer, translated into the modules of a transformer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from blade.families.protocol import ModelFamily
from blade.families.transformers import Transformer
from blade.models.foreign_branches import branch_problem
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
    "magnitude": r"\.(lora_magnitude_vector(\.default)?(\.weight)?|dora_scale)",
    "alpha": r"\.(lora_)?alpha",
    "rank": r"\.lora_rank",
    "weight": r"\.diff(_param)?",
    "bias": r"\.diff_b",
    "set": r"\.set_(weight|param)",
}
"""Endings of keys behind the module's name, by what the tensor is; `weight` and `bias` are differences, `magnitude` is
DoRA's (arXiv 2402.09353), `set` takes a weight's place, and `rank` says again what the matrices show."""

WHOLE_ENDINGS = {"set": r"\.weight", "set_bias": r"\.bias"}
"""The same in files of whole weights, where a key without either is a parameter."""

MODULATION_DIFFERENCE = re.compile(r"\.diff_m$")
"""Ending of a difference of a block's modulation. Source: `lora_adapter.py` of lightx2v."""

OTHER_KINDS = re.compile(r"\.(lora_mid|lokr_\w+|hada_\w+|oft_\w+)\b.*$")
"""Endings of adapters that are no LoRA."""

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
    magnitude: torch.Tensor | None = None
    """(rows,) the norms of the rows of the changed weight, of DoRA."""


@dataclass(frozen=True, eq=False)
class Translation:
    """What a LoRA's file changes in a transformer."""

    pairs: dict[str, Pair] = field(default_factory=dict)
    """By module."""
    differences: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Whole parameters and what is added to them: norms, biases, and weights that the file has in full."""
    replacements: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Whole parameters and what takes their place."""
    unused: dict[str, str] = field(default_factory=dict)
    """Modules that cannot be changed, as the file names them, with the reason."""
    needless: dict[str, str] = field(default_factory=dict)
    """Modules that change nothing, being zero, as the file names them, with the reason."""
    refused: dict[str, str] = field(default_factory=dict)
    """Modules without which the rest must not be used, as the file names them, with the reason and the remedy."""
    modules: set[str] = field(default_factory=set)
    """All modules that are changed."""


def translate(file: LoraFile, transformer: Transformer, family: ModelFamily) -> Translation:
    """Assign the tensors of a LoRA, or of whole weights, to the modules of a transformer.

    A module whose tensors do not all fit is left as it is, and is in `unused`.

    Args:
        file: the file.
        transformer: the transformer, with or without adapters.
        family: the transformer's, which knows the names that its authors use.
    """
    names, result = ModuleNames(transformer, family), Translation()
    for module, parts in _by_module(file.tensors, file.is_whole).items():
        name, targets = names.find(module)
        if not targets and (problem := branch_problem(name, parts)):
            (result.refused if problem.changes else result.needless)[module] = problem.reason
            continue
        reorder = names.reordering(name, by_head=file.is_by_head)
        try:
            if result.modules & set(targets):
                raise _UnusableError("the file has this module twice")
            change = _Change(parts, [_Target(transformer, target) for target in targets], file, name, reorder)
        except _UnusableError as reason:
            result.unused[module] = str(reason)
            continue
        result.pairs.update(change.pairs)
        result.differences.extend(change.differences)
        result.replacements.extend(change.replacements)
        result.modules.update(targets)
    return result


class _UnusableError(Exception):
    """Why a module cannot be changed."""


class ModuleNames:
    """Names of a transformer's modules and parameters in every layout."""

    def __init__(self, transformer: Transformer, family: ModelFamily) -> None:
        plain = {name: (name,) for name in _changeable(transformer)}
        originals: dict[str, list[tuple[tuple[int, ...], str]]] = {}
        for name in plain:
            original, matched = name, []
            for number, (pattern, replacement) in enumerate(family.original_names):
                original, count = re.subn(pattern, replacement, original)
                matched += [number] if count else []
            originals.setdefault(original, []).append((tuple(matched), name))
        self.originals = {name: tuple(target for _, target in sorted(ranked)) for name, ranked in originals.items()}
        """The modules by their name in the authors' own code; several are the rows of a fused one, in their order."""
        self.modules = self.originals | plain
        self._plain = plain
        self._flat = {name.replace(".", "_"): name for name in self.modules}
        self._orders = family.row_orders
        self._head_dim = getattr(transformer.config, "attention_head_dim", 0)

    def find(self, name: str) -> tuple[str, tuple[str, ...]]:
        """Return a module's name without prefixes, with dots, and the modules that it stands for, if there are any."""
        while True:
            known = name if name in self.modules else self._flat.get(name)
            prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
            if known is not None or prefix is None:
                return (name, ()) if known is None else (known, self.modules[known])
            name = name.removeprefix(prefix)

    def reordering(self, name: str, *, by_head: bool) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Return what puts the rows of a module of the authors' into Diffusers' order; None: they are in it.

        Args:
            name: the module's name, with dots.
            by_head: fused projections have their rows head by head.
        """
        order = next((order for pattern, order in self._orders if re.search(pattern, name)), None)
        if name in self._plain or order is None or (order == "by-head" and not by_head):
            return None
        if order == "swapped-halves":
            return lambda rows: torch.cat(rows.chunk(2)[::-1])
        return lambda rows: rows.unflatten(0, (-1, 3, self._head_dim)).transpose(0, 1).flatten(0, 2)


def _changeable(transformer: Transformer) -> Iterator[str]:
    """Yield the modules that have a weight, and the parameters that are no module's weight or bias."""
    for name, module in transformer.named_modules():
        inside = any(part == "base_layer" or part.startswith("lora_") for part in name.split("."))
        if name and not inside and isinstance(getattr(module, "weight", None), torch.Tensor):
            yield name
    for name, _ in transformer.named_parameters():
        if name.rpartition(".")[2] not in ("weight", "bias"):
            yield name


def _by_module(tensors: Mapping[str, torch.Tensor], is_whole: bool) -> dict[str, Parts]:
    """Sort the tensors of a file by module; those of other kinds are under their own ending."""
    endings = {kind: re.compile(f"{ending}$") for kind, ending in (WHOLE_ENDINGS if is_whole else ENDINGS).items()}
    modules: dict[str, Parts] = {}
    for file_key, tensor in tensors.items():
        key = MODULATION_DIFFERENCE.sub(".modulation.diff", file_key)
        for kind, ending in endings.items():
            if match := ending.search(key):
                modules.setdefault(key[: match.start()], {})[kind] = tensor
                break
        else:
            match = OTHER_KINDS.search(key)
            kind = match[1] if match else "set" if is_whole else UNKNOWN
            modules.setdefault(key[: match.start()] if match else key, {})[kind] = tensor
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

    def __init__(
        self,
        parts: Parts,
        targets: Sequence[_Target],
        file: LoraFile,
        name: str,
        reorder: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        self.parts, self.targets, self.reorder = parts, targets, reorder
        self.pairs: dict[str, Pair] = {}
        self.differences: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.replacements: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._check_kinds()
        scale = self._scale(file, name)
        if "down" in parts:
            magnitudes = self._magnitudes()
            for target, up, magnitude in zip(targets, self._rows(parts["up"]), magnitudes, strict=True):
                self.pairs[target.name] = _fitting(target, Pair(parts["down"], up, scale, magnitude))
        for kind, factor in (("weight", 1.0), ("bias", 1.0), ("up_bias", scale)):
            if kind in parts:
                for target, rows in zip(targets, self._rows(parts[kind]), strict=True):
                    difference = rows if factor == 1 else rows.float() * factor
                    self.differences.append(
                        self._whole(target.weight if kind == "weight" else target.bias, difference)
                    )
        for kind in ("set", "set_bias"):
            if kind in parts:
                for target, rows in zip(targets, self._rows(parts[kind]), strict=True):
                    self.replacements.append(self._whole(target.weight if kind == "set" else target.bias, rows))

    def _check_kinds(self) -> None:
        others = sorted(set(self.parts) - set(ENDINGS) - set(WHOLE_ENDINGS))
        if UNKNOWN in others or not self.targets:
            raise _UnusableError("no such module")
        if others:
            raise _UnusableError(f"{others[0]} is of no LoRA")
        if ("down" in self.parts) != ("up" in self.parts):
            raise _UnusableError(f"its lora_{'B' if 'down' in self.parts else 'A'} is missing")
        if not set(self.parts) & {"down", "weight", "bias", "set", "set_bias"}:
            raise _UnusableError(f"{' and '.join(sorted(self.parts))} alone")

    def _scale(self, file: LoraFile, name: str) -> float:
        if "down" not in self.parts:
            return 1.0
        rank, alpha = self.parts["down"].shape[0], self.parts.get("alpha")
        if alpha is None:
            return file.scale(name, rank)
        if alpha.numel() != 1:
            raise _UnusableError(f"its alpha has {alpha.numel()} values")
        return float(alpha) / rank if not alpha.is_meta else 1.0

    def _magnitudes(self) -> Sequence[torch.Tensor | None]:
        """Return the rows' norms for each target, None where the pair is no DoRA."""
        magnitude = self.parts.get("magnitude")
        if magnitude is None:
            return [None] * len(self.targets)
        rows = sum(target.shape[0] for target in self.targets)
        if tuple(magnitude.shape) not in ((rows,), (rows, 1)) or any(
            len(target.shape) != 2 for target in self.targets
        ):
            raise _UnusableError(
                f"its DoRA magnitude is {_size(magnitude.shape)} instead of one of each of {rows} rows"
            )
        return self._rows(magnitude.flatten())

    def _rows(self, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
        """Split a tensor into the rows of each target."""
        rows = [target.shape[0] for target in self.targets]
        if tensor.ndim == 0 or ((len(rows) > 1 or self.reorder) and tensor.shape[0] != sum(rows)):
            raise _UnusableError(f"{_size(tensor.shape)} instead of {sum(rows)} rows")
        tensor = tensor if self.reorder is None else self.reorder(tensor)
        return tensor.split(rows) if len(rows) > 1 else [tensor]

    def _whole(self, parameter: torch.Tensor | None, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a parameter and a tensor of its shape."""
        if parameter is None:
            raise _UnusableError("it has no bias here")
        if not parameter.is_floating_point():
            raise _UnusableError("its weights are stored in fewer bits, to which nothing can be added")
        if parameter.shape != tensor.shape:
            raise _UnusableError(f"{_size(tensor.shape)} instead of {_size(parameter.shape)}")
        return parameter, tensor


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
