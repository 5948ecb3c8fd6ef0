"""Folders by others: what they name and hold is checked before anything in them is loaded.

Diffusers, Transformers and PyTorch import modules that a configuration names, ask whether a model's own code may run,
unpickle weights, and follow paths in index files, each of them in some of their versions. None of that is left to the
version that is installed: a folder holds JSON and safetensors, and names classes of Diffusers and Transformers alone.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path, PureWindowsPath
from typing import Any

from blade.common.errors import first_line
from blade.models.source import INDEX_NAME, ModelError

COMPONENTS = {
    "diffusers": ("ModelMixin", "SchedulerMixin", "BaseGuidance"),
    "transformers": (
        "PreTrainedModel",
        "PreTrainedTokenizerBase",
        "FeatureExtractionMixin",
        "ImageProcessingMixin",
        "ProcessorMixin",
    ),
}
"""By library, the base classes of a pipeline's components."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files that run code when they are unpickled."""

REDIRECTION = "adapter_config.json"
"""File with which Transformers loads another model than the one in the folder."""

CUSTOM_PIPELINE = "None.py"
"""File that Diffusers takes for a custom pipeline where none is asked for."""

HARMLESS_FILES = ("special_tokens_map_file",)
"""Names of files in a tokenizer's configuration that nothing reads; published ones hold paths of their authors."""


def find_component_class(library: Any, name: Any, what: str) -> type:
    """Return the class of a pipeline's component.

    Args:
        library: what `model_index.json` names as its library: "diffusers", "transformers", or a package of
            `diffusers.pipelines`.
        name: the class's name.
        what: the subject of the error's message, such as "`source` FOLDER".

    Raises:
        ModelError: if this is no class of a component.
    """
    module, bases = None, dict[str, tuple[str, ...]]()
    if isinstance(library, str) and library in COMPONENTS:
        module, bases = import_module(library), {library: COMPONENTS[library]}
    elif isinstance(library, str) and library.isidentifier() and _is_pipeline_package(library):
        module, bases = import_module(f"diffusers.pipelines.{library}"), COMPONENTS
    kind = getattr(module, name, None) if module is not None and isinstance(name, str) else None
    allowed = tuple(getattr(import_module(package), base) for package, names in bases.items() for base in names)
    if inspect.isclass(kind) and issubclass(kind, allowed):
        return kind
    if missing := getattr(kind, "_backends", None):  # both libraries' stand-in for a class that needs further packages
        raise ModelError(f"{what} needs {name}, for which this must be installed: {', '.join(missing)}.")
    raise ModelError(
        f"{what} names {library!r} {name!r} as a component, which must be a model, scheduler, tokenizer or processor "
        "of Diffusers or Transformers; nothing else is imported."
    )


def _is_pipeline_package(name: str) -> bool:
    spec = find_spec(f"diffusers.pipelines.{name}")
    return spec is not None and spec.submodule_search_locations is not None


def find_scheduler_class(name: Any, what: str) -> type:
    """Return a scheduler's class.

    Args:
        name: the class's name.
        what: see `find_component_class`.

    Raises:
        ModelError: if Diffusers has no such scheduler.
    """
    import diffusers

    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not inspect.isclass(kind) or not issubclass(kind, diffusers.SchedulerMixin):
        raise ModelError(f"{what} names {name!r} as its scheduler, which must be one of Diffusers' schedulers.")
    return kind


def find_pipeline_class(name: Any, what: str) -> Any:
    """Return a pipeline's class.

    Args:
        name: the class's name.
        what: see `find_component_class`.

    Raises:
        ModelError: if Diffusers has no such pipeline, or only one that loads further models by itself.
    """
    import diffusers

    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not inspect.isclass(kind) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise ModelError(f"{what} names {name!r} as its pipeline, which must be one of Diffusers' pipelines.")
    pipeline: Any = kind
    if pipeline._load_connected_pipes:  # from whatever repository the model's README names
        raise ModelError(f"{what} is a {name}, which loads further models and makes no video.")
    return pipeline


def read_model_index(path: Path, what: str) -> tuple[Any, dict[str, Any]]:
    """Read a `model_index.json`.

    Args:
        path: the file.
        what: see `find_component_class`.

    Returns:
        The pipeline's class, and the values of its arguments by name: a class for a component, None for one that is
        left out, and settings as they are.

    Raises:
        ModelError: if it is not JSON, or names what is no pipeline or no component.
    """
    values = read_json(path, what)
    kind = find_pipeline_class(values.get("_class_name"), what)
    components = {*kind._get_signature_keys(kind)[0], *kind._optional_components}
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name in components:
            # nothing but a list: Diffusers also takes the two letters of a string apart, and the two keys of an object
            if not isinstance(value, list) or len(value) != 2:
                raise ModelError(f"{what} must name the library and class of its {name}, got {value!r}.")
            library, class_name = value
            value = None if library is None else find_component_class(library, class_name, what)
        if not name.startswith("_"):
            arguments[name] = value
    return kind, arguments


def check_model_folder(folder: Path, what: str) -> tuple[Any, dict[str, Any]]:
    """Check a folder in Diffusers format; a part of its files is enough.

    Args:
        folder: the folder.
        what: see `find_component_class`.

    Returns:
        See `read_model_index`.

    Raises:
        ModelError: if loading it would run code, or read files elsewhere; see also `read_model_index`.
    """
    check_index_place(folder, INDEX_NAME, what)
    kind, arguments = read_model_index(folder / INDEX_NAME, what)
    for name, value in arguments.items():
        if inspect.isclass(value):
            check_files(folder, name, what)
    return kind, arguments


def check_index_place(folder: Path, name: str, what: str) -> None:
    """Check that a pipeline's index is a file of its folder, and that there is no pipeline of the folder's own.

    Args:
        folder: the folder.
        name: the index's name.
        what: see `find_component_class`.

    Raises:
        ModelError: if it is not, or there is one.
    """
    _check_place(folder / name, folder, what)
    if (folder / CUSTOM_PIPELINE).exists():
        raise ModelError(f"{what} holds Python code, {CUSTOM_PIPELINE}, which is never run; delete it.")


def check_files(folder: Path, part: str, what: str) -> None:
    """Check the files of a part of a model or of a student.

    Args:
        folder: the folder of the whole.
        part: a file or folder in it, which may be missing.
        what: see `find_component_class`.

    Raises:
        ModelError: if a file holds code, is a link that leads out of the folder, or names a file elsewhere; if weights
            are pickled and there are none in safetensors.
    """
    path = folder / part
    _check_place(path, folder, what)
    files = sorted(path.rglob("*")) if path.is_dir() else [path] if path.exists() else []
    for file in files:
        _check_place(file, folder, what)
        if file.is_dir():
            continue
        name = file.relative_to(folder).as_posix()
        if file.suffix.lower() == ".py":
            raise ModelError(f"{what} holds Python code for one of its parts, {name}, which is never run.")
        if file.name == REDIRECTION:
            raise ModelError(
                f"{what} holds {name}, which would load another model; merge the adapter into the weights."
            )
        if file.name.endswith(".index.json"):
            _check_shards(file, name, what)
        elif file.name.endswith("config.json"):
            _check_config(file, name, what)
    pickles = [file for file in files if file.suffix.lower() in PICKLES]
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        name = pickles[0].relative_to(folder).as_posix()
        raise ModelError(f"{what} has its weights in {name}, a pickle, which can run code; convert it to safetensors.")


def find_local_lora(source: str, what: str) -> Path | None:
    """Return the file or folder here of a LoRA by others, which is checked.

    Args:
        source: a safetensors file, a folder with one at its top, or a Hub id.
        what: see `find_component_class`.

    Returns:
        The file or folder; None for what is neither, such as a Hub id.

    Raises:
        ModelError: if it is pickled, or a link that leads out of its folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(item for item in path.iterdir() if item.suffix.lower() in (".safetensors", *PICKLES))
        for file in [item for item in files if item.suffix == ".safetensors"] or files:
            check_files(path, file.name, what)
        return path
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ModelError(f"{what} must be a safetensors file, which cannot run code; convert it.")
        return path
    return None


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file.
        what: see `find_component_class`.

    Raises:
        ModelError: if it cannot be read, or is no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else first_line(error)
        raise ModelError(f"{what} has a {path.name} that cannot be read as JSON: {reason}.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{what} has a {path.name} that holds no JSON object, but a {type(values).__name__}.")
    return values


def leads_out(path: Path, folder: Path) -> bool:
    """Return whether links in a path lead out of a folder; those of the Hub's cache into its own files do not."""
    from huggingface_hub import constants

    # by `realpath`: with a loop of links, `Path.resolve` raises an error
    top, target, cache = (Path(os.path.realpath(place)) for place in (folder, path, constants.HF_HUB_CACHE))
    inside = [top, cache]
    if top.parent.name == "snapshots":
        inside.append(top.parent.parent / "blobs")
    return not any(target.is_relative_to(place) for place in inside)


def _check_place(path: Path, folder: Path, what: str) -> None:
    """Refuse links that lead out, and what is neither a file nor a folder, such as a device or a pipe."""
    name = path.relative_to(folder).as_posix()
    if leads_out(path, folder):
        raise ModelError(
            f"{what} holds {name}, a link to {os.path.realpath(path)} outside of it; put the file itself there."
        )
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ModelError(f"{what} holds {name}, which is no ordinary file.")


def _check_shards(path: Path, name: str, what: str) -> None:
    """Refuse an index of weights whose files are not beside it."""
    shards = read_json(path, what).get("weight_map")
    for shard in shards.values() if isinstance(shards, Mapping) else [shards]:
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\:\0"):
            raise ModelError(
                f"{what} has an index of weights, {name}, that names {shard!r}, which is no file beside it."
            )


def _check_config(path: Path, name: str, what: str) -> None:
    """Refuse a configuration that asks for code of its own, or names files elsewhere."""
    values = read_json(path, what)
    for key, value in _all_items(values):
        if key == "auto_map" and value:
            raise ModelError(f"{what} asks in {name} for Python code of its own (`auto_map`), which is never run.")
        # Transformers downloads the kernels that it names, and imports them
        if "attn_implementation" in key or "experts_implementation" in key:
            named = [value] if isinstance(value, str) else value.values() if isinstance(value, Mapping) else []
            if any("/" in str(implementation) for implementation in named):
                raise ModelError(f"{what} asks in {name} for kernels of the Hub, {value!r}, which are never run.")
    for key, value in values.items():
        is_file = key.endswith(("_file", "_files")) or key == "transformers_weights"
        for named in value if isinstance(value, list) else [value]:
            if is_file and key not in HARMLESS_FILES and isinstance(named, str) and _is_elsewhere(named, path.parent):
                raise ModelError(f"{what} names in {name} a file outside of its folder as `{key}`, {named}.")


def _is_elsewhere(name: str, folder: Path) -> bool:
    """Return whether a file's name, on any system, leads to a file elsewhere; leftovers of authors do not."""
    path = PureWindowsPath(name)
    leads_away = bool(path.anchor) or ".." in path.parts
    return leads_away and (os.path.exists(name) or os.path.exists(folder / name))


def _all_items(values: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys of an object, and of all objects in it, with their values."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
