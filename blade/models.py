"""Loading a text-to-video pipeline, and what it can make: inputs, devices, sizes of videos."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from blade.attention.apply import find_transformers
from blade.convolutions import quicken_convolutions
from blade.model_source import BUNDLED, EXAMPLE_MODEL, INDEX_NAME, ModelError, first_line, locate

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What the transformer and the text encoder can run in. The VAE always runs in float32."""

INPUTS = ("prompt", "image", "video")
"""Arguments of a pipeline's call that a generation can give."""

SMALL_PARTS = ("scheduler_config.json", "guider_config.json")
"""Configuration files of a pipeline's parts that have no weights."""

RANDOM_PARTS = ("transformer", "transformer_2")
"""Of a pipeline without weights, the parts of which one can be given random ones, beside the VAE."""

WAN_SIZE_MULTIPLE = 16
"""Diffusers' video pipelines take heights and widths of whole multiples of this, whatever the VAE."""


def resolve_device(device: str | None = None) -> torch.device:
    """Return a device that is there.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; None takes CUDA if there is one.

    Raises:
        ValueError: if it is no device, or isn't there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f'`device` must be "cpu", "cuda" or a device such as "cuda:1", got {device!r}.') from None
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise ValueError(f'`device` is "{device}", but PyTorch finds no CUDA device here; take "cpu".')
        if resolved.index is not None and resolved.index >= count:
            raise ValueError(f"`device` must be one of the {count} CUDA devices here, from cuda:0, got {device!r}.")
    else:
        try:
            torch.empty(1, device=resolved).cpu()
        except (RuntimeError, NotImplementedError, AssertionError):
            raise ValueError(f'`device` is "{device}", which this PyTorch cannot use; take "cpu".') from None
    return resolved


def resolve_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; None takes bfloat16 on CUDA and float32 elsewhere.

    Raises:
        ValueError: if the models cannot run in it there.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if dtype == "float16" and device.type == "cpu":
        raise ValueError("`dtype` must be float32 or bfloat16 on the CPU, got 'float16', which is for GPUs.")
    return DTYPES[dtype]


def load_pipeline(
    model: str | Path = BUNDLED,
    *,
    revision: str | None = None,
    device: torch.device | str | None = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DiffusionPipeline:
    """Load a Diffusers video pipeline.

    Args:
        model: `BUNDLED`, a folder in Diffusers format, or a Hub id.
        revision: branch, tag or commit of a Hub id; None takes its main branch.
        device: where it runs; None leaves it where it was loaded, on the CPU.
        dtype: dtype of all parts but the VAE, which runs in float32.

    Raises:
        ModelError: if there is no such model, it cannot be read, or it makes no video.
    """
    import diffusers
    from packaging.version import Version

    source, options = locate(model, revision)
    # named `torch_dtype` before Diffusers 0.40, which warns about that name
    dtype_argument = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"
    options[dtype_argument] = {"default": dtype, "vae": torch.float32}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, **options)
    except Exception as error:  # whatever Diffusers, Transformers and safetensors raise for a broken model
        raise ModelError(f"`model` {model} cannot be loaded: {_reason(source, error)}") from error
    _check_video_model(model, pipe)
    quicken_convolutions(pipe.vae)
    return pipe if device is None else pipe.to(device)


def load_empty_pipeline(
    model: str | Path = BUNDLED,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    random_weights_on: torch.device | None = None,
) -> DiffusionPipeline:
    """Load a pipeline without its weights: its models are on PyTorch's meta device, and it has no tokenizers.

    Of a Hub id, only the small configuration files are downloaded.

    Args:
        model: see `load_pipeline`.
        revision: see `load_pipeline`.
        dtype: see `load_pipeline`.
        random_weights_on: where one transformer and the VAE are made, with the random weights of their classes. None
            leaves them on the meta device too.

    Raises:
        ModelError: if there is no such model, it cannot be read, or it makes no video.
    """
    import diffusers
    import transformers
    from huggingface_hub import snapshot_download

    source, options = locate(model, revision, announce=False)
    try:
        if not Path(source).is_dir():
            patterns = [INDEX_NAME, "*/config.json", *(f"*/{file}" for file in SMALL_PARTS)]
            source = snapshot_download(source, allow_patterns=patterns, **options)
        folder = Path(source)
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        parts: dict[str, Any] = {}
        for name, value in index.items():
            if name.startswith("_"):
                continue
            if not isinstance(value, list):
                parts[name] = value
            elif value[0] == "diffusers" and any((folder / name / file).exists() for file in SMALL_PARTS):
                parts[name] = getattr(diffusers, value[1]).from_pretrained(folder, subfolder=name)
            elif value[0] in ("diffusers", "transformers") and (folder / name / "config.json").exists():
                wanted = torch.float32 if name == "vae" else dtype
                # a second transformer is as large, and would only take memory
                first = name in RANDOM_PARTS and not any(parts.get(other) for other in RANDOM_PARTS)
                real = random_weights_on is not None and (first or name == "vae")
                with _making(random_weights_on if real else None, wanted):
                    if value[0] == "diffusers":
                        kind = getattr(diffusers, value[1])
                        part = kind.from_config(kind.load_config(folder, subfolder=name))
                    else:
                        part = getattr(transformers, value[1])(transformers.AutoConfig.from_pretrained(folder / name))
                parts[name] = nn.Module.to(part.eval(), wanted)
            else:
                parts[name] = None
        pipe = getattr(diffusers, index["_class_name"])(**parts)
    except Exception as error:  # whatever Diffusers, Transformers and the Hub's client raise for a broken model
        raise ModelError(f"`model` {model} cannot be read: {first_line(error)}") from error
    _check_video_model(model, pipe)
    return pipe


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


def execution_device(pipe: Any) -> torch.device:
    """Return the device that a pipeline runs on, wherever its weights wait."""
    return getattr(pipe, "_execution_device", pipe.device)


def main_transformer(pipe: Any) -> nn.Module:
    """Return the transformer of a pipeline, the first one where it has two."""
    return next(iter(find_transformers(pipe).values()))


def call_parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline's call by name; those of its base where a subclass passes all on."""
    calls = [vars(kind)["__call__"] for kind in type(pipe).__mro__ if "__call__" in vars(kind)]
    found = [inspect.signature(call).parameters for call in calls]
    passes_on = inspect.Parameter.VAR_KEYWORD
    return next((one for one in found if all(each.kind is not passes_on for each in one.values())), found[0])


def vae_compression(pipe: Any) -> tuple[int, int]:
    """Return how many frames, and how many pixels of height and of width, become one in a pipeline's latents."""
    time = int(getattr(pipe, "vae_scale_factor_temporal", 0) or getattr(pipe, "vae_temporal_compression_ratio", 4))
    space = int(getattr(pipe, "vae_scale_factor_spatial", 0) or getattr(pipe, "vae_spatial_compression_ratio", 8))
    return time, space


def latent_size(pipe: Any, height: int, width: int, frames: int) -> tuple[int, int, int]:
    """Return frames, height and width of the latent of a video of so many pixels and frames."""
    time, space = vae_compression(pipe)
    return (frames - 1) // time + 1, height // space, width // space


def empty_latent(pipe: Any, size: tuple[int, int, int]) -> torch.Tensor:
    """Return zeros of the shape, type and device that a pipeline's VAE decodes: (1, channels, *size)."""
    vae = pipe.vae
    return next(vae.parameters()).new_zeros(1, vae.config.get("z_dim") or vae.config.latent_channels, *size)


def size_multiples(pipe: Any) -> tuple[int, int]:
    """Return what a pipeline's heights and widths are whole multiples of."""
    patch = getattr(main_transformer(pipe).config, "patch_size", 1)
    edges = (patch, patch) if isinstance(patch, int) else patch[-2:]
    _, scale = vae_compression(pipe)
    height, width = (math.lcm(WAN_SIZE_MULTIPLE, scale * edge) for edge in edges)
    return height, width


def check_size(pipe: Any, height: int, width: int, frames: int) -> None:
    """Check that a pipeline can make a video of this size, which Diffusers would change with a mere warning.

    Args:
        pipe: the pipeline.
        height: pixels.
        width: pixels.
        frames: number of frames.

    Raises:
        ValueError: naming the nearest sizes that it can make.
    """
    for name, value, multiple in zip(("height", "width"), (height, width), size_multiples(pipe), strict=True):
        _check_step(name, value, first=multiple, step=multiple, rule=f"a multiple of {multiple}")
    step, _ = vae_compression(pipe)
    _check_step("frames", frames, first=1, step=step, rule=f"{step}n + 1 for a whole number n")


def _check_step(name: str, value: int, *, first: int, step: int, rule: str) -> None:
    below = first + (value - first) // step * step
    if value == below and value >= first:
        return
    nearest = f"{first}" if value < first else f"{below} or {below + step}"
    raise ValueError(f"`{name}` must be {rule} for this model, got {value}; the nearest is {nearest}.")


def _check_video_model(model: str | Path, pipe: Any) -> None:
    kind, parameters = type(pipe).__name__, call_parameters(pipe)
    if "num_frames" not in parameters or not (
        getattr(pipe, "transformer", None) or getattr(pipe, "transformer_2", None)
    ):
        raise ModelError(
            f"`model` {model} is a {kind}, which makes no video with a transformer; take {EXAMPLE_MODEL}."
        )
    needed = [name for name, value in parameters.items() if value.default is value.empty and name != "self"]
    needed = [name for name in needed if name not in INPUTS and parameters[name].kind != inspect.Parameter.VAR_KEYWORD]
    if needed:
        raise ModelError(f"`model` {model} is a {kind}, which needs `{needed[0]}`; take {EXAMPLE_MODEL}.")


def _reason(source: str, error: Exception) -> str:
    """Name the weight file that cannot be read, if it is that; else the first line of the error."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(Path(source).rglob("*.safetensors")) if Path(source).is_dir() else ():
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as damage:
            return f"{path.relative_to(source)} is damaged or incomplete ({first_line(damage)})"
    return first_line(error)
