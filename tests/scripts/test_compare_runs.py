"""Runs in pairs, from the records of an evaluation."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compare_runs.py"

specification = importlib.util.spec_from_file_location("compare_runs", SCRIPT)
compare_runs = importlib.util.module_from_spec(specification)
specification.loader.exec_module(compare_runs)


@pytest.fixture
def folder(tmp_path):
    lines = [
        json.dumps({"run": {"name": run}, "prompt": f"prompt {number}", "seed": 0, "psnr": 20.0 + number + gain})
        for run, gain in (("old", 0), ("new", 2))
        for number in range(20)
    ]
    lines.append(json.dumps({"run": {"name": "dense"}, "prompt": "prompt 0", "seed": 0, "psnr": None}))
    (tmp_path / "records-1-of-2.jsonl").write_text("\n".join(lines[:25]) + "\n")
    (tmp_path / "records-2-of-2.jsonl").write_text("\n".join(lines[25:]) + "\n")
    return tmp_path


def test_means_worst_tenths_and_differences(folder, capsys):
    compare_runs.main(folder, ["new=old", "old=new"], "psnr", folder / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| new | old | 29.50 | 31.50 | 20.50 | 22.50 | +2.00 (+2.00 to +2.00) | 0 of 20 |"
    assert lines[3].endswith("| -2.00 (-2.00 to -2.00) | 20 of 20 |")
    written = json.loads((folder / "out" / "pairs.json").read_text())
    assert written["pairs"][0]["mean"] == 2 and written["pairs"][0]["worst"] == [20.5, 22.5]
    assert lines[2] in (folder / "out" / "pairs.md").read_text()


@pytest.mark.parametrize(
    ("pairs", "measure", "message"),
    [
        (["new=older"], "psnr", "must be of the runs new, old, got 'older' in 'new=older'"),
        (["new"], "psnr", "got '' in 'new'"),
        (["new=old"], "beauty", "must hold records with `beauty`"),
    ],
)
def test_what_is_not_there_is_named(folder, pairs, measure, message):
    with pytest.raises(ValueError, match=message):
        compare_runs.main(folder, pairs, measure)


def test_runs_of_other_videos_are_not_compared(folder):
    with (folder / "records-1-of-2.jsonl").open("a") as file:
        file.write(json.dumps({"run": {"name": "new"}, "prompt": "another", "seed": 1, "psnr": 9.0}) + "\n")
    with pytest.raises(ValueError, match="runs that made the same videos, got 'new=old'"):
        compare_runs.main(folder, ["new=old"], "psnr")
