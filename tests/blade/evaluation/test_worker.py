from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from blade.attention.config import BladeConfig
from blade.attention.pattern_table import uniform_table
from blade.attention.patterns import HeadPattern
from blade.common.files import OutputError
from blade.evaluation import worker as evaluation_worker
from blade.evaluation.plan import Evaluation, plan_evaluation
from blade.evaluation.prompts import held_out_prompts, prompts_with_seeds
from blade.evaluation.records import read_records
from blade.evaluation.runs import RunSettings, parse_run
from blade.evaluation.worker import evaluate_videos
from blade.media.video import read_mp4


def evaluate(evaluation: Evaluation) -> dict:
    """Make all videos, and return their records."""
    plan = plan_evaluation(evaluation)
    evaluate_videos(plan)
    return read_records(plan)


@pytest.mark.slow
def test_videos_are_measured_once(evaluation, monkeypatch):
    seen, plan = [], plan_evaluation(evaluation)
    evaluate_videos(plan, on_video=seen.append)
    records = read_records(plan)
    assert [progress.done for progress in seen] == [1, 2, 3, 4] and seen[-1].seconds_left == 0
    keys = [prompt.key for prompt in evaluation.prompts]
    assert set(records) == {(run, *key) for run in ("asa", "dense") for key in keys}
    for (name, text, _), record in records.items():
        assert len(record["attributes"]) == text.count("moving")
        assert 0 <= record["realism_error"] <= 1 and record["motion"] > 0
        if name == "dense":
            assert record["run_density"] == 1 and record["blade_config"] is None
            assert record["psnr"] is None and record["psnr_by_frame"] is None
        else:
            assert 0 < record["layer_density"] <= 0.5 < record["run_density"] < 1
            assert 5 < record["psnr"] < 100 and 0 < record["ssim"] < 1 and record["motion_ratio"] > 0
            assert len(record["psnr_by_frame"]) == len(record["ssim_by_frame"]) == 9
            assert min(record["psnr_by_frame"]) < record["psnr"] < max(record["psnr_by_frame"])
            assert sum(record["ssim_by_frame"]) / 9 == pytest.approx(record["ssim"])
            assert record["blade_config"]["sparsity"] == 0.5
    monkeypatch.setattr(evaluation_worker, "load_model", None)
    evaluate_videos(plan)
    assert read_records(plan) == records


@pytest.mark.slow
def test_every_video_is_written_once_for_each_run(evaluation):
    evaluate(evaluation)
    for run in evaluation.runs:
        paths = sorted((evaluation.folder / "videos" / run.name).iterdir())
        assert [path.name for path in paths] == sorted(f"{prompt.stem}.mp4" for prompt in evaluation.prompts)
        assert read_mp4(paths[0]).shape == (9, 3, 64, 64)


def test_prompts_of_a_list_are_made_with_every_seed(evaluation):
    prompts = prompts_with_seeds(["a red ball moving left", "something else"], (3, 5))
    dense = replace(evaluation, prompts=prompts, runs=evaluation.runs[1:])
    records = evaluate(dense)
    assert {(text, seed) for _, text, seed in records} == {prompt.key for prompt in prompts}
    for (_, text, _), record in records.items():
        assert ("basics" in record) == (text == "a red ball moving left")
    assert len({record["motion"] for record in records.values()}) == 4


def test_models_of_other_worlds_are_not_scored(evaluation):
    records = evaluate(replace(evaluation, of_shapes=False, prompts=evaluation.prompts[:1]))
    record = records["asa", *evaluation.prompts[0].key]
    assert not {"basics", "realism_error"} & set(record)
    measured = {key for measure in evaluation.chosen_measures for key in measure.recorders}
    own = {*evaluation_worker.OWN_FIELDS, *evaluation_worker.COSTS, *evaluation_worker.KEPT_FIELDS}
    assert set(record) - measured == own | {"height", "width", "frames", "fps"}, "a measure could write over a field"


def test_runs_with_loras_are_compared_with_their_own_dense_run(evaluation, tmp_path):
    """And are told from the same run with other weights, or with another strength."""
    shape = (32, 32)  # of the tiny pipeline's queries
    path = tmp_path / "style.safetensors"
    save_file({"transformer.blocks.0.attn1.to_q.diff": torch.randn(shape)}, path)
    runs = [replace(run, lora=f"{path}=0.5", name=f"{run.name}-style") for run in evaluation.runs]
    evaluation = replace(evaluation, runs=(*evaluation.runs, *runs), prompts=evaluation.prompts[:1])
    plan = plan_evaluation(evaluation)
    assert plan.evaluation.reference_of(plan.evaluation.runs[2]) == plan.evaluation.runs[3]
    records = evaluate(evaluation)
    by_run = {run: record for (run, *_), record in records.items()}
    assert by_run["asa-style"]["psnr"] > 5 and by_run["dense-style"]["motion"] != by_run["dense"]["motion"]
    assert by_run["dense-style"]["run"]["lora"] == f"{path}=0.5" and by_run["dense"]["lora_fingerprint"] is None
    moved = path.rename(tmp_path / "moved.safetensors")
    elsewhere = [replace(run, lora=f"{moved}=0.5") for run in runs]
    assert evaluate(replace(evaluation, runs=tuple(elsewhere))).keys() < records.keys()
    for other in (f"{moved}=1", f"{moved}"):
        with pytest.raises(ValueError, match=r"holds run `asa-style` with another `lora_fingerprint`"):
            evaluate(replace(evaluation, runs=(replace(elsewhere[0], lora=other),)))
    with pytest.raises(ValueError, match=r"run `x`: `loras` must name one source for a model of one transformer"):
        plan_evaluation(replace(evaluation, runs=(parse_run(f"x=lora={moved}:{moved}"),)))


def test_head_patterns_are_evaluated(evaluation, patterns_folder):
    found = parse_run(f"found={patterns_folder},steps=2,guidance=1")
    records = evaluate(replace(evaluation, runs=(*evaluation.runs, found), prompts=evaluation.prompts[:1]))
    record = records["found", *evaluation.prompts[0].key]
    assert record["blade_config"]["patterns"]["patterns"][0]["kind"] == "diagonal"
    assert record["run"]["config"] == str(patterns_folder)
    assert record["layer_density"] < 1 and 5 < record["psnr"] < 100


def test_another_configuration_in_the_same_folder_is_refused(evaluation, patterns_folder, tmp_path):
    found = parse_run(f"found={patterns_folder},steps=2,guidance=1")
    evaluation = replace(evaluation, runs=(found,), prompts=evaluation.prompts[:1])
    records = evaluate(evaluation)
    moved = replace(found, config=str(patterns_folder.rename(tmp_path / "elsewhere")))
    assert evaluate(replace(evaluation, runs=(moved,))) == records
    table = uniform_table(HeadPattern(kind="diagonal", frames=1.0), 2, 2, block_size=32)
    BladeConfig(attention="patterns", patterns=table).save_pretrained(moved.config)
    with pytest.raises(ValueError, match="run `found` with another `blade_config`; take another name"):
        evaluate(replace(evaluation, runs=(moved,)))


def test_a_configuration_recorded_before_a_field_came_is_the_same(evaluation):
    plan = plan_evaluation(replace(evaluation, prompts=evaluation.prompts[:1]))
    evaluate_videos(plan)
    records, (path,) = read_records(plan), evaluation.folder.glob("records-*.jsonl")
    older = records["asa", *evaluation.prompts[0].key]
    del older["blade_config"]["adapt_patterns"]
    del older["run"]["selector"]
    path.write_text(json.dumps(older) + "\n")
    assert list(read_records(plan).values()) == [older]
    older["blade_config"]["sparsity"] = 0.25
    path.write_text(json.dumps(older) + "\n")
    with pytest.raises(ValueError, match="another `blade_config`"):
        read_records(plan)


@pytest.mark.slow
def test_a_killed_process_loses_one_video(evaluation):
    plan = plan_evaluation(replace(evaluation, prompts=evaluation.prompts[:1]))
    evaluate_videos(plan)
    (path,) = evaluation.folder.glob("records-*.jsonl")
    whole = path.read_bytes()
    first, second = whole.splitlines(keepends=True)
    path.write_bytes(first + second[: len(second) // 2])
    for reference in evaluation.folder.rglob("*.npz"):
        reference.unlink()
    made = []
    evaluate_videos(plan, on_video=made.append)
    assert [progress.record["run"]["name"] for progress in made] == ["asa"]
    assert made[0].record["psnr"] == json.loads(second)["psnr"]
    assert len(path.read_bytes().splitlines()) == 2


def test_a_run_that_fails_stops_no_other(evaluation, monkeypatch, caplog):
    generate = evaluation_worker.run_request

    def sometimes(model, request):
        if request.blade_config is not None and request.prompt == evaluation.prompts[0].text:
            raise RuntimeError("out of luck\nsomewhere")
        return generate(model, request)

    monkeypatch.setattr(evaluation_worker, "run_request", sometimes)
    plan = plan_evaluation(evaluation)
    failed = evaluate_videos(plan)
    assert [(name, str(error)) for name, error in failed.items()] == [("asa", "out of luck\nsomewhere")]
    assert "run `asa` failed, and its remaining videos are left out: out of luck" in caplog.text
    assert {name for name, *_ in read_records(plan)} == {"dense"} and len(read_records(plan)) == 2
    monkeypatch.setattr(evaluation_worker, "run_request", generate)
    assert evaluate_videos(plan) == {} and len(read_records(plan)) == 4


def test_a_full_disk_stops_all_runs(evaluation, monkeypatch):
    def full(files):
        raise OutputError("the disk is full")

    monkeypatch.setattr(evaluation_worker, "write_files", full)
    with pytest.raises(OutputError, match="the disk is full"):
        evaluate_videos(plan_evaluation(evaluation))


def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(evaluation, monkeypatch):
    monkeypatch.setattr(evaluation_worker, "load_model", lambda *given, **options: pytest.fail("loaded"))
    evaluation.folder.touch()
    with pytest.raises(OutputError, match="cannot be written"):
        evaluate_videos(plan_evaluation(evaluation))


def test_what_a_failed_run_worked_on_is_let_go(evaluation, monkeypatch):
    """On a GPU, its latents would take the memory that the next run needs."""

    class Latents:
        pass

    def fails(model, request):
        latents = Latents()
        seen.append(weakref.ref(latents))
        raise MemoryError("too little memory")

    seen = []
    monkeypatch.setattr(evaluation_worker, "run_request", fails)
    failed = evaluate_videos(plan_evaluation(evaluation))
    assert set(failed) == {"asa", "dense"} and [one() for one in seen] == [None, None]


@pytest.mark.slow
def test_shards_share_the_work(evaluation):
    dense = replace(evaluation, runs=evaluation.runs[1:], prompts=held_out_prompts(2, 1))
    shards = [replace(dense, shard=(number, 2)) for number in (1, 2)]
    assert {prompt for shard in shards for prompt in shard.own_prompts} == set(dense.prompts)
    assert [len(evaluate(shard)) for shard in shards] == [2, 3]
    assert len(list(evaluation.folder.glob("records-*.jsonl"))) == 2


def test_other_settings_under_the_same_name_are_refused(evaluation):
    evaluation = replace(evaluation, runs=evaluation.runs[1:], prompts=evaluation.prompts[:1])
    evaluate(evaluation)
    with pytest.raises(ValueError, match="with another `steps`, 2 instead of 3"):
        evaluate(replace(evaluation, runs=(RunSettings(name="dense", steps=3, guidance=1.0),)))
    with pytest.raises(ValueError, match="with another `height`, 64 instead of 80"):
        evaluate(replace(evaluation, height=80))
    plan = replace(plan_evaluation(evaluation), fingerprint="0123456789abcdef")
    with pytest.raises(ValueError, match="with another `fingerprint`"):
        read_records(plan)


def refuse_to_load(*arguments, **options):
    pytest.fail("the model was loaded first")


@pytest.mark.parametrize("name", ["x" * 300, "videos"])
def test_what_cannot_be_written_is_found_before_the_model_is_loaded(evaluation, monkeypatch, name):
    monkeypatch.setattr(evaluation_worker, "load_model", refuse_to_load)
    folder = evaluation.folder
    message = "cannot be written: File name too long"
    if name == "videos":
        folder.mkdir()
        (folder / "videos").touch()
        message = "cannot be written: Not a directory"
    else:
        folder /= name
    plan = plan_evaluation(replace(evaluation, folder=folder))
    with pytest.raises(OutputError, match=message):
        evaluate_videos(plan)


def test_too_little_room_is_found_before_the_model_is_loaded(evaluation, monkeypatch):
    monkeypatch.setattr(evaluation_worker, "load_model", refuse_to_load)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with pytest.raises(OutputError, match=r"has 20 kB free on its disk, but an evaluation of 4 video\(s\) needs"):
        evaluate_videos(plan_evaluation(evaluation))
    assert not evaluation.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 4, 12])
def test_an_evaluation_that_filled_the_disk_resumes_equally(evaluation, small_disk, left):
    """Whether it is the reference, the video or the record that has no room."""
    disk = small_disk(2048)
    filled = []

    def fill(progress):
        filled.append(progress)
        if len(filled) == 2:
            (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 1024 * left))

    plan = plan_evaluation(replace(evaluation, folder=disk / "evaluation"))
    with pytest.raises(OutputError, match=r"^No space left: the disk of .* is full\.$"):
        evaluate_videos(plan, fill)
    assert len(read_records(plan)) >= 2
    assert not list(disk.rglob(".*.tmp"))
    (disk / "other").unlink()
    evaluate_videos(plan)
    whole = evaluate(evaluation)
    resumed = read_records(plan)
    assert resumed.keys() == whole.keys()
    for key, record in whole.items():
        assert resumed[key]["psnr"] == record["psnr"] and resumed[key]["all_attributes"] == record["all_attributes"]
