import importlib.util
import json
from dataclasses import replace

import pytest
import torch

import blade.benchmarks.candidates as candidates
from blade import TokenGrid
from blade.benchmarks import attention as attention_benchmark
from blade.benchmarks.attention import AttentionBenchmark, run_attention_benchmark
from blade.benchmarks.attention_report import tables, write_report
from blade.benchmarks.layers import AttentionShape
from blade.cli.bench import main

TINY = AttentionBenchmark(
    shapes=(AttentionShape(tokens=44, head_dim=32), AttentionShape(tokens=80, head_dim=32, model="Tiny")),
    densities=(1.0, 0.3),
    block_size=8,
    repeats=2,
    threads=1,
)
ALL_PASSES = replace(TINY, passes=("forward", "training", "selection", "whole"))
ARGUMENTS = ["attention", "--tokens", "44", "--heads", "1", "--head-dim", "8", "--block-size", "8", "--repeats", "1"]


@pytest.fixture(autouse=True)
def no_compiling(monkeypatch):
    """FlexAttention takes seconds to compile, and is tested elsewhere."""
    monkeypatch.setattr("blade_kernels.block_sparse.flex.missing_cpp_toolchain", lambda: "this is a test")


def test_reports_every_size_and_density():
    threads, seen = torch.get_num_threads(), []
    report = run_attention_benchmark(
        TINY, command="the command", on_case=lambda so_far: seen.append(so_far["cases"][-1])
    )
    assert torch.get_num_threads() == threads and report["machine"]["threads"] == 1
    assert seen == report["cases"] and json.loads(json.dumps(report))["cases"] == report["cases"]
    found = [(case["tokens"], case["density"], round(case["realised_density"], 3)) for case in report["cases"]]
    # 44 tokens are 6 blocks, of which 0.3 is 2; the last block has 4 tokens
    assert found[:1] == [(44, 1.0, 1.0)] and found[2:] == [(80, 1.0, 1.0), (80, 0.3, 0.3)]
    assert 2 * 4 / 44 < found[1][2] <= 2 * 8 / 44
    for case in report["cases"]:
        assert case["sparse"] == ["cpu"] and case["auto"] == "cpu"
        assert case["ms"]["flash"]["forward"] > 0 and set(case["ms"]["cpu"]) == {"drawn"}
        assert "this is a test" in case["missing"]["flex"] and "cudnn" in case["missing"]


def test_every_pass_is_timed_where_there_is_one():
    case = run_attention_benchmark(ALL_PASSES)["cases"][1]
    assert set(case["ms"]["cpu"]) == {"forward", "training", "whole"}
    assert set(case["ms"]["math"]) == {"forward", "training"} and set(case["ms"]["selection"]) == {"selection"}
    assert case["error"]["cpu"] < 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off")
def test_the_triton_kernels_are_a_contestant_where_they_can_run():
    """Here the interpreter runs them."""
    shape = AttentionShape(tokens=70, heads=1, head_dim=64)
    settings = replace(ALL_PASSES, shapes=(shape,), densities=(0.5,), block_size=32, repeats=1)
    (case,) = run_attention_benchmark(settings)["cases"]
    assert set(case["ms"]["triton"]) == {"forward", "training", "whole"}
    assert case["error"]["triton"] < 1e-5


def test_a_wrong_output_is_no_result(monkeypatch):
    monkeypatch.setattr(candidates, "block_sparse_attention", lambda q, *_, **__: torch.zeros_like(q))
    with pytest.raises(RuntimeError, match="the output of `cpu` is wrong: relative error 1"):
        run_attention_benchmark(TINY)


def test_writes_json_tables_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    report = run_attention_benchmark(ALL_PASSES, command="blade-bench attention --tokens 44,80")
    files = write_report(report, tmp_path / "new")
    assert [file.name for file in files] == ["attention.json", "attention.md", "attention.png"]
    assert json.loads(files[0].read_text())["cases"] == report["cases"]
    text = files[1].read_text()
    assert "    blade-bench attention --tokens 44,80\n" in text
    # dense; forward, training, selection, whole and backward, each with headings, a rule and four cases
    text, _, missing = text.partition("\n## Not measured\n")
    assert text.count("\n## ") == 6 and text.count("\n| ") == (2 + 2 * 4) + 5 * 6
    assert "| flex | " in missing
    assert "| Tiny, 80 tokens | 0.300 |" in text
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_tables_say_how_fast_and_what_a_kept_pair_costs():
    size = {"tokens": 8192, "heads": 12, "head_dim": 128, "batch": 1, "model": None}
    ms = {
        "flash": {"forward": 1.0, "training": 4.0},
        "cudnn": {"forward": 0.8, "training": 5.0},
        "triton": {"forward": 0.4, "training": 2.4, "whole": 0.5},
        "selection": {"selection": 0.04},
    }
    case = {**size, "realised_density": 0.25, "ms": ms, "sparse": ["triton"]}
    case["peak_mib"] = {"flash": {"training": 100.0}, "cudnn": {"forward": 50.0}, "triton": {"forward": 55.0}}
    passes = ["forward", "training", "selection", "whole"]
    cubin = {
        "kernel": "forward_kernel", "arch": "90", "case": "any", "num_warps": 8, "registers": 168, "stack_bytes": 0,
        "shared_bytes": 2048, "instructions": {"HGMMA": 4},
    }  # fmt: skip
    found = tables({"cases": [case], "settings": {"passes": passes}, "cubins": [cubin]})
    dense, forward, training, selection, whole, backward, memory, cubins = (table.rows for table in found)
    # 4 * 128 * 12 * 8192^2 operations: 0.412 TFLOP
    assert dense == [
        ["8,192 tokens", "flash", "1.00, 412 TFLOP/s", "4.00, 361 TFLOP/s", "3.00, 344 TFLOP/s"],
        ["8,192 tokens", "cudnn", "0.80, 515 TFLOP/s", "5.00, 289 TFLOP/s", "4.20, 245 TFLOP/s"],
    ]
    place = ["8,192 tokens", "0.250"]
    assert forward == [[*place, "0.80, 515 TFLOP/s (cudnn)", "0.40, 258 TFLOP/s (2.00, 50 %)"]]
    assert training == [[*place, "4.00, 361 TFLOP/s (flash)", "2.40, 150 TFLOP/s (1.67, 42 %)"]]
    assert selection == [[*place, "0.80, 515 TFLOP/s (cudnn)", "0.04 (5.0 % of dense)"]]
    assert whole == [[*place, "0.80, 515 TFLOP/s (cudnn)", "0.50, 206 TFLOP/s (1.60, 40 %)"]]
    assert backward == [[*place, "3.00, 344 TFLOP/s (flash)", "2.00, 129 TFLOP/s (1.50, 38 %)"]]
    assert memory == [[*place, "55 MiB (1.10)"]]
    assert cubins[0][-1] == "4 HGMMA"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": ()}, "`shapes` must hold at least one size"),
        ({"densities": (0.5, 0.0)}, r"`densities` must be in \(0, 1\], got \(0.5, 0.0\)"),
        ({"passes": ("forward", "sideways")}, "`passes` must be some of drawn, .*, got forward, sideways"),
        ({"dtype": "float64"}, "`dtype` must be one of float32, bfloat16, float16, got 'float64'"),
        ({"threads": 0}, "`threads` must be at least 1 or None, got 0"),
        ({"repeats": 0}, "`repeats` must be at least 1, got 0"),
        ({"blocks": "some"}, "`blocks` must be one of random, patterns, got 'some'"),
        ({"blocks": "patterns"}, "`shapes` must be of models where `blocks` is patterns"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AttentionBenchmark(**change)


def test_the_command_prints_a_table(capsys):
    with pytest.raises(SystemExit) as ended:
        main([*ARGUMENTS, "--density", "1,0.5"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert shown.count("44 tokens") >= 2 and "cpu" in shown


def test_the_command_writes_its_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as ended:
        main([*ARGUMENTS, "--output", str(tmp_path)])
    assert not ended.value.code and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--tokens", "8k"], "`tokens` must be numbers separated by commas, got '8k'."),
        (["attention", "--tokens", "0"], "`tokens` must be at least 1, got 0."),
        (["attention", "--model", "wan-1.3b,sora"], "`model` must be of chronoedit, cogvideox-1.5, "),
        (["attention", "--density", "2"], "`densities` must be in (0, 1], got (2.0,)."),
        (["attention", "--device", "cuda"], "no CUDA device is available"),
        (["tune"], "`device` must be a CUDA device that is there, got 'cuda'."),
    ],
)
def test_bad_input_ends_in_one_line(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    # Diffusers' first import of a broken torchao says so
    shown = [line for line in capsys.readouterr().err.splitlines() if "torchao" not in line]
    assert ended.value.code == 2 and len(shown) == 1 and message in shown[0]


def test_without_matplotlib_output_is_refused_before_anything_is_measured(capsys, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(SystemExit) as ended:
        main([*ARGUMENTS, "--output", str(tmp_path)])
    assert ended.value.code == 2 and "pip install 'blade-video[plots]'" in capsys.readouterr().err


GRID = TokenGrid(3, 4, 8, text_after=5)


def test_head_patterns_are_timed_with_what_surrounds_them():
    shape = AttentionShape(tokens=GRID.sequence_length, heads=5, head_dim=16, grid=GRID)
    settings = replace(
        TINY,
        shapes=(shape,),
        densities=(0.5,),
        block_size=8,
        blocks="patterns",
        passes=("forward", "selection", "whole"),
    )
    (case,) = run_attention_benchmark(settings)["cases"]
    assert set(case["ms"]["cpu"]) == {"forward", "whole"} and case["ms"]["selection"]["selection"] > 0
    assert case["error"]["cpu"] < 1e-5
    assert 0.3 < case["realised_density"] <= 0.52  # a stripe more or less, of 12


def test_what_was_measured_is_kept_when_a_later_case_fails(tmp_path, monkeypatch):
    measured = attention_benchmark._Layer.case

    def failing(layer, density):
        if density == 0.25:
            raise RuntimeError("the device is gone")
        return measured(layer, density)

    monkeypatch.setattr(attention_benchmark._Layer, "case", failing)
    arguments = ["--tokens", "64", "--head-dim", "16", "--heads", "1", "--block-size", "16", "--density", "0.5,0.25"]
    with pytest.raises(RuntimeError, match="the device is gone"):
        main(["attention", *arguments, "--repeats", "1", "--output", str(tmp_path / "kept"), "--debug"])
    report = json.loads((tmp_path / "kept" / "attention.json").read_text())
    assert [case["density"] for case in report["cases"]] == [0.5]
