"""A measure that a module of somebody else's declares is seen everywhere without another edit."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace

import pytest

from blade.cli.evaluate import main
from blade.evaluation.pages import write_report
from blade.evaluation.plan import plan_evaluation
from blade.evaluation.report import make_report, notes, tables
from blade.evaluation.runs import parse_run
from blade.evaluation.videos import lay_out_videos
from blade.evaluation.worker import evaluate_videos
from blade.metrics import registry
from blade.metrics.measures import Measure

MODULE = '''
from statistics import fmean

from blade.metrics.estimates import Values
from blade.metrics.measures import Measure, Panel
from blade.metrics.registry import register_measure

register_measure(
    Measure(
        name="brightness",
        heading="Brightness",
        detail="mean of the pixels",
        format="{:.4f}",
        better="down",
        compute=lambda sample: float(sample.video.mean()),
        by_frame=lambda sample: sample.video.mean((1, 2, 3)).tolist(),
        note="Brightness of {reference} stands beside it.",
        progress="brightness {:.4f}".format,
        panel=Panel(label="mean brightness", low=0, high=1),
    )
)


def spread(videos):
    """Each video's distance from the mean brightness of the reference run."""
    if videos.reference is None:
        return None
    own, reference = videos.recorded("brightness"), videos.reference.recorded("brightness")
    if not own or not reference:
        return None
    middle = fmean(reference.values())
    return Values({video: abs(value - middle) for video, value in own.items()})


register_measure(Measure(name="spread", heading="spread", per="set", compute=spread, brief=False))
'''


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The module above, imported; afterwards its measures are gone."""
    monkeypatch.setattr(registry, "MEASURES", dict(registry.measures()))
    (tmp_path / "bright_videos.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "bright_videos", raising=False)
    yield importlib.import_module("bright_videos")
    sys.modules.pop("bright_videos", None)


def options(evaluation):
    size = [
        "--height",
        "64",
        "--width",
        "64",
        "--frames",
        "9",
        "--steps",
        "2",
        "--guidance-scale",
        "1",
        "--device",
        "cpu",
    ]
    return ["--model", evaluation.model, "--output", str(evaluation.folder), *size]


def test_it_is_measured_and_reported_by_default(evaluation, added):
    runs = (*evaluation.runs, parse_run("local=local,steps=2,guidance=1"))
    plan, said = plan_evaluation(replace(evaluation, runs=runs, prompts=evaluation.prompts[:1])), []
    evaluate_videos(plan, on_video=lambda progress: said.append(str(progress)))
    (path,) = evaluation.folder.glob("records-*.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(0 < record["brightness"] < 1 and len(record["brightness_by_frame"]) == 9 for record in records)
    assert all(f"brightness {record['brightness']:.4f}, " in line for record, line in zip(records, said))

    report = make_report(plan, "x")
    sparse, dense, local = report["runs"]
    (value,) = [record["brightness"] for record in records if record["run"]["name"] == "asa"]
    assert sparse["groups"]["single"]["brightness"]["mean"] == value
    assert sparse["by_frame"]["single"]["brightness"] and dense["by_frame"]["single"].keys() == {"brightness"}
    assert sparse["groups"]["single"]["spread"]["videos"] == 1 and "spread" not in dense["groups"]["single"]
    assert {"brightness", "spread"} <= local["differences"]["single"].keys()
    assert list(dense["differences"]["single"])[-1] == "brightness"

    found = {table.title: table.headings for table in tables(report)}
    assert found["Single-object prompts"][-3:] == ["seconds", "Brightness", "spread"]
    assert found["Single-object prompts: differences to asa"][-2:] == ["Brightness", "spread"]
    (brief, *_) = tables(report, brief=True)
    assert brief.headings[-2:] == ["seconds", "Brightness"]
    assert "Brightness: mean of the pixels." in notes(report)[0]
    assert "Brightness of dense stands beside it." in notes(report)

    paths = {path.name: path for path in write_report(report, evaluation.folder, lay_out_videos(plan))}
    assert json.loads(paths["report.json"].read_text())["runs"] == report["runs"]
    assert "| Brightness |" in paths["report.md"].read_text()
    page = paths["report.html"].read_text()
    assert '<th scope="col">Brightness</th>' in page and "Brightness of dense stands beside it." in page
    mean = f"{sparse['groups']['single']['brightness']['mean']:.4f}"
    assert f"<td>{mean}</td>" in page


def test_it_is_drawn(evaluation, added, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    from blade.evaluation.plot import plot_report

    labels, ends = [], []
    monkeypatch.setattr(axes.Axes, "set_ylabel", lambda self, label: labels.append(label))
    set_ylim = axes.Axes.set_ylim
    monkeypatch.setattr(
        axes.Axes,
        "set_ylim",
        lambda self, *values, **options: (ends.append(values), set_ylim(self, *values, **options)),
    )
    estimate = {"mean": 0.5, "low": 0.4, "high": 0.6, "videos": 2}
    run = {"name": "asa", "attention": "asa", "student": None, "steps": 2, "guidance": 1.0}
    run["groups"] = {"all": {name: estimate for name in ("run_density", "psnr", "ssim", "brightness")}}
    assert plot_report({"prompts": {"all": 2}, "runs": [run]}).startswith(b"\x89PNG")
    assert labels == ["PSNR to dense in dB", "SSIM to dense", "mean brightness (lower is better)"] and ends[-1] == (
        0,
        1,
    )


def test_the_command_measures_it_alone(evaluation, added, capsys):
    arguments = [
        "--shapes",
        "--single",
        "1",
        "--two",
        "0",
        "--run",
        "asa",
        "--run",
        "dense",
        "--measure",
        "brightness",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *options(evaluation)])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "brightness 0." in shown and "Brightness" in shown and "PSNR" not in shown
    report = json.loads((evaluation.folder / "report.json").read_text())
    asa, dense = report["runs"]
    assert asa["groups"]["single"].keys() == {"layer_density", "run_density", "seconds_denoising", "brightness"}
    assert dense["differences"]["single"].keys() == {"seconds_denoising", "brightness"}
    assert report["unscored"] == 0 and "without_lpips" not in report
    assert not (evaluation.folder / "references").exists(), "nothing is compared with dense"
    records = [json.loads(line) for path in evaluation.folder.glob("records-*") for line in path.open()]
    assert len(records) == 2 and not {"psnr", "motion", "basics", "features"} & {*records[0], *records[1]}


def test_the_command_lists_it_beside_the_others(evaluation, added, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--shapes", "--measure", "psnr", "--measure", "beauty", *options(evaluation)])
    assert ended.value.code == 2 and not evaluation.folder.exists()
    error = capsys.readouterr().err
    assert "`measures` must be of layer_density, run_density, psnr, " in error
    assert ", brightness, spread, got 'beauty'." in error


def test_older_records_lack_it(evaluation, added, monkeypatch):
    plan = plan_evaluation(replace(evaluation, prompts=evaluation.prompts[:1], measures=("motion",)))
    evaluate_videos(plan)
    report = make_report(replace(plan, evaluation=replace(plan.evaluation, measures=None)), "x")
    names = {name for run in report["runs"] for name in run["groups"]["single"]}
    assert names == {"layer_density", "run_density", "motion", "seconds_denoising"}


def test_a_field_that_every_record_has_is_refused_before_the_first_video(evaluation, added, monkeypatch):
    monkeypatch.setattr("blade.evaluation.worker.load_model", lambda *given, **options: pytest.fail("loaded"))
    registry.register_measure(Measure(name="seed", heading="seed", compute=lambda sample: 0))
    plan = plan_evaluation(replace(evaluation, prompts=evaluation.prompts[:1], measures=("seed",)))
    with pytest.raises(ValueError, match="`measures` must not write `seed`, which every record has"):
        evaluate_videos(plan)
