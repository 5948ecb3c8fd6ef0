"""Names that options choose from: dtypes, offloading, quantization, caches, LoRAs, files. Imports nothing heavy."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
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

CACHES = {
    "first-block": 0.05,
    "mag": 0.06,
    "sea": 0.25,
    "cache-dit": 0.08,
    "taylor-seer": 5,
    "pyramid": 2,
    "faster": 2,
}
"""Caches, each with the default of its number, which is that of its configuration: the change below which blocks are
skipped, and, of the last three, the steps from one computation of attention to the next. Source: Diffusers 0.42
(FirstBlockCache, MagCache, SeaCache, TaylorSeer, PyramidAttentionBroadcast, FasterCache), cache-dit 1.5 (DBCache)."""

CACHE_THRESHOLDS = ("first-block", "mag", "sea", "cache-dit")
"""Caches whose number is a threshold; that of the others is a count of steps."""


SEPARATOR = ":"
"""Stands between the files or LoRAs of two transformers, and between their strengths."""

DRIVE = re.compile(r"(^|:)[A-Za-z]:[\\/]$")
"""Beginning of a Windows path, such as C:\\ or C:/, up to the slash."""


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA as `--lora` names it: `FILE`, `FILE=0.8`, `FIRST:SECOND=0.8` or `FIRST:SECOND=0.8:0.6`."""

    sources: tuple[str, ...]
    """A folder, file or Hub id; two of them for a model of two transformers, a source each."""
    strengths: tuple[float, ...]
    """A strength for each source."""

    @property
    def name(self) -> str:
        """The sources as they are written on the command line."""
        return SEPARATOR.join(self.sources)


def parse_lora(text: str) -> LoraChoice:
    """Read a LoRA and its strength, such as "style.safetensors=0.8"; without a strength: 1.

    A name with "=" or ":" that is a file or folder here is one, as it is; so is a Windows drive letter.

    Args:
        text: a source, or two with ":" between them, then "=STRENGTH", "=STRENGTH:STRENGTH" or nothing.

    Raises:
        ValueError: if a strength is no finite number, a source is empty, or there are more than two.
    """
    sources = split_sources(text)
    if sources is not None and all(map(_exists, sources)):
        return LoraChoice(sources, (1.0,) * len(sources))
    named, equals, ending = text.rpartition("=")
    sources = split_sources(named if equals else text)
    if sources is None:
        raise ValueError(
            f"`loras` must name one source, or FIRST:SECOND, one for each of two transformers, got {shortened(text)}."
        )
    strengths = _read_strengths(ending, text) if equals else (1.0,)
    if len(strengths) > len(sources):
        raise ValueError(f"`loras` must name a source for each strength, FIRST:SECOND=0.8:0.6, got {shortened(text)}.")
    return LoraChoice(sources, strengths if len(strengths) == len(sources) else strengths * len(sources))


def parse_transformer(text: str) -> tuple[str, ...]:
    """Return the file that replaces a transformer's weights, or the two of `FIRST:SECOND`, one for each of two.

    Args:
        text: files, folders or Hub ids; colons are read as `parse_lora` reads them.

    Raises:
        ValueError: if one is empty, or there are more than two.
    """
    sources = split_sources(text)
    if sources is None:
        raise ValueError(
            "`transformer` must name one file, or FIRST:SECOND, one for each of two transformers, got "
            f"{shortened(text)}."
        )
    return sources


def split_sources(text: str) -> tuple[str, ...] | None:
    """Return the one or two sources in a text, "FIRST:SECOND".

    A text that is a file or folder here is one source, as it is; so is a Windows drive letter.

    Args:
        text: the sources.

    Returns:
        None if it has an empty one, or cannot be cut in one way.
    """
    if _exists(text):
        return (text,)
    marks = [match.start() for match in re.finditer(SEPARATOR, text) if not DRIVE.search(text[: match.end() + 1])]
    pairs = [(text[:mark], text[mark + 1 :]) for mark in marks if not text.startswith("//", mark + 1)]
    if len(pairs) > 1:
        pairs = [pair for pair in pairs if all(map(_exists, pair))]
        if len(pairs) != 1:
            return None
    sources = pairs[0] if pairs else (text,)
    return sources if all(sources) else None


def _exists(source: str) -> bool:
    return os.path.exists(os.path.expanduser(source))


def _read_strengths(text: str, whole: str) -> tuple[float, ...]:
    try:
        strengths = tuple(map(float, text.split(SEPARATOR)))
    except ValueError:
        strengths = ()
    if not 1 <= len(strengths) <= 2 or not all(map(math.isfinite, strengths)):
        raise ValueError(f"`loras` must be sources, each with =STRENGTH or not, got {shortened(whole)}.")
    return strengths


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
    if name in CACHE_THRESHOLDS:
        if not 0 < number < math.inf:
            raise ValueError(f"`cache` {name} takes a threshold above 0, such as {CACHES[name]:g}, got {value!r}.")
    elif not (number.is_integer() and 2 <= number <= MOST_STEPS):
        raise ValueError(f"`cache` {name} takes a whole number of steps from 2, got {value!r}.")
    return name, number
