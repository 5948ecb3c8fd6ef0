"""LoRAs reach every transformer of a model, or are refused; a failed one leaves none."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from safetensors.torch import save_file

from blade.models.adapters import adapter_weight
from blade.models.loaded import LoadedModel
from blade.models.loras import load_loras, merge_loras


@pytest.fixture
def model(make_wan):
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=make_wan(),
    )
    return LoadedModel(pipe)


@pytest.fixture
def two(make_wan, model):
    pipe = WanPipeline(**model.pipe.components | {"transformer_2": make_wan(seed=1)}, boundary_ratio=0.5)
    return LoadedModel(pipe)


def lora(transformer, layers=("to_q", "to_v"), rank=2):
    generator = torch.Generator().manual_seed(0)
    return {
        f"transformer.{name}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for name, module in transformer.named_modules()
        if name.endswith(layers)
        for side, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank)))
    }


def test_the_modules_that_each_lora_changes_are_counted(model, tmp_path):
    sources = [str(tmp_path / name) for name in ("queries.safetensors", "both.safetensors")]
    save_file(lora(model.transformer, layers="attn1.to_q"), sources[0])
    save_file(lora(model.transformer), sources[1])
    reach = load_loras(model, [sources[0], f"{sources[1]}=0.5"])
    assert reach == {sources[0]: {"transformer": 3}, sources[1]: {"transformer": 12}}
    assert [adapter_weight(model.transformer, name) for name in ("lora_0", "lora_1")] == [1.0, 0.5]


def test_modules_that_the_model_lacks_are_named_and_counted(model, tmp_path, caplog):
    weights = lora(model.transformer)
    for name in ("text_encoder.layer.q", "transformer.blocks.99.attn1.to_q", "transformer.blocks.0.attn1.to_foo"):
        for side in "AB":
            weights[f"{name}.lora_{side}.weight"] = weights[
                f"transformer.blocks.0.attn1.to_q.lora_{side}.weight"
            ].clone()
    source = str(tmp_path / "more.safetensors")
    save_file(weights, source)
    assert load_loras(model, [source]) == {source: {"transformer": 12}}
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert message.endswith(
        "more.safetensors: 3 of 15 modules are left out of transformer: text_encoder.layer.q (no such module), "
        "transformer.blocks.0.attn1.to_foo (no such module), transformer.blocks.99.attn1.to_q (no such module)"
    )


def test_a_lora_whose_keys_all_match_is_loaded_without_a_word(model, tmp_path, caplog):
    diffusers_names = str(tmp_path / "all.safetensors")
    save_file(lora(model.transformer), diffusers_names)
    others_names = str(tmp_path / "other.safetensors")  # as ComfyUI and the trainers of Wan write them
    weights = {}
    for key, value in lora(model.transformer, layers="attn1.to_q").items():
        name = key.replace("transformer.blocks", "diffusion_model.blocks").replace("attn1.to_q", "self_attn.q")
        weights[name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = value
        weights[name.partition(".lora_")[0] + ".alpha"] = torch.tensor(2.0)
    save_file(weights, others_names)
    reach = load_loras(model, [diffusers_names, others_names])
    assert reach == {diffusers_names: {"transformer": 12}, others_names: {"transformer": 3}}
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_lora_for_one_of_two_transformers_is_refused(two, tmp_path):
    source = str(tmp_path / "one.safetensors")
    save_file(lora(two.transformer), source)
    with pytest.raises(
        ValueError,
        match=r"one.safetensors changes 12 modules of transformer and nothing in transformer_2. Name a source for "
        r"each transformer: `--lora FIRST:SECOND=STRENGTH`",
    ):
        load_loras(two, [source])
    assert not any(getattr(one, "peft_config", None) for one in two.transformers.values())


def weights_of(model):
    return {name: part.blocks[0].attn1.to_q.weight.clone() for name, part in model.transformers.items()}


def test_two_transformers_take_a_file_each_with_a_strength_each(two, tmp_path):
    high, low = str(tmp_path / "high.safetensors"), str(tmp_path / "low.safetensors")
    states = {"transformer": lora(two.transformer), "transformer_2": lora(two.transformer, ("attn1.to_q",), rank=3)}
    save_file(states["transformer"], high)
    save_file(states["transformer_2"], low)
    before, key = weights_of(two), "transformer.blocks.0.attn1.to_q.lora_{}.weight"
    reach = load_loras(two, [f"{high}:{low}=0.8:-0.5", f"{high}:{high}=1:0"])
    assert reach == {
        f"{high}:{low}": {"transformer": 12, "transformer_2": 3},
        f"{high}:{high}": {"transformer": 12, "transformer_2": 12},
    }
    merge_loras(two)
    after = weights_of(two)
    for part, strength, name in (("transformer", 1.8, "transformer"), ("transformer_2", -0.5, "transformer_2")):
        assert not getattr(two.transformers[part], "peft_config", None)
        change = strength * states[name][key.format("B")] @ states[name][key.format("A")]
        torch.testing.assert_close(after[part] - before[part], change)


def test_one_strength_is_for_both_transformers(two, tmp_path):
    source = str(tmp_path / "one.safetensors")
    save_file(lora(two.transformer), source)
    load_loras(two, [f"{source}:{source}=0.25"])
    assert [adapter_weight(part, "lora_0") for part in two.transformers.values()] == [0.25, 0.25]


def test_two_files_for_one_transformer_are_refused(model, tmp_path):
    source = str(tmp_path / "one.safetensors")
    save_file(lora(model.transformer), source)
    with pytest.raises(ValueError, match=r"one source for a model of one transformer, got .*one.safetensors and .*"):
        load_loras(model, [f"{source}:{source}"])


def test_a_second_file_that_fails_takes_the_first_along(two, tmp_path):
    good, bad = str(tmp_path / "good.safetensors"), str(tmp_path / "bad.safetensors")
    save_file(lora(two.transformer), good)
    save_file({"unrelated.weight": torch.zeros(2, 2)}, bad)
    with pytest.raises(ValueError, match=r"`loras` \S*bad.safetensors holds whole weights and no LoRA"):
        load_loras(two, [f"{good}:{bad}"])
    assert not any(getattr(part, "peft_config", None) for part in two.transformers.values())


def test_a_second_lora_that_fails_takes_the_first_along(model, tmp_path):
    good, bad = str(tmp_path / "good.safetensors"), str(tmp_path / "bad.safetensors")
    save_file(lora(model.transformer), good)
    save_file({"unrelated.weight": torch.zeros(2, 2)}, bad)
    before = [name for name, _ in model.transformer.named_modules()]
    with pytest.raises(ValueError, match=r"bad.safetensors holds whole weights and no LoRA"):
        load_loras(model, [good, bad])
    assert [name for name, _ in model.transformer.named_modules()] == before
    assert not getattr(model.transformer, "peft_config", None)
