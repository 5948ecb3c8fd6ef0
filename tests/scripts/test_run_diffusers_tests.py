"""`scripts/run_diffusers_tests.py`: what counts as a failure with BLADE, on a small suite of the same layout."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "run_diffusers_tests.py"

SUITE = """
import torch
from diffusers import WanTransformer3DModel

CONFIG = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=16, ffn_dim=24, num_layers=2, rope_max_seq_len=32,
)


def run(transformer):
    return transformer(torch.randn(1, 4, 2, 16, 16), torch.tensor([500]), torch.randn(1, 12, 16)).sample


def test_passes():
    assert run(WanTransformer3DModel(**CONFIG)).shape == (1, 4, 2, 16, 16)


def test_loaded_too(tmp_path):
    WanTransformer3DModel(**CONFIG).save_pretrained(tmp_path)
    assert run(WanTransformer3DModel.from_pretrained(tmp_path)).isfinite().all()


def test_wants_the_processors_of_diffusers():
    processor = WanTransformer3DModel(**CONFIG).blocks[0].attn1.processor
    assert type(processor).__name__ == "WanAttnProcessor"


def test_wants_no_hook_of_ours():
    assert not hasattr(WanTransformer3DModel(**CONFIG), "_diffusers_hook")


def test_fails_anyway():
    assert False
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("run_diffusers_tests", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def outcome(outcome: str = "passed", digests: tuple[str, ...] = ("a",), sparse_passes: int = 1) -> dict[str, Any]:
    return {"outcome": outcome, "digests": list(digests), "sparse_passes": sparse_passes, "reason": "it says so"}


def test_a_failure_is_what_passes_without_blade_and_does_not_with_it(script: ModuleType) -> None:
    tests = ("same", "differs in a bit", "fails at 0.5", "known", "is skipped", "is missing", "fails anyway")
    plain = {test: outcome() for test in tests} | {"fails anyway": outcome("failed")}
    dense = plain | {"differs in a bit": outcome(digests=("b",)), "is skipped": outcome("skipped")}
    sparse = plain | {"fails at 0.5": outcome("failed"), "known": outcome("failed"), "same": outcome(sparse_passes=0)}
    del sparse["is missing"]
    runs = {script.PLAIN: plain, script.DENSE: dense, script.SPARSE: sparse}
    row = script.compare("models", runs, [script.Known(tests="^kno", reason="honestly refused")])
    assert row.known == [("known", "0.5", "honestly refused")]
    assert row.unexpected == [
        ("differs in a bit", "0", "outputs of a transformer differ"),
        ("fails at 0.5", "0.5", "failed: it says so"),
        ("is skipped", "0", "skipped: it says so"),
        ("is missing", "0.5", "failed: it did not run"),
    ]
    assert (row.counts["passed"], row.counts["failed"], row.counts["outputs"]) == (6, 1, 6)
    assert (row.counts["passed at 0"], row.counts["passed at 0.5"], row.counts["sparse"]) == (4, 3, 2)


@pytest.mark.slow
def test_a_suite_is_run_without_blade_and_with_it(tmp_path: Path) -> None:
    folder, output = tmp_path / "diffusers", tmp_path / "out"
    models = folder / "tests" / "models"
    models.mkdir(parents=True)
    (folder / "tests" / "conftest.py").write_text("", encoding="utf-8")
    (folder / "setup.py").write_text('setup(\n    version="0.40.0",\n)\n', encoding="utf-8")
    (models / "test_wan.py").write_text(SUITE, encoding="utf-8")
    (models / "test_other.py").write_text("def test_of_another_model():\n    assert False\n", encoding="utf-8")
    command = [sys.executable, str(SCRIPT), str(folder), "--output", str(output), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "the tests are of 0.40.0." in done.stdout
    record = json.loads((output / "diffusers-tests.json").read_text(encoding="utf-8"))
    (group,) = record["groups"].values()
    assert (group["passed"], group["failed"], group["passed at 0"], group["sparse"]) == (4, 1, 2, 2)
    assert {test.rpartition("::")[2] for test, _, _ in group["unexpected"]} == {
        "test_wants_the_processors_of_diffusers",
        "test_wants_no_hook_of_ours",
    }
    assert group["outputs"] == 2
    assert "| models | 4 | 2 | 2 | 2 | 2 | 0 | 2 | 2 |" in (output / "diffusers-tests.md").read_text(encoding="utf-8")


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "`folder` must be a checkout of Diffusers' repository" in done.stderr
