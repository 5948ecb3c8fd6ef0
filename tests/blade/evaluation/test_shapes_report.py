from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from blade.evaluation.shapes import ShapesEvaluation
from blade.evaluation.shapes_report import bootstrap, make_report, markdown, table, write_report
from blade.evaluation.shapes_settings import RunSettings, held_out_prompts
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


def synthetic_record(run: RunSettings, prompt, quality: float) -> dict:
    """A record in which share `quality` of the prompts, by their seeds, show everything."""
    right = prompt.seed < quality * (SINGLE if prompt.objects == 1 else TWO)
    captions = parse_caption(prompt.text).objects
    named = [[n for n in ("size", "fill", "speed") if getattr(caption, n)] for caption in captions]
    dense = run.is_dense
    return {
        "run": run.to_dict(),
        "prompt": prompt.text,
        "objects": prompt.objects,
        "seed": prompt.seed,
        "fingerprint": None,
        "attributes": [dict.fromkeys(["colour", "shape", "direction", *names], right) for names in named],
        "background": None if parse_caption(prompt.text).background is None else right,
        "basics": right,
        "all_attributes": right,
        "realism_error": 1.1 - quality,
        "motion": 1.0,
        "psnr": None if dense else 20 + 10 * quality,
        "ssim": None if dense else quality,
        "motion_ratio": None if dense else quality,
        "layer_density": None if dense else 1 - run.sparsity,
        "run_density": 1.0 if dense else 1 - 0.8 * run.sparsity,
        "seconds_denoising": 3.0,
        "dtype": "float32",
        "machine": {"system": "Linux", "device": "cpu", "threads": 1},
        "versions": {"torch": "2.13.0"},
        "height": 96,
        "width": 96,
        "frames": 33,
    }


def quality_of(run: RunSettings) -> float:
    return 1.0 if run.is_dense else 1 - run.sparsity * (0.9 if run.attention in ("random", "local") else 0.3)


@pytest.fixture
def evaluation(tmp_path: Path) -> ShapesEvaluation:
    folder = tmp_path / "evaluation"
    folder.mkdir()
    prompts = held_out_prompts(SINGLE, TWO)
    for shard in (1, 2):
        records = [
            synthetic_record(run, prompt, quality_of(run)) for run in RUNS for prompt in prompts[shard - 1 :: 2]
        ]
        (folder / f"records-{shard}-of-2.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return ShapesEvaluation(runs=RUNS, folder=folder, model="some/model", single=SINGLE, two=TWO)


def test_report_averages_over_all_shards(evaluation):
    report = make_report(evaluation, "blade-evaluate --shapes")
    assert report["missing"] == 0 and report["machines"] == [
        {"system": "Linux", "device": "cpu", "threads": 1, "dtype": "float32"}
    ]
    dense, *sparse = report["runs"]
    assert dense["groups"]["single"]["basics"] == {"mean": 1, "low": 1, "high": 1, "videos": SINGLE}
    assert "psnr" not in dense["groups"]["single"]
    worst = next(run for run in sparse if run["name"] == "random-0.9")
    share = sum(seed < quality_of(RUNS[9]) * SINGLE for seed in range(SINGLE)) / SINGLE
    assert worst["groups"]["single"]["colour"]["mean"] == share
    assert worst["groups"]["two"]["run_density"]["mean"] == pytest.approx(0.28)


def test_missing_videos_are_counted(evaluation):
    more = make_report(
        ShapesEvaluation(runs=RUNS, folder=evaluation.folder, model="some/model", single=SINGLE, two=TWO + 1), "x"
    )
    assert more["missing"] == len(RUNS)


def test_tables_and_files(evaluation):
    report = make_report(evaluation, "blade-evaluate --shapes")
    headings, rows = table(report, "single")
    assert len(rows) == len(RUNS) and all(len(row) == len(headings) for row in rows)
    first = dict(zip(headings, rows[0]))
    assert first["run"] == "dense" and first["PSNR"] == "" and first["basics"] == "100.0% (100.0% to 100.0%)"
    page = markdown(report)
    assert "## Two-object prompts" in page and "blade-evaluate --shapes" in page
    paths = write_report(report, evaluation.folder)
    assert json.loads(paths[0].read_text()) == report
    assert paths[1].read_text() == page


def test_plot_is_a_picture(evaluation):
    pytest.importorskip("matplotlib")
    from blade.evaluation.shapes_plot import plot_report

    report = make_report(evaluation, "blade-evaluate --shapes")
    assert plot_report(report).startswith(b"\x89PNG")
    report["runs"] = report["runs"][:1]
    assert plot_report(report).startswith(b"\x89PNG")


def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    estimate = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])
