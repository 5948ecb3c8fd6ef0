"""From measured errors to a table: budgets, groups of steps, stripes, the published rule."""

import itertools
import json
from dataclasses import fields, replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from blade.profiling.adaptive_sparsity import adaptive_at_error
from blade.profiling.assignment import GreedyRule
from blade.profiling.costs import AttentionCosts
from blade.profiling.objectives import Budget
from blade.profiling.profile import AttentionProfile
from blade.profiling.search import PatternSearch, prompt_dependence


def test_profiles_are_saved_and_read(make_profile, tmp_path):
    profile = make_profile()
    profile.save(tmp_path / "profile.safetensors")
    again = AttentionProfile.load(tmp_path / "profile.safetensors")
    assert again.source == profile.source
    assert np.array_equal(again.error, profile.error) and np.array_equal(again.maps, profile.maps)
    names = [item.name for item in fields(profile) if item.name != "source"]
    source = json.dumps(profile.source.to_dict())
    old = source.replace("multi-diagonal", "multi_diagonal").replace("token-major", "token_major")
    assert old != source
    tensors = {name: getattr(profile, name) for name in names}
    save_file(tensors, tmp_path / "old.safetensors", metadata={"source": old})
    assert AttentionProfile.load(tmp_path / "old.safetensors").source == profile.source
    (tmp_path / "broken.safetensors").write_bytes(b"no profile")
    for name in ("broken", "missing"):
        with pytest.raises(ValueError, match=f"{name}.safetensors` cannot be read as an attention profile"):
            AttentionProfile.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("groups", [1, 2, None])
@pytest.mark.parametrize("density", [0.3, 0.6])
def test_a_density_is_kept_and_errors_are_those_of_the_profile(make_profile, groups, density):
    profile = make_profile()
    search = PatternSearch(profile, groups=groups)
    choice = search.within(Budget(target_density=density))
    table = search.table(choice)
    assert choice.candidates.shape == (groups or 6, 3, 4) == table.assignment.shape
    by_step = choice.candidates[table.by_step(6)]
    assert np.array(profile.source.densities)[by_step].mean() == pytest.approx(choice.density)
    assert choice.density <= density + 1e-9 and choice.density > density - 0.05
    energy = profile.energy.mean(0).sum(-1)
    errors = profile.error.mean(0)
    expected = np.mean(
        [
            sum(errors[step, layer, by_step[step, layer, head], head] for head in range(4)) / energy[step, layer]
            for step, layer in itertools.product(range(6), range(3))
        ]
    )
    assert choice.error == pytest.approx(expected, rel=1e-5)


def test_more_groups_and_larger_budgets_never_have_a_larger_error(make_profile):
    profile = make_profile()
    errors = [PatternSearch(profile, groups=n).within(Budget(target_density=0.5)).error for n in (1, 2, 3, 6)]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]
    curve = PatternSearch(profile).curve()
    assert (np.diff(curve[:, 0]) > 0).all() and (np.diff(curve[:, 1]) < 0).all() and curve[-1, 1] == 0


def test_what_matters_more_is_given_more(make_profile):
    profile = make_profile()
    influences = np.ones((6, 3))
    influences[0] = 50.0
    plain, weighted = (
        PatternSearch(profile, influences=one).within(Budget(target_density=0.5)) for one in (None, influences)
    )
    densities = np.array(profile.source.densities)
    first = [densities[choice.candidates[0]].mean() for choice in (plain, weighted)]
    assert first[1] > first[0] + 0.2
    with pytest.raises(ValueError, match=r"`influences` must have the shape \(6, 3\), got \(3, 6\)"):
        PatternSearch(profile, influences=influences.T)


def test_a_step_gets_as_fast_as_was_asked_for(make_profile):
    profile = make_profile()
    costs = AttentionCosts(candidates=np.array([1.2, 0.0, 0.4, 0.3, 0.25]), step_share=0.6, measured=True)
    search = PatternSearch(profile, costs=costs)
    choice = search.within(Budget(target_speedup=1.5))
    assert 1.5 - 1e-9 <= costs.speedup(choice.cost) < 1.6
    assert costs.speedup(choice.cost) == pytest.approx(1 / (0.4 + 0.6 * choice.cost))
    with pytest.raises(ValueError, match=r"`target_speedup` must be at most 2\.5 here, where attention is 60% of a"):
        search.within(Budget(target_speedup=2.6))
    with pytest.raises(ValueError, match="`target_speedup` needs the share of attention in a step"):
        PatternSearch(profile).within(Budget(target_speedup=1.5))


def test_an_error_is_kept_at_the_least_cost(make_profile):
    search = PatternSearch(make_profile())
    choice = search.within(Budget(max_error=0.05))
    assert choice.error <= 0.05
    assert search.within(Budget(target_density=choice.density - 0.02)).error > 0.05
    assert search.within(Budget(max_error=0.1)).density < choice.density


def test_budgets_are_checked(make_profile):
    for values, message in (
        ({}, "one of `target_density`, `target_speedup` and `max_error` must be given, got none"),
        ({"target_density": 0.5, "max_error": 0.1}, "got `target_density` and `max_error`"),
        ({"target_density": 0.0}, r"`target_density` must be in \(0, 1\], got 0.0"),
        ({"target_speedup": 1.0}, "`target_speedup` must be above 1, got 1.0"),
        ({"max_error": -1.0}, "`max_error` must be above 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Budget(**values)
    profile = make_profile()
    only = replace(profile.source, candidates=(profile.source.candidates[0], profile.source.candidates[2]))
    search = PatternSearch(
        replace(
            profile,
            source=replace(only, densities=(1.0, 0.4), adaptive=()),
            error=profile.error[:, :, :, [0, 2]],
            head_error=profile.head_error[:, :, [0, 2]],
        )
    )
    with pytest.raises(ValueError, match=r"`target_density` must be at least 0\.4 with these patterns, got 0\.3"):
        search.within(Budget(target_density=0.3))
    with pytest.raises(ValueError, match="`groups` must be at most the number of steps, which is 6, got 7"):
        PatternSearch(profile, groups=7)


def test_stripes_go_where_heads_look(make_profile):
    profile = make_profile()
    profile.columns[:, 1, 2] = 0.0
    profile.columns[:, 1, 2, [3, 7, 11]] = 5.0
    search = PatternSearch(profile, groups=1)
    candidates = np.full((1, 3, 4), 4)
    choice = replace(search.within(Budget(target_density=0.5)), candidates=candidates)
    table = search.table(choice)
    found = table.patterns[table.assignment[0, 1, 2]]
    assert found.kind == "vertical" and found.key_blocks == (3, 7, 11)
    assert table.steps == 6 and table.grid == profile.source.grid
    evenly = search.table(choice, calibrated=False)
    assert evenly.patterns == (profile.source.candidates[4],) and evenly.steps is None


def test_the_published_rule_by_hand(make_profile):
    profile = make_profile()
    rule = GreedyRule(weight=0.5, threshold=0.4)
    search = PatternSearch(profile)
    choice = search.by_rule(rule)
    densities = np.array(profile.source.densities)
    for step, layer, head in itertools.product(range(6), range(3), range(4)):
        errors = profile.head_error[step, layer, :5] / profile.head_error[step, layer, 1].mean()
        losses = errors[:, head] + 0.5 * densities
        best = int(losses[1:].argmin()) + 1
        assert choice.candidates[step, layer, head] == (best if losses[best] <= 0.4 else 0)
    assert search.by_rule(replace(rule, threshold=0.0)).density == pytest.approx(1)
    assert search.within(Budget(target_density=choice.density)).error <= choice.error + 1e-9


def test_heads_that_depend_on_the_prompt_are_seen(make_profile):
    profile = make_profile()
    search = PatternSearch(profile)
    candidates = np.full((6, 3, 4), 2)
    choice = replace(search.within(Budget(target_density=0.5)), candidates=candidates)
    profile.error[:, :, :, 2] = 1.0
    profile.error[:, :, :, [3, 4]] = 2.0
    profile.error[:, :, :, 1] = 3.0
    profile.error[2:, :, 0, 3, 0] = 0.25  # for the second prompt, another pattern does better
    costs = np.array([1.0, 0.0, 0.4, 0.4, 0.9])
    disagreement, regret = prompt_dependence(profile, choice, costs)
    assert disagreement[0, 0] == 0.5 and disagreement.sum() == 0.5
    assert regret[0, 0] == pytest.approx(0.375) and regret.sum() == pytest.approx(0.375)


def test_asa_is_calibrated_to_an_error(make_profile):
    profile = make_profile()
    energy = profile.energy.mean(0).sum(-1)
    errors = [
        float(((profile.error[:, :, :, n].mean(0).sum(-1) / energy)[1:]).sum()) / 18 for n in (5, 6)
    ]  # the first step is dense
    between = adaptive_at_error(profile, float(np.sqrt(errors[0] * errors[1])), np.ones((6, 3)))
    assert between.config.sparsity == pytest.approx(0.65, abs=0.002) and between.reached
    assert between.error == pytest.approx(np.sqrt(errors[0] * errors[1]), rel=0.01)
    assert between.density == pytest.approx(1 - 5 / 6 * between.config.sparsity)
    beyond = adaptive_at_error(profile, 10 * errors[1], np.ones((6, 3)))
    assert beyond.config.sparsity == 0.8 and not beyond.reached
    assert adaptive_at_error(profile, errors[0] / 3, np.ones((6, 3))).config.sparsity < 0.5
    with pytest.raises(ValueError, match="`adaptive` must be measured"):
        adaptive_at_error(replace(profile, source=replace(profile.source, adaptive=())), 0.1, np.ones((6, 3)))
