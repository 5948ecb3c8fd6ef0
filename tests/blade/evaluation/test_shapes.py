from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from blade.cli.evaluate import main
from blade.config import BladeConfig
from blade.evaluation import shapes
from blade.evaluation.shapes import ShapesEvaluation, evaluate_shapes, model_fingerprint, read_records
from blade.evaluation.shapes_report import make_report
from blade.evaluation.shapes_settings import ATTENTION, RunSettings, held_out_prompts, parse_run
from blade.moving_shapes.captions import HELD_OUT, parse_caption

DENSE = RunSettings(name="dense", steps=2, guidance=1.0)
SPARSE = RunSettings(name="asa", steps=2, guidance=1.0, attention="asa", sparsity=0.5, dense_steps=1, dense_layers=())


def records_of(evaluation: ShapesEvaluation) -> dict:
    return read_records(evaluation, model_fingerprint(evaluation.model))


@pytest.fixture
def evaluation(saved_tiny_pipeline: Path, tmp_path: Path) -> ShapesEvaluation:
    return ShapesEvaluation(
        runs=(SPARSE, DENSE),
        folder=tmp_path / "evaluation",
        model=str(saved_tiny_pipeline),
        single=1,
        two=1,
        size={"height": 64, "width": 64, "frames": 9},
        device="cpu",
    )


def test_run_settings_are_read():
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
    assert parse_run("plain") == RunSettings(name="plain")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "`name`"),
        ("a b=steps=3", "`name`"),
        ("x=steps=0", "`steps`"),
        ("x=steps=many", "`steps` cannot be 'many'"),
        ("x=speed=3", "with keys steps, guidance"),
        ("x=steps", "with keys steps, guidance"),
        ("x=attention=flash", "`attention` must be one of dense, asa"),
        ("x=attention=asa,sparsity=1", "`sparsity`"),
        ("x=sparsity=0.5", '`attention` is "dense"'),
        ("x=guidance=-1", "`guidance`"),
    ],
)
def test_bad_run_settings_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_run(text)


def test_every_kind_of_attention_has_its_configuration():
    preset = BladeConfig.from_preset("shapes")
    configs = {name: RunSettings(name=name, attention=name).blade_config(preset) for name in ATTENTION}
    assert configs.pop("dense") is None
    assert configs["asa"] == preset
    assert configs["asa-gt"].pooled_tokens == "all"
    assert configs["asa-dropped"].pooled_tokens == "dropped"
    assert {name: config.asa.selector for name, config in configs.items()} == {
        "asa": "sampled",
        "asa-gt": "sampled",
        "asa-dropped": "sampled",
        "mean-pooled": "mean-pooled",
        "random": "random",
        "local": "local",
    }
    changed = SPARSE.blade_config(preset)
    assert (changed.sparsity, changed.dense_steps, changed.dense_layers) == (0.5, 1, ())


def test_prompts_are_fixed_held_out_and_extend_each_other():
    prompts = held_out_prompts(64, 64)
    assert prompts == held_out_prompts(64, 64)
    assert set(held_out_prompts(5, 3)) < set(prompts)
    assert len({prompt.key for prompt in prompts}) == 128
    for prompt in prompts:
        objects = parse_caption(prompt.text).objects
        assert len(objects) == prompt.objects
        assert all(described.combination in HELD_OUT for described in objects)


def test_videos_are_measured_once(evaluation, monkeypatch):
    seen = []
    evaluate_shapes(evaluation, on_video=seen.append)
    records = records_of(evaluation)
    assert [progress.done for progress in seen] == [1, 2, 3, 4] and seen[-1].seconds_left == 0
    assert set(records) == {(run, objects, 0) for run in ("asa", "dense") for objects in (1, 2)}
    for (name, objects, _), record in records.items():
        assert len(record["attributes"]) == objects
        assert 0 <= record["realism_error"] <= 1
        if name == "dense":
            assert record["run_density"] == 1 and record["psnr"] is None
        else:
            assert 0 < record["layer_density"] <= 0.5 < record["run_density"] < 1
            assert 5 < record["psnr"] < 100 and 0 < record["ssim"] < 1 and record["motion_ratio"] > 0

    monkeypatch.setattr(shapes, "load_pipeline", None)
    evaluate_shapes(evaluation)
    assert records_of(evaluation) == records
    report = make_report(evaluation, "blade-evaluate")
    assert report["missing"] == 0
    assert [run["name"] for run in report["runs"]] == ["asa", "dense"]


def test_a_killed_process_loses_one_video(evaluation):
    evaluation = replace(evaluation, two=0)
    evaluate_shapes(evaluation)
    (path,) = evaluation.folder.glob("records-*.jsonl")
    whole = path.read_bytes()
    first, second = whole.splitlines(keepends=True)
    path.write_bytes(first + second[: len(second) // 2])
    for reference in evaluation.folder.rglob("*.npz"):
        reference.unlink()
    made = []
    evaluate_shapes(evaluation, on_video=made.append)
    assert [progress.record["run"]["name"] for progress in made] == ["asa"]
    assert made[0].record["psnr"] == json.loads(second)["psnr"]
    assert len(path.read_bytes().splitlines()) == 2


def test_shards_share_the_work(evaluation):
    shards = [replace(evaluation, shard=(number, 2), single=2, runs=(DENSE,)) for number in (1, 2)]
    assert {prompt for shard in shards for prompt in shard.own_prompts} == set(shards[0].prompts)
    for shard in shards:
        evaluate_shapes(shard)
    assert len(list(evaluation.folder.glob("records-*.jsonl"))) == 2
    assert len(records_of(shards[0])) == 3


def test_other_settings_under_the_same_name_are_refused(evaluation):
    evaluation = replace(evaluation, two=0, runs=(DENSE,))
    evaluate_shapes(evaluation)
    with pytest.raises(ValueError, match="with another `run`"):
        evaluate_shapes(replace(evaluation, runs=(replace(DENSE, steps=3),)))
    with pytest.raises(ValueError, match="with another `fingerprint`"):
        read_records(evaluation, "0123456789abcdef")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": ()}, "at least one run"),
        ({"runs": (DENSE, DENSE)}, "different names"),
        ({"shard": (3, 2)}, "`shard`"),
    ],
)
def test_bad_evaluations_are_refused(evaluation, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(evaluation, **changes)


def test_command_reports(saved_tiny_pipeline, tmp_path, capsys):
    arguments = ["--shapes", "--model", str(saved_tiny_pipeline), "--output", str(tmp_path / "out")]
    arguments += ["--single", "1", "--two", "0", "--height", "64", "--width", "64", "--frames", "9"]
    arguments += ["--run", "dense=steps=2,guidance=1"]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "1/1 dense, seed 0" in shown and "single-object prompts" in shown
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["missing"] == 0 and report["runs"][0]["groups"]["single"]["basics"]["videos"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`--shapes`"),
        (["--shapes", "--shard", "two"], "`shard`"),
        (["--shapes", "--run", "x=steps=0"], "`steps`"),
        (["--shapes", "--single", "0", "--two", "0"], "not both 0"),
        (["--shapes", "--model", "no/such/model"], "no/such/model"),
    ],
)
def test_command_ends_with_one_line_for_bad_input(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not list(tmp_path.iterdir())
