"""A configuration says what is wrong with it."""

import pytest
from omegaconf import OmegaConf

from blade import BladeConfig
from blade.distillation.config import AttentionConfig, load_config, recipe_names, student_attention

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
        (["run.updates=many"], "`run.updates` is not right: Value 'many'"),
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
