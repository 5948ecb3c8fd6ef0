from __future__ import annotations

import json
from dataclasses import replace

import pytest

from blade.evaluation.plan import Evaluation, EvaluationPlan, plan_evaluation
from blade.evaluation.prompts import held_out_prompts, prompts_with_seeds
from blade.evaluation.report import facts, make_report, notes, tables
from blade.evaluation.runs import RunSettings
from blade.evaluation.worker import evaluate_videos
from blade.moving_shapes.captions import parse_caption

SINGLE, TWO = 8, 4
RUNS = (
    RunSettings(name="dense"),
    *(
        RunSettings(name=f"{attention}-{sparsity}", attention=attention, sparsity=sparsity)
        for attention in ("asa", "asa-gt", "random", "local")
        for sparsity in (0.5, 0.7, 0.9)
    ),
)


def synthetic_record(plan: EvaluationPlan, run: RunSettings, prompt, quality: float) -> dict:
    """A record in which share `quality` of the prompts, by their seeds, show everything."""
    right = prompt.seed < quality * (SINGLE if prompt.group == "single" else TWO)
    captions = parse_caption(prompt.text).objects
    named = [[n for n in ("size", "fill", "speed") if getattr(caption, n)] for caption in captions]
    dense = run.is_dense
    return {
        "run": run.to_dict(),
        "prompt": prompt.text,
        "seed": prompt.seed,
        "fingerprint": plan.fingerprint,
        "blade_config": None if run.is_dense else plan.requests[run.name].blade_config.to_dict(),
        "attributes": [dict.fromkeys(["colour", "shape", "direction", *names], right) for names in named],
        "background": None if parse_caption(prompt.text).background is None else right,
        "basics": right,
        "all_attributes": right,
        "realism_error": 1.1 - quality,
        "motion": 1.0,
        "psnr": None if dense else 20 + 10 * quality + prompt.seed,
        "ssim": None if dense else quality,
        "lpips": None,
        "psnr_by_frame": None if dense else [20.0 + prompt.seed, 10.0],
        "ssim_by_frame": None if dense else [quality, quality / 2],
        "motion_ratio": None if dense else quality,
        "layer_density": None if dense else 1 - run.sparsity,
        "run_density": 1.0 if dense else 1 - 0.8 * run.sparsity,
        "seconds_denoising": 3.0,
        "dtype": "float32",
        "machine": {"system": "Linux", "device": "cpu", "threads": 1},
        "versions": {"torch": "2.13.0"},
        **plan.size,
    }


def quality_of(run: RunSettings) -> float:
    return 1.0 if run.is_dense else 1 - run.sparsity * (0.9 if run.attention in ("random", "local") else 0.3)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> EvaluationPlan:
    folder = tmp_path_factory.mktemp("evaluation")
    plan = plan_evaluation(Evaluation(runs=RUNS, folder=folder, prompts=held_out_prompts(SINGLE, TWO), device="cpu"))
    for shard in (1, 2):
        records = [
            synthetic_record(plan, run, prompt, quality_of(run))
            for run in plan.evaluation.runs
            for prompt in plan.evaluation.prompts[shard - 1 :: 2]
        ]
        (folder / f"records-{shard}-of-2.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return plan


def test_report_averages_over_all_shards(plan):
    report = make_report(plan, "blade-evaluate --shapes")
    assert report["missing"] == 0 and report["prompts"] == {"single": SINGLE, "two": TWO, "all": SINGLE + TWO}
    assert report["machines"] == [{"system": "Linux", "device": "cpu", "threads": 1, "dtype": "float32"}]
    dense, *sparse = report["runs"]
    basics = dense["groups"]["single"]["basics"]  # all are right, of which the interval says that there are only 8
    assert basics == pytest.approx({"mean": 1, "low": 0.6756, "high": 1, "videos": SINGLE}, abs=1e-4)
    assert dense["groups"]["two"]["basics"] == {"mean": 1, "low": None, "high": None, "videos": TWO}
    assert "psnr" not in dense["groups"]["single"]
    worst = next(run for run in sparse if run["name"] == "random-0.9")
    share = sum(seed < quality_of(RUNS[9]) * SINGLE for seed in range(SINGLE)) / SINGLE
    assert worst["groups"]["single"]["colour"]["mean"] == share
    assert worst["groups"]["two"]["run_density"]["mean"] == pytest.approx(0.28)
    assert worst["blade_config"]["asa"]["selector"] == "random" and dense["blade_config"] is None


def test_report_tells_how_far_each_run_is_from_the_baseline(plan):
    report = make_report(plan, "x")
    assert report["baseline"] == "asa-0.5"
    runs = {run["name"]: run for run in report["runs"]}
    assert runs["asa-0.5"]["differences"] == {}
    assert "psnr" not in runs["dense"]["differences"]["single"]
    # 0.85 and 0.55 are the qualities: by prompt, PSNR is 3 dB less whatever the prompt's own, so that it is certain
    apart = runs["random-0.5"]["differences"]["single"]
    assert apart["psnr"] == pytest.approx({"mean": -3.0, "low": -3.0, "high": -3.0, "videos": SINGLE})
    assert apart["realism_error"]["mean"] == pytest.approx(0.3)
    # 7 of 8 right, and 5 of 8
    assert apart["basics"]["mean"] == pytest.approx(-2 / 8)
    assert -0.6 < apart["basics"]["low"] < -2 / 8 < apart["basics"]["high"] < 0.2
    other = make_report(replace(plan, evaluation=replace(plan.evaluation, baseline="dense")), "x")
    assert other["baseline"] == "dense"
    assert {run["name"]: run for run in other["runs"]}["random-0.5"]["differences"]["single"]["basics"]["mean"] == (
        pytest.approx(-3 / 8)
    )


def test_missing_videos_are_counted(plan):
    prompts = held_out_prompts(SINGLE, TWO + 1)
    more = make_report(replace(plan, evaluation=replace(plan.evaluation, prompts=prompts)), "x")
    assert more["missing"] == len(RUNS)


def test_report_averages_each_frame(plan):
    dense, sparse, *_ = make_report(plan, "x")["runs"]
    assert dense["by_frame"] == {}
    assert sparse["by_frame"]["two"]["psnr"] == [20 + (TWO - 1) / 2, 10]
    assert sparse["by_frame"]["single"]["ssim"] == pytest.approx([0.85, 0.425])


def test_tables(plan):
    report = make_report(plan, "x")
    found = tables(report)
    assert [table.title for table in found] == [
        "Single-object prompts",
        "Single-object prompts: differences to asa-0.5",
        "Two-object prompts",
        "Two-object prompts: differences to asa-0.5",
        "All prompts",
        "All prompts: differences to asa-0.5",
    ]
    assert all(len(row) == len(table.headings) for table in found for row in table.rows)
    assert [len(table.rows) for table in found] == [len(RUNS), len(RUNS) - 1] * 3
    first = dict(zip(found[0].headings, found[0].rows[0]))
    assert first["run"] == "dense" and first["PSNR"] == "" and first["basics"] == "100.0% (67.6% to 100.0%)"
    assert dict(zip(found[2].headings, found[2].rows[0]))["basics"] == "100.0%"
    apart = next(row for row in found[1].rows if row[0] == "random-0.5")
    assert dict(zip(found[1].headings, apart))["PSNR"] == "-3.00 (-3.00 to -3.00)"
    titles = [table.title for table in tables(report, brief=True)]
    assert titles == ["Single-object prompts", "Two-object prompts", "All prompts"]


def test_words_around_the_tables(plan):
    report = make_report(plan, "x")
    counts = "8 of single-object prompts, 4 of two-object prompts, 12 of all prompts"
    assert facts(report)[0].endswith(f"Videos of each run: {counts}.")
    assert any("less that of asa-0.5" in note for note in notes(report))
    assert "LPIPS is missing" in notes(report)[-1]
    report["runs"] = [report["runs"][0] | {"differences": {}}]
    assert not any("Differences" in note for note in notes(report | {"without_lpips": False}))


def test_videos_of_other_prompts_are_counted_as_not_scored(evaluation):
    prompts = prompts_with_seeds(["a red ball moving left", "something else"], (0,))
    plan = plan_evaluation(replace(evaluation, prompts=prompts, runs=evaluation.runs[1:]))
    evaluate_videos(plan)
    report = make_report(plan, "x")
    assert report["unscored"] == 1 and report["runs"][0]["groups"]["all"]["basics"]["videos"] == 1
    assert any(note.startswith("Not scored") and note.endswith(": 1 videos.") for note in notes(report))


def test_report_of_head_patterns_tells_their_shares(plan, patterns_folder, saved_tiny_pipeline):
    evaluation = replace(
        plan.evaluation,
        runs=(RunSettings(name="found", config=str(patterns_folder)),),
        prompts=prompts_with_seeds(["a cat"], (0,)),
        model=str(saved_tiny_pipeline),
        height=64,
        width=64,
        frames=9,
    )
    (run,) = make_report(plan_evaluation(evaluation), "x")["runs"]
    assert (run["attention"], run["sparsity"], run["blade_config"]["patterns"]) == ("patterns", None, {"diagonal": 1})


def test_plot_is_a_picture(plan):
    pytest.importorskip("matplotlib")
    from blade.evaluation.plot import plot_report

    report = make_report(plan, "x")
    assert plot_report(report).startswith(b"\x89PNG")
    for run in report["runs"]:
        for estimates in run["groups"].values():
            estimates.pop("realism_error")
    assert plot_report(report).startswith(b"\x89PNG")
    report["runs"] = report["runs"][:1]
    assert plot_report(report) is None


def test_selectors_have_their_colours(plan, later_selector, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    from blade.evaluation.plot import plot_report

    drawn = {}
    monkeypatch.setattr(
        axes.Axes, "errorbar", lambda self, x, y, label, color, **style: drawn.update({label.split(",")[0]: color})
    )
    report = make_report(plan, "x")
    sparse = next(run for run in report["runs"] if run["attention"] == "asa")
    names = ("later", "random", "local", "mean-pooled", "asa", "unknown")
    report["runs"] = [{**sparse, "name": name, "attention": name} for name in names]
    plot_report(report)
    assert drawn == {
        "later": "#123456", "random": "#7F7F7F", "local": "#E69F00", "mean-pooled": "#CC79A7", "asa": "#0072B2",
        "unknown": "C5",
    }  # fmt: skip


def test_selectors_are_explained(plan):
    report = make_report(plan, "x")
    words = [note for note in notes(report) if note.startswith("Key blocks are scored")]
    assert words == [
        "Key blocks are scored: random by chance alone (a control, which looks at neither queries nor keys); local by "
        "nearness in the video (a control, which looks at neither queries nor keys)."
    ]
    assert not any("scored:" in note for note in notes(report | {"runs": report["runs"][:7]}))  # dense, asa and asa-gt


def test_students_are_points_of_their_own(plan, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    from blade.evaluation.plot import plot_report

    drawn = {}
    monkeypatch.setattr(axes.Axes, "errorbar", lambda self, x, y, label, **style: drawn.update({label: len(x)}))
    report = make_report(plan, "x")
    sparse = next(run for run in report["runs"] if run["attention"] not in ("dense", "config", "patterns"))
    report["runs"] = [{**sparse, "name": name, "student": name} for name in ("one", "two")]
    plot_report(report)
    assert sorted(drawn.values()) == [1, 1] and all(label.startswith(("one, ", "two, ")) for label in drawn)
    report["runs"] = [{**run, "student": None} for run in report["runs"]]
    drawn.clear()
    plot_report(report)
    assert list(drawn.values()) == [2]
