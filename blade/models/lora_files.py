"""Files of LoRAs and of whole weights: finding one in a folder or on the Hub, and reading it. Nothing is run."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from blade.common.checks import is_number, meant, shortened
from blade.common.errors import first_line
from blade.common.reading import parse_json
from blade.models.foreign_branches import is_branch
from blade.models.source import MOST_BESIDE, ModelError, repository_info
from blade.models.untrusted import find_local_lora, read_json

ENDING = ".safetensors"

WEIGHT_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Names of a LoRA's file as Diffusers and PEFT save it, which is taken where there are others beside it."""

ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's file beside `adapter_model.safetensors`, which has the LoRA's alpha."""

ADAPTER_METADATA = "lora_adapter_metadata"
"""Key of the same in the header of a file that Diffusers has saved."""

ALPHA = "alpha"
"""Key of the alpha of all pairs in the header of some files, such as lightx2v's. Source: the documentation of
Diffusers' LoRA loaders."""

ADAPTER_KEY = re.compile(
    r"\.(lora_\w+|lora\.\w+|diff(_[a-z]+)?|set_(weight|param)|dora_scale|alpha|lokr_\w+|hada_\w+|oft_\w+)(\.|$)"
)
"""Part of a key that only files of LoRAs and their like have."""


@dataclass(frozen=True, eq=False)
class LoraFile:
    """The contents of a file of a LoRA, or of whole weights."""

    path: Path
    """The file."""
    tensors: dict[str, torch.Tensor]
    """Its tensors by their keys; on the meta device where their values were not asked for."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """PEFT's `LoraConfig` as JSON, as far as there is one: `r`, `lora_alpha`, their patterns and `use_rslora`."""

    @property
    def is_whole(self) -> bool:
        """True if it holds whole weights, and no changes of any."""
        return bool(self.tensors) and not any(ADAPTER_KEY.search(key) for key in self.tensors)

    @property
    def is_by_head(self) -> bool:
        """True if it is of DiffSynth, which keeps the rows of fused projections head by head where authors do.

        Source: `_convert_non_diffusers_minimax_h3_lora_to_diffusers` of Diffusers, which tells it by the same mark.
        """
        return any(".default." in key for key in self.tensors)

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of a pair that has no alpha of its own: PEFT's, or 1.

        Args:
            module: the module's name.
            rank: the pair's rank.
        """
        alpha = _of_module(self.config, "alpha_pattern", module, self.config.get("lora_alpha"))
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def read_lora(source: str, option: str = "loras") -> LoraFile:
    """Find and read a LoRA, or a file of whole weights.

    Args:
        source: a safetensors file, a folder with one at its top, a Hub id, or a file of one: `owner/name/FILE`.
        option: name of the option that it was given for, for messages.

    Raises:
        ModelError: if there is none, it is pickled or damaged, or there are several and none is named.
    """
    what = f"`{option}` {source}"
    path, config = _find(source, what, option, download=True)
    assert path is not None  # it was downloaded
    return read_lora_file(path, what, config)


def peek_lora(source: str, option: str = "loras") -> LoraFile | None:
    """Find a LoRA and read its shapes, without its values and without downloading it.

    Args:
        source: see `read_lora`.
        option: see `read_lora`.

    Returns:
        The file, its tensors on the meta device; None if it is on the Hub and not in its cache.

    Raises:
        ModelError: see `read_lora`.
    """
    what = f"`{option}` {source}"
    path, config = _find(source, what, option, download=False)
    return None if path is None else read_lora_file(path, what, config, values=False)


def read_lora_file(path: Path, what: str, config: Path | None = None, *, values: bool = True) -> LoraFile:
    """Read a file of a LoRA, or of whole weights.

    Args:
        path: a safetensors file.
        what: the subject of the errors' messages, such as "`loras` FILE".
        config: PEFT's configuration beside it, if there is one.
        values: read the tensors; else their shapes alone.

    Raises:
        ModelError: if it is damaged.
    """
    try:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            keys = list(file.keys())
            tensors = {key: _as_float(file.get_tensor(key)) if values else _shape(file, key) for key in keys}
    except Exception as error:  # whatever safetensors raises for a damaged file
        raise ModelError(f"{what} cannot be read as safetensors: {first_line(error)}") from error
    return LoraFile(path, tensors, _read_config(metadata, config, what))


def _shape(file: Any, key: str) -> torch.Tensor:
    """Return a tensor of a file without its values, if it may be any."""
    if is_branch(key):
        return _as_float(file.get_tensor(key))  # what matters is whether it is zero
    return torch.empty(file.get_slice(key).get_shape(), device="meta")


def _as_float(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that can be multiplied: in float32 where it has 8 bits or is of integers."""
    return tensor if tensor.is_floating_point() and tensor.itemsize > 1 else tensor.float()


def _of_module(config: Mapping[str, Any], pattern: str, module: str, default: Any) -> Any:
    """Return a value of PEFT's configuration that may differ between modules."""
    for key, value in (config.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _read_config(metadata: Mapping[str, str], path: Path | None, what: str) -> dict[str, Any]:
    """Return PEFT's configuration, from the header of the file or from the file beside it."""
    header = parse_json(metadata.get(ADAPTER_METADATA, "{}"), f"{what}: {ADAPTER_METADATA}")
    if not isinstance(header, dict):
        raise ModelError(f"{what} has {ADAPTER_METADATA} that is no JSON object, but a {type(header).__name__}.")
    config: dict[str, Any] = {key.removeprefix("transformer."): value for key, value in header.items()}
    if not config and path is not None:
        config = read_json(path, what)
    if not config and re.fullmatch(r"[\d.]+(e-?\d+)?", metadata.get(ALPHA, "")):  # others write words there
        config = {"lora_alpha": parse_json(metadata[ALPHA], f"{what}: {ALPHA}")}
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ModelError(f"{what} must have an `alpha_pattern` by module, got {shortened(patterns)}.")
    for value in (config.get("lora_alpha"), *patterns.values()):
        if value is not None and not is_number(value):
            raise ModelError(f"{what} must have numbers for `lora_alpha`, got {shortened(value)}.")
    return config


def _find(source: str, what: str, option: str, *, download: bool) -> tuple[Path | None, Path | None]:
    """Return a LoRA's file, and PEFT's configuration beside it if there is one."""
    local = find_local_lora(source, what)
    if local is None:
        return _download(source, what, option, download=download)
    if local.is_dir():
        files = [item.name for item in local.iterdir() if item.suffix == ENDING]
        local = local / _choose_file(files, what, f"{source}/FILE")
    config = local.parent / ADAPTER_CONFIG
    return local, config if is_peft(local.name) and config.is_file() else None


def _download(source: str, what: str, option: str, *, download: bool) -> tuple[Path | None, Path | None]:
    """Return the file of a Hub id, and PEFT's configuration beside it if there is one.

    Without a download, there is none unless the cache has it.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    parts = source.split("/")
    if not all(parts) or len(parts) < 2 or source[0] in ".~" or "\\" in source:
        raise ModelError(
            f"{what} is no file or folder here and no Hub id, which reads owner/name or owner/name/FILE"
            f"{meant(source, _beside(source))}"
        )
    name, file = "/".join(parts[:2]), "/".join(parts[2:])
    info = repository_info(name, option, file or WEIGHT_NAMES[0])
    files = [] if info is None else [item.rfilename for item in info.siblings or []]
    if info is not None:
        weights = [item for item in files if item.endswith(ENDING)]
        if file and file not in weights:
            raise ModelError(f"`{option}` {name} has no safetensors file {file}{meant(file, weights)}")
        file = file or _choose_file(weights, what, f"{name}/FILE")
    file = file or WEIGHT_NAMES[0]
    if not download:
        cached = try_to_load_from_cache(name, file)
        return (Path(cached) if isinstance(cached, str) else None), None
    config = (Path(file).parent / ADAPTER_CONFIG).as_posix()
    try:
        path = Path(hf_hub_download(name, file, local_files_only=info is None))
        if not is_peft(file) or config not in files:
            return path, None
        return path, Path(hf_hub_download(name, config))
    except Exception as error:  # whatever the Hub's client raises
        raise ModelError(f"{what} cannot be downloaded: {first_line(error)}") from error


def _beside(source: str) -> list[str]:
    """Return the paths of what stands where a source would."""
    folder = Path(source).parent
    try:
        return [str(folder / item.name) for item in islice(folder.expanduser().iterdir(), MOST_BESIDE)]
    except OSError:
        return []


def is_peft(name: str) -> bool:
    """Return whether a file's name is PEFT's, which has its configuration beside it."""
    return name.endswith(WEIGHT_NAMES[1])


def _choose_file(files: list[str], what: str, example: str) -> str:
    """Return the only safetensors file, or the one that is named as Diffusers or PEFT name it."""
    for known in WEIGHT_NAMES:
        if known in files:
            return known
    if len(files) != 1:
        held = f"it has {', '.join(sorted(files)[:4])}{', ...' if len(files) > 4 else ''}" if files else "it has none"
        raise ModelError(f"{what} must hold one safetensors file, or the file be named, {example}; {held}.")
    return files[0]
