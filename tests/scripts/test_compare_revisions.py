"""Comparing revisions: what counts as the same, and that a revision is the same as itself."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "compare_revisions.py"

specification = importlib.util.spec_from_file_location("compare_revisions", SCRIPT)
compare_revisions = importlib.util.module_from_spec(specification)
specification.loader.exec_module(compare_revisions)


def difference(old, new):
    (found,) = compare_revisions.compare_arrays({"x": np.asarray(old)}, {"x": np.asarray(new)}).values()
    return found


@pytest.mark.parametrize("values", [[1.0, np.nan, np.inf], [0, 1], [True], ["raster", "gilbert"], [], 0.5])
def test_equal_values_are_the_same(values):
    assert difference(values, values) is None


def test_the_last_bit_counts():
    value = np.float32(0.1)
    next_value = np.nextafter(value, np.float32(1))
    assert difference([value, value], [value, value]) is None
    message = difference([value, value], [value, next_value])
    assert message == f"max abs difference {np.float64(next_value) - np.float64(value):.3g}, 1 of 2 values"
    assert difference([0.0], [-0.0]) == "max abs difference 0, 1 of 1 values"
    assert difference(0.5, 0.25) == "max abs difference 0.25, 1 of 1 values"


def test_a_nan_is_the_same_as_a_nan_of_the_same_bits():
    quiet, other = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert difference(quiet, quiet) is None
    assert difference(quiet, other) == "max abs difference nan, 1 of 1 values"
    assert difference([1.0, np.nan], [1.0, 2.0]) == "max abs difference 0, 1 of 2 values"


def test_shape_and_type_count():
    values = np.arange(6, dtype=np.float32)
    assert difference(values, values.reshape(2, 3)) == "shape (2, 3) instead of (6,)"
    assert difference(values, values.astype(np.float64)) == "float64 instead of float32"
    assert difference(values.view(np.int32), values) == "float32 instead of int32"
    assert difference(values, values.reshape(2, 3).T.copy().T.reshape(6)) is None  # how it lies in memory does not


def test_words_are_compared_one_by_one():
    message = difference(["full", "skip"], ["full", "diagonal"])
    assert message == "1 of 2 values, such as 'diagonal' instead of 'skip'"


def test_a_missing_and_an_extra_result_are_named():
    old, new = {"both": np.zeros(2), "gone": np.ones(1)}, {"both": np.zeros(2), "come": np.ones(1)}
    assert compare_revisions.compare_arrays(old, new) == {
        "both": None,
        "gone": "missing in new",
        "come": "missing in old",
    }


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ({"x": np.ones(2), "y": np.ones(1)}, {"x": np.ones(2), "y": np.zeros(1)}, (2, 1)),
        ({"x": np.ones(2)}, {"x": np.ones(2)}, (1, 0)),
        ({"x": np.ones(2)}, {}, (1, 1)),
        ({}, {}, (0, 1)),
    ],
)
def test_a_case_counts_its_results(tmp_path, capsys, old, new, counts):
    sides = []
    for name, arrays in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "generate.npz", **arrays)
        sides.append(compare_revisions.Side(name, tmp_path, tmp_path / name))
    assert compare_revisions.compare_case("generate", sides) == counts
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("DIFFERS  generate: ") for line in printed) == counts[1]


@pytest.mark.long
@pytest.mark.slow
def test_a_revision_is_the_same_as_itself(tmp_path):
    def git(*arguments):
        return subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)

    if git("rev-parse", "HEAD").returncode:
        pytest.skip("this is no git checkout")
    keep = tmp_path / "runs"
    command = [sys.executable, str(SCRIPT), "HEAD", "HEAD", "--only", "families", "--keep", str(keep)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].endswith("results of families compared: 0 differ; 0 runs failed")
    assert "same     families: wan/asa/step 0" in lines
    assert {path.name for path in keep.iterdir()} == {"old", "new"}
    assert "compare-revisions-" not in git("worktree", "list").stdout
