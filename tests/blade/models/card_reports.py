"""A report of `blade-bench gpu` with round times."""

from __future__ import annotations

import copy
from typing import Any

from blade.models.costs import count_flops, forward_cost
from blade.models.loading import load_empty_model

SIZE = {"height": 64, "width": 64, "frames": 9}
"""Of the bundled model: 192 tokens."""


def counted() -> tuple[int, int]:
    """Return the operations of the bundled model's products with weights and of its decoder, at `SIZE`."""
    model = load_empty_model()
    latent = model.latent_size(*SIZE.values())
    flops = forward_cost(model.transformer, latent).flops
    sample = model.empty_latent(latent)
    return (
        flops["linear layers"] + flops["convolutions"],
        count_flops(lambda: model.pipe.vae.decode(sample, return_dict=False)),
    )


def attention_step(tokens: int, density: float, dense_ms: float, sparse_ms: float) -> dict[str, Any]:
    """Return the timing of a layer of 2 heads of 16."""
    case = {
        "tokens": tokens, "heads": 2, "head_dim": 16, "batch": 1, "density": density, "realised_density": density,
        "auto": "cpu", "sparse": ["cpu", "flex"],
        "ms": {
            "slow": {"forward": 9 * dense_ms}, "fast": {"forward": dense_ms}, "flex": {"forward": 0.001},
            "cpu": {"forward": 0.5 * sparse_ms, "whole": sparse_ms}, "selection": {"selection": 0.01},
        },
    }  # fmt: skip
    result = {"settings": {"blocks": "random", "dtype": "float32"}, "cases": [case]}
    return {"part": "attention", "name": f"{tokens}, {density}", "state": "done", "result": result}


def make_report() -> dict[str, Any]:
    """Return a report of a card that makes a TFLOP/s with weights and half of one in decoding."""
    weights, decoding = counted()
    video = {
        "settings": {"model": "bundled", "dtype": "float32"}, **SIZE,
        "parts_ms": {"linear layers": 1e3 * weights / 1e12}, "decoding_seconds": decoding / 5e11,
    }  # fmt: skip
    steps = [
        {"part": "correctness", "name": "a check", "state": "done", "result": {"errors": {}}},
        {"part": "attention", "name": "crashed", "state": "crashed", "reason": "no"},
        attention_step(192, 0.2, 2.0, 1.0),
        attention_step(192, 0.5, 2.0, 4.0),
        attention_step(3000, 0.5, 50.0, 40.0),
        {"part": "generation", "name": "generation", "state": "done", "result": video},
    ]
    return copy.deepcopy({"machine": {"device": "a card"}, "versions": {}, "steps": steps})
