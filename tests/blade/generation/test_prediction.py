"""Operations of each part of a run are PyTorch's own, and seconds follow from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from card_reports import SIZE, make_report
from safetensors.torch import save_file
from taehv_weights import base_weights
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

from blade.cli.generate import main
from blade.generation.plan import RunPlan, plan_run
from blade.generation.prepare import prepare_model
from blade.generation.request import GenerationRequest
from blade.generation.run import run_request
from blade.models.cards import documented_cards

WAN = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}


def bundled(**changes) -> GenerationRequest:
    given = {"prompt": "a red ball moving right", "attention": "dense", "steps": 2, "guidance_scale": 5.0}
    return GenerationRequest(**{**given, **SIZE, "device": "cpu", **changes})


def count_run(request: GenerationRequest) -> dict[str, int]:
    """Make a video, and return the operations of its parts as PyTorch counts them."""
    model, resolved = prepare_model(request)
    model.pipe.set_progress_bar_config(disable=True)
    for module in model.pipe.vae.modules():  # to the convolution that PyTorch counts
        if isinstance(module, nn.Conv3d):
            module.__dict__.pop("_conv_forward", None)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run_request(model, resolved)
    counts = {name: sum(values.values()) for name, values in counter.get_flop_counts().items()}
    text, transformer = counts["UMT5EncoderModel"], counts["WanTransformer3DModel"]
    return {"text encoder": text, "transformer": transformer, "decoder": counts["Global"] - text - transformer}


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_the_parts_of_a_run_of_the_bundled_model(guidance: float) -> None:
    request = bundled(guidance_scale=guidance)
    assert plan_run(request).flops == pytest.approx(count_run(request), rel=0.01)


def test_the_parts_of_a_run_with_a_tiny_decoder(saved_tiny_pipeline: Path, tmp_path: Path) -> None:
    save_file(base_weights(4), tmp_path / "own.safetensors")
    request = bundled(
        model=str(saved_tiny_pipeline), decoder="tiny", decoder_weights=str(tmp_path / "own.safetensors")
    )
    assert plan_run(request).flops == pytest.approx(count_run(request), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", WAN)
def test_the_parts_of_known_configurations(name: str) -> None:
    """Each part is made and called here by itself, on the meta device."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    request = bundled(model=name, height=480, width=832, frames=33, steps=3)
    plan = plan_run(request)
    config = UMT5Config(
        vocab_size=1000, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"), torch.no_grad():
        encoder, vae, transformer = UMT5EncoderModel(config), AutoencoderKLWan(), WanTransformer3DModel(**WAN[name])
        latent, text = torch.zeros(1, 16, 9, 60, 104), torch.zeros(1, 512, 4096)
        ids = torch.zeros(1, 512, dtype=torch.int64)
        counts = [
            2 * count(lambda: encoder(input_ids=ids)),
            6 * count(lambda: transformer(hidden_states=latent, timestep=torch.zeros(1), encoder_hidden_states=text)),
            count(lambda: vae.decode(latent)),
        ]
    assert list(plan.flops.values()) == pytest.approx(counts, rel=0.01)
    inner, width, hidden = 64 * 64, 4096, 10240
    layer = 2 * 512 * (4 * width * inner + 3 * width * hidden) + 4 * 512**2 * inner
    assert plan.text_flops == pytest.approx(2 * 24 * layer, rel=0.01)


def count(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def test_documented_peaks_bound_the_seconds() -> None:
    plan = plan_run(bundled(), card="h200")
    assert plan.request.dtype == "bfloat16" and plan.prediction is not None
    expected = {part: count / (494.5e12 if part == "decoder" else 989.5e12) for part, count in plan.flops.items()}
    assert plan.prediction.seconds == pytest.approx(expected)
    assert plan.prediction.total == pytest.approx(sum(expected.values()))
    shown = str(plan)
    assert (
        "prediction  at least " in shown
        and " at the documented peak of the H200 (989.5 TFLOP/s in bfloat16, " in shown
    )
    assert "494.5 TFLOP/s in TF32; assumed share of it 100 %" in shown
    assert "text encoder " in shown and plan_run(bundled()).prediction is None


def test_sparse_operations_take_their_own_rate() -> None:
    dense, sparse = plan_run(bundled()), plan_run(bundled(attention="asa", sparsity=0.5, dense_steps=0))
    cost = sparse.cost
    assert 0 < cost.sparse_self_attention < cost.flops["self-attention"] < dense.cost.flops["self-attention"]
    assert dense.cost.sparse_self_attention == 0
    layer = cost.forward.flops["self-attention"] / cost.forward.layers
    dense_layers = cost.passes * (cost.forward.layers - cost.sparse_layers) * layer
    assert cost.sparse_self_attention + dense_layers == pytest.approx(cost.flops["self-attention"])


@pytest.fixture
def card(tmp_path: Path) -> str:
    path = tmp_path / "card.json"
    path.write_text(json.dumps(make_report()))
    return str(path)


def test_a_report_predicts_by_its_rates(card: str) -> None:
    request = bundled(attention="asa", sparsity=0.5, dense_steps=0)
    plan = plan_run(request, card=card)
    assert plan.request.dtype == "float32" and plan.prediction is not None
    flops, unit = plan.cost.flops, 4 * 2 * 16 * 192**2
    own = plan.cost.sparse_self_attention
    seconds = (flops["linear layers"] + flops["convolutions"]) / 1e12
    seconds += (flops["self-attention"] - own + flops["other attention"]) / (unit / 2e-3)
    seconds += (own + flops["block selection"]) / (0.5 * unit / 4e-3)
    expected = {"text encoder": plan.text_flops / 1e12, "transformer": seconds, "decoder": plan.decoding_flops / 5e11}
    assert plan.prediction.seconds == pytest.approx(expected)
    shown = str(plan.prediction)
    assert shown.startswith("about ") and "by what was measured on a card, matrix products alone" in shown
    assert "linear layers 1 (bundled), decoder 0.5 (bundled)" in shown


def test_what_a_report_lacks_is_left_out(tmp_path: Path) -> None:
    report = make_report()
    report["steps"] = [step for step in report["steps"] if "3000" not in step["name"]]
    path = tmp_path / "card.json"
    path.write_text(json.dumps(report))
    own = plan_run(bundled(height=64, width=64, frames=17), card=str(path)).prediction
    longer = plan_run(bundled(height=96, width=96, frames=33), card=str(path)).prediction
    assert own is not None and not own.lacking
    assert longer is not None and longer.lacking == {"transformer": "dense attention"}
    assert ", without the transformer, by what was measured" in str(longer)
    assert "the report has no speed of this dense attention" in str(longer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize": "int8-dynamic"}, "`card` must not be given with `quantize` int8-dynamic"),
        ({"cache": "first-block"}, "`card` must not be given with `cache` first-block"),
        ({"attention": "asa", "precision": "int8"}, '`card` must not be given with `precision` "int8"'),
    ],
)
def test_what_is_faster_than_its_operations_tell_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_run(bundled(**changes), card="H200")


def test_the_command_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["a red ball moving right", "--student", "none", "--height=64", "--width=64", "--frames=9", "--steps=2"]
    with pytest.raises(SystemExit) as ended:
        main([*line, "--dry-run", "--card", "RTX 5090"])
    shown = capsys.readouterr().out
    assert not ended.value.code and "prediction  at least " in shown and "of the RTX 5090" in shown
    for options, message in (
        (["--card", "H200"], "`--card` must not be given without `--dry-run`, got 'H200'"),
        (["--dry-run", "--card", "H300"], "`card` must be one of A100, H100, H200"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*line, *options])
        assert ended.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_a_faster_card_takes_less() -> None:
    plan = plan_run(bundled(), card="A100")
    assert isinstance(plan, RunPlan) and plan.prediction is not None
    faster = plan_run(replace(plan.request, dtype="bfloat16"), card="B200").prediction
    assert faster is not None and faster.total < plan.prediction.total
    assert faster.rates.source == documented_cards()["B200"].source
