"""A split transformer with what else Diffusers does to it: adapters, fewer bits, caches, offloading, compilation."""

import json
from pathlib import Path

import pytest
from ranks import run_ranks

SCRIPT = Path(__file__).parent / "split_together.py"
SKIPPING = ("mag", "taylor-seer", "pyramid", "faster")
REFUSED = ("first-block", "sea", "cache-dit")


@pytest.fixture(scope="module")
def results(saved_tiny_pipeline, tmp_path_factory):
    """What two ranks have of every case, by its name."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(SCRIPT, 2, folder, saved_tiny_pipeline, folder / "results.json")
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_what_else_is_done_to_a_split_transformer_changes_nothing(results):
    assert {
        "lora",
        "merged lora",
        "late lora",
        "put back",
        "compiled",
        "offloaded groups",
        "offloaded whole",
    } <= results.keys()
    for name, result in results.items():
        if not name.startswith(REFUSED):
            assert result["error"] < 2e-6, (name, result)
            assert result.get("change", 1) > 1e-2, (name, result)  # of what is tried, which must do something


@pytest.mark.slow
def test_caches_that_go_by_the_step_skip_the_same_on_every_rank(results):
    for cache in SKIPPING:
        cases = {name: result for name, result in results.items() if name.startswith(cache)}
        assert len(cases) >= 3 and all(result["skipped"] for result in cases.values()), cases


@pytest.mark.slow
def test_caches_that_go_by_values_are_refused(results):
    cases = {name: result for name, result in results.items() if name.startswith(REFUSED)}
    assert len(cases) >= 4
    for name, result in cases.items():
        cache = name.split(",")[0]
        assert result["message"].startswith(f"`cache` must not be {cache} where several ranks compute"), name


@pytest.mark.slow
def test_regional_compilation_keeps_the_exchanges_in_its_graphs(results):
    """A dense and a sparse one, and one for the first block, whose input is a view."""
    assert results["compiled"]["again"] < 2e-6 and results["compiled"]["graphs"] <= 3
