"""Location of a model: the bundled one, a folder in Diffusers format, or a repository of the Hub."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blade.common.checks import meant
from blade.common.errors import first_line
from blade.common.leftovers import is_temporary
from blade.common.terminal import logger

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

BUNDLED = "bundled"
"""Name of the shapes model that ships with this package."""

INDEX_NAME = "model_index.json"
"""The file that makes a folder a Diffusers pipeline."""

MODULAR_INDEX_NAME = "modular_model_index.json"
"""The file that makes a folder a modular pipeline of Diffusers."""

INDEX_NAMES = (INDEX_NAME, MODULAR_INDEX_NAME)
"""The files one of which makes a folder a pipeline."""

MOST_BESIDE = 10_000
"""Most files of a folder among which a misspelled one is looked for."""

LARGE_DOWNLOAD = 50_000_000
"""Bytes from which on a download is announced."""

HUB_TIMEOUT = 10.0
"""Seconds to wait for the Hub before the local cache is taken."""


class ModelError(ValueError):
    """A model that cannot be found, loaded or used; its message names the model and what would be right."""


class HubUnreachableError(ModelError):
    """A model that is neither here nor in the Hub's cache, while the Hub cannot be reached."""


def bundled_model_path() -> Path:
    """Return the folder of the shapes model, an ordinary `WanPipeline` in Diffusers format.

    Raises:
        ModelError: if the package was installed without it.
    """
    path = Path(str(files("blade") / "assets" / "shapes"))
    if not (path / INDEX_NAME).is_file():
        from blade.families.registry import example_model

        raise ModelError(f"This installation lacks the bundled model; name another, such as `{example_model()}`.")
    return path


def hub_commit(model: str | Path, revision: str | None = None) -> str | None:
    """Return the commit of a Hub id that the local cache holds, once it is loaded.

    Args:
        model: the `model` of `load_model`.
        revision: the `revision` of `load_model`.

    Returns:
        40 hexadecimal digits; None for the bundled model and for folders.
    """
    from huggingface_hub import try_to_load_from_cache

    if str(model) == BUNDLED or Path(model).expanduser().exists():
        return None
    cached = (try_to_load_from_cache(str(model), name, revision=revision) for name in INDEX_NAMES)
    return next((Path(path).parent.name for path in cached if isinstance(path, str)), None)


def look_up(
    name: str, option: str, file: str, revision: str | None = None, known: Iterable[str] = ()
) -> list[str] | None:
    """Return the names of a repository's files, or None if the Hub cannot be reached but the cache has `file`.

    The arguments and errors are those of `repository_info`.
    """
    info = repository_info(name, option, file, revision, known)
    return None if info is None else _file_names(info)


def repository_info(
    name: str, option: str, file: str, revision: str | None = None, known: Iterable[str] = ()
) -> ModelInfo | None:
    """Ask the Hub for a repository, once and with a time limit, where Diffusers would retry for minutes.

    Args:
        name: what ought to be a Hub id, as it is no path here.
        option: name of the option that it was given for, for messages.
        file: the file that tells whether the local cache has it.
        revision: branch, tag or commit; None takes the main branch.
        known: names that may be meant, beside those of files here.

    Returns:
        Its commit and files, among others; None if the Hub cannot be reached but the cache has `file`.

    Raises:
        ModelError: if there is no such repository.
        HubUnreachableError: if it is not in the cache, and the Hub cannot be asked.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    problem = f"`{option}` {name} is no folder here"
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or name[0] in ".~" or "=" in name:
        raise ModelError(f"{problem}, and no Hub id, which reads owner/name{meant(name, [*known, *_beside(name)])}")
    try:
        return HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT)
    except HFValidationError as error:
        raise ModelError(f"{problem}, and no Hub id: {first_line(error)}") from error
    except GatedRepoError as error:
        raise ModelError(f"{problem}; on the Hub its licence must be accepted first (`hf auth login`).") from error
    except RepositoryNotFoundError as error:
        end = meant(name, [*known, *_beside(name)])
        missing = "the Hub has no such repository, or not without `hf auth login`"
        raise ModelError(f"{problem}, and {missing}{end}") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"`revision` must be a branch, tag or commit of {name}, got {revision!r}.") from error
    except HfHubHTTPError as error:
        raise ModelError(f"{problem}, and the Hub refused to look it up: {first_line(error)}") from error
    except Exception as error:  # no network: each version of the Hub's client has another class for it
        looked_for = INDEX_NAMES if file == INDEX_NAME else (file,)
        if any(isinstance(try_to_load_from_cache(name, known, revision=revision), str) for known in looked_for):
            return None
        raise HubUnreachableError(
            f"{problem} and not in the Hub's local cache, and the Hub cannot be reached ({first_line(error)})"
            f"{meant(name, [*known, *_beside(name)])}"
        ) from error


def _beside(name: str) -> list[str]:
    """Return the paths of what stands where a name would, with its own folder as it is written."""
    folder = Path(name).expanduser().parent
    try:
        return [str(Path(name).parent / item.name) for item in islice(folder.iterdir(), MOST_BESIDE)]
    except OSError:
        return []


def _file_names(info: ModelInfo) -> list[str]:
    return [item.rfilename for item in info.siblings or []]


def bytes_to_download(name: str, files: Iterable[str], commit: str | None = None) -> int:
    """Return how much of a pipeline's repository the local cache lacks: its parts' configurations and safetensors.

    Args:
        name: the Hub id.
        files: names of its files.
        commit: which of its commits; a branch, or None for the main one, would be looked up once more, and the cache
            would note its commit as if it were downloaded.

    Returns:
        Bytes, without those that the cache has from another commit; 0 if the Hub cannot be asked any more.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):  # type: ignore[misc]  # huggingface_hub is not followed
        """No bar: all this takes is a moment."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    files = list(files)
    parts = {path.partition("/")[0] for path in files if path.endswith(("/config.json", "_config.json"))}
    needed = [
        path
        for path in files
        if path.partition("/")[0] in parts
        and path.endswith((".safetensors", ".json", ".txt", ".model"))
        and not path.endswith((".fp16.safetensors", ".bf16.safetensors"))
    ]
    if not needed:
        return 0
    try:
        listed = snapshot_download(
            name,
            revision=commit,
            allow_patterns=needed,
            etag_timeout=HUB_TIMEOUT,
            tqdm_class=Silent,
            dry_run=True,
        )
    except OSError:  # the download itself, which follows, is to say what is wrong
        return 0
    return sum(file.file_size or 0 for file in listed if file.will_download)


def announce_download(name: str, files: Iterable[str], commit: str | None = None) -> None:
    """Say how much of a repository is downloaded, if that is much. See `bytes_to_download`."""
    size = bytes_to_download(name, files, commit)
    if size >= LARGE_DOWNLOAD:
        logger.info(f"downloading {size / 1e9:.1f} GB of {name} to the Hub's local cache")


def locate(model: str | Path, revision: str | None, *, announce: bool = True) -> tuple[str, dict[str, Any]]:
    """Return what to hand to Diffusers for a model that seems to be one.

    Args:
        model: `BUNDLED`, a folder in Diffusers format, or a Hub id.
        revision: branch, tag or commit of a Hub id; None takes its main branch.
        announce: say how much a large model will download.

    Returns:
        What `from_pretrained` takes first, and its keyword arguments.

    Raises:
        ModelError: if there is no such model.
    """
    name = str(model)
    path = Path(name).expanduser()
    if revision is not None and (name == BUNDLED or path.exists()):
        raise ModelError(f"`revision` must not be given for `model` {name}, which is not from the Hub.")
    if name == BUNDLED:
        return str(bundled_model_path()), {}
    if path.is_file():
        raise ModelError(f"`model` must be a folder in Diffusers format or a Hub id, got the file {name}.")
    if path.is_dir():
        files = [item.name for item in path.iterdir() if not is_temporary(item.name)]
        options: dict[str, Any] = {}
    else:
        info = repository_info(name, "model", INDEX_NAME, revision, known=[BUNDLED])
        files = [INDEX_NAME] if info is None else _file_names(info)
        # of a modular pipeline, only what its workflows need is downloaded, which its index says
        if info is not None and announce and MODULAR_INDEX_NAME not in files:
            announce_download(name, files, info.sha)
        options = {"local_files_only": info is None, "revision": revision}
    if not set(INDEX_NAMES) & set(files):
        raise ModelError(f"`model` {name} is no Diffusers pipeline: it has no {INDEX_NAME}{_resemblance(files)}.")
    return (str(path) if path.is_dir() else name), options


def _resemblance(files: list[str]) -> str:
    """Say what a folder without a pipeline looks like."""
    if any(name.endswith((".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".gguf")) for name in files):
        from blade.families.registry import example_model

        return (
            ". It looks like a model in its original format, or a single component; take the repository whose name "
            f"ends in -Diffusers, such as {example_model()}"
        )
    return ""
