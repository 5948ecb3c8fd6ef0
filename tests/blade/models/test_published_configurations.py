"""Configurations of published pipelines that come with BLADE, for machines that do not reach the Hub."""

import pytest
import torch
from huggingface_hub import HfApi

from blade.families.registry import published_configurations
from blade.generation.plan import plan_run
from blade.generation.request import GenerationRequest
from blade.models.loading import load_empty_model
from blade.models.source import HubUnreachableError

WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    ("model", "parameters", "text", "shift"),
    [(WAN, 1.4190e9, 5.6810e9, 3.0), ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 14.2885e9, 5.6810e9, 5.0)],
)
def test_a_published_model_is_known_without_the_hub(model, parameters, text, shift, caplog):
    """With the numbers of parameters of the releases."""
    caplog.set_level("INFO", logger="blade")
    loaded = load_empty_model(model, dtype=torch.bfloat16)
    counts = [sum(x.numel() for x in part.parameters()) for part in (loaded.transformer, loaded.pipe.text_encoder)]
    assert counts == [pytest.approx(parameters, rel=1e-4), pytest.approx(text, rel=1e-3)]
    assert loaded.pipe.scheduler.config.flow_shift == shift
    assert {x.device.type for x in loaded.transformer.parameters()} == {"meta"}
    assert f"the configuration of {model} is the one that comes with BLADE" in caplog.text


def test_the_dry_run_of_a_published_model_needs_no_network():
    shown = str(plan_run(GenerationRequest(prompt="a cat", model=WAN, device="cpu")))
    assert "21 x 30 x 52 = 32,760, in 30 layers of 12 heads" in shown


def test_every_configuration_makes_a_pipeline():
    for model in published_configurations():
        assert load_empty_model(model).preset.attention == "asa"


def test_others_are_refused_as_before():
    with pytest.raises(
        HubUnreachableError, match="`model` Wan-AI/Unknown is no folder here and not in the Hub's local"
    ):
        load_empty_model("Wan-AI/Unknown")
    with pytest.raises(HubUnreachableError, match="cannot be reached"):
        load_empty_model(WAN, revision="main")  # which may say something else
