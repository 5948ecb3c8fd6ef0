"""Modular pipelines of Diffusers: their index, which is checked as an ordinary pipeline's is, their parts and call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch

from blade.models.source import INDEX_NAME, MODULAR_INDEX_NAME, ModelError
from blade.models.untrusted import check_files, check_index_place, find_component_class, read_json

GIVEN_INPUTS = ("prompt", "image", "last_image", "video")
"""Inputs that a generation can give; workflows that are chosen by others are left out, with the parts they need."""

FRAMES, SOUND = "videos", "audio"
"""Names of a modular pipeline's outputs."""


@dataclass(frozen=True)
class ModularIndex:
    """A `modular_model_index.json`, checked."""

    kind: Any
    """The pipeline's class."""
    parts: Mapping[str, type]
    """Classes of the parts that are loaded, by name; each lies in the folder of its name."""
    settings: Mapping[str, Any]
    """Values of the pipeline's configuration."""


def is_modular(pipe: Any) -> bool:
    """Return whether a pipeline is one of Diffusers' modular ones."""
    import diffusers

    return isinstance(pipe, getattr(diffusers, "ModularPipeline", ()))


def is_modular_folder(folder: Path) -> bool:
    """Return whether a folder holds a modular pipeline, and no ordinary one that this Diffusers has."""
    if not (folder / MODULAR_INDEX_NAME).is_file():
        return False
    return not (folder / INDEX_NAME).is_file() or is_unknown(folder / INDEX_NAME, f"`{folder}`")


def is_unknown(index: Path, what: str) -> bool:
    """Return whether a `model_index.json` names a pipeline that this Diffusers lacks.

    Args:
        index: the file.
        what: see `blade.models.untrusted.find_component_class`.

    Raises:
        ModelError: if it is not JSON.
    """
    import diffusers

    name = read_json(index, what).get("_class_name")
    return isinstance(name, str) and not hasattr(diffusers, name)


def read_modular_index(path: Path, what: str) -> ModularIndex:
    """Read a `modular_model_index.json`: Diffusers' own blocks of the pipeline's class, and parts beside the file.

    Blocks of others, which are code, are never loaded. What the file says of where parts are is not followed.

    Args:
        path: the file.
        what: see `blade.models.untrusted.find_component_class`.

    Raises:
        ModelError: if it is not JSON, names what is no modular pipeline or no component, or a part lies elsewhere.
    """
    values = read_json(path, what)
    kind = _find_class(values.get("_class_name"), what)
    pipe = kind()
    needed, parts = _needed_parts(pipe), dict[str, type]()
    for name in sorted(needed & set(pipe.pretrained_component_names)):
        entry = values.get(name)
        if entry is None:
            continue
        if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[2], Mapping):
            raise ModelError(f"{what} must name the library, class and place of its {name}, got {entry!r}.")
        if entry[2].get("subfolder", name) != name:
            raise ModelError(
                f"{what} must have its {name} in the folder {name}, got {entry[2]['subfolder']!r}; parts from "
                "elsewhere are not loaded."
            )
        library, class_name = entry[:2] if entry[0] is not None else entry[2].get("type_hint", (None, None))
        parts[name] = find_component_class(library, class_name, what)
    settings = {name: values[name] for name in pipe.config if name in values and name not in pipe.component_names}
    return ModularIndex(kind, parts, {name: value for name, value in settings.items() if not name.startswith("_")})


def check_modular_folder(folder: Path, what: str) -> ModularIndex:
    """Check a folder of a modular pipeline; a part of its files is enough. See `check_model_folder`."""
    check_index_place(folder, MODULAR_INDEX_NAME, what)
    index = read_modular_index(folder / MODULAR_INDEX_NAME, what)
    for name in index.parts:
        check_files(folder, name, what)
    return index


def load_modular_pipeline(
    folder: Path,
    what: str,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    components: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Load a modular pipeline from a folder: no code of others runs, and nothing is unpickled.

    Args:
        folder: the folder.
        what: the subject of the error's message.
        dtype: dtype of all parts, or of each by name, with "default".
        components: parts that are loaded already, by name.

    Raises:
        ModelError: see `check_modular_folder`.
    """
    from diffusers import ConfigMixin, ModelMixin
    from transformers import PreTrainedModel

    index = check_modular_folder(folder, what)
    parts = dict[str, Any](components)
    for name, kind in index.parts.items():
        if name in components:
            continue
        if not (folder / name).is_dir():
            raise ModelError(f"{what} lacks the folder of its {name}.")
        options = dict[str, Any]()
        if issubclass(kind, (ModelMixin, PreTrainedModel)):
            own = dtype if isinstance(dtype, torch.dtype) else dtype.get(name, dtype["default"])
            options = {"dtype": own, "use_safetensors": True}
        if not issubclass(kind, ConfigMixin):  # but of Transformers, whose classes have this option
            options["trust_remote_code"] = False
        part: Any = kind
        parts[name] = part.from_pretrained(str(folder / name), local_files_only=True, **options)
    return make_modular_pipeline(index, parts)


def make_modular_pipeline(index: ModularIndex, parts: Mapping[str, Any]) -> Any:
    """Return a pipeline of Diffusers' own blocks with parts."""
    pipe = index.kind()
    pipe.update_components(**index.settings, **{name: part for name, part in parts.items() if part is not None})
    return pipe


def call_parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a modular pipeline's call by name: those of the workflows that can be chosen."""
    every = [{item.name: item for item in blocks.inputs if item.name} for blocks in _workflows(pipe)]
    parameters = dict[str, inspect.Parameter]()
    for name in dict.fromkeys(name for inputs in every for name in inputs):
        own = [inputs[name] for inputs in every if name in inputs]
        default = next((item.default for item in own if item.default is not None), None)
        needed = default is None and len(own) == len(every) and all(item.required for item in own)
        parameters[name] = inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=inspect.Parameter.empty if needed else default
        )
    return parameters


def call_modular(pipe: Any, arguments: Mapping[str, Any]) -> Any:
    """Call a modular pipeline; return its `frames` and `audio` as an ordinary pipeline's output has them."""
    made = pipe(**arguments, output=[FRAMES, SOUND])
    return SimpleNamespace(frames=made[FRAMES], audio=made.get(SOUND))


def _find_class(name: Any, what: str) -> Any:
    import diffusers

    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    base = getattr(diffusers, "ModularPipeline", None)
    is_one = base is not None and isinstance(kind, type) and issubclass(kind, base)
    if not is_one or kind.default_blocks_name is None:
        raise ModelError(f"{what} names {name!r} as its pipeline, which must be one of Diffusers' modular pipelines.")
    return kind


def _workflows(pipe: Any) -> list[Any]:
    """Return the blocks of each workflow that is chosen by what can be given; all blocks where none is named."""
    blocks = pipe.blocks
    named = getattr(blocks, "_workflow_map", None) or {}
    possible = []
    for name, triggers in named.items():
        spellings = triggers if isinstance(triggers, tuple) else (triggers,)
        if any(set(GIVEN_INPUTS) >= set(spelling) for spelling in spellings):
            possible.append(blocks.get_workflow(name))
    return possible or [blocks]


def _needed_parts(pipe: Any) -> set[str]:
    """Return the names of the parts of all workflows that can be chosen."""
    return {spec.name for blocks in _workflows(pipe) for spec in blocks.expected_components}
