"""The comparison of selectors: its heads, its methods at their budget, and its table."""

import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture(scope="module")
def scripts():
    """The three modules of the script."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import attention_heads
        import compare_selectors
        import selector_methods

        yield attention_heads, selector_methods, compare_selectors
    finally:
        sys.path.remove(str(SCRIPTS))


def made_up(scripts, kind="local", **options):
    return scripts[0].synthetic_heads(kind, **{"tokens": 1024, "size": 32, "block": 32} | options)


def test_everything_kept_is_exact_and_nothing_pooled_is_left(scripts):
    heads = made_up(scripts)
    everything = torch.ones_like(heads.weights, dtype=torch.bool)
    assert float(heads.errors(heads.attend(everything, True))) < 1e-6
    assert heads.density(everything, True) == 1.0
    nothing = torch.zeros_like(everything)
    pooled = heads.attend(nothing, True)
    weights = heads.pooled_logits.softmax(-1)
    torch.testing.assert_close(pooled, weights @ heads.mean_values)
    assert heads.density(nothing, True) == pytest.approx(1 / 32)


def test_every_method_keeps_what_it_may_spend_and_no_more(scripts):
    heads = made_up(scripts, "segment")
    for method in scripts[1].METHODS:
        keep = method.choose(heads, 0.25 * heads.tokens)
        density = heads.density(keep, method.pooled)
        # thresholds and clusters come in steps; compared are an eighth of the rows, whose share may be another
        assert 0.15 <= density <= 0.32, method.name
        assert keep.any(-1).all(), method.name


def test_chance_is_far_behind_and_the_error_is_the_better_oracle(scripts):
    heads = made_up(scripts, "segment")
    methods = {method.name: method for method in scripts[1].METHODS}
    errors = {
        name: float(heads.errors(heads.attend(method.choose(heads, 0.2 * heads.tokens), method.pooled)))
        for name, method in methods.items()
    }
    assert errors["oracle: output error, pooled, by layer"] < 0.9 * errors["oracle: true mass, pooled"]
    assert errors["oracle: true mass, pooled"] < errors["oracle: true mass"]
    scores = torch.rand(1, heads.blocks, heads.blocks, generator=torch.Generator().manual_seed(0))
    chance = scripts[1].by_rank(heads, scores, 0.2 * heads.tokens, pooled=True)
    assert float(heads.errors(heads.attend(chance, True))) > 2 * errors["ours: the preset"]


def test_sinks_are_found(scripts):
    heads = made_up(scripts, "sink", tokens=2048)
    methods = {method.name: method for method in scripts[1].METHODS}

    def error(name):
        return float(heads.errors(heads.attend(methods[name].choose(heads, 0.2 * heads.tokens), True)))

    assert error("ours: the preset") < 1.3 * error("oracle: true mass, pooled")
    assert error("ours: the preset") < 0.5 * error("ASA, dropped blocks pooled")


def test_a_choice_that_costs_more_than_the_budget_is_left_out(scripts):
    heads = made_up(scripts)
    methods = {method.name: method for method in scripts[1].METHODS}
    measure = scripts[2].measure
    assert measure(methods["BLASST, skipped softmax"], [heads], 0.5, with_selection=True) is None
    with_choice = measure(methods["ASA, as published"], [heads], 0.5, with_selection=True)
    without = measure(methods["ASA, as published"], [heads], 0.5, with_selection=False)
    assert with_choice["density"] < without["density"] - 0.1  # the probe of half a block costs an eighth
    assert with_choice["error"] > without["error"]


@pytest.mark.slow
def test_the_script_writes_its_tables(scripts, tmp_path):
    scripts[2].main(tmp_path, tokens=1024, prompts=1, steps=3)
    values = json.loads((tmp_path / "selectors.json").read_text())
    assert [name.partition(",")[0] for name in values["results"]] == ["the bundled model", *["synthetic"] * 4]
    found = values["results"]["the bundled model"]["density"]["oracle: true mass"]["0.5"]
    assert found["heads"] == 5 * 2 * 3 and 0 < found["error"] < found["worst_tenth"] < 1
    assert 0.45 < found["density"] <= 0.5
    text = (tmp_path / "selectors.md").read_text()
    assert text.count("| ours: the preset |") == 10 and text.count("**") >= 2 * 10
