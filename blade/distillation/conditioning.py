"""Conditions of a transformer besides the latent and the time: a prompt's embeddings, and tables for the video size.

They are captured by running the pipeline up to the transformer's first forward pass, so that they are exactly the
pipeline's, whatever the family. They are stored in shards of safetensors, so that text encoders run once and the
encoding of long lists can resume.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from blade.common.files import write_files
from blade.common.reading import read_json
from blade.distillation.prompt_files import PROMPTS_KEY, written_prompts
from blade.families.protocol import Inputs
from blade.families.registry import find_family
from blade.generation.request import ResolvedRequest
from blade.generation.run import call_arguments, prepare_sampler
from blade.models.loaded import LoadedModel
from blade.models.loading import INPUTS

INDEX_NAME = "embeddings.json"
"""File of the values that all shards share."""

SHARD_PROMPTS = 256
"""Prompts in a shard."""

NEGATIVE = "negative"
"""Name of the negative prompt's file."""

SHARED = "shared"
"""Name of the file of the conditions that depend on the video's size and not on the prompt."""

CONSTANT_CHANNELS = "constant_channels"
"""Name of the latent's channels besides the noise, which are the same for every prompt."""

VARIABLE = ("hidden_states", "timestep", "return_dict")
"""Arguments of the transformer that are not conditions."""

SAMPLED_VALUES = 64
"""Number of values of each parameter that enter a fingerprint."""


class _Captured(Exception):
    """Raised to end a pipeline's run at the transformer."""


@dataclass(frozen=True)
class Conditions:
    """Arguments of a forward pass besides the latent and the time."""

    prompts: Inputs
    """Tensors (B, ...) with a row for each prompt."""
    shared: Inputs
    """All other arguments."""
    latent_shape: tuple[int, ...]
    """Shape of one latent, without the batch."""
    time_dtype: torch.dtype | None = None
    """Type to which the pipeline casts times; None: no cast."""

    def at(self, indices: Sequence[int]) -> Conditions:
        """Return the conditions of some of the prompts."""
        return replace(self, prompts={name: value[list(indices)] for name, value in self.prompts.items()})

    def on(self, device: torch.device) -> Conditions:
        """Return the conditions on a device."""
        return Conditions(
            {name: _to(value, device) for name, value in self.prompts.items()},
            {name: _to(value, device) for name, value in self.shared.items()},
            self.latent_shape,
            self.time_dtype,
        )

    def inputs(self, latents: torch.Tensor, times: torch.Tensor) -> Inputs:
        """Return the arguments of a forward pass.

        Args:
            latents: (B, ...), in the type that the network takes, on the device of the conditions.
            times: (B,).
        """
        batch = len(latents)
        rows = {name: value.expand(batch, *value.shape[1:]) for name, value in self.prompts.items()}
        arguments = {**rows, **self.shared}
        constant = arguments.pop(CONSTANT_CHANNELS, None)
        if constant is not None:
            latents = torch.cat((latents, constant.expand(batch, *constant.shape[1:]).to(latents)), dim=1)
        return {**arguments, "hidden_states": latents, "timestep": times.to(latents.device, self.time_dtype)}


def check_text_alone(model: LoadedModel) -> None:
    """Raise a `ValueError` for a pipeline that requires more than a prompt, such as an image, or that makes sound."""
    required = [name for name, value in model.parameters.items() if name in INPUTS and value.default is value.empty]
    if others := [name for name in required if name != "prompt"]:
        raise ValueError(
            "`model` must be one that makes videos from text alone, but a "
            f"{type(model.pipe).__name__} needs `{others[0]}`."
        )
    if model.family.sound_rate(model.pipe) is not None:  # whose noise would be taken for a condition
        raise ValueError(
            f"`model` must be one that makes video alone, but a {type(model.pipe).__name__} makes sound beside it, "
            "which cannot be distilled."
        )


def capture(model: LoadedModel, request: ResolvedRequest, prompt: str) -> Conditions:
    """Capture the conditions that a pipeline passes to its transformer for a prompt.

    Args:
        model: the model.
        request: a resolved request for everything but the prompt; guidance in two passes is disabled.
        prompt: the prompt, which may be empty.
    """
    pipe, transformer, arguments = model.pipe, model.transformer, dict[str, Any]()
    names = list(inspect.signature(type(transformer).forward).parameters)[1:]

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments.update(zip(names, args), **kwargs)
        raise _Captured

    if find_family(transformer).guidance_takes_two_passes:
        request = replace(request, guidance_scale=1.0, negative_prompt=None)
    handle = transformer.register_forward_pre_hook(stop, with_kwargs=True)
    prepare_sampler(model, request)
    try:
        with torch.no_grad():
            pipe(**call_arguments(model, request) | {"prompt": prompt})
    except _Captured:
        pass
    finally:
        handle.remove()
    latent, channels = arguments["hidden_states"], getattr(transformer.config, "out_channels", None)
    conditions = {name: value for name, value in arguments.items() if name not in VARIABLE and value is not None}
    prompts = {name: value for name, value in conditions.items() if _is_row(value)}
    shared = {name: value for name, value in conditions.items() if name not in prompts}
    if channels is not None and latent.ndim == 5 and latent.shape[1] == transformer.config.in_channels > channels:
        # HunyuanVideo-1.5's channels for an image, which are empty in text-to-video
        shared[CONSTANT_CHANNELS] = latent[:, channels:]
        latent = latent[:, :channels]
    time_dtype = arguments["timestep"].dtype
    return Conditions(prompts, shared, tuple(latent.shape[1:]), time_dtype if time_dtype.is_floating_point else None)


class ExampleConditions:
    """Placeholder conditions, all ones, for a model without text encoders."""

    def __init__(self, transformer: nn.Module, latent_size: tuple[int, int, int]) -> None:
        """Take the shapes from the example inputs of the transformer's family.

        Args:
            transformer: the transformer.
            latent_size: frames, height and width of the latent.
        """
        inputs = find_family(transformer).example_inputs(transformer, latent_size)
        latent = inputs["hidden_states"]
        channels = getattr(transformer.config, "out_channels", None) or latent.shape[1]
        conditions = {name: value for name, value in inputs.items() if name not in VARIABLE}
        prompts = {name: torch.ones_like(value) for name, value in conditions.items() if _is_row(value)}
        shared = {name: value for name, value in conditions.items() if name not in prompts}
        if latent.ndim == 5 and latent.shape[1] > channels:
            shared[CONSTANT_CHANNELS] = latent[:, channels:]
            latent = latent[:, :channels]
        self._row = Conditions(prompts, shared, tuple(latent.shape[1:]))

    def __len__(self) -> int:
        return 1

    def rows(self, numbers: Sequence[int]) -> Conditions:
        """Return one row per number."""
        return self._row.at([0] * len(numbers))

    def negative(self) -> Conditions:
        """Return one row."""
        return self._row


def stack(conditions: Sequence[Conditions]) -> Conditions:
    """Concatenate the conditions of several prompts."""
    first = conditions[0]
    rows = {name: torch.cat([item.prompts[name] for item in conditions]) for name in first.prompts}
    return replace(first, prompts=rows)


def encoder_fingerprint(pipe: Any) -> str:
    """Return the fingerprint of a pipeline's text encoders."""
    parts = {name: part for name, part in sorted(pipe.components.items()) if isinstance(part, nn.Module)}
    return fingerprint({name: part for name, part in parts.items() if not name.startswith(("transformer", "vae"))})


def fingerprint(parts: Mapping[str, nn.Module]) -> str:
    """Return a short hash of models that changes with their classes, settings and weights.

    Args:
        parts: models with a `config`, by name.
    """
    digest = hashlib.sha256()
    for name, part in parts.items():
        config: Any = part.config  # of Diffusers or of Transformers
        settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        known = {key: value for key, value in settings.items() if not key.startswith(("_", "transformers_version"))}
        digest.update(json.dumps([name, type(part).__name__, known], sort_keys=True, default=str).encode())
        for key, parameter in part.state_dict().items():
            flat = parameter.flatten()
            indices = torch.linspace(0, len(flat) - 1, min(SAMPLED_VALUES, len(flat))).long()
            digest.update(key.encode())
            digest.update(flat[indices.to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class PromptEmbeddings:
    """A folder with the conditions of a list of prompts."""

    def __init__(self, folder: Path, prompts: Sequence[str]) -> None:
        """Open a folder that `encode_prompts` filled.

        Args:
            folder: the folder.
            prompts: the prompts.
        """
        self.folder, self.prompts = folder, tuple(prompts)
        index = read_json(folder / INDEX_NAME, f"`{folder / INDEX_NAME}`")
        self._shapes = {name: tuple(shape) for name, shape in index["shapes"].items()}
        time_dtype = index["time_dtype"]
        self._time_dtype = None if time_dtype is None else getattr(torch, time_dtype)
        self._latent_shape = tuple(index["latent_shape"])
        self._shared = {**_joined(load_file(folder / f"{SHARED}.safetensors")), **index["plain"]}

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, numbers: Sequence[int]) -> Conditions:
        """Return the conditions of some prompts, in this order.

        Args:
            numbers: their indices in the list.
        """
        return stack([self._row(f"{number // SHARD_PROMPTS:05d}", number % SHARD_PROMPTS) for number in numbers])

    def negative(self) -> Conditions:
        """Return the conditions of the negative prompt."""
        return self._row(NEGATIVE, 0)

    def _row(self, shard: str, index: int) -> Conditions:
        rows = {}
        with safe_open(self.folder / f"{shard}.safetensors", framework="pt") as file:
            for name, shape in self._shapes.items():
                row = file.get_tensor(f"{index}.{name}")
                rows[name] = row.new_zeros(1, *shape)
                if shape:
                    rows[name][0, : len(row)] = row
                else:
                    rows[name][0] = row
        return Conditions(rows, self._shared, self._latent_shape, self._time_dtype)


def encode_prompts(
    model: LoadedModel,
    request: ResolvedRequest,
    prompts: Sequence[str],
    folder: Path,
    *,
    share: tuple[int, int] = (0, 1),
    on_progress: Callable[[str], None] = lambda text: None,
) -> None:
    """Fill a folder with the conditions of prompts; existing shards are kept.

    Args:
        model: the model.
        request: a resolved request for everything but the prompt.
        prompts: the prompts.
        folder: made if missing.
        share: index of this process, from 0, and number of processes that share the work.
        on_progress: called with the progress as text.

    Raises:
        ValueError: if the folder has embeddings of other text encoders, or for another size of video.
    """
    process, count = share
    texts = [prompts[first : first + SHARD_PROMPTS] for first in range(0, len(prompts), SHARD_PROMPTS)]
    shards = {f"{number:05d}": text for number, text in enumerate(texts)}
    shards[NEGATIVE] = [request.negative_prompt or ""]
    expected = {
        "encoders": encoder_fingerprint(model.pipe),
        "pipeline": type(model.pipe).__name__,
        "size": [request.height, request.width, request.frames],
    }
    others = {"encoders": "other text encoders", "size": "videos of another size", "pipeline": "another pipeline"}
    check_index(folder / INDEX_NAME, expected, "embeddings", others)
    if process == 0 and not (folder / INDEX_NAME).exists():
        conditions = capture(model, request, prompts[0])
        tensors, plain = _split(conditions.shared)
        _save(tensors, folder / f"{SHARED}.safetensors", [])
        shapes = {name: list(row.shape[1:]) for name, row in conditions.prompts.items()}
        time_dtype = conditions.time_dtype
        index = {
            **expected,
            "latent_shape": list(conditions.latent_shape),
            "time_dtype": None if time_dtype is None else str(time_dtype).removeprefix("torch."),
            "shapes": shapes,
            "plain": plain,
        }
        write_files({folder / INDEX_NAME: (json.dumps(index, indent=2) + "\n").encode()})
    jobs = {name: shard for number, (name, shard) in enumerate(shards.items()) if number % count == process}
    jobs = {name: shard for name, shard in jobs.items() if not _holds(folder / f"{name}.safetensors", shard)}
    done, total = 0, sum(map(len, jobs.values()))
    for name, shard in jobs.items():
        tensors = {}
        for index_in_shard, prompt in enumerate(shard):
            rows = capture(model, request, prompt).prompts
            tensors |= {f"{index_in_shard}.{key}": _trimmed(row[0]) for key, row in rows.items()}
            done += 1
            on_progress(f"text of {done}/{total} prompts")
        _save(tensors, folder / f"{name}.safetensors", shard)


def check_index(path: Path, expected: Mapping[str, Any], field: str, others: Mapping[str, str]) -> None:
    """Refuse a folder whose files were made with other settings.

    Args:
        path: the folder's index, a JSON file, which may be missing.
        expected: the expected values of the index.
        field: the option that names the folder.
        others: descriptions of different values, by key; other keys are named themselves.

    Raises:
        ValueError: if a value of the index differs.
    """
    index = read_json(path, f"`{field}` {path}") if path.exists() else expected
    for name, value in expected.items():
        if index.get(name) != value:
            other = others.get(name, f"another {name}")
            raise ValueError(
                f"`{field}` {path.parent} are of {other} ({index.get(name)} instead of {value}); name another folder."
            )


def _holds(path: Path, prompts: Sequence[str]) -> bool:
    """Return whether a shard exists and holds these prompts."""
    return written_prompts(path) == json.dumps(list(prompts))


def _save(tensors: Mapping[str, torch.Tensor], path: Path, prompts: Sequence[str]) -> None:
    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write_files({path: save(contiguous, metadata={PROMPTS_KEY: json.dumps(list(prompts))})})


def _is_row(value: Any) -> bool:
    """Return whether a value belongs to a prompt, as a tensor with a batch of one does."""
    return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == 1


def _trimmed(row: torch.Tensor) -> torch.Tensor:
    """Return a row without its trailing padding of zeros."""
    if row.ndim == 0:
        return row
    filled = row.flatten(1).ne(0).any(dim=1) if row.ndim > 1 else row.ne(0)
    length = int(filled.nonzero().max()) + 1 if filled.any() else 0
    return row[:length].clone()


def _split(shared: Inputs) -> tuple[dict[str, torch.Tensor], Inputs]:
    """Split values into tensors, those of tuples under numbered names, and plain JSON values."""
    tensors: dict[str, torch.Tensor] = {}
    plain: Inputs = {}
    for name, value in shared.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, tuple | list) and all(isinstance(item, torch.Tensor) for item in value):
            tensors |= {f"{name}.{index}": item for index, item in enumerate(value)}
        else:
            plain[name] = value
    return tensors, plain


def _joined(tensors: Mapping[str, torch.Tensor]) -> Inputs:
    """Rebuild the values from the tensors of `_split`."""
    joined: Inputs = {}
    for name, value in sorted(tensors.items()):
        base, dot, _ = name.rpartition(".")
        if dot:
            joined[base] = (*joined.get(base, ()), value)
        else:
            joined[name] = value
    return joined


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(item.to(device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value
