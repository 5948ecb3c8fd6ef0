"""Weights of a tiny decoder: where they are, that they are harmless, and that they fit a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from blade.common.checks import meant
from blade.common.errors import first_line
from blade.common.terminal import logger
from blade.families.registry import model_families
from blade.models.loaded import LoadedModel
from blade.models.source import ModelError, repository_info
from blade.models.tiny_decoder import TinyDecoder, TinyDecoderLayout, make_tiny_decoder

ENDINGS = (".safetensors", ".pth", ".pt")
"""Endings of files of weights, the best first. The last two are unpickled as tensors alone, which runs no code."""

MOST_BYTES = 1 << 30
"""Most bytes of a file of weights; published ones have up to about 0.1 GB."""

TINY_PREFIX = "tae"
"""The names of all published tiny decoders begin so."""


def load_tiny_decoder(model: LoadedModel, source: str) -> TinyDecoder:
    """Read a tiny decoder's weights, and check that they decode a model's latents.

    Args:
        model: the model, with its weights or without.
        source: a file, or a Hub id, with "/FILE" or without.

    Returns:
        The decoder, in float32 on the CPU.

    Raises:
        ModelError: if there are no such weights, or they are no tiny decoder's.
        ValueError: if they do not fit the model's latents.
    """
    published = _check_family(model)
    path = find_decoder_weights(source)
    decoder = read_tiny_decoder(path, f"`decoder_weights` {source}")
    layout, (time, space) = decoder.layout, model.compression
    if (layout.latent_channels, layout.space_scale, layout.time_scale) != (model.latent_channels, space, time):
        fitting = published.get(model.latent_channels)
        advice = f"take {' or '.join(fitting)}" if fitting else "no tiny decoder is published for it"
        raise ValueError(
            f"`decoder_weights` {source} must fit the latents of this model, {model.latent_channels} channels, "
            f"{space} x {space} pixels and {time} frames each, got a decoder of {layout}; {advice}."
        )
    names = published.get(layout.latent_channels, ())
    if path.stem.startswith(TINY_PREFIX) and names and path.stem not in names:
        logger.warning(
            f"`decoder_weights` {source} has the shape of this model's latents but another name than "
            f"{' and '.join(names)}: weights that were trained for another model decode to noise."
        )
    return decoder


def published_layout(model: LoadedModel) -> TinyDecoderLayout | None:
    """Return the sizes of the tiny decoder that is published for a model's latents, or None if none is."""
    time, space = model.compression
    if not model.family.tiny_decoders.get(model.latent_channels):
        return None
    layout = TinyDecoderLayout(latent_channels=model.latent_channels)
    layout = replace(layout, patch=max(space // layout.space_scale, 1))
    return layout if (layout.time_scale, layout.space_scale) == (time, space) else None


def decoder_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type that a tiny decoder runs in: float16, which its authors use, where the model is in 16 bits.

    Args:
        dtype: the transformer's.
        device: where it runs; on the CPU it is float32.
    """
    return torch.float32 if device.type == "cpu" or dtype == torch.float32 else torch.float16


def _check_family(model: LoadedModel) -> dict[int, tuple[str, ...]]:
    """Return the published decoders of a model's family by the number of latent channels."""
    if model.family.tiny_decoders:
        return dict(model.family.tiny_decoders)
    fitting = "; ".join(
        f"{family.name}: {', '.join(name for names in family.tiny_decoders.values() for name in names)}"
        for family in model_families()
        if family.tiny_decoders
    )
    raise ValueError(
        f'`decoder` must be "full" for this model: no tiny decoder takes the latents of {model.family.name} as its '
        f"pipelines return them. Those that fit others: {fitting}."
    )


def find_decoder_weights(source: str) -> Path:
    """Return the file of a tiny decoder's weights, downloaded where it is on the Hub.

    Args:
        source: a file here, `owner/name`, or `owner/name/FILE`.

    Raises:
        ModelError: if there is none, or several and none is named.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in ENDINGS:
            raise ModelError(f"`decoder_weights` must be a file that ends in {_listed(ENDINGS)}, got {source}.")
        return path
    if path.exists():
        raise ModelError(f"`decoder_weights` must be a file or a Hub id, got the folder {source}; name a file in it.")
    owner, *rest = source.split("/")
    if not rest or not owner or source[0] in ".~" or (len(rest) == 1 and source.endswith(ENDINGS)):
        raise ModelError(
            f"`decoder_weights` must be a file or a Hub id, owner/name or owner/name/FILE; there is no file {source}."
        )
    from huggingface_hub import hf_hub_download

    name, file = f"{owner}/{rest[0]}", "/".join(rest[1:])
    info = repository_info(name, "decoder_weights", file)
    if info is not None:
        file = _choose_file([item.rfilename for item in info.siblings or []], name, file)
    try:
        return Path(hf_hub_download(name, file, local_files_only=info is None))
    except Exception as error:  # whatever the Hub's client raises
        raise ModelError(f"`decoder_weights` {source} cannot be downloaded: {first_line(error)}") from error


def _choose_file(files: list[str], name: str, file: str) -> str:
    """Return the file of a repository that is named, or its only one."""
    weights = [item for item in files if item.endswith(ENDINGS)]
    if file:
        if file not in weights:
            raise ModelError(f"`decoder_weights` {name} has no file of weights {file}{meant(file, weights)}")
        return file
    best = next((kind for ending in ENDINGS if (kind := [item for item in weights if item.endswith(ending)])), [])
    if len(best) != 1:
        held = f"it has {', '.join(best[:5])}{', ...' if len(best) > 5 else ''}" if best else "it has none"
        raise ModelError(
            f"`decoder_weights` {name} must hold one file of weights, or the file be named as {name}/FILE; {held}."
        )
    return best[0]


def read_tiny_decoder(path: Path, what: str) -> TinyDecoder:
    """Read a tiny decoder. Nothing in the file is run.

    Args:
        path: a file that ends in one of `ENDINGS`.
        what: the subject of the error's message.

    Raises:
        ModelError: if the file is damaged, holds anything but tensors, or is no tiny decoder; see
            `blade.models.tiny_decoder.make_tiny_decoder`.
    """
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ModelError(f"{what} must be a tiny decoder, of at most {MOST_BYTES:,} bytes, got {size:,}.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever PyTorch and safetensors raise for a damaged file
        reason = f"{type(error).__name__}: {first_line(error)}"
        if path.suffix != ".safetensors":
            # PyTorch's own text advises to unpickle everything
            reason = f"it is damaged, or holds more than tensors, which could run code ({type(error).__name__})"
        raise ModelError(f"{what} cannot be read: {reason}.") from error
    if not isinstance(weights, dict):
        raise ModelError(f"{what} must hold tensors by their keys, got a {type(weights).__name__}.")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ModelError(f"{what} must hold tensors by their keys, got a {type(value).__name__} as {key!r}.")
    return make_tiny_decoder(weights, what)


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
