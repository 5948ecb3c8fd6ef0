"""The file that says which CuTe kernels are verified is made of the reports of cards."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from blade_kernels.block_sparse import cute_table

from blade.benchmarks.card.steps import CUTE_STEP

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "verify_cute.py"


@pytest.fixture
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("verify_cute", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_package_says_what_the_reports_say(script) -> None:
    assert sorted(cute_table.verified()) == script.verified(script.REPORTS)


def test_a_kernel_is_verified_if_all_that_checked_it_found_it_right(script, tmp_path: Path) -> None:
    states = {"a": ("done", "done"), "b": ("done", "wrong"), "c": ("not begun", "done"), "d": ("crashed", "not begun")}
    for report in range(2):
        steps = [{"name": CUTE_STEP + name, "state": found[report]} for name, found in states.items()]
        steps.append({"name": "attention by triton", "state": "done"})
        (tmp_path / f"card-{report}.json").write_text(json.dumps({"steps": steps}), encoding="utf-8")
    assert script.verified(tmp_path) == ["a", "c"]
    assert script.verified(tmp_path / "none") == []
