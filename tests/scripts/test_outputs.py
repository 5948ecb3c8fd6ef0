"""Scripts and benchmarks find out that their output cannot be written before they measure anything."""

import importlib.util
from pathlib import Path

import pytest

from blade.cli.bench import main as bench
from blade.common.files import OutputError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

OPTIONS = {
    "compare_caches": {},
    "compare_runs": {"folder": Path("missing"), "pairs": []},
    "compare_selectors": {},
    "contact_sheet": {"videos": [Path("missing.mp4")]},
    "count_flops": {},
    "count_selection": {},
    "distillation_memory": {},
    "draw_distillation": {},
    "draw_kernels": {},
    "draw_quality": {"line": ["missing=nothing"]},
    "pattern_density": {},
    "plan_scale": {},
    "quality_by_density": {},
    "picture_report": {"report": Path("missing.html")},
}


def load_script(name: str):
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", OPTIONS)
def test_a_script_checks_its_output_first(name, tmp_path, monkeypatch):
    if name == "picture_report":
        pytest.importorskip("playwright")
    monkeypatch.syspath_prepend(SCRIPTS)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"`output` .*file/.* cannot be written: Not a directory"):
        load_script(name).main(output=tmp_path / "file" / "out" / "a.png", **OPTIONS[name])


@pytest.mark.parametrize("arguments", [("attention",), ("generate", "--random-weights")])
def test_a_benchmark_checks_its_output_first(arguments, tmp_path, monkeypatch, capsys):
    for name in ("attention.run_attention_benchmark", "generation.run_generation_benchmark"):
        monkeypatch.setattr(f"blade.benchmarks.{name}", lambda *args, **options: pytest.fail("it was measured first"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        bench([*arguments, "--output", str(tmp_path / "file" / "out")])
    assert ended.value.code == 1
    assert capsys.readouterr().err.endswith("cannot be written: Not a directory.\n")


def test_the_report_of_an_estimate_is_checked_first(tmp_path, monkeypatch, capsys):
    from blade.cli.distill import main
    from blade.distillation import workflow

    monkeypatch.setattr(workflow, "distill", lambda *args, **options: pytest.fail("it was measured first"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        main(["shapes", "--dry-run", "--report", str(tmp_path / "file" / "report.json")])
    assert ended.value.code == 1 and "report.json cannot be written" in capsys.readouterr().err
