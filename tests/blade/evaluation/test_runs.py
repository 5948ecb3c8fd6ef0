from __future__ import annotations

from dataclasses import replace

import pytest

from blade.attention.config import AdaptiveConfig, BladeConfig
from blade.evaluation.runs import RunSettings, attention_kinds, parse_run


def shapes_preset() -> BladeConfig:
    return BladeConfig.from_preset("shapes")


def no_preset() -> BladeConfig:
    raise AssertionError("the preset was asked for")


def test_keys_and_values_are_read():
    text = "asa-70=steps=8,guidance=1,attention=asa-gt,sparsity=0.7,dense_steps=0.25,dense_layers=0-1+4"
    assert parse_run(text) == RunSettings(
        name="asa-70",
        steps=8,
        guidance=1.0,
        attention="asa-gt",
        sparsity=0.7,
        dense_steps=0.25,
        dense_layers=(0, 1, 4),
    )


@pytest.mark.parametrize(
    ("text", "run"),
    [
        ("dense", RunSettings(name="dense")),
        ("preset", RunSettings(name="preset", attention="preset")),
        ("slow=dense,steps=50", RunSettings(name="slow", steps=50, attention="dense")),
        ("best=preset,sparsity=0.5", RunSettings(name="best", attention="preset", sparsity=0.5)),
        ("mine=some/folder", RunSettings(name="mine", config="some/folder")),
        ("mine=owner/name,dense_steps=2", RunSettings(name="mine", config="owner/name", dense_steps=2)),
        ("mine=steps=4,config=a=b", RunSettings(name="mine", steps=4, config="a=b")),
        ("few=steps=4", RunSettings(name="few", steps=4, attention="dense")),
        ("near=selector=local", RunSettings(name="near", attention="local")),
        ("near=asa,selector=local", RunSettings(name="near", attention="local")),
        ("paper=selector=sampled", RunSettings(name="paper", attention="asa")),
        ("x=asa-gt,selector=random", RunSettings(name="x", attention="asa-gt", selector="random")),
        ("x=folder,selector=local", RunSettings(name="x", config="folder", selector="local")),
        ("few=preset=few-step", RunSettings(name="few", attention="preset", preset="few-step")),
        ("few=asa,preset=few-step", RunSettings(name="few", attention="asa", preset="few-step")),
        (
            "few=student=a/b,preset=few-step",
            RunSettings(name="few", attention="preset", student="a/b", preset="few-step"),
        ),
        ("x=asa,lora=a/b=0.5", RunSettings(name="x", attention="asa", lora="a/b=0.5")),
        ("x=lora=high:low=0.8:1", RunSettings(name="x", attention="dense", lora="high:low=0.8:1")),
    ],
)
def test_short_forms_are_read(text, run):
    assert parse_run(text) == run


def test_defaults_fill_in_what_a_run_leaves_open():
    run = parse_run("x=asa,steps=4", steps=30, guidance=3.0)
    assert (run.steps, run.guidance) == (4, 3.0)
    assert parse_run("dense", steps=30).steps == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "NAME=dense"),
        ("plain", "NAME=dense"),
        ("x=", "NAME=dense"),
        ("a b=steps=3", "`name`"),
        ("..=dense", "`name`"),
        ("nul=dense", "`name` must be a folder's name on every system"),
        ("Com1.x=dense", "`name` must be a folder's name on every system"),
        ("a.=dense", "`name` must be a folder's name on every system"),
        (f"{'n' * 101}=dense", "of at most 100 bytes"),
        ("x=steps=0", "`steps`"),
        ("x=steps=many", "`steps` cannot be 'many'"),
        ("x=speed=3", "with keys steps, guidance"),
        ("x=dense,steps", "with keys steps, guidance"),
        ("x=asa,", "got ''"),
        ("x=asa,attention=dense", "`attention` once"),
        ("x=attention=flash", '`attention` must be one of "dense", "preset"'),
        ("x=folder,attention=asa", "`attention` must not be given with `config`"),
        ("x=attention=asa,sparsity=1", "`sparsity`"),
        ("x=sparsity=0.5", '`attention` is "dense"'),
        ("x=guidance=-1", "`guidance`"),
        ("x=selector=best", '`selector` must be one of "sampled", "mean-pooled"'),
        ("x=dense,selector=local", '`selector` must not be given where `attention` is "dense"'),
        ("x=random,selector=local", "`selector` must not be given where `attention` is one, got 'random'"),
        ("x=preset=fast", '`preset` must be one of "training-free", "few-step", "student", got \'fast\''),
        ("x=dense,preset=few-step", "`preset` must not be given with `attention` \"dense\", got 'few-step'"),
        ("x=folder,preset=few-step", "`preset` must not be given with `config`, got 'few-step'"),
        ("x=noise_kept=0.5", "`noise_kept` must not be given without `student`"),
        ("x=asa,lora=high:low=much", "`loras` must be sources, each with =STRENGTH or not, got 'high:low=much'"),
    ],
)
def test_bad_runs_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_run(text)


def test_every_kind_of_attention_has_its_configuration():
    configs = {name: RunSettings(name=name, attention=name).blade_config(shapes_preset) for name in attention_kinds()}
    assert configs.pop("dense") is None
    preset = shapes_preset()
    assert configs["preset"] == preset
    paper = replace(preset.asa, statistic="max", probe_keys="drawn", value_weighting=False, budget="row")
    assert configs["asa-dropped"] == replace(preset, asa=paper) != preset
    assert configs["asa"] == replace(preset, pooled_tokens="none", asa=paper)
    assert configs["asa-gt"].pooled_tokens == "all"
    assert configs["asa-dropped"].pooled_tokens == "dropped"
    assert {name: config.asa.selector for name, config in configs.items() if name != "preset"} == {
        "asa": "sampled",
        "asa-gt": "sampled",
        "asa-dropped": "sampled",
        "mean-pooled": "mean-pooled",
        "random": "random",
        "local": "local",
    }
    changed = RunSettings(name="x", attention="asa", sparsity=0.25, dense_steps=1, dense_layers=())
    config = changed.blade_config(shapes_preset)
    assert (config.sparsity, config.dense_steps, config.dense_layers) == (0.25, 1, ())


def test_a_selector_takes_the_place_of_the_configurations(tmp_path):
    def asa(text):
        return parse_run(text).blade_config(shapes_preset)

    assert asa("x=selector=local") == asa("x=local") and asa("x=local").pooled_tokens == "none"
    changed = asa("x=asa-gt,selector=random,sparsity=0.7")
    assert (changed.asa.selector, changed.pooled_tokens, changed.sparsity) == ("random", "all", 0.7)
    assert asa("x=preset,selector=local") == replace(
        shapes_preset(), asa=replace(shapes_preset().asa, selector="local")
    )
    saved = BladeConfig(sparsity=0.3, pooled_tokens="dropped", asa=AdaptiveConfig(probe_tokens=3))
    saved.save_pretrained(tmp_path)
    assert asa(f"x={tmp_path},selector=local") == replace(saved, asa=replace(saved.asa, selector="local"))


def test_a_saved_configuration_is_applied_as_it_is_but_for_what_the_run_says(patterns_folder):
    config = parse_run(f"x={patterns_folder},dense_steps=1").blade_config(no_preset)
    saved = BladeConfig.from_pretrained(patterns_folder)
    assert config.patterns == saved.patterns and config.patterns is not None
    assert (config.dense_steps, config.sparsity) == (1, saved.sparsity)


def test_a_saved_dense_configuration_is_dense(tmp_path):
    BladeConfig(attention="dense").save_pretrained(tmp_path)
    assert parse_run(f"x={tmp_path}").blade_config(no_preset) is None


def test_a_student_brings_its_attention_steps_and_guidance(tmp_path):
    BladeConfig(sparsity=0.7, kind="student").save_pretrained(tmp_path)
    run = parse_run(f"joint=student={tmp_path}", steps=None)
    assert (run.student, run.attention, run.steps) == (str(tmp_path), None, None)
    assert run.blade_config(lambda: BladeConfig()).sparsity == 0.7
    assert run.noise_kept is None and parse_run(f"joint=student={tmp_path},noise_kept=0.5").noise_kept == 0.5
    dense = parse_run(f"dense=student={tmp_path},attention=dense")
    assert dense.is_dense and dense.blade_config(lambda: BladeConfig()) is None
    assert not parse_run("teacher=dense").is_reference_of(run)
    other = parse_run(f"other=student={tmp_path},attention=asa,sparsity=0.9")
    assert other.blade_config(lambda: BladeConfig()).sparsity == 0.9
    assert dense.is_reference_of(other)
