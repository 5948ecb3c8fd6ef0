"""Plans of runs, of models of which nothing but configuration files is there."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from transformers import UMT5Config

from blade.cli.generate import main
from blade.generation.plan import peak_bytes, plan_run
from blade.generation.request import GenerationRequest
from blade.models.costs import forward_cost, run_cost
from blade.models.source import ModelError


@pytest.fixture(scope="module")
def wan_1_3b(tmp_path_factory):
    """A folder with the configuration of Wan2.1-T2V-1.3B, and no weights."""
    folder = tmp_path_factory.mktemp("models") / "Wan2.1-T2V-1.3B-Diffusers"
    with torch.device("meta"):
        transformer = WanTransformer3DModel(num_attention_heads=12, num_layers=30, ffn_dim=8960)
        vae = AutoencoderKLWan()
    transformer.save_config(folder / "transformer")
    vae.save_config(folder / "vae")
    encoder = UMT5Config(
        vocab_size=256384,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    encoder.save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.slow
def test_a_real_model_is_planned_without_its_weights(wan_1_3b):
    request = GenerationRequest(
        prompt="a cat", model=str(wan_1_3b), height=480, width=832, frames=81, steps=50, dtype="bfloat16", device="cpu"
    )
    plan = plan_run(request)
    assert plan.cost.forward.grid.video_tokens == 32760 and plan.cost.passes == 100
    assert plan.cost.forward.parameters == pytest.approx(1.42e9, rel=0.01)
    assert plan.weights_gib["transformer"] == pytest.approx(2.64, rel=0.01)
    assert plan.weights_gib["text_encoder"] == pytest.approx(10.58, rel=0.01)  # 5.68e9 numbers
    assert plan.cost.forward.flops["self-attention"] * 100 == 4 * 30 * 12 * 128 * 32760**2 * 100
    assert plan.cost.total < 0.8 * plan.cost.dense_total
    assert 0.5 < plan.activations_gib["transformer"] < 4 and plan.activations_gib["decoding"] > 0.5
    assert plan.needed_gib > 14 and plan.fits is None
    shown = str(plan)
    assert "21 x 30 x 52 = 32,760, in 30 layers of 12 heads" in shown
    assert "29 layers in 80 of 100 passes at density 0.30" in shown


@pytest.mark.slow
def test_a_dense_run_costs_what_the_transformer_does(wan_1_3b):
    request = GenerationRequest(
        prompt="a cat", model=str(wan_1_3b), attention="dense", height=256, width=256, frames=5, steps=4,
        guidance_scale=1.0,
    )  # fmt: skip
    plan = plan_run(request)
    with torch.device("meta"):
        transformer = WanTransformer3DModel(num_attention_heads=12, num_layers=30, ffn_dim=8960)
    expected = run_cost(forward_cost(transformer, (2, 32, 32)), 4, guidance=False)
    assert plan.cost.total == plan.cost.dense_total == expected.total
    assert plan.weights_gib["transformer"] == pytest.approx(2 * 2.64, rel=0.01)  # float32 on the CPU


def test_peak_memory_is_that_of_what_lives_at_once():
    weight = torch.zeros(1000, 10, device="meta")

    def run():
        first = weight.t() @ weight  # 100 numbers
        second = torch.zeros(500)
        del first
        third = second * 2  # 1,000 numbers live
        return torch.cat((third[:10], second[:10]))

    assert peak_bytes(run) == 4 * (500 + 500 + 20)
    query = torch.zeros(1, 2, 300, 16, device="meta")
    assert (
        peak_bytes(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query)) == 4 * 2 * 300 * 16
    )


@pytest.mark.slow
def test_the_command_prints_a_plan_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["--prompt", "a red ball moving right", "--dry-run"])
    shown = capsys.readouterr().out
    assert not ended.value.code and not list(tmp_path.iterdir())
    assert "9 x 12 x 12 = 1,296" in shown and "TFLOP" in shown


def test_a_broken_folder_is_named(wan_1_3b, tmp_path):
    with pytest.raises(ModelError, match="is no folder here"):
        plan_run(GenerationRequest(prompt="a cat", model=str(tmp_path / "nothing")))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read: "):
        plan_run(GenerationRequest(prompt="a cat", model=str(tmp_path)))


@pytest.mark.parametrize(
    "name", ["CogVideoXPipeline", "HunyuanVideoPipeline", "HunyuanVideo15Pipeline", "LTXPipeline"]
)
def test_every_family_is_planned(name, configurations):
    request = GenerationRequest(
        prompt="a cat", model=str(configurations(name)), height=256, width=256, frames=17, steps=3, sparsity=0.3
    )
    plan = plan_run(request)
    scale, frames = (32, 3) if name == "LTXPipeline" else (16, 5)
    assert plan.cost.forward.grid.video_tokens == frames * (256 // scale) ** 2
    assert plan.cost.total > 0 and min(plan.activations_gib.values()) > 0
    unguided = plan_run(replace(request, guidance_scale=1.0))
    ratio = plan.activations_gib["transformer"] / unguided.activations_gib["transformer"]
    assert 1.8 < ratio <= 2 if name in ("CogVideoXPipeline", "LTXPipeline") else ratio == 1  # guidance as a batch
    assert plan.activations_gib["decoding"] == unguided.activations_gib["decoding"]
