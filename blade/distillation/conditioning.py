"""What a transformer is given beside the latent and the time: a prompt's embeddings, and tables for the size.

Found by running the pipeline up to the transformer's first forward pass, so that they are what the pipeline gives it,
of whatever family. Kept in shards of safetensors, so that text encoders run once and long lists can be gone on with.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from blade.common.files import write_files
from blade.families.protocol import Inputs
from blade.families.registry import find_family
from blade.generation.request import ResolvedRequest
from blade.generation.run import call_arguments, prepare_sampler
from blade.models.loaded import LoadedModel
from blade.models.loading import INPUTS

if TYPE_CHECKING:
    from diffusers import ModelMixin

INDEX_NAME = "embeddings.json"
"""What all shards share."""

SHARD_PROMPTS = 256
"""Prompts in a shard."""

NEGATIVE = "negative"
"""Name of the file of the prompt that guidance leads away from."""

SHARED = "shared"
"""Name of the file of what belongs to the size of the video, not to a prompt."""

CONSTANT_CHANNELS = "constant_channels"
"""What stands beside the noise in the latent, whatever the prompt."""

PROMPTS_KEY = "prompts"
"""Where a shard's metadata says which prompts it holds."""

VARIABLE = ("hidden_states", "timestep", "return_dict")
"""Arguments that are no condition."""

SAMPLED_VALUES = 64
"""Weights of each parameter that a fingerprint takes in."""


class _Captured(Exception):
    """Ends a pipeline's run at the transformer."""


@dataclass(frozen=True)
class Conditions:
    """What a forward pass is given beside the latent and the time."""

    prompts: Inputs
    """Tensors (B, ...), a row for each prompt."""
    shared: Inputs
    """Everything else."""
    latent_shape: tuple[int, ...]
    """Shape of one latent, without the batch."""
    time_dtype: torch.dtype | None = None
    """Type that the pipeline brings times to; None: none."""

    def at(self, places: Sequence[int]) -> Conditions:
        """Those of some of the prompts."""
        return replace(self, prompts={name: value[list(places)] for name, value in self.prompts.items()})

    def on(self, device: torch.device) -> Conditions:
        """The same on a device."""
        return Conditions(
            {name: _to(value, device) for name, value in self.prompts.items()},
            {name: _to(value, device) for name, value in self.shared.items()},
            self.latent_shape,
            self.time_dtype,
        )

    def inputs(self, latents: torch.Tensor, times: torch.Tensor) -> Inputs:
        """The arguments of a forward pass.

        Args:
            latents: (B, ...), in the type that the network takes, on the device of the conditions.
            times: (B,).
        """
        batch = len(latents)
        rows = {name: value.expand(batch, *value.shape[1:]) for name, value in self.prompts.items()}
        given = {**rows, **self.shared}
        constant = given.pop(CONSTANT_CHANNELS, None)
        if constant is not None:
            latents = torch.cat((latents, constant.expand(batch, *constant.shape[1:]).to(latents)), dim=1)
        return {**given, "hidden_states": latents, "timestep": times.to(latents.device, self.time_dtype)}


def check_text_alone(model: LoadedModel) -> None:
    """Raise a `ValueError` for a pipeline that needs more than a prompt, such as an image."""
    needed = [name for name, value in model.parameters.items() if name in INPUTS and value.default is value.empty]
    if others := [name for name in needed if name != "prompt"]:
        raise ValueError(
            "`model` must be one that makes videos from text alone, but a "
            f"{type(model.pipe).__name__} needs `{others[0]}`."
        )


def capture(model: LoadedModel, request: ResolvedRequest, prompt: str) -> Conditions:
    """Find out what a pipeline gives its transformer for a prompt.

    Args:
        model: the model.
        request: a resolved request, for all but the prompt; guidance in two passes is left out.
        prompt: the prompt, which may be empty.
    """
    transformer: ModelMixin = model.transformer
    pipe, seen = model.pipe, dict[str, Any]()
    names = list(inspect.signature(type(transformer).forward).parameters)[1:]

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(zip(names, args), **kwargs)
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
    latent, channels = seen["hidden_states"], getattr(transformer.config, "out_channels", None)
    given = {name: value for name, value in seen.items() if name not in VARIABLE and value is not None}
    prompts = {name: value for name, value in given.items() if _is_row(value)}
    shared = {name: value for name, value in given.items() if name not in prompts}
    if channels is not None and latent.ndim == 5 and latent.shape[1] == transformer.config.in_channels > channels:
        # HunyuanVideo-1.5 has room for an image there, which a video made from text leaves empty
        shared[CONSTANT_CHANNELS] = latent[:, channels:]
        latent = latent[:, :channels]
    time_dtype = seen["timestep"].dtype
    return Conditions(prompts, shared, tuple(latent.shape[1:]), time_dtype if time_dtype.is_floating_point else None)


class ExampleConditions:
    """Conditions of no prompts in particular, all ones, where there are no text encoders."""

    def __init__(self, transformer: nn.Module, latent_size: tuple[int, int, int]) -> None:
        """Take the shapes that the transformer's family says.

        Args:
            transformer: the transformer.
            latent_size: frames, height and width of the latent.
        """
        inputs = find_family(transformer).example_inputs(transformer, latent_size)
        latent = inputs["hidden_states"]
        channels = getattr(transformer.config, "out_channels", None) or latent.shape[1]
        given = {name: value for name, value in inputs.items() if name not in VARIABLE}
        prompts = {name: torch.ones_like(value) for name, value in given.items() if _is_row(value)}
        shared = {name: value for name, value in given.items() if name not in prompts}
        if latent.ndim == 5 and latent.shape[1] > channels:
            shared[CONSTANT_CHANNELS] = latent[:, channels:]
            latent = latent[:, :channels]
        self._one = Conditions(prompts, shared, tuple(latent.shape[1:]))

    def __len__(self) -> int:
        return 1

    def rows(self, numbers: Sequence[int]) -> Conditions:
        """As many rows as there are numbers."""
        return self._one.at([0] * len(numbers))

    def negative(self) -> Conditions:
        """One row."""
        return self._one


def stack(conditions: Sequence[Conditions]) -> Conditions:
    """Put the conditions of several prompts together."""
    first = conditions[0]
    rows = {name: torch.cat([one.prompts[name] for one in conditions]) for name in first.prompts}
    return replace(first, prompts=rows)


def encoder_fingerprint(pipe: Any) -> str:
    """A short name for a pipeline's text encoders; see `fingerprint`."""
    parts = {name: part for name, part in sorted(pipe.components.items()) if isinstance(part, nn.Module)}
    return fingerprint({name: part for name, part in parts.items() if not name.startswith(("transformer", "vae"))})


def fingerprint(parts: Mapping[str, nn.Module]) -> str:
    """A short name for models: it differs where a class, a setting or weights do.

    Args:
        parts: models with a `config`, by name.
    """
    found = hashlib.sha256()
    for name, part in parts.items():
        config: Any = part.config  # of Diffusers or of Transformers
        settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        known = {key: value for key, value in settings.items() if not key.startswith(("_", "transformers_version"))}
        found.update(json.dumps([name, type(part).__name__, known], sort_keys=True, default=str).encode())
        for key, parameter in part.state_dict().items():
            flat = parameter.flatten()
            places = torch.linspace(0, len(flat) - 1, min(SAMPLED_VALUES, len(flat))).long()
            found.update(key.encode())
            found.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


class PromptEmbeddings:
    """A folder with the conditions of a list of prompts."""

    def __init__(self, folder: Path, prompts: Sequence[str]) -> None:
        """Open a folder that `encode_prompts` has filled.

        Args:
            folder: the folder.
            prompts: the list.
        """
        self.folder, self.prompts = folder, tuple(prompts)
        index = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))
        self._shapes = {name: tuple(shape) for name, shape in index["shapes"].items()}
        time_dtype = index["time_dtype"]
        self._time_dtype = None if time_dtype is None else getattr(torch, time_dtype)
        self._latent_shape = tuple(index["latent_shape"])
        self._shared = {**_joined(load_file(folder / f"{SHARED}.safetensors")), **index["plain"]}

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, numbers: Sequence[int]) -> Conditions:
        """The conditions of some prompts, in this order.

        Args:
            numbers: their places in the list.
        """
        return stack([self._row(f"{number // SHARD_PROMPTS:05d}", number % SHARD_PROMPTS) for number in numbers])

    def negative(self) -> Conditions:
        """The conditions that guidance leads away from."""
        return self._row(NEGATIVE, 0)

    def _row(self, shard: str, place: int) -> Conditions:
        rows = {}
        with safe_open(self.folder / f"{shard}.safetensors", framework="pt") as file:
            for name, shape in self._shapes.items():
                row = file.get_tensor(f"{place}.{name}")
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
    """Fill a folder with the conditions of prompts; what is there already is kept.

    Args:
        model: the model.
        request: a resolved request, for all but the prompt.
        prompts: the list.
        folder: made if missing.
        share: number of this process, from 0, and of processes that share out the shards.
        on_progress: told how far it is.

    Raises:
        ValueError: if the folder has embeddings of other text encoders, or for another size of video.
    """
    own, count = share
    texts = [prompts[first : first + SHARD_PROMPTS] for first in range(0, len(prompts), SHARD_PROMPTS)]
    shards = {f"{number:05d}": text for number, text in enumerate(texts)}
    shards[NEGATIVE] = [request.negative_prompt or ""]
    wanted = {
        "encoders": encoder_fingerprint(model.pipe),
        "pipeline": type(model.pipe).__name__,
        "size": [request.height, request.width, request.frames],
    }
    others = {"encoders": "other text encoders", "size": "videos of another size", "pipeline": "another pipeline"}
    check_index(folder / INDEX_NAME, wanted, "embeddings", others)
    folder.mkdir(parents=True, exist_ok=True)
    if own == 0 and not (folder / INDEX_NAME).exists():
        found = capture(model, request, prompts[0])
        tensors, plain = _split(found.shared)
        _save(tensors, folder / f"{SHARED}.safetensors", [])
        shapes = {name: list(row.shape[1:]) for name, row in found.prompts.items()}
        index = {
            **wanted,
            "latent_shape": list(found.latent_shape),
            "time_dtype": None if found.time_dtype is None else str(found.time_dtype).removeprefix("torch."),
            "shapes": shapes,
            "plain": plain,
        }
        write_files({folder / INDEX_NAME: (json.dumps(index, indent=2) + "\n").encode()})
    jobs = {name: shard for number, (name, shard) in enumerate(shards.items()) if number % count == own}
    jobs = {name: shard for name, shard in jobs.items() if not _holds(folder / f"{name}.safetensors", shard)}
    done, total = 0, sum(map(len, jobs.values()))
    for name, shard in jobs.items():
        tensors = {}
        for place, prompt in enumerate(shard):
            rows = capture(model, request, prompt).prompts
            tensors |= {f"{place}.{key}": _trimmed(row[0]) for key, row in rows.items()}
            done += 1
            on_progress(f"text of {done}/{total} prompts")
        _save(tensors, folder / f"{name}.safetensors", shard)


def check_index(path: Path, wanted: Mapping[str, Any], field: str, others: Mapping[str, str]) -> None:
    """Refuse a folder that was made for something else.

    Args:
        path: of what its files share, JSON; it may be missing.
        wanted: what that must say.
        field: that names the folder.
        others: names of what else it may be of, by key; any other key is named itself.

    Raises:
        ValueError: where it says something else.
    """
    index = json.loads(path.read_text(encoding="utf-8")) if path.exists() else wanted
    for name, value in wanted.items():
        if index.get(name) != value:
            what = others.get(name, f"another {name}")
            raise ValueError(
                f"`{field}` {path.parent} are of {what} ({index.get(name)} instead of {value}); name another folder."
            )


def _holds(path: Path, prompts: Sequence[str]) -> bool:
    """Whether a shard is there, and of these prompts."""
    if not path.exists():
        return False
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get(PROMPTS_KEY) == json.dumps(list(prompts))


def _save(tensors: Mapping[str, torch.Tensor], path: Path, prompts: Sequence[str]) -> None:
    whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    write_files({path: save(whole, metadata={PROMPTS_KEY: json.dumps(list(prompts))})})


def _is_row(value: Any) -> bool:
    """Whether it belongs to a prompt: a tensor with a batch of one."""
    return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == 1


def _trimmed(row: torch.Tensor) -> torch.Tensor:
    """A row without the zeros that it is padded with at its end."""
    if row.ndim == 0:
        return row
    filled = row.flatten(1).ne(0).any(dim=1) if row.ndim > 1 else row.ne(0)
    length = int(filled.nonzero().max()) + 1 if filled.any() else 0
    return row[:length].clone()


def _split(shared: Inputs) -> tuple[dict[str, torch.Tensor], Inputs]:
    """Tensors, those of tuples under numbered names, and what JSON can hold."""
    tensors: dict[str, torch.Tensor] = {}
    plain: Inputs = {}
    for name, value in shared.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, tuple | list) and all(isinstance(one, torch.Tensor) for one in value):
            tensors |= {f"{name}.{place}": one for place, one in enumerate(value)}
        else:
            plain[name] = value
    return tensors, plain


def _joined(tensors: Mapping[str, torch.Tensor]) -> Inputs:
    """The tensors of `_split` as they were."""
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
        return tuple(one.to(device) for one in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value
