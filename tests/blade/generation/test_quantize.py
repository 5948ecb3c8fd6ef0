"""Weights and products of transformers in fewer bits."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

from blade.generation.prepare import prepare_model
from blade.generation.request import GenerationRequest
from blade.generation.run import run_request
from blade.models.acceleration import TORCHAO_CONFIGS, check_quantizable
from blade.models.choices import QUANTIZATIONS


def tiny(model: Path, **changes) -> GenerationRequest:
    size = {"height": 64, "width": 64, "frames": 9, "steps": 2, "device": "cpu"}
    return GenerationRequest(prompt="a red ball moving right", model=str(model), **size, **changes)


def make(request: GenerationRequest) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the video of a request, and a weight of the transformer that made it."""
    model, resolved = prepare_model(request)
    model.pipe.set_progress_bar_config(disable=True)
    return run_request(model, resolved).video, model.pipe.transformer.blocks[0].attn1.to_q.weight


@pytest.fixture(scope="module")
def plain(saved_tiny_pipeline: Path) -> torch.Tensor:
    """The video in full precision."""
    return make(tiny(saved_tiny_pipeline))[0]


@pytest.mark.parametrize("kind", ["int8", "int8-dynamic"])
def test_eight_bits_and_tiles_stay_close(saved_tiny_pipeline: Path, plain: torch.Tensor, kind: str) -> None:
    pytest.importorskip("torchao")
    video, weight = make(tiny(saved_tiny_pipeline, quantize=kind, vae_tiling=True))
    assert "Int8" in type(weight).__name__ + repr(weight)
    assert not torch.equal(video, plain)
    assert (video - plain).square().mean().sqrt() < 0.05


def test_dynamic_ones_round_the_inputs_too(saved_tiny_pipeline: Path) -> None:
    pytest.importorskip("torchao")
    videos = [make(tiny(saved_tiny_pipeline, quantize=kind))[0] for kind in ("int8", "int8-dynamic")]
    assert not torch.equal(*videos)


@pytest.mark.parametrize(
    ("kind", "capability", "message"),
    [
        (
            "fp8-dynamic",
            None,
            "`quantize` fp8-dynamic needs a GPU of compute capability 8.9 or later, got cpu; int8 and",
        ),
        ("nvfp4", (9, 0), "needs a GPU of compute capability 10.0 or later, got cuda:1 of 9.0"),
        ("int8-dynamic", (7, 5), "8.0 or later, got cuda:1 of 7.5"),
        ("fp8-dynamic", (8, 9), None),
        ("nvfp4", (12, 0), None),
        ("fp8", (7, 5), None),
    ],
)
def test_what_a_card_cannot_multiply_is_refused_before_loading(monkeypatch, kind, capability, message) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cpu" if capability is None else "cuda:1")
    if message is None:
        check_quantizable(kind, device)
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        check_quantizable(kind, device)
    if capability is None:
        with pytest.raises(ValueError, match=re.escape(message)):
            prepare_model(GenerationRequest(prompt="x", model="nowhere", quantize=kind, device="cpu"))


def test_every_quantization_has_its_configuration() -> None:
    pytest.importorskip("torchao")
    assert set(TORCHAO_CONFIGS) == set(QUANTIZATIONS)
    for module, name in TORCHAO_CONFIGS.values():
        assert callable(getattr(importlib.import_module(module), name))
