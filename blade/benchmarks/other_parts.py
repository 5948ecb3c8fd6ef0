"""Times of a pipeline's parts beside the transformer: text encoders and the decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from blade.metrics.timing import Measurement, measure, time_calls
from blade.models.loaded import LatentSize, LoadedModel


def time_decoding(model: LoadedModel, latent: LatentSize, device: torch.device) -> Measurement:
    """Time the decoding of a random latent, after a warm-up."""
    pipe, sample = model.pipe, torch.randn_like(model.empty_latent(latent))

    def decode(_: int) -> torch.Tensor:
        frames: torch.Tensor = pipe.vae.decode(sample, return_dict=False)[0]
        return frames.float().cpu()

    decode(0)
    return time_calls(decode, device, 1)


def time_encoding(model: LoadedModel, tokens: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Time the encoding of one text by all text encoders, one after the other, so that one at a time needs memory.

    Encoders on the meta device are made anew, with the random weights of their classes.

    Args:
        model: the pipeline.
        tokens: length of the text, padding included; no encoder is given more than it has positions for.
        device: where.
        dtype: type of weights that are made anew.
        repeats: measured calls, of which the median counts.

    Returns:
        Milliseconds.

    Raises:
        NotImplementedError: if the pipeline has no text encoder.
        torch.OutOfMemoryError: if an encoder does not fit beside what is there.
    """
    encoders = [part for name, part in model.pipe.components.items() if name.startswith("text_encoder")]
    encoders = [part for part in encoders if isinstance(part, nn.Module)]
    if not encoders:
        raise NotImplementedError("the pipeline has no text encoder")
    return sum(_time_encoder(part, tokens, device, dtype, repeats) for part in encoders)


def _time_encoder(encoder: Any, tokens: int, device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    if encoder.device.type == "meta":
        encoder = _make_anew(encoder, device, dtype)
    config = encoder.config.get_text_config()  # of an encoder that also sees images, the part for text
    tokens = min(tokens, getattr(config, "max_position_embeddings", tokens))
    ids = torch.randint(config.vocab_size, (1, tokens), device=device)
    mask = torch.ones_like(ids)
    return measure(lambda _: encoder(input_ids=ids, attention_mask=mask), device, repeats).median


def _make_anew(encoder: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Make a model of Transformers by its configuration, in a dtype from the start."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return type(encoder)(encoder.config).eval()
    finally:
        torch.set_default_dtype(before)
