"""Prediction of a run's seconds from its operations and the speed of a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blade.models.cards import TERA, CardRates
from blade.models.costs import RunCost


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of a run, as they follow from operations alone; `print` it."""

    rates: CardRates
    """The speed of the card."""
    seconds: Mapping[str, float]
    """By part: "text encoder", "transformer" and "decoder"; those that the card has a rate of."""
    lacking: Mapping[str, str]
    """By each other part, the rate that the card's report lacks."""

    @property
    def total(self) -> float:
        """Seconds of all parts that are known."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds_text(seconds)}" for part, seconds in self.seconds.items()) or "nothing"
        rates = self.rates
        if not rates.measured:
            peaks = {rate.of: f"{rate.tflops:g} TFLOP/s in {rate.of}" for rate in rates.rates.values()}
            return (
                f"at least {seconds_text(self.total)} at the documented peak of the {rates.card} "
                f"({', '.join(peaks.values())}; assumed share of it 100 %, which no run reaches): {parts}"
            )
        speeds = ", ".join(f"{name} {rate.tflops:.3g} ({rate.of})" for name, rate in rates.rates.items())
        without = f", without the {' and the '.join(self.lacking)}" if self.lacking else ""
        missing = f"; the report has no speed of this {' or '.join(self.lacking.values())}" if self.lacking else ""
        return (
            f"about {seconds_text(self.total)}{without}, by what was measured on {rates.card}, matrix products alone: "
            f"{parts}{missing}. TFLOP/s: {speeds}"
        )


def predict(cost: RunCost, text_flops: float, decoding_flops: float, rates: CardRates) -> Prediction:
    """Predict the seconds of a run.

    Norms, activations, the scheduler, and transfers are left out, so that a run takes longer; how much longer depends
    on the card, and is not guessed.

    Args:
        cost: of the transformer.
        text_flops: operations of the text encoders.
        decoding_flops: operations of the decoder.
        rates: the speed of the card.

    Returns:
        Seconds by part. A part has none where the card lacks a rate that it needs.
    """
    work = {
        "text encoder": {"linear layers": text_flops},
        "transformer": _by_rate(cost),
        "decoder": {"decoder": decoding_flops},
    }
    seconds, lacking = dict[str, float](), dict[str, str]()
    for part, flops in work.items():
        flops = {name: count for name, count in flops.items() if count}
        missing = [name for name in flops if name not in rates.rates]
        if missing:
            lacking[part] = missing[0]
        else:
            seconds[part] = sum(count / (rates.rates[name].tflops * TERA) for name, count in flops.items())
    return Prediction(rates=rates, seconds=seconds, lacking=lacking)


def _by_rate(cost: RunCost) -> dict[str, float]:
    """Return the transformer's operations by the rate that they run at."""
    parts = cost.flops
    sparse = cost.sparse_self_attention
    return {
        "linear layers": parts["linear layers"] + parts["convolutions"],
        "dense attention": parts["self-attention"] - sparse + parts["other attention"],
        "sparse attention": sparse + parts.get("block selection", 0.0),
    }


def seconds_text(seconds: float) -> str:
    """Return seconds for people."""
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return f"{seconds:.3g} s" if seconds >= 0.001 else f"{1e3 * seconds:.3g} ms"
