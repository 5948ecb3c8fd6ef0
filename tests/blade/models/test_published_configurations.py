"""Configurations of published pipelines that come with BLADE, for machines that do not reach the Hub."""

from functools import cache

import pytest
import torch
from diffusers import WanAnimateTransformer3DModel
from huggingface_hub import HfApi

from blade.families.registry import published_configurations
from blade.generation.plan import plan_run
from blade.generation.request import GenerationRequest
from blade.models.costs import forward_cost
from blade.models.loaded import LoadedModel
from blade.models.loading import load_empty_model
from blade.models.source import HubUnreachableError, ModelError

WAN = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", fail)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


RELEASES = {
    # parameters of the transformer and of the text encoder, the rounded number that was published, tokens of a dry run
    "THUDM/CogVideoX-2b": (1_693_783_872, 4_762_310_656, 2e9, "13 x 30 x 45 = 17,550 and 226 of text"),
    "THUDM/CogVideoX-5b": (5_570_283_072, 4_762_310_656, 5e9, "in 42 layers of 48 heads"),
    "zai-org/CogVideoX-2b": (1_693_783_872, 4_762_310_656, 2e9, "in 30 layers of 30 heads"),
    "zai-org/CogVideoX-5b": (5_570_283_072, 4_762_310_656, 5e9, "in 42 layers of 48 heads"),
    "hunyuanvideo-community/HunyuanVideo": (12_821_012_544, 7_505_186_816, 13e9, "33 x 45 x 80 = 118,800 and 256"),
    "Lightricks/LTX-2": (18_876_174_592, 12_187_325_040, 19e9, "16 x 16 x 24 = 6,144, in 48 layers of 32 heads"),
    "diffusers/LTX-2.3-Diffusers": (18_988_838_144, 12_187_325_040, 22e9, "47 layers in 96 of 120 passes at density"),
    "Lightricks/LTX-2.5-Diffusers": (18_987_859_200, None, 22e9, "121 frames of 768x512, 8 steps, guidance 1"),
    "Lightricks/LTX-Video": (1_923_385_472, 4_762_310_656, 1.9e9, "21 x 16 x 22 = 7,392, in 28 layers of 32 heads"),
    "MiniMaxAI/MiniMax-H3": (
        33_122_992_896,
        33_357_390_064,
        33e9,
        "37 x 24 x 42 = 37,296 and 670 of text, in 50 layers",
    ),
    WAN: (1_418_996_800, 5_680_910_336, 1.3e9, "21 x 30 x 52 = 32,760, in 30 layers of 12 heads"),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": (14_288_491_584, 5_680_910_336, 14e9, "in 40 layers of 40 heads"),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": (14_288_491_584, 5_680_910_336, 14e9, "21 x 45 x 80 = 75,600, in 40 layers"),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": (4_999_787_712, 5_680_910_336, 5e9, "31 x 22 x 40 = 27,280, in 30 layers"),
    "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers": (1_435_525_696, 5_680_910_336, 1.3e9, "25 x 34 x 60 = 51,000"),
    "Skywork/SkyReels-V2-DF-14B-540P-Diffusers": (14_288_491_584, 5_680_910_336, 14e9, "in 40 layers of 40 heads"),
    "Skywork/SkyReels-V2-T2V-14B-540P-Diffusers": (14_288_491_584, 5_680_910_336, 14e9, "in 40 layers of 40 heads"),
    "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers": (1_421_752_384, 5_680_910_336, 1.3e9, "21 x 30 x 52 = 32,760"),
    "nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers": (14_316_026_944, 5_680_910_336, 14e9, "in 40 layers of 40 heads"),
}
"""Of every configuration. Source of the rounded numbers: the model cards of CogVideoX, Wan 2.1 and Wan 2.2 (14B for
each of two experts), the papers of HunyuanVideo (arXiv 2412.03603) and LTX-Video (arXiv 2501.00103), Diffusers'
documentation of MiniMax-H3, and the names of the files of LTX-2 (19b), 2.3 and 2.5 (22b), whose connectors count
there."""

SHIFTS = {
    WAN: 3.0,
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 5.0,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 3.0,
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": 5.0,
    # Diffusers' conversion leaves it at the default
    **{model: 1.0 for model in RELEASES if model.startswith("Skywork/")},
}
"""Flow shifts of the releases."""

ANIMATE = "Wan-AI/Wan2.2-Animate-14B-Diffusers"
"""A configuration of a pipeline that needs inputs that no option gives."""


@cache
def load_once(model: str) -> LoadedModel:
    """Load a model without its weights."""
    return load_empty_model(model, dtype=torch.bfloat16)


def test_where_a_configuration_is_from_is_said(caplog):
    caplog.set_level("INFO", logger="blade")
    load_empty_model(WAN)
    assert f"the configuration of {WAN} is the one that comes with BLADE" in caplog.text


def test_parts_that_a_configuration_lacks_are_named(caplog):
    caplog.set_level("INFO", logger="blade")
    pipe = load_empty_model("Lightricks/LTX-2.5-Diffusers").pipe
    assert "comes with BLADE, without connectors and text_encoder" in caplog.text
    assert pipe.connectors is None and pipe.text_encoder is None


def test_every_configuration_is_tested():
    assert set(published_configurations()) == {*RELEASES, ANIMATE}


def test_the_configuration_of_wan_animate_counts_its_operations():
    """The pipeline is for Python alone; its transformer holds Wan's of 14B, and what follows faces and poses."""
    with pytest.raises(ModelError, match=r"is a WanAnimatePipeline, which needs `pose_video` and `face_video`: no"):
        load_empty_model(ANIMATE)
    with torch.device("meta"):
        transformer = WanAnimateTransformer3DModel.from_config(published_configurations()[ANIMATE]["transformer"])
    cost = forward_cost(transformer.to(torch.bfloat16), (21, 90, 160))
    assert cost.parameters == 17_274_816_884
    assert (cost.grid.video_tokens, cost.layers, cost.heads, cost.head_dim) == (75_600, 40, 40, 128)


@pytest.mark.parametrize("model", RELEASES)
def test_a_published_model_is_known_without_the_hub(model):
    """With the numbers of parameters of the releases, and a preset."""
    loaded = load_once(model)
    parameters, text, rounded, _ = RELEASES[model]
    parts = (loaded.transformer, loaded.pipe.text_encoder)
    counts = [None if part is None else sum(x.numel() for x in part.parameters()) for part in parts]
    assert counts == [parameters, text]
    assert parameters == pytest.approx(rounded, rel=0.16)
    assert loaded.pipe.scheduler.config.get("flow_shift") == SHIFTS.get(model)
    assert {x.device.type for x in loaded.transformer.parameters()} == {"meta"}
    assert loaded.preset.attention == "asa"


def test_facts_beside_the_sizes():
    """Two experts and their boundary, timesteps by token, noise at the last step, shifts of the flow."""
    pipes = {name.partition("/")[2]: load_once(name).pipe for name in RELEASES if "zai-org" not in name}
    experts = pipes["Wan2.2-T2V-A14B-Diffusers"]
    assert experts.config.boundary_ratio == 0.875
    assert dict(experts.transformer_2.config) == dict(experts.transformer.config)
    small = pipes["Wan2.2-TI2V-5B-Diffusers"]
    assert small.config.expand_timesteps and (small.vae_scale_factor_spatial, small.vae.config.z_dim) == (16, 48)
    assert pipes["HunyuanVideo"].scheduler.config.shift == 7.0
    assert sum(x.numel() for x in pipes["HunyuanVideo"].text_encoder_2.parameters()) == 123_060_480  # CLIP ViT-L/14
    ltx = pipes["LTX-Video"]
    assert (ltx.vae_spatial_compression_ratio, ltx.vae_temporal_compression_ratio) == (32, 8)
    pipe = pipes["LTX-2.3-Diffusers"]
    size = (pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio)
    assert (*size, pipe.vocoder.config.output_sampling_rate) == (32, 8, 48000)
    assert pipes["LTX-2"].vocoder.config.output_sampling_rate == 24000
    assert sum(x.numel() for x in pipe.connectors.parameters()) == 3_172_227_584  # 22 billion with the transformer's
    assert not pipes["LTX-2.5-Diffusers"].scheduler.config.use_dynamic_shifting  # distilled
    shifts = [pipes[f"CogVideoX-{size}"].scheduler.config.snr_shift_scale for size in ("2b", "5b")]
    scales = [pipes[f"CogVideoX-{size}"].vae.config.scaling_factor for size in ("2b", "5b")]
    assert (shifts, scales) == ([3.0, 1.0], [1.15258426, 0.7])


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=pytest.mark.slow) if "LTX-2" in model else model for model in RELEASES]
)
def test_the_dry_run_of_a_published_model_needs_no_network(model):
    assert RELEASES[model][3] in str(plan_run(GenerationRequest(prompt="a cat", model=model, device="cpu")))


def test_others_are_refused_as_before():
    with pytest.raises(
        HubUnreachableError, match="`model` Wan-AI/Unknown is no folder here and not in the Hub's local"
    ):
        load_empty_model("Wan-AI/Unknown")
    with pytest.raises(HubUnreachableError, match="cannot be reached"):
        load_empty_model(WAN, revision="main")  # which may say something else
