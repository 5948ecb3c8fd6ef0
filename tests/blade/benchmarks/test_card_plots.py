"""Plots of a card's report, of a synthetic report with plausible values: nothing of it was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from blade.benchmarks import attention_report
from blade.benchmarks.card import quality
from blade.benchmarks.card.plots import PLOTS, draw_plots
from blade.benchmarks.card.report import markdown, report_files, tables, write_report
from blade.benchmarks.card.results import attention_speedups, merged_attention, quality_table, video_speedups
from blade.benchmarks.layers import model_shapes

DENSE = {
    "flash": (380.0, 0.52), "flash, deterministic": (372.0, 0.40), "efficient": (185.0, 0.42), "cudnn": (660.0, 0.72),
    "flash-attn 3": (690.0, 0.78), "flash-attn 4": (705.0, 0.80),
}  # fmt: skip
"""Forward TFLOP/s, and the backward pass's as a share of it."""

SPARSE = {"triton": (505.0, 0.62), "triton, int8": (610.0, None), "flex": (330.0, 0.45), "SpargeAttn": (560.0, None)}
"""The same per kept pair, at density 0.5."""


def synthetic_case(shape: Any, density: float) -> dict[str, Any]:
    work = 4 * shape.head_dim * shape.heads * shape.tokens**2 / 1e9
    small = (1 - 4000 / shape.tokens) * (shape.head_dim / 128) ** 0.4
    times: dict[str, dict[str, float]] = {}
    for name, (speed, backward) in DENSE.items():
        forward = work / speed
        times[name] = {"forward": forward, "training": forward * (1 + 2.5 / backward)}
    selection = 0.02 * work / 660
    for name, (speed, backward) in SPARSE.items():
        forward = work * density / (speed * small * (0.80 + 0.4 * density)) + 0.03
        times[name] = {"forward": forward}
        if backward is not None:
            times[name] |= {"training": forward * (1 + 2.5 / backward)}
        if name != "SpargeAttn":
            times[name] |= {"whole": forward + selection}
    times["selection"] = {"selection": selection}
    return {
        "tokens": shape.tokens, "heads": shape.heads, "head_dim": shape.head_dim, "batch": 1, "model": shape.model,
        "grid": None, "density": density, "realised_density": density + 0.001, "auto": "triton", "sparse": [*SPARSE],
        "ms": times, "peak_mib": {}, "error": dict.fromkeys(times, 0.002), "missing": {},
    }  # fmt: skip


def step(name: str, part: str, result: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "part": part, "state": "done", "seconds": 9.0, "result": result}


def synthetic_generation() -> dict[str, Any]:
    runs = [
        {"run": run, "steps": steps, "passes": passes, "measured_passes": 6, "encoding_seconds": 0.02 * texts,
         "transformer_seconds": passes * ms / 1e3, "transformer_factor": 1.0, "factor": 1.0, "limit": 2.0,
         "seconds": 0.02 * texts + passes * ms / 1e3 + 1.9}
        for run, steps, passes, ms, texts in (
            ("dense, guidance", 50, 100, 620.0, 2), ("sparse, guidance", 50, 100, 330.0, 2),
            ("sparse", 8, 8, 330.0, 1), ("sparse", 4, 4, 330.0, 1),
        )
    ]  # fmt: skip
    return {
        "settings": {"model": "owner/A-Model-1.3B", "sparsity": 0.8}, "width": 832, "height": 480, "frames": 81,
        "steps": 50, "tokens": 32760, "runs": runs, "pass_ms": {"dense": 620.0, "sparse": 330.0}, "bound_ms": 320.0,
        "preset_pass_ms": {"0.5": 500.0, "0.7": 412.0, "0.75": 390.0, "0.8": 368.0, "0.9": 325.0},
        "parts_ms": {"attention": 100.0, "other": 230.0}, "dense_attention_ms": {"native": 11.0}, "missing": {},
        "decoding_seconds": 1.9, "encoding_seconds": 0.02, "peak_gib": {"dense": 9.0},
    }  # fmt: skip


def synthetic_report(names: tuple[str, ...] = ("wan-1.3b", "cogvideox-1.5", "wan-14b", "hunyuan-video")) -> Any:
    """Make a report with plausible values for a card; nothing of it was measured."""
    settings = {
        "blocks": "random", "passes": ["forward", "training", "selection", "whole"], "device": "cuda",
        "dtype": "bfloat16", "block_size": 128, "repeats": 5,
    }  # fmt: skip
    machine = {"device": "SYNTHETIC, not measured", "threads": 16}
    shared = {"settings": settings, "machine": machine, "matrix_peak_tflops": 780.0}
    shared["absent"] = {"flashinfer": "`flashinfer-python` is not installed"}
    steps = [
        step(f"{name}, {density}", "attention", shared | {"cases": [synthetic_case(model_shapes()[name], density)]})
        for name in names
        for density in (0.2, 0.1, 0.5, 0.3)
    ]
    return {
        "date": "2026-01-01", "command": "blade-bench gpu", "minutes": 9.0, "machine": machine,
        "versions": {"torch": "2.13"}, "settings": {},
        "steps": [*steps, step("generation", "generation", synthetic_generation())],
    }  # fmt: skip


ROOT = Path(__file__).resolve().parents[3]


def figures(monkeypatch: pytest.MonkeyPatch, report: Any) -> dict[str, Any]:
    """Draw a report, and return the figures by name of the plot."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    saved, save = [], figure.savefig

    def keep(self, *args, **options):
        saved.append(self)
        return save(self, *args, **options)

    monkeypatch.setattr(figure, "savefig", keep)
    drawn, note = draw_plots(report)
    assert note is None and all(image.startswith(b"\x89PNG") for image in drawn.values())
    return dict(zip(drawn, saved, strict=True))


def lines_of(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.lines if not str(line.get_label()).startswith("_")}


def test_operations_per_second_are_those_of_kept_pairs(monkeypatch):
    """By hand: 4 D B H S^2 operations forward, 2.5 times as many backward, of which sparse ones do a share."""
    panels = figures(monkeypatch, report := synthetic_report())["tflops"].axes
    assert len(panels) == 2 * 4
    case = merged_attention(report, "random")["cases"][0]
    assert case["density"] == 0.1
    work = 4 * 128 * 12 * 32760**2 / 1e9
    forward, backward = (lines_of(panels[place]) for place in (0, 4))
    assert {*forward} == {*SPARSE, *(f"{name}, dense" for name in DENSE), "matrix product, measured"}
    assert "triton, int8" not in backward and "SpargeAttn" not in backward
    times = case["ms"]["triton"]
    assert forward["triton"].get_xydata()[0] == pytest.approx([0.101, 0.101 * work / times["forward"]])
    taken = times["training"] - times["forward"]
    assert backward["triton"].get_ydata()[0] == pytest.approx(2.5 * 0.101 * work / taken)
    assert forward["cudnn, dense"].get_ydata()[0] == pytest.approx(660)
    assert backward["cudnn, dense"].get_ydata()[0] == pytest.approx(0.72 * 660)
    assert "TFLOP/s" in panels[0].get_ylabel() and "density" in panels[4].get_xlabel()


def test_quality_is_said_to_be_another_models(monkeypatch):
    figure = figures(monkeypatch, synthetic_report())["quality"]
    assert "with another model, the bundled one" in figure.get_suptitle()
    layer, video = figure.axes
    assert "of the bundled model" in layer.get_ylabel()
    (first, *_), labels = layer.get_legend_handles_labels()
    assert labels[0] == "Wan-1.3B 480p, 32,760 tokens" and len(labels) == 4
    assert list(first.lines[0].get_ydata()) == sorted(first.lines[0].get_ydata())  # quality rises with density
    assert video.get_legend_handles_labels()[1] == ["A-Model-1.3B, 81 frames of 832x480, 50 steps"]


def ticks_of(axis: Any) -> list[Any]:
    low, high = sorted(axis.get_view_interval())
    return [label for label, at in zip(axis.get_ticklabels(), axis.get_ticklocs()) if low <= at <= high]


def test_no_text_of_a_plot_covers_another_or_is_cut(monkeypatch):
    FigureCanvasAgg = pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg
    for report in (synthetic_report(), synthetic_report(("wan-1.3b",))):
        for name, figure in figures(monkeypatch, report).items():
            renderer = FigureCanvasAgg(figure).get_renderer()
            texts = [axes.title for axes in figure.axes]
            texts += [axis.label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
            texts += [text for legend in figure.legends for text in legend.get_texts()]
            texts += [text for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]
            texts += [label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in ticks_of(axis)]
            shown = [text for text in (*texts, figure._suptitle) if text.get_visible() and text.get_text()]
            boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown]
            for index, (text, box) in enumerate(boxes):
                assert box.x0 >= -1 and box.y0 >= -1, (name, text)
                assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, (name, text)
                for other, second in boxes[index + 1 :]:
                    assert not box.padded(-1).overlaps(second.padded(-1)), (name, text, other)


def test_speed_is_compared_at_the_protocol_of_the_quality():
    """A fifth of 50 steps dense: 20 of 100 passes of 620 ms, the others of 412 ms at density 0.3."""
    report = synthetic_report()
    ((_, speeds),) = video_speedups(report).items()
    assert speeds[0.3] == pytest.approx((62 + 1.94) / (20 * 0.62 + 80 * 0.412 + 1.94))
    case = merged_attention(report, "random")["cases"][0]
    fastest = min(ms["forward"] for name, ms in case["ms"].items() if name in DENSE)
    attention = attention_speedups(report)["Wan-1.3B 480p, 32,760 tokens"]
    assert attention[0.1] == pytest.approx(fastest / case["ms"]["triton"]["whole"])  # not of 8 bits
    table = quality_table(report)
    assert [row[0] for row in table.rows] == ["0.1", "0.2", "0.25", "0.3", "0.5"]
    assert table.rows[3][1] == "36.3 (33.8 to 38.8)" and table.rows[2][2] == ""
    assert table.title in [other.title for other in tables(report)]
    report["steps"] = []
    assert quality_table(report) is None


def test_the_quality_is_that_of_the_results(monkeypatch):
    """In the package, as it ships no results."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import quality_by_density

    assert json.loads(quality.PATH.read_text()) == quality_by_density.gather()
    assert quality.sparsities() == (0.5, 0.7, 0.75, 0.8, 0.9)
    assert quality.psnr_at(0.2)["mean"] == pytest.approx(33.28, abs=0.01)
    assert quality.psnr_at(0.4) is None


def test_without_matplotlib_a_sentence_says_so(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    paths = report_files(tmp_path, "A card", "now")
    assert {*paths} == {"json", "md", *PLOTS}
    written = write_report(synthetic_report(), paths)
    assert written == [paths["json"], paths["md"]] == sorted(tmp_path.iterdir(), key=lambda path: path.suffix)
    assert "No plots: matplotlib is not installed (pip install 'blade-video[plots]')." in paths["md"].read_text()


def test_what_was_not_timed_is_not_plotted():
    pytest.importorskip("matplotlib")
    report = synthetic_report()
    report["steps"] = [item for item in report["steps"] if item["part"] == "generation"]
    drawn, note = draw_plots(report)
    assert {*drawn} == {"quality"} and note.startswith("Not plotted, as nothing was timed: speed of attention against")
    page = markdown(report, {"quality": "a.png"}, note)
    assert "![Speed against quality](a.png)" in page and note in page


def test_small_machines_are_plotted_in_smaller_units(monkeypatch):
    report = synthetic_report(("wan-1.3b",))
    for item in report["steps"][:-1]:
        for case in item["result"]["cases"]:
            case["ms"] = {name: {key: 1e4 * ms for key, ms in of.items()} for name, of in case["ms"].items()}
    panels = figures(monkeypatch, report)["tflops"].axes
    assert panels[0].get_ylabel() == "forward, GFLOP/s"
    assert attention_report.tflops(report["steps"][0]["result"]["cases"][0], "triton", "selection") is None


def test_what_was_tried_apart_stands_beside_the_others():
    """Two steps of one size and density, with the same mask: the times of dense attention are those of the first."""
    report = synthetic_report(("wan-1.3b",))
    result = json.loads(json.dumps(report["steps"][0]["result"]))
    (case,) = result["cases"]
    case["ms"] = {"cute": {"forward": 1.0, "whole": 1.1}, "cudnn": {"forward": 99.0}}
    case |= {"sparse": ["cute"], "missing": {"other": "why"}, "error": {}}
    report["steps"].insert(4, step("cute", "attention", result))
    cases = merged_attention(report, "random")["cases"]
    assert [case["density"] for case in cases] == [0.1, 0.2, 0.3, 0.5]
    joined = cases[1]
    assert joined["sparse"] == [*SPARSE, "cute"] and joined["missing"] == {"other": "why"}
    assert joined["ms"]["cute"]["whole"] == 1.1 and joined["ms"]["cudnn"]["forward"] < 99
    assert attention_speedups(report)["Wan-1.3B 480p, 32,760 tokens"][0.2] > 5  # the fastest of all
