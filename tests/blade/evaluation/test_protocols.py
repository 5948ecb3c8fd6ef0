"""Comparisons by a protocol, on a tiny pipeline: what is made, what resumes, and the row of the common table."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

import pytest

from blade.cli.evaluate import main
from blade.evaluation.plan import Evaluation, plan_evaluation
from blade.evaluation.protocol_rows import protocol_lines, protocol_result
from blade.evaluation.protocols import protocol_generation, protocol_prompts, protocol_runs
from blade.families.registry import find_comparison_protocol

PROTOCOL = "wan1.3b-480p"
FILE_LINES = 944
"""Different prompts in the file that the protocol selects from."""


def run(arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture
def command(saved_tiny_pipeline, tmp_path):
    """A protocol in a few seconds: one prompt with two seeds, two steps, a small size."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    return [
        "--protocol", PROTOCOL, "--prompts", prompts, "--seeds", "3,5", "--model", saved_tiny_pipeline, "--height", 64,
        "--width", 64, "--frames", 9, "--steps", 2, "--guidance", 1, "--device", "cpu", "--output", tmp_path / "out",
        "--measure", "psnr", "--measure", "ssim",
    ]  # fmt: skip


@pytest.fixture
def report_of(tmp_path):
    return lambda: json.loads((tmp_path / "out" / "report.json").read_text())


def cells(lines) -> dict[str, str]:
    """The cells of a Markdown table of one row, by heading."""
    headings, _, row = ([cell.strip() for cell in line.split(" | ")] for line in lines)
    assert len(headings) == len(row)
    return {heading.strip("| "): cell.strip("| ") for heading, cell in zip(headings, row)}


def records_of(folder, name):
    records = map(json.loads, (folder / "records-1-of-1.jsonl").read_text().splitlines())
    return [record for record in records if record["run"]["name"] == name]


def test_the_row_agrees_with_the_report_and_the_records(command, report_of, tmp_path, capsys):
    assert run([*command, "--run", "mine=preset,sparsity=0.5"]) == 0
    printed = capsys.readouterr().out
    folder, report = tmp_path / "out", report_of()
    assert [described["name"] for described in report["runs"]] == [
        "dense", "mine-dense-0", "mine-dense-20", "mine-dense-30",
    ]  # fmt: skip
    assert len(list((folder / "videos").rglob("*.mp4"))) == 4 * 2
    (row,) = report["protocol"]["rows"]
    sparse = report["runs"][1:]
    assert row["dense_steps"] == [0, 1, 1] and row["steps"] == 2  # 0, 20 and 30 % of two, rounded up
    assert row["videos"] == 2 and row["size"] == "64x64x9" and row["model"] == "tiny-wan"
    assert row["method"] == "preset, sparsity 0.5"
    assert row["dense_kernel"] == "native (flash)"
    for column, name in (("run_density", "run_density"), ("ssim", "ssim")):
        assert row[column] == [described["groups"]["all"][name]["mean"] for described in sparse]
    assert row["run_density"][0] < row["run_density"][1] == row["run_density"][2] < 1
    by_frame = [record["psnr_by_frame"] for record in records_of(folder, "mine-dense-0")]
    assert len(by_frame) == 2 and len(by_frame[0]) == 9
    assert row["psnr"][0] == pytest.approx(fmean(fmean(frames) for frames in by_frame))
    seconds = {
        described["name"]: median(
            record["seconds_denoising"] for record in records_of(folder, described["name"])
        )
        for described in report["runs"]
    }  # fmt: skip
    assert row["seconds_dense"] == seconds["dense"]
    assert row["seconds_sparse"] == [seconds[described["name"]] for described in sparse]
    assert row["speedup"] == pytest.approx([row["seconds_dense"] / value for value in row["seconds_sparse"]])
    assert row["lpips"] == [None] * 3

    shown = cells(printed.splitlines()[-3:])
    assert [*shown] == [
        "protocol", "model", "size", "card", "dense kernel", "method", "dense steps", "run density", "PSNR", "SSIM",
        "LPIPS", "seconds dense", "seconds sparse", "speed-up", "videos", "versions", "measured by",
    ]  # fmt: skip
    assert shown["protocol"] == (f"{PROTOCOL} (changed: model, size, steps 2, guidance 1, prompts, seeds 3,5)")
    assert shown["dense steps"] == "0 / 1 / 1 of 2" and shown["videos"] == "2" and shown["measured by"] == ""
    assert shown["PSNR"] == " / ".join(f"{value:.2f}" for value in row["psnr"])
    assert shown["LPIPS"] == "not measured"
    assert shown["card"] == report["machines"][0]["device"]
    assert "diffusers" in shown["versions"] and "torch" in shown["versions"]
    for line in printed.splitlines()[-3:]:
        assert line in (folder / "report.md").read_text()
    assert "PSNR is the mean over the frames of a video" in (folder / "report.html").read_text()


def test_a_stopped_protocol_makes_only_what_is_missing(command, report_of, tmp_path, capsys):
    from blade.evaluation import worker

    command += ["--run", "preset", "--seeds", "3"]
    records, original, made = tmp_path / "out" / "records-1-of-1.jsonl", worker.run_request, []

    def generate(model, request):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(request.seed)
        return original(model, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "run_request", generate)
        assert run(command) == 130
    before = records.read_text()
    assert len(before.splitlines()) == 2 and not (tmp_path / "out" / "report.json").exists()
    records.write_text(before + before.splitlines()[0][:40])  # as a killed process leaves it
    capsys.readouterr()
    assert run(command) == 0
    assert capsys.readouterr().out.count(", seed 3, a cat") == 2
    assert records.read_text().startswith(before) and len(records.read_text().splitlines()) == 4
    (row,) = report_of()["protocol"]["rows"]
    assert row["videos"] == 1 and row["method"] == "preset, sparsity 0.7"
    assert run(command) == 0
    assert ", seed 3, a cat" not in capsys.readouterr().out  # nothing is left to make
    assert report_of()["protocol"]["rows"] == [row]


def test_each_method_has_a_row_that_names_its_changes(command, report_of):
    runs = ["--run", "dense", "--run", "x=asa,sparsity=0.5,dense_layers=0,dense_steps=1", "--run", "y=random"]
    assert run([*command, *runs, "--seeds", "3", "--dtype", "float32", "--vae-tiling"]) == 0
    first, second = report_of()["protocol"]["rows"]
    shared = ["model", "size", "steps 2", "guidance 1", "float32", "decoded in tiles", "prompts", "seeds 3"]
    assert second["changes"] == shared
    assert first["changes"] == [*shared, "dense steps", "dense layers 0"]
    assert first["dense_steps"] == [1] and len(second["dense_steps"]) == len(second["psnr"]) == 3
    assert (first["method"], second["method"]) == ("asa, sparsity 0.5", "random, sparsity 0.7")


@pytest.fixture
def plan_as_declared(configurations, tmp_path):
    """The plan of a protocol with all its own values, but for a small model and other prompts."""
    protocol = find_comparison_protocol("wan14b-720p")
    texts = [f"prompt {number}" for number in range(20)]
    suite = replace(protocol.prompts, sha256=hashlib.sha256("\n".join(texts).encode()).hexdigest())
    protocol = replace(protocol, prompts=suite)
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    evaluation = Evaluation(
        runs=protocol_runs(protocol, ["preset"]),
        prompts=protocol_prompts(protocol, tmp_path / "prompts.txt"),
        folder=tmp_path,
        protocol=protocol,
        device="cpu",
        **protocol_generation(protocol) | {"model": str(configurations("WanPipeline"))},
    )
    return plan_evaluation(evaluation)


def test_nothing_is_changed_where_all_values_are_the_protocols(plan_as_declared):
    plan, protocol = plan_as_declared, plan_as_declared.evaluation.protocol
    assert protocol_result(plan, [], {})["changes"] == ["model"]
    plan = replace(plan, evaluation=replace(plan.evaluation, model=protocol.model))
    assert protocol_result(plan, [], {}) == {"name": "wan14b-720p", "changes": [], "rows": []}
    request = plan.requests["preset-dense-30"]
    assert request.blade_config.dense_step_count(request.steps) == 15 and request.blade_config.dense_layers == ()
    assert (request.dtype, request.size, len(plan.evaluation.prompts)) == ("bfloat16", (720, 1280, 81), 100)


def test_seconds_are_medians_and_all_cards_are_named(plan_as_declared):
    plan = plan_as_declared
    estimates = {name: {"mean": mean} for name, mean in (("run_density", 0.5), ("ssim", 0.9), ("lpips", 0.125))}
    runs = [
        {"name": run.name, "attention": "preset", "sparsity": 0.65, "groups": {"all": estimates}, "by_frame": {}}
        for run in plan.evaluation.runs
    ]
    records = {
        (run.name, *prompt.key): {
            "seconds_denoising": 4.0 if run.is_dense else 2.0,
            "machine": {"device": "H200" if prompt.seed else "H100"},
            "versions": {"torch": "2.13", "diffusers": "0.42", "blade-video": "1.0"},
            "dense_kernel": "native (cudnn)" if run.is_dense else None,
        }
        for run in plan.evaluation.runs
        for prompt in plan.evaluation.prompts
    }
    for run in plan.evaluation.runs:  # the first video of a run compiles kernels
        records[run.name, "prompt 0", 0]["seconds_denoising"] = 1000.0
    result = protocol_result(plan, runs, records)
    shown = cells(protocol_lines(result))
    assert (shown["seconds dense"], shown["seconds sparse"]) == ("4.00", "2.00 / 2.00 / 2.00")
    assert shown["speed-up"] == "2.00 / 2.00 / 2.00" and shown["videos"] == "100"
    assert (shown["card"], shown["dense kernel"]) == ("H100 + H200", "native (cudnn)")
    assert shown["dense steps"] == "0 / 10 / 15 of 50" and shown["size"] == "720x1280x81"
    assert (shown["PSNR"], shown["LPIPS"]) == ("not measured", "0.1250 / 0.1250 / 0.1250")
    assert shown["versions"] == "blade 1.0, torch 2.13, diffusers 0.42"
    del records["preset-dense-20", "prompt 7", 3]
    assert protocol_result(plan, runs, records)["rows"] == []


@pytest.mark.parametrize(
    ("name", "model", "size", "guidance", "tiling"),
    [
        ("wan1.3b-480p", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", (480, 832, 81), 5.0, False),
        ("wan14b-720p", "Wan-AI/Wan2.1-T2V-14B-Diffusers", (720, 1280, 81), 5.0, False),
        ("hunyuan-720p", "hunyuanvideo-community/HunyuanVideo", (720, 1280, 129), 6.0, True),
    ],
)
def test_the_protocols(name, model, size, guidance, tiling):
    protocol = find_comparison_protocol(name)
    assert (protocol.name, protocol.model, protocol.guidance_scale) == (name, model, guidance)
    assert (protocol.height, protocol.width, protocol.frames) == size and protocol.vae_tiling == tiling
    assert (protocol.steps, protocol.dtype, protocol.dense_layers) == (50, "bfloat16", ())
    dense, *sparse = protocol_runs(protocol, ["preset"])
    assert dense.is_dense and (dense.steps, dense.guidance) == (50, guidance)
    assert [(run.name, run.dense_steps) for run in sparse] == [
        ("preset-dense-0", 0), ("preset-dense-20", 0.2), ("preset-dense-30", 0.3),
    ]  # fmt: skip
    assert all(dense.is_reference_of(run) and run.dense_layers == () for run in sparse)


def test_prompts_are_selected_by_rule_and_checked(tmp_path):
    protocol = find_comparison_protocol(PROTOCOL)
    lines = [f"prompt {number}" for number in range(FILE_LINES)]
    expected = lines[::47][:20]
    suite = replace(protocol.prompts, sha256=hashlib.sha256("\n".join(expected).encode()).hexdigest())
    file, selection = tmp_path / "all.txt", tmp_path / "selection.txt"
    file.write_text("\n".join(lines))
    selection.write_text("\n".join(expected))
    for path in (file, selection):
        prompts = protocol_prompts(replace(protocol, prompts=suite), path)
        assert len(prompts) == 100 and list(dict.fromkeys(prompt.text for prompt in prompts)) == expected
        assert sorted({prompt.seed for prompt in prompts}) == [0, 1, 2, 3, 4]
    assert len(protocol_prompts(protocol, file, "0")) == FILE_LINES  # not the published file: all that it holds
    assert suite.select(lines[1:]) is None


@pytest.mark.parametrize(
    ("name", "pipeline", "message"),
    [
        ("hunyuan-720p", "WanPipeline", "must be of the family of `protocol` hunyuan-720p"),
        (PROTOCOL, "CogVideoXPipeline", f"must be of the family of `protocol` {PROTOCOL}"),
        (PROTOCOL, "WanImageToVideoPipeline", "is a WanImageToVideoPipeline, which needs an image"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(name, pipeline, message, configurations, tmp_path, capsys):
    prompts, model = tmp_path / "prompts.txt", configurations(pipeline)
    prompts.write_text("a cat\n")
    assert run(["--protocol", name, "--prompts", prompts, "--model", model, "--output", tmp_path / "out"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_page_has_the_tables_heading_and_every_protocol():
    page = (Path(__file__).parents[3] / "docs" / "protocols.md").read_text(encoding="utf-8")
    heading, rule = protocol_lines({"name": PROTOCOL, "rows": []})
    assert f"{heading}\n{rule}\n| wan1.3b-480p | " in page
    for name in ("wan1.3b-480p", "wan14b-720p", "hunyuan-720p"):
        protocol = find_comparison_protocol(name)
        size = f"{protocol.height}x{protocol.width}x{protocol.frames}"
        assert f"| {name} | {protocol.model} | {size} |" in page and protocol.prompts.address in page
