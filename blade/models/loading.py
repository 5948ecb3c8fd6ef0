"""Loading a video pipeline, with its weights or without."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from blade.common.errors import first_line
from blade.common.files import write_files
from blade.common.leftovers import files_in
from blade.common.terminal import logger
from blade.families.registry import example_model, model_families, published_configurations
from blade.models.cpu_convolutions import use_onednn_conv3d
from blade.models.loaded import LoadedModel
from blade.models.modular import (
    check_modular_folder,
    is_modular_folder,
    load_modular_pipeline,
    make_modular_pipeline,
    read_modular_index,
)
from blade.models.source import (
    BUNDLED,
    INDEX_NAME,
    INDEX_NAMES,
    MODULAR_INDEX_NAME,
    HubUnreachableError,
    ModelError,
    announce_download,
    locate,
    repository_info,
)
from blade.models.untrusted import check_model_folder, read_model_index

INPUTS = ("prompt", "image", "video")
"""Arguments of a pipeline's call that a generation can give."""

SMALL_PARTS = ("scheduler_config.json", "guider_config.json")
"""Configuration files of a pipeline's parts that have no weights."""

NEEDED_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Endings of the files of a modular pipeline's parts that are downloaded."""

FLOAT32_PARTS = ("vae", "audio_vae")
"""Parts that run in float32 whatever the others do."""

RANDOM_PARTS = ("transformer", "transformer_2")
"""Of a pipeline without weights, the parts of which one can be given random ones, beside the VAE."""


def load_model(
    model: str | Path = BUNDLED,
    *,
    revision: str | None = None,
    device: torch.device | str | None = "cpu",
    dtype: torch.dtype = torch.float32,
    components: Mapping[str, nn.Module] = MappingProxyType({}),
) -> LoadedModel:
    """Load a Diffusers video pipeline.

    Args:
        model: `BUNDLED`, a folder in Diffusers format, or a Hub id.
        revision: branch, tag or commit of a Hub id; None takes its main branch.
        device: where it runs; None leaves it where it was loaded, on the CPU.
        dtype: dtype of all parts but the VAE, which runs in float32.
        components: parts that are loaded already, by name; the model's own are then neither read nor downloaded.

    Raises:
        ModelError: if there is no such model, it cannot be read, or it makes no video.
    """
    source, options = locate(model, revision)
    try:
        source = _fetch(model, source, options, components)
        dtypes = {"default": dtype, **dict.fromkeys(FLOAT32_PARTS, torch.float32)}
        pipe = load_pipeline(source, f"`model` {model} cannot be loaded: it", dtypes, components)
    except ModelError:
        raise
    except Exception as error:  # whatever Diffusers, Transformers and safetensors raise for a broken model
        raise ModelError(f"`model` {model} cannot be loaded: {_reason(source, error)}") from error
    loaded = _checked(model, pipe)
    _check_weights(model, pipe)
    use_onednn_conv3d(pipe.vae)
    if device is not None:
        pipe.to(device)
    return loaded


def load_pipeline(
    folder: str | Path,
    what: str,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    components: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Any:
    """Load a pipeline from a folder in Diffusers format by others: none of its code runs, and nothing is unpickled.

    Args:
        folder: the folder.
        what: the subject of the error's message, such as "`model` folder".
        dtype: dtype of all parts, or of each by name.
        components: see `load_model`.

    Raises:
        ModelError: see `blade.models.untrusted.check_model_folder`.
    """
    import diffusers
    from packaging.version import Version

    if is_modular_folder(Path(folder)):
        return load_modular_pipeline(Path(folder), what, dtype, components)
    kind, _ = check_model_folder(Path(folder), what)
    if Version(diffusers.__version__) >= Version("0.40"):
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    else:  # which takes the first by another name, and knows the second for downloads alone
        options = {"torch_dtype": dtype}
    return kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, **options, **components)


def _fetch(model: str | Path, source: str, options: Mapping[str, Any], components: Mapping[str, nn.Module]) -> str:
    """Download the pipeline of a Hub id into the local cache, but for parts that are there; return its folder."""
    if Path(source).is_dir():
        return source
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    # before anything else: Diffusers looks at its classes while it downloads
    folder, what = Path(snapshot_download(source, allow_patterns=INDEX_NAMES, **options)), f"`model` {model} cannot be"
    if is_modular_folder(folder):
        parts = read_modular_index(folder / MODULAR_INDEX_NAME, f"{what} loaded: it").parts
        if not options["local_files_only"]:
            info = repository_info(source, "model", MODULAR_INDEX_NAME, options["revision"])
            names = [] if info is None else [item.rfilename for item in info.siblings or []]
            announce_download(source, [name for name in names if name.partition("/")[0] in parts], folder.name)
        patterns = [f"{name}/*{ending}" for name in parts if name not in components for ending in NEEDED_FILES]
        return str(snapshot_download(source, allow_patterns=[*INDEX_NAMES, *patterns], **options))
    read_model_index(folder / INDEX_NAME, f"{what} loaded: it")
    options = {**options, **components, "trust_remote_code": False}
    return str(DiffusionPipeline.download(source, use_safetensors=True, **options))


def load_empty_model(
    model: str | Path = BUNDLED,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    random_weights_on: torch.device | None = None,
) -> LoadedModel:
    """Load a pipeline without its weights: its models are on PyTorch's meta device, and it has no tokenizers.

    Of a Hub id, only the small configuration files are downloaded. Where the Hub cannot be reached, those of some
    published pipelines come with BLADE (`published_configurations`).

    Args:
        model: see `load_model`.
        revision: see `load_model`.
        dtype: see `load_model`.
        random_weights_on: where one transformer and the VAE are made, with the random weights of their classes. None
            leaves them on the meta device too.

    Raises:
        ModelError: if there is no such model, it cannot be read, or it makes no video.
    """
    from diffusers import ModelMixin
    from huggingface_hub import snapshot_download
    from transformers import PreTrainedModel

    try:
        source, options = locate(model, revision, announce=False)
    except HubUnreachableError:
        if revision is not None or str(model) not in published_configurations():
            raise
        index = published_configurations()[str(model)].get("model_index", {})
        missing = [name for name, value in index.items() if value == [None, None]]
        without = f", without {' and '.join(missing)}" if missing else ""
        logger.info(
            f"the Hub cannot be reached; the configuration of {model} is the one that comes with BLADE{without}"
        )
        with TemporaryDirectory() as known:
            write_published_configuration(str(model), Path(known))
            return load_empty_model(known, dtype=dtype, random_weights_on=random_weights_on)
    try:
        if not Path(source).is_dir():
            patterns = [*INDEX_NAMES, "*/config.json", *(f"*/{file}" for file in SMALL_PARTS)]
            source = snapshot_download(source, allow_patterns=patterns, **options)
        folder = Path(source)
        what = f"`model` {model} cannot be read: it"
        modular = check_modular_folder(folder, what) if is_modular_folder(folder) else None
        kind: Any = None
        arguments = dict[str, Any]()
        if modular is None:
            kind, arguments = check_model_folder(folder, what)
        arguments |= {} if modular is None else modular.parts
        parts: dict[str, Any] = {name: value for name, value in arguments.items() if inspect.isclass(value)}
        for name, part in parts.items():
            arguments[name], is_model = None, issubclass(part, (ModelMixin, PreTrainedModel))
            if not is_model and any((folder / name / file).exists() for file in SMALL_PARTS):
                arguments[name] = part.from_pretrained(folder, subfolder=name)
            elif is_model and (folder / name / "config.json").exists():
                wanted = torch.float32 if name in FLOAT32_PARTS else dtype
                # a second transformer is as large, and would only take memory
                made = any(isinstance(arguments.get(other), nn.Module) for other in RANDOM_PARTS)
                first = name in RANDOM_PARTS and not made
                real = random_weights_on is not None and (first or name == "vae")
                with _making(random_weights_on if real else None, wanted):
                    arguments[name] = _without_weights(part, folder / name)
                nn.Module.to(arguments[name].eval(), wanted)
        pipe = kind(**arguments) if modular is None else make_modular_pipeline(modular, arguments)
    except ModelError:
        raise
    except Exception as error:  # whatever Diffusers, Transformers and the Hub's client raise for a broken model
        raise ModelError(f"`model` {model} cannot be read: {first_line(error)}") from error
    return _checked(model, pipe)


def write_published_configuration(model: str, folder: Path) -> None:
    """Write the configuration files of a published pipeline into a folder; see `published_configurations`."""
    parts = dict(published_configurations()[model])
    indices = {"model_index": INDEX_NAME, "modular_model_index": MODULAR_INDEX_NAME}
    files = {folder / file: parts.pop(name) for name, file in indices.items() if name in parts}
    for name, values in parts.items():
        files[folder / name / ("scheduler_config.json" if name.endswith("scheduler") else "config.json")] = values
    write_files({path: json.dumps(values).encode() for path, values in files.items()})


def _without_weights(kind: Any, folder: Path) -> nn.Module:
    """Make a model of Diffusers or Transformers from its configuration."""
    if hasattr(kind, "load_config"):
        part: nn.Module = kind.from_config(kind.load_config(folder))
        return part
    import transformers

    return kind(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False))  # type: ignore[no-any-return]


@contextmanager
def _making(device: torch.device | None, dtype: torch.dtype) -> Iterator[None]:
    """Make modules on a device, in a dtype from the start, as the largest would not fit twice; None: on no device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if device is None else dtype)
    try:
        with torch.device("meta" if device is None else device):
            yield
    finally:
        torch.set_default_dtype(before)


def _checked(model: str | Path, pipe: Any) -> LoadedModel:
    """Return a pipeline with its facts, if it makes videos with a transformer from inputs that can be given."""
    kind, loaded = type(pipe).__name__, LoadedModel(pipe)
    parameters = loaded.parameters
    needed = [name for name, value in parameters.items() if value.default is value.empty and name != "self"]
    needed = [name for name in needed if name not in INPUTS and parameters[name].kind != inspect.Parameter.VAR_KEYWORD]
    transformer = getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
    if needed and transformer is not None and any(family.recognises(transformer) for family in model_families()):
        named = " and ".join(f"`{name}`" for name in needed)
        raise ModelError(
            f"`model` {model} is a {kind}, which needs {named}: no option gives that. Call the pipeline from Python, "
            f"where `apply_blade(pipe)` makes it sparse, or take {example_model()}."
        )
    if "num_frames" not in parameters or transformer is None:
        raise ModelError(
            f"`model` {model} is a {kind}, which makes no video with a transformer; take {example_model()}."
        )
    if needed:
        raise ModelError(f"`model` {model} is a {kind}, which needs `{needed[0]}`; take {example_model()}.")
    return loaded


def _check_weights(model: str | Path, pipe: Any) -> None:
    """Refuse a pipeline with parts that lack weights, which are then on PyTorch's meta device."""
    for part, module in pipe.components.items():
        if isinstance(module, nn.Module):
            named = (*module.named_parameters(), *module.named_buffers())
            missing = [name for name, weight in named if weight.is_meta]
            if missing:
                count = f"{len(missing)} of the {len(named)} weights"
                raise ModelError(f"`model` {model} lacks {count} of its {part}, such as {missing[0]}.")


def _reason(source: str, error: Exception) -> str:
    """Name the weight file that cannot be read, if it is that; else the first line of the error."""
    from safetensors import SafetensorError, safe_open

    for path in files_in(Path(source), "*.safetensors") if Path(source).is_dir() else ():
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as damage:
            return f"{path.relative_to(source)} is damaged or incomplete ({first_line(damage)})"
    return first_line(error)
