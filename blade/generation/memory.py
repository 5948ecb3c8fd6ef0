"""Settings of storage, offloading and decoding whose memory a device has: predicted without weights, best first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from blade.common.machine import GIB
from blade.generation.memory_stages import Stages
from blade.generation.request import ResolvedRequest
from blade.models.acceleration import HEADROOM
from blade.models.choices import OFFLOADS
from blade.models.loaded import LoadedModel
from blade.models.outlines import AS_IT_IS, EVERY_WAY, LAYERWISE, STORAGES, WHOLE_PARTS, PackedNf4Linear, Storage
from blade.models.stored_weights import packed_layers

SLOWNESS = {"none": 0, "model": 0, "group": 1}
"""How often offloading brings weights: once at most for a video, or in every step. Sequential offloading is never
better: it brings the same layers as by group, with nothing else going on meanwhile."""

LOSSES = {16: 0.0, 8: 1.0, 4: 2.0}
"""Rank of a setting by the bits that weights are rounded to."""

TINY_LOSS = 1.5
"""Addition of a tiny decoder to that rank: more than weights of 8 bits, and less than those of 4."""

DECODINGS = {"full": None, "tiled": "--vae-tiling", "tiny": "--decoder tiny"}
"""Ways of decoding, the most faithful first, and the option that asks for each."""


@dataclass(frozen=True, kw_only=True)
class MemorySetting:
    """A way of storing weights, of offloading and of decoding, with its memory."""

    storage: Storage
    """How the transformers' weights are stored."""
    offload: str
    """One of `OFFLOADS` but "auto"."""
    decoding: str
    """A key of `DECODINGS`."""
    peak_gib: float
    """The most memory that weights and activations take together at any time."""

    def __str__(self) -> str:
        offload = None if self.offload == "none" else f"--offload {self.offload}"
        options = [text for text in (self.storage.option, offload, DECODINGS[self.decoding]) if text]
        return f"{' '.join(options) or 'no option needed'}: {self.peak_gib:.2f} GiB"


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Settings that fit a device; `print` it."""

    memory_gib: float
    """The device's memory."""
    best: MemorySetting | None
    """The fastest setting that fits, of those the most faithful; None: none fits."""
    exact: MemorySetting | None
    """The fastest that fits and rounds no weights; None: none does."""
    least: MemorySetting | None = None
    """The one that takes the least, where none fits."""
    missing: tuple[str, ...] = ()
    """Extras whose packages are not installed, so that what they bring was not looked at."""

    def __str__(self) -> str:
        label = f"{self.memory_gib:g} GiB"
        room = f"of {HEADROOM * self.memory_gib:.2f} that weights and activations may fill"
        if self.best is None:
            lines = [f"{label:<12}none fits; the least is {self.least}, {room}: take a smaller video"]
        else:
            lines = [f"{label:<12}{self.best} {room}"]
            if self.exact is not None and self.exact != self.best:
                lines.append(f"{'unrounded':<12}{self.exact}")
        if self.missing:
            extras = ", ".join(f"blade-video[{extra}]" for extra in self.missing)
            lines.append(f"{'':<12}not looked at, as they are not installed: {extras}")
        return "\n".join(lines)


def plan_memory(stages: Stages, request: ResolvedRequest, memory_gib: float) -> MemoryPlan:
    """Look for settings whose memory a device has.

    Args:
        stages: the run.
        request: the request; what it says of storage, offloading and decoding is kept, but for `offload` "none".
        memory_gib: the device's memory.
    """
    storages, missing = _storages(stages.model, request)
    settings = _ordered(stages, request, storages)
    room = HEADROOM * memory_gib * GIB
    best = exact = None
    for storage, offload, decoding in settings:
        if best is not None and _loss(storage, decoding) > 0:
            continue  # what is left to look for rounds nothing
        if _at_least(stages, storage, offload) > room:
            continue
        setting = _setting(stages, storage, offload, decoding)
        if setting.peak_gib * GIB > room:
            continue
        best = best or setting
        if _loss(storage, decoding) == 0:
            exact = setting
            break
    least = None
    if best is None:
        storage, offload, _ = min(settings, key=lambda setting: _at_least(stages, *setting[:2]))
        ends = [_setting(stages, *setting) for setting in settings if setting[:2] == (storage, offload)]
        least = min(ends, key=lambda setting: setting.peak_gib)
    return MemoryPlan(memory_gib=memory_gib, best=best, exact=exact, least=least, missing=missing)


def _at_least(stages: Stages, storage: Storage, offload: str) -> int:
    """Return bytes that a run takes however its latent is decoded."""
    return stages.peak(storage, offload, None)


def _setting(stages: Stages, storage: Storage, offload: str, decoding: str) -> MemorySetting:
    peak = stages.peak(storage, offload, decoding)
    return MemorySetting(storage=storage, offload=offload, decoding=decoding, peak_gib=peak / GIB)


def _loss(storage: Storage, decoding: str) -> float:
    """Return the rank of what a setting changes about a video; 0: nothing but rounding at the seams of tiles."""
    return LOSSES[storage.bits] + (TINY_LOSS if decoding == "tiny" else 0)


def _storages(model: LoadedModel, request: ResolvedRequest) -> tuple[list[Storage], tuple[str, ...]]:
    """Return the ways of storing weights that a request leaves open, and the extras that others would need."""
    if request.transformer is not None:
        modules = [module for part in model.transformers.values() for module in part.modules()]
        packed = any(next(packed_layers(part), None) for part in model.transformers.values())
        offloads = LAYERWISE if packed else EVERY_WAY
        if any(isinstance(module, PackedNf4Linear) for module in modules):
            offloads = WHOLE_PARTS
        return [Storage(name=AS_IT_IS, bits=16, option="--transformer as given", offloads=offloads)], ()
    if request.quantize is not None:
        bits = 4 if request.quantize == "nvfp4" else 8
        return [
            Storage(name=request.quantize, bits=bits, option=f"--quantize {request.quantize}", package="torchao")
        ], ()
    known = [item for item in STORAGES if item.package is None or find_spec(item.package) is not None]
    lacking = dict.fromkeys(item.extra for item in STORAGES if item not in known and item.extra is not None)
    return known, tuple(lacking)


def _ordered(stages: Stages, request: ResolvedRequest, storages: Iterable[Storage]) -> list[tuple[Storage, str, str]]:
    """Return all settings that a request leaves open, the fastest first, of those the most faithful."""
    offloads = list(SLOWNESS) if request.offload in ("none", "auto") else [request.offload]
    decodings = list(_decodings(stages, request))
    listed = [
        (storage, offload, decoding)
        for storage in storages
        for offload in offloads
        for decoding in decodings
        if offload in storage.offloads
    ]

    def rank(setting: tuple[Storage, str, str]) -> tuple[float, ...]:
        storage, offload, decoding = setting
        return SLOWNESS[offload], _loss(storage, decoding), OFFLOADS.index(offload), list(DECODINGS).index(decoding)

    return sorted(listed, key=rank)


def _decodings(stages: Stages, request: ResolvedRequest) -> Iterator[str]:
    """Yield the ways of decoding that a request leaves open."""
    if request.decoder == "tiny":
        yield "tiny"
        return
    if not request.vae_tiling:
        yield "full"
    if hasattr(stages.model.pipe.vae, "enable_tiling"):
        yield "tiled"
    if stages.tiny is not None and not request.vae_tiling:
        yield "tiny"
