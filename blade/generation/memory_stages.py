"""The memory of a run's stages under every storage, offloading and decoding, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from blade.families.transformers import Transformer
from blade.models.loaded import LatentSize, LoadedModel
from blade.models.memory_use import peak_bytes, weight_bytes, weights_by_leaf
from blade.models.outlines import Storage, outline

VAE = "vae"
"""Name of a pipeline's component that decodes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Stages:
    """The calls of a run on the meta device, and their memory, each counted once."""

    model: LoadedModel
    """The model without its weights."""
    latent: LatentSize
    """The size of its latent."""
    batch: int
    """Latents that the transformer takes at once."""
    encoders: Mapping[str, Callable[[], object]]
    """Calls of the text encoders by their component's name."""
    decode: Callable[[], object]
    """Decodes a latent with the VAE."""
    tiny: tuple[nn.Module, Callable[[], object]] | None = None
    """A tiny decoder, and a call that decodes with it; None: there is none for this model."""
    streams: bool = True
    """True if group offloading brings weights while others are multiplied, as on CUDA devices."""
    _outlines: dict[str, list[Transformer]] = field(default_factory=dict)
    _counted: dict[tuple[object, ...], int] = field(default_factory=dict)

    def transformers(self, storage: Storage) -> list[Transformer]:
        """Return the transformers with their weights stored in a way."""
        if storage.name not in self._outlines:
            parts = self.model.transformers.values()
            self._outlines[storage.name] = [outline(part, self.model.family, storage) for part in parts]
        return self._outlines[storage.name]

    def others(self) -> dict[str, int]:
        """Return the bytes of the weights of all parts but the transformers, by component."""
        models = {name: part for name, part in self.model.pipe.components.items() if isinstance(part, nn.Module)}
        return {name: weight_bytes(part) for name, part in models.items() if name not in self.model.transformers}

    def weights(self, storage: Storage) -> int:
        """Return the bytes of the weights of all parts, without a tiny decoder's."""
        return sum(self.others().values()) + sum(map(weight_bytes, self.transformers(storage)))

    def peak(self, storage: Storage, offload: str, decoding: str | None) -> int:
        """Return the most bytes that weights and activations take together at any time of a run.

        Args:
            storage: of the transformers' weights.
            offload: one of `blade.models.choices.OFFLOADS` but "auto".
            decoding: "full", "tiled" or "tiny"; None: of a run that ends before.
        """
        stages = [self._text(offload), self._denoising(storage, offload)]
        if decoding is not None:
            stages.append(self._decoding(decoding, offload))
        if offload == "model":  # parts that no call is known of, such as encoders of images
            stages += [size for name, size in self.others().items() if name not in (*self.encoders, VAE)]
        resident = self.weights(storage) if offload == "none" else 0
        if decoding == "tiny" and self.tiny is not None:  # which nothing offloads
            resident += weight_bytes(self.tiny[0])
        return resident + max(stages)

    def _text(self, offload: str) -> int:
        """Return the most bytes while text is encoded: activations, with the weights that offloading brings."""
        parts = self.model.pipe.components
        calls = [self._count(("text", name), call, parts[name], offload) for name, call in self.encoders.items()]
        return max(calls, default=0)

    def _denoising(self, storage: Storage, offload: str) -> int:
        """Return the most bytes in a forward pass of a transformer, as `_text` does."""
        parts: dict[str, Transformer] = {}
        for part in self.transformers(storage):  # those of one configuration and size take the same
            parts.setdefault(f"{weight_bytes(part)} {sorted(part.config.items(), key=str)}", part)
        return max(
            self._count(("transformer", storage.name, key), lambda: self._forward(part), part, offload)  # noqa: B023
            for key, part in parts.items()
        )

    def _forward(self, transformer: Transformer) -> None:
        family = self.model.family
        inputs = family.example_inputs(transformer, self.latent, batch=self.batch)
        with family.without_values():
            transformer(**inputs)

    def _decoding(self, decoding: str, offload: str) -> int:
        """Return the most bytes while a latent is decoded, as `_text` does."""
        if decoding == "tiny":
            assert self.tiny is not None
            return self._count((decoding,), self.tiny[1], self.tiny[0], "none")
        vae = self.model.pipe.vae
        decoder = getattr(vae, "decoder", None)  # which gets equal tiles of large videos
        repeated = decoder if isinstance(decoder, nn.Module) else None
        if decoding == "tiled":
            vae.enable_tiling()
        try:
            return self._count((decoding,), self.decode, vae, offload, repeated)
        finally:
            if decoding == "tiled":
                vae.disable_tiling()

    def _count(
        self,
        key: tuple[object, ...],
        call: Callable[[], object],
        part: nn.Module,
        offload: str,
        repeated: nn.Module | None = None,
    ) -> int:
        """Return a call's activations, with a part's weights as far as offloading has them on the device."""
        by_leaf = offload in ("group", "sequential")
        ahead = offload == "group" and self.streams
        key = (*key, by_leaf, ahead)
        if key not in self._counted:
            held: AbstractContextManager[Any] = weights_by_leaf(part, ahead=ahead) if by_leaf else nullcontext()
            with held:
                self._counted[key] = peak_bytes(call, repeated)
        return self._counted[key] + (weight_bytes(part) if offload == "model" else 0)
