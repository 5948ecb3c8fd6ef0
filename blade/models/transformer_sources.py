"""Files of a transformer's weights: finding them, and reading their tensors. Nothing in them is run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from blade.common.checks import meant, shortened
from blade.common.errors import first_line
from blade.common.reading import parse_json
from blade.models.source import ModelError, repository_info
from blade.models.untrusted import PICKLES, check_files, read_json

ENDINGS = (".safetensors", ".gguf")
"""Endings of files that are read."""

CONFIG = "config.json"
"""The file that makes a folder one of a transformer, as Diffusers saves it."""

EXTRAS = {"gguf": "gguf", "bitsandbytes": "nf4"}
"""Packages that some weights need, and BLADE's extras that bring them."""

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of tensors by their names in the header of a safetensors file."""

Weights = dict[str, torch.Tensor]
"""Tensors by their keys."""


def find_source(source: str) -> Path:
    """Return the file or folder of a transformer's weights, downloaded where it is on the Hub.

    Args:
        source: a .safetensors or .gguf file, a folder as Diffusers saves one, or a file of the Hub, `owner/name/FILE`.

    Raises:
        ModelError: if there is none, or reading it could run code.
    """
    path, what = Path(source).expanduser(), f"`transformer` {source}"
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise ModelError(f"{what} must be a file, or a folder with a {CONFIG}, as Diffusers saves one.")
        check_files(path, ".", what)
        return path
    if path.suffix.lower() in PICKLES:
        raise ModelError(f"{what} is a pickle, which can run code when it is read; take or make a safetensors file.")
    if path.is_file():
        if path.suffix not in ENDINGS:
            raise ModelError(f"{what} must be a file that ends in {' or '.join(ENDINGS)}.")
        return path
    parts = source.split("/")
    if len(parts) < 3 or not all(parts) or source[0] in ".~" or path.suffix not in ENDINGS:
        raise ModelError(f"{what} is no file or folder here, and no file of the Hub, such as owner/name/FILE.gguf.")
    return _download("/".join(parts[:2]), "/".join(parts[2:]), what)


def _download(name: str, file: str, what: str) -> Path:
    from huggingface_hub import hf_hub_download

    info = repository_info(name, "transformer", file)
    files = [file] if info is None else [item.rfilename for item in info.siblings or []]
    if file not in files:
        weights = [item for item in files if item.endswith(ENDINGS)]
        raise ModelError(f"`transformer` {name} has no file {file}{meant(file, weights)}")
    try:
        return Path(hf_hub_download(name, file, local_files_only=info is None))
    except Exception as error:  # whatever the Hub's client raises
        raise ModelError(f"{what} cannot be downloaded: {first_line(error)}") from error


def read_quantization(path: Path, what: str) -> Mapping[str, Any] | None:
    """Return how a folder's weights are quantised, from its configuration; None: they are not, or it is a file.

    Raises:
        ModelError: if they are quantised otherwise than by bitsandbytes to 4 bits.
    """
    config = read_json(path / CONFIG, what).get("quantization_config") if path.is_dir() else None
    if config is None:
        return None
    values = config if isinstance(config, dict) else {}
    if values.get("quant_method") != "bitsandbytes" or not values.get("load_in_4bit"):
        raise ModelError(
            f"{what} must hold weights that are not quantised, or by bitsandbytes to 4 bits; its {CONFIG} says "
            f"{shortened(config)}. Take a GGUF or fp8 file instead."
        )
    return values


def require(package: str, what: str) -> None:
    """Check that an optional package is installed.

    Args:
        package: one of `EXTRAS`.
        what: the subject of the error's message.

    Raises:
        ModelError: naming the extra that brings it.
    """
    if find_spec(package) is None:
        raise ModelError(f'{what} needs the package {package}: pip install "blade-video[{EXTRAS[package]}]".')


def read_tensors(path: Path, what: str, *, meta: bool = False) -> Weights:
    """Read the tensors of a file, or of all safetensors files of a folder.

    Args:
        path: the result of `find_source`.
        what: the subject of the error's message.
        meta: read headers alone; the tensors are then on PyTorch's meta device.

    Returns:
        Tensors by key; a quantised one of a GGUF file is Diffusers' `GGUFParameter`.

    Raises:
        ModelError: if they cannot be read.
    """
    if path.suffix == ".gguf":
        require("gguf", what)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    tensors: Weights = {}
    for file in files:
        read = _read_gguf if file.suffix == ".gguf" else _read_safetensors
        try:
            tensors |= read(file, meta)
        except Exception as error:  # whatever the two packages and Diffusers raise for a damaged or unknown file
            problem = f"{file.name} cannot be read as {file.suffix[1:]}"
            raise ModelError(f"{what}: {problem}: {first_line(error)}") from error
    if not tensors:
        raise ModelError(f"{what} holds no weights in safetensors.")
    return tensors


def _read_safetensors(path: Path, meta: bool) -> Weights:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
        if not meta:
            return {key: file.get_tensor(key) for key in keys}
        headers = {key: file.get_slice(key) for key in keys}
        return {
            key: torch.empty(header.get_shape(), dtype=SAFETENSORS_DTYPES[header.get_dtype()], device="meta")
            for key, header in headers.items()
        }


def _read_gguf(path: Path, meta: bool) -> Weights:
    from diffusers.models.model_loading_utils import load_gguf_checkpoint

    if not meta:
        weights: Weights = load_gguf_checkpoint(str(path))
        return weights
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter
    from gguf import GGUFReader

    tensors: Weights = {}
    for tensor in GGUFReader(path).tensors:
        kind = tensor.tensor_type
        data = torch.empty(tensor.data.shape, dtype=getattr(torch, str(tensor.data.dtype)), device="meta")
        if kind.name not in ("F32", "F16"):
            if kind not in SUPPORTED_GGUF_QUANT_TYPES:
                raise ValueError(f"{tensor.name} is stored as {kind.name}, which Diffusers cannot read")
            data = GGUFParameter(data, quant_type=kind)
        tensors[tensor.name] = data
    return tensors


def read_state(path: Path, key: str) -> Mapping[str, Any]:
    """Return what bitsandbytes says of a packed weight: its `shape` among others, as JSON in a tensor of bytes.

    Args:
        path: the folder.
        key: the tensor's key.
    """
    from safetensors import safe_open

    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            if key in opened.keys():  # noqa: SIM118 (it is no mapping)
                state: dict[str, Any] = parse_json(bytes(opened.get_tensor(key).tolist()), key)
                return state
    raise KeyError(key)
