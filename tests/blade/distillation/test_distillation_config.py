"""A configuration says what is wrong with it."""

import json

import pytest
from omegaconf import OmegaConf

from blade import BladeConfig
from blade.distillation.config import AttentionConfig, student_attention
from blade.distillation.recipes import load_config, recipe_names

PRESET = BladeConfig.from_preset("shapes", "student")


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_can_be_read(name):
    config = load_config(name)
    assert config.run.updates > 0
    assert config.to_dict() == load_config(name, ["run.seed=0"]).to_dict()
    preset = student_attention(config.attention, PRESET)
    assert preset.kind == "student" and preset.sparsity >= 0.79


def test_settings_stand_over_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model: somebody/else\nrun:\n  updates: 7\n")
    config = load_config(path, ["run.updates=9", "trajectory.steps=[8]", "generator.huber=1e-2"])
    assert (config.model, config.run.updates, config.trajectory.steps) == ("somebody/else", 9, [8])
    assert config.generator.huber == 0.01


def test_what_is_written_is_read_again(tmp_path):
    config = load_config("shapes", ["attention.sparsity=0.9", "trajectory.times=[[900.0,500.0]]"])
    OmegaConf.save(config.to_dict(), tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["run.updats=3"], "`run.updats` is not right: Key 'updats' not in 'RunConfig'"),
        (["run.updates=many"], "`run.updates` must be an integer of at most 64 bits, got 'many'"),
        (["prompts=false"], "`prompts` must be a string or None, got False"),
        (["output=1e3"], "`output` must be a string, got 1000.0"),
        (["weights.full=1"], "`weights.full` must be True or False, got 1"),
        (["weights.targets=[to_q,2.5]"], "`weights.targets` must be a list of strings, got ['to_q', 2.5]"),
        (["run.updates=0"], "`run.updates` must be an integer of at least 1, got 0"),
        (["run.updates"], "must be `key=value`, got 'run.updates'"),
        (["generator.loss=cubic"], '`generator.loss` must be one of "squared", "huber", got \'cubic\''),
        (["trajectory.noise_kept=2"], "`trajectory.noise_kept` must be in"),
        (["trajectory.sampling_noise_kept=-1"], "`trajectory.sampling_noise_kept` must be in"),
        (["attention.method=flash"], "`attention.method` must be one of"),
        (["weights.ema_decay=1.0"], "`weights.ema_decay` must be in"),
        (["run.precision=fp8"], "`run.precision` must be one of"),
        (["fake.learning_rate=0"], "`fake.learning_rate` must be above 0"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError) as error:
        load_config("shapes", settings)
    assert message in str(error.value)


def test_neither_a_file_nor_a_recipe(tmp_path):
    with pytest.raises(ValueError, match=r"must be a YAML file, or one of the recipes .*shapes.*, got nowhere"):
        load_config("nowhere")
    (tmp_path / "broken.yaml").write_text("run: [")
    with pytest.raises(ValueError, match=r"broken.yaml is not right"):
        load_config(tmp_path / "broken.yaml")


def test_the_students_attention(tmp_path):
    assert student_attention(AttentionConfig(), PRESET) == PRESET
    assert student_attention(AttentionConfig(method="dense"), PRESET) is None
    sparser = student_attention(AttentionConfig(method="asa", sparsity=0.9, dense_layers="0"), PRESET)
    assert (sparser.sparsity, sparser.pooled_tokens, sparser.dense_layers) == (0.9, "none", (0,))
    named = student_attention(AttentionConfig(config="wan2.1-t2v-1.3b"), PRESET)
    assert named == BladeConfig.from_preset("wan2.1-t2v-1.3b", "student")
    BladeConfig(sparsity=0.3).save_pretrained(tmp_path)
    found = student_attention(AttentionConfig(config=str(tmp_path)), PRESET)
    assert (found.sparsity, found.kind) == (0.3, "student")


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:TOKEN}",
        "x ${oc.env:TOKEN,none} y",
        "${oc.decode:${oc.env:TOKEN}}",
        "${oc.env:${run.seed}}",
        "${${model}:TOKEN}",
        "${own_resolver:1}",
        r"\${oc.env:TOKEN}",
    ],
)
@pytest.mark.parametrize("in_file", [True, False], ids=["file", "setting"])
def test_no_resolver_is_asked(value, in_file, tmp_path, monkeypatch):
    """What it reads would go into the files that `push_student` uploads."""
    monkeypatch.setenv("TOKEN", "hf_secret")
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps({"embeddings": value} if in_file else {}))
    with pytest.raises(ValueError, match=r"`embeddings` must name nothing but fields") as caught:
        load_config(path, [] if in_file else [f"embeddings={value}"])
    assert "hf_secret" not in str(caught.value)


def test_no_resolver_is_asked_deep_inside(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "7")
    (tmp_path / "mine.yaml").write_text("trajectory:\n  steps: ['${oc.env:TOKEN}']\n")
    with pytest.raises(ValueError, match=r"`trajectory.steps` must name nothing but fields"):
        load_config(tmp_path / "mine.yaml")


def test_a_name_that_is_put_together_is_not_resolved(monkeypatch):
    monkeypatch.setenv("TOKEN", "hf_secret")
    config = load_config(None, ["model=$", "embeddings=${model}{oc.env:TOKEN}"])
    assert config.embeddings == "${oc.env:TOKEN}"


def test_fields_may_name_others(tmp_path):
    (tmp_path / "mine.yaml").write_text("run:\n  updates: 7\nvalidation:\n  every: ${run.updates}\n")
    config = load_config(tmp_path / "mine.yaml", ["output=outputs/${model}-${run.updates}"])
    assert (config.validation.every, config.output) == (7, "outputs/bundled-7")
