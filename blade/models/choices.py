"""Names that options choose from: dtypes, offloading, quantization, caches, LoRAs. Imports nothing heavy."""

from __future__ import annotations

import math
import os
from typing import Literal, get_args

from blade.common.checks import MOST_STEPS, meant, shortened

DtypeName = Literal["float32", "bfloat16", "float16"]
Offload = Literal["none", "model", "sequential", "group", "auto"]
Decoder = Literal["full", "tiny"]
Quantization = Literal["int8", "fp8", "int8-dynamic", "fp8-dynamic", "nvfp4"]

DTYPE_NAMES = get_args(DtypeName)
"""Dtypes that the transformer and the text encoder can run in."""

OFFLOADS = get_args(Offload)
"""Ways of keeping weights on the CPU while they are not needed, fastest first; "auto" takes the fastest that fits."""

DECODERS = get_args(Decoder)
"""Decoders of latents: the VAE's own, or a tiny one that stands in for it."""

QUANTIZATIONS = get_args(Quantization)
"""Types that the weights of the transformers' linear layers can be stored in; with `-dynamic`, and as `nvfp4`, the
layers also multiply in that type, their inputs being rounded as they come."""

CACHES = {"first-block": 0.05, "pyramid": 2}
"""Diffusers' caches, each with the default of its number: the residual's threshold below which all blocks but the
first are skipped, and the steps from one computation of attention to the next."""


def split_lora(text: str) -> tuple[str, float]:
    """Read a LoRA and its strength, such as "style.safetensors=0.8"; without a strength: 1.

    A name with "=" that is a file or folder here is one, as it is.

    Raises:
        ValueError: if the strength is no finite number.
    """
    source, separator, weight = text.rpartition("=")
    if not separator or os.path.exists(os.path.expanduser(text)):
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"`loras` must be sources, each with =STRENGTH or not, got {shortened(text)}.")
    return source, number


def parse_cache(text: str) -> tuple[str, float]:
    """Read a cache and its number, such as "first-block=0.1".

    Raises:
        ValueError: if there is no such cache, or its number makes no sense.
    """
    name, separator, value = text.partition("=")
    if name not in CACHES:
        listed, end = ", ".join(CACHES), meant(name, CACHES)
        raise ValueError(f"`cache` must be one of {listed}, with =NUMBER or without, got {shortened(text)}{end}")
    try:
        number = float(value) if separator else float(CACHES[name])
    except ValueError:
        number = -1.0
    if name == "first-block" and not 0 < number < math.inf:
        raise ValueError(f"`cache` first-block takes a threshold above 0, such as 0.05, got {value!r}.")
    if name == "pyramid" and not (number.is_integer() and 2 <= number <= MOST_STEPS):
        raise ValueError(f"`cache` pyramid takes a whole number of steps from 2, got {value!r}.")
    return name, number
