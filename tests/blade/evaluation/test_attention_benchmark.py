import importlib.util
import json

import pytest
import torch

import blade.evaluation.attention_benchmark as benchmark
from blade.cli.bench import main
from blade.evaluation.attention_benchmark import AttentionBenchmark, run_attention_benchmark, table, write_report

TINY = AttentionBenchmark(
    tokens=(44, 80), densities=(1.0, 0.3), heads=2, head_dim=8, block_size=8, repeats=2, threads=1
)
ARGUMENTS = ["attention", "--tokens", "44", "--heads", "1", "--head-dim", "8", "--block-size", "8", "--repeats", "1"]


@pytest.fixture(autouse=True)
def no_compiling(monkeypatch):
    """FlexAttention takes seconds to compile, and is tested elsewhere."""
    monkeypatch.setattr("blade_kernels.block_sparse.flex.missing_cpp_toolchain", lambda: "this is a test")


def test_reports_every_length_and_density():
    threads, seen = torch.get_num_threads(), []
    report = run_attention_benchmark(TINY, command="the command", on_case=seen.append)
    assert torch.get_num_threads() == threads and report["machine"]["threads"] == 1
    assert seen == report["cases"] and json.loads(json.dumps(report)) == report
    found = [(case["tokens"], case["density"], round(case["realised_density"], 3)) for case in report["cases"]]
    # 44 tokens are 6 blocks, of which 0.3 is 2; the last block has 4 tokens
    assert found[:1] == [(44, 1.0, 1.0)] and found[2:] == [(80, 1.0, 1.0), (80, 0.3, 0.3)]
    assert 2 * 4 / 44 < found[1][2] <= 2 * 8 / 44
    for case in report["cases"]:
        assert case["dense_ms"] > 0 and case["reference_ms"] > 0 and case["auto"] == "reference"
        assert "flex_ms" not in case and "this is a test" in case["flex_missing"]


def test_a_wrong_output_is_no_result(monkeypatch):
    monkeypatch.setattr(benchmark, "block_sparse_attention", lambda q, *_, **__: torch.zeros_like(q))
    with pytest.raises(RuntimeError, match="the output of `reference` is wrong: relative error 1"):
        run_attention_benchmark(TINY)


def test_writes_json_table_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    report = run_attention_benchmark(TINY, command="blade-bench attention --tokens 44,80")
    files = write_report(report, tmp_path / "new")
    assert [file.name for file in files] == ["attention.json", "attention.md", "attention.png"]
    assert json.loads(files[0].read_text())["cases"] == report["cases"]
    assert "    blade-bench attention --tokens 44,80\n" in files[1].read_text()
    assert files[1].read_text().count("\n| ") == 6
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_table_says_how_many_times_as_fast():
    case = {"tokens": 8192, "realised_density": 0.15, "dense_ms": 100.0, "reference_ms": 25.0, "auto": "reference"}
    headings, rows = table({"cases": [case]})
    assert headings == ["tokens", "density", "dense ms", "reference ms (times as fast)", "auto takes"]
    assert rows == [["8,192", "0.150", "100.0", "25.0 (4.00)", "reference"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": (0,)}, r"`tokens` must be lengths of at least 1, got \(0,\)"),
        ({"densities": (0.5, 0.0)}, r"`densities` must be in \(0, 1\], got \(0.5, 0.0\)"),
        ({"dtype": "float64"}, "`dtype` must be one of float32, bfloat16, float16, got 'float64'"),
        ({"threads": 0}, "`threads` must be at least 1 or None, got 0"),
        ({"repeats": 0}, "`repeats` must be at least 1, got 0"),
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
    assert "tokens" in shown and shown.count("44") >= 2 and "reference" in shown


def test_the_command_writes_its_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as ended:
        main([*ARGUMENTS, "--output", str(tmp_path)])
    assert not ended.value.code and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--tokens", "8k"], "`--tokens` must be numbers separated by commas, got '8k'."),
        (["attention", "--density", "2"], "`densities` must be in (0, 1], got (2.0,)."),
        (["attention", "--device", "cuda"], "no CUDA device is available"),
    ],
)
def test_bad_input_ends_in_one_line(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    shown = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and len(shown) == 1 and message in shown[0]


def test_without_matplotlib_output_is_refused_before_anything_is_measured(capsys, monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    with pytest.raises(SystemExit) as ended:
        main([*ARGUMENTS, "--output", str(tmp_path)])
    assert ended.value.code == 1 and "pip install 'blade-video[plots]'" in capsys.readouterr().err
