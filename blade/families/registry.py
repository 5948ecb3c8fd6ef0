"""The registry: every model family that there is an adapter for, and its data by name.

The project's own families are the modules of `blade_pipelines`, found without installed metadata. A package of
somebody else's adds families by entry points of the group `blade.families`, each of which names a sequence of them:

    [project.entry-points."blade.families"]
    my-model = "my_package.my_family:FAMILIES"
"""

from __future__ import annotations

import pkgutil
import warnings
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from blade.common.checks import check_choice, meant
from blade.families.data import BenchmarkLayer, ComparisonProtocol, FamilyData, ReleasedStudent, SupportedModel
from blade.families.kinds import PRESET_KINDS, PresetKind
from blade.families.protocol import ModelFamily

OWN_FAMILIES = "blade_pipelines"
"""The package of the project's own families: each of its modules has them as `FAMILIES`."""

ENTRY_POINTS = "blade.families"
"""Entry point group of third parties' families."""


@cache
def model_families() -> tuple[ModelFamily, ...]:
    """Return every model family that there is an adapter for, the project's own ones first."""
    package = import_module(OWN_FAMILIES)
    modules = [info.name for info in pkgutil.iter_modules(package.__path__) if not info.ispkg]
    own = [family for name in sorted(modules) for family in _own(name)]
    added = [family for entry in entry_points(group=ENTRY_POINTS) for family in _load(entry)]
    return (*own, *added)


def find_family(transformer: nn.Module) -> ModelFamily:
    """Return the family that recognises a transformer.

    Raises:
        ValueError: if none does; the message says why a class of Diffusers is not supported, and lists the families
            that there are.
    """
    families = model_families()
    for family in families:
        if family.recognises(transformer):
            return family
    name, listed = type(transformer).__name__, ", ".join(family.name for family in families)
    refused, others = unsupported_classes()
    if name in refused:
        raise ValueError(f"`{name}` is not supported: {refused[name]}. It must be one of: {listed}.")
    if name in others:
        raise ValueError(f"`{name}` makes no video: it makes {others[name]}. It must be one of: {listed}.")
    raise ValueError(f"`{name}` is of no model family that BLADE knows; it must be one of: {listed}.")


@cache
def unsupported_classes() -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Return Diffusers' transformer classes of no family: why those for videos are refused, what the others make."""
    path = Path(import_module(OWN_FAMILIES).__path__[0]) / "unsupported.yaml"
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    return listed["video"], {name: made for made, names in listed["other"].items() for name in names}


def preset_names(kind: PresetKind = "training-free") -> tuple[str, ...]:
    """Return the names of the presets of a kind."""
    return tuple(_presets(kind))


def available_kind(name: str, kind: PresetKind) -> PresetKind:
    """Return a kind of preset, or `training-free` where the model of this name has none of it."""
    return kind if name in preset_names(kind) else "training-free"


def preset_values(name: str, kind: PresetKind = "training-free") -> dict[str, Any]:
    """Return a preset as plain values of a `BladeConfig`. See `BladeConfig.from_preset`.

    Raises:
        ValueError: if there is no such preset; the message lists those that exist.
    """
    presets = _presets(kind)
    if name not in presets:
        others = [other for other in PRESET_KINDS if other != kind and name in _presets(other)]
        hint = f" It exists as {others[0]} preset." if others else ""
        problem = f"`name` must be one of the {kind} presets {', '.join(presets)}, got {name!r}"
        raise ValueError(f"{problem}.{hint}" if hint else problem + meant(name, presets))
    return {**presets[name], "kind": kind}


def released_students() -> tuple[ReleasedStudent, ...]:
    """Return the published students of all families."""
    return tuple(student for data in _data() for student in data.released_students)


def benchmark_layers() -> dict[str, BenchmarkLayer]:
    """Return the sizes of published models' self-attention layers by name."""
    return {name: layer for data in _data() for name, layer in data.benchmark_layers.items()}


def comparison_protocols() -> dict[str, ComparisonProtocol]:
    """Return the protocols of comparisons by name."""
    return {name: protocol for data in _data() for name, protocol in data.protocols.items()}


def find_comparison_protocol(name: str) -> ComparisonProtocol:
    """Return the protocol of comparisons that has a name.

    Raises:
        ValueError: if there is none; the message lists those that exist.
    """
    protocols = comparison_protocols()
    if name not in protocols:
        check_choice("protocol", name, tuple(protocols))
    return protocols[name]


def published_configurations() -> dict[str, Mapping[str, Mapping[str, Any]]]:
    """Return what the configuration files of published pipelines say, by Hub id; see `FamilyData`."""
    return {source: parts for data in _data() for source, parts in data.configurations.items()}


def supported_models() -> dict[str, SupportedModel]:
    """Return the rows of the table of models, by transformer class."""
    return {name: model for data in _data() for name, model in data.models.items()}


def example_model() -> str:
    """Return the Hub id of a published pipeline, for messages."""
    return next(data.example_model for data in _data() if data.example_model is not None)


def _data() -> list[FamilyData]:
    """Return the data of all families, once where families share it."""
    return list({id(family.data): family.data for family in model_families()}.values())


def _presets(kind: PresetKind) -> dict[str, Mapping[str, Any]]:
    """Return the presets of a kind by name."""
    check_choice("kind", kind, PRESET_KINDS)
    return {name: values for data in _data() for name, values in data.presets.get(kind, {}).items()}


def _own(name: str) -> tuple[ModelFamily, ...]:
    """Return the families of one of the project's modules; none where the installed Diffusers lacks their class."""
    try:
        return tuple(import_module(f"{OWN_FAMILIES}.{name}").FAMILIES)
    except ImportError as error:  # of a module that is not there, or of a name in one
        if not str(error.name).startswith("diffusers."):
            raise
        return ()


def _load(entry: EntryPoint) -> tuple[ModelFamily, ...]:
    """Return the families of an entry point; one that is broken takes no other family along, but is heard of."""
    try:
        return tuple(entry.load())
    except Exception as error:  # whatever the import of somebody else's package raises
        warnings.warn(
            f"The model family `{entry.name}` ({entry.value}) cannot be loaded: {type(error).__name__}: {error}.",
            UserWarning,
            stacklevel=3,
        )
        return ()
