"""How fast a GPU multiplies, and copies to others: peaks as documented, or rates of a report of `blade-bench gpu`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from blade.common.checks import check_choice, check_integer, check_number, is_number, meant
from blade.common.reading import read_json
from blade.families.registry import published_configurations
from blade.models.choices import DTYPE_NAMES, DtypeName
from blade.models.costs import count_flops, forward_cost
from blade.models.loading import load_empty_model
from blade.models.source import BUNDLED

DATA = Path(__file__).with_name("cards.yaml")

RATES = ("linear layers", "dense attention", "sparse attention", "decoder")
"""What rates are of. Text encoders are taken for linear layers."""

NEAR = 4.0
"""Factor up to which the length of a measured layer may differ from that of a run: speed depends on it."""

TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A speed, and where it is from."""

    tflops: float
    """TFLOP/s."""
    of: str
    """What was documented or measured."""


@dataclass(frozen=True, kw_only=True)
class CardRates:
    """The speed of a card in a dtype."""

    card: str
    """Its name."""
    measured: bool
    """True: measured. False: documented peaks, which no run exceeds."""
    source: str
    """Address of the documentation, or path of the report."""
    rates: Mapping[str, Rate]
    """By what they are of, `RATES`; a report may lack some."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What the cards of a machine are connected by."""

    name: str
    """Its name, with its generation."""
    gb_per_second: float
    """Documented peak in one direction, for one card: GB/s, of 1e9 bytes."""
    source: str
    """Address of the documentation."""


@dataclass(frozen=True, kw_only=True)
class DocumentedCard:
    """A card whose peaks are documented."""

    name: str
    """Its name."""
    half: float
    """TFLOP/s in bfloat16 or float16, accumulated in float32, without structured sparsity."""
    tf32: float
    """TFLOP/s in TF32, which stands for float32."""
    source: str
    """Address of the documentation."""
    link: Link
    """What several of them are connected by."""

    default_dtype: DtypeName = "bfloat16"
    """The dtype of a run that names none."""

    def rates(self, dtype: torch.dtype, decoder_dtype: torch.dtype, tokens: int, density: float) -> CardRates:
        """Return the documented peaks; `tokens` and `density` make no difference to them.

        Args:
            dtype: of the transformer and the text encoders.
            decoder_dtype: of the decoder.
            tokens: length of the sequence.
            density: of sparse attention.
        """
        own, decoder = self._peak(dtype), self._peak(decoder_dtype)
        return CardRates(
            card=self.name,
            measured=False,
            source=self.source,
            rates={name: decoder if name == "decoder" else own for name in RATES},
        )

    def _peak(self, dtype: torch.dtype) -> Rate:
        if dtype == torch.float32:
            return Rate(tflops=self.tf32, of="TF32")
        return Rate(tflops=self.half, of=str(dtype).removeprefix("torch."))


@cache
def documented_cards() -> dict[str, DocumentedCard]:
    """Return the cards whose peaks are known by their names. Source: `cards.yaml`, which has an address for each."""
    values = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    return {
        name: DocumentedCard(name=name, **{**fields, "link": Link(**fields["link"])})
        for name, fields in values.items()
    }


def find_card(text: str) -> DocumentedCard | CardReport:
    """Return a card by its name, or by a report of `blade-bench gpu`.

    Args:
        text: a name such as "H200", "nvidia-rtx-4090" or "NVIDIA GeForce RTX 4090"; or the path of the report's JSON.

    Raises:
        ValueError: if there is no such report, it is none, or the card is unknown; names those that are known.
    """
    cards = documented_cards()
    for name, card in cards.items():
        if _plain(text) == _plain(name):
            return card
    path = Path(text).expanduser()
    if path.is_file():
        return CardReport(text, read_json(path, f"`card` {text}"))
    if path.suffix == ".json" or path.exists():
        raise ValueError(f"`card` must be a card's name or the JSON of a blade-bench gpu; there is no file {text}.")
    known, end = ", ".join(cards), meant(text.upper(), cards)
    raise ValueError(f"`card` must be one of {known}, or the JSON of a blade-bench gpu on another, got {text!r}{end}")


def _plain(text: str) -> str:
    return "".join(
        character for character in text.lower().replace("nvidia", "").replace("geforce", "") if character.isalnum()
    )


class CardReport:
    """A report of `blade-bench gpu`, and the rates that its times amount to."""

    def __init__(self, path: str, values: Mapping[str, Any]) -> None:
        """Check a report.

        Args:
            path: where it is from, for messages.
            values: its content.

        Raises:
            ValueError: if it is no such report.
        """
        self.path, self._what = path, f"`card` {path}"
        try:
            self.name = str(values["machine"]["device"])
            results = [(step["part"], step["result"]) for step in values["steps"] if "result" in step]
            self._attention = [
                result
                for part, result in results
                if part == "attention" and result["settings"]["blocks"] == "random" and result["cases"]
            ]
            self._videos = [result for part, result in results if part == "generation"]
            dtypes = {result["settings"]["dtype"] for result in (*self._attention, *self._videos)}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self._what} must be the JSON of a blade-bench gpu; it lacks {error}.") from None
        if len(dtypes) != 1 or not dtypes <= set(DTYPE_NAMES):
            timed = ", ".join(sorted(map(str, dtypes))) or "nothing"
            raise ValueError(f"{self._what} must have timed attention or videos in one dtype, got {timed}.")
        self.default_dtype: DtypeName = dtypes.pop()
        known = {_plain(name): card.link for name, card in documented_cards().items()}
        self.link: Link | None = known.get(_plain(self.name))
        """Documented, of the card of this name; None: there is none, and a report measures one card alone."""

    def rates(self, dtype: torch.dtype, decoder_dtype: torch.dtype, tokens: int, density: float) -> CardRates:
        """Return the rates that the report has.

        Args:
            dtype: of the transformer and the text encoders.
            decoder_dtype: of the decoder; a report has timed the VAE's own, in float32.
            tokens: length of the sequence; the layer nearest to it counts, if it is within a factor `NEAR`.
            density: of sparse attention; the nearest one measured counts.

        Raises:
            ValueError: if it measured in another dtype, or holds times that are none.
        """
        name = str(dtype).removeprefix("torch.")
        if name != self.default_dtype:
            raise ValueError(f"`dtype` must be {self.default_dtype}, which {self._what} measured in, got {name!r}.")
        try:
            rates = {**self._attention_rates(tokens, density), **self._video_rates(decoder_dtype)}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self._what} must be the JSON of a blade-bench gpu; it lacks {error}.") from None
        return CardRates(card=self.name, measured=True, source=self.path, rates=rates)

    def _attention_rates(self, tokens: int, density: float) -> dict[str, Rate]:
        """Return the rates of the layer whose length is nearest, and of its case whose density is nearest."""
        cases = [case for result in self._attention for case in result["cases"]]
        if not cases:
            return {}
        for case in cases:
            for name in ("tokens", "heads", "head_dim", "batch"):
                check_integer(f"{name}` of `card", case[name], least=1)
            for name in ("density", "realised_density"):
                check_number(f"{name}` of `card", case[name], "in (0, 1]", lambda share: 0 < share <= 1)
        case = min(cases, key=lambda case: (_distance(case["tokens"], tokens), abs(case["density"] - density)))
        if _distance(case["tokens"], tokens) > math.log(NEAR):
            return {}
        flops = 4 * case["batch"] * case["heads"] * case["head_dim"] * case["tokens"] ** 2
        times, rates = case["ms"], dict[str, Rate]()
        dense = [
            ms["forward"] for name, ms in times.items() if name not in case["sparse"] and ms.get("forward") is not None
        ]
        size = f"{case['heads']} heads, {case['tokens']:,} tokens"
        if dense:
            rates["dense attention"] = self._rate(flops, min(dense), size)
        if taken := times.get(case["auto"]):
            kept = flops * case["realised_density"]
            choosing = ", the choice of blocks included" if "whole" in taken else ""
            sparse = taken.get("whole", taken.get("forward"))
            rates["sparse attention"] = self._rate(kept, sparse, f"{size}, density {case['density']:g}{choosing}")
        return rates

    def _video_rates(self, decoder_dtype: torch.dtype) -> dict[str, Rate]:
        """Return the rates of linear layers and of the VAE's decoder, of the model that was timed."""
        if not self._videos:
            return {}
        result = self._videos[0]
        title = result["settings"]["model"]
        check_choice("model` of `card", title, (BUNDLED, *published_configurations()))
        model = load_empty_model(title)
        latent = model.latent_size(result["height"], result["width"], result["frames"])
        flops = forward_cost(model.transformer, latent).flops
        weights = flops["linear layers"] + flops["convolutions"]
        rates = {"linear layers": self._rate(weights, result["parts_ms"]["linear layers"], title)}
        if decoder_dtype == torch.float32:
            decode: Callable[[], object] = lambda: model.pipe.vae.decode(  # noqa: E731
                model.empty_latent(latent), return_dict=False
            )
            rates["decoder"] = self._rate(count_flops(decode), 1e3 * result["decoding_seconds"], title)
        return rates

    def _rate(self, flops: float, ms: Any, of: str) -> Rate:
        if not is_number(ms) or not 0 < ms < math.inf or not 0 < flops < math.inf:
            raise ValueError(f"{self._what} must hold milliseconds above 0 of {of}, got {ms!r}.")
        return Rate(tflops=flops / ms * 1e3 / TERA, of=of)


def _distance(tokens: int, other: int) -> float:
    return abs(math.log(tokens / other))
