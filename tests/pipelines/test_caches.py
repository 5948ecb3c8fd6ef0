"""Diffusers' caches on all families with BLADE: exact where nothing is skipped, in token order where it is."""

from itertools import product

import pytest
import torch
from cache_settings import CACHES, STEPS, TIMES, context, enable, enable_unchecked, hooks_of, run_steps, steps_of
from diffusers import CacheMixin

from blade import BladeConfig, apply_blade, blade_summary, remove_blade
from blade.attention.applied import applied_to
from blade.attention.budget import BlockBudget
from blade.attention.config import AdaptiveConfig
from blade.families.registry import find_family

DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)
SPARSE = BladeConfig(sparsity=0.5, dense_steps=1, asa=DETAILS)

every_cache = pytest.mark.parametrize("cache", CACHES)


@pytest.fixture(autouse=True)
def _cached_by_diffusers(request):
    """Leave out transformers that Diffusers has no caches for."""
    if "family" in request.fixturenames and not isinstance(request.getfixturevalue("family").make(), CacheMixin):
        pytest.skip("Diffusers has no caches for this transformer")


@pytest.fixture
def keep_all(monkeypatch):
    """Let the sparse path run with every block kept, where it would be left to Diffusers' attention otherwise."""
    monkeypatch.setattr(BlockBudget, "is_full", False)


def with_both(family, cache, config, *, skips, cache_first):
    """A transformer with a cache and BLADE, enabled and applied in either order."""
    transformer = family.make()
    if cache_first:
        apply_blade(enable(transformer, cache, skips), config)
    else:
        enable(apply_blade(transformer, config), cache, skips)
    return transformer


def calls(transformer):
    """Forward passes of each layer, dense and sparse, as BLADE counts them."""
    return [layer.dense_calls + layer.sparse_calls for layer in blade_summary(transformer).transformers[0].layers]


def attentions_of(transformer):
    """The self-attention modules."""
    return find_family(transformer).attention_layers(transformer)


@every_cache
def test_a_cache_that_never_skips_changes_no_bit(family, cache):
    steps = steps_of(family)
    for sparsity in (0.0, 0.5):
        config = BladeConfig(sparsity=sparsity, dense_steps=1, asa=DETAILS)
        alone = family.make() if sparsity == 0 else apply_blade(family.make(), config)
        expected = run_steps(alone, steps)
        for cache_first in (True, False):
            both = with_both(family, cache, config, skips=False, cache_first=cache_first)
            assert torch.equal(run_steps(both, steps), expected)
            assert calls(both) == [STEPS] * len(calls(both))


@every_cache
def test_cached_tokens_are_in_the_order_of_the_next_step(family, cache, keep_all):
    """With every block kept, in Gilbert order, the cache does what it does to Diffusers' own transformer."""
    config = BladeConfig(sparsity=0.0, dense_steps=1, asa=DETAILS)
    steps = steps_of(family, batch=2)
    expected = run_steps(enable(family.make(), cache, skips=True), steps)
    assert not torch.allclose(expected, run_steps(family.make(), steps), rtol=2e-3, atol=2e-4)
    for cache_first in (True, False):
        both = with_both(family, cache, config, skips=True, cache_first=cache_first)
        torch.testing.assert_close(run_steps(both, steps), expected, rtol=2e-3, atol=2e-4)
        assert sum(calls(both)) < STEPS * len(calls(both)), "the setting must skip some calls"


@every_cache
def test_skipped_calls_are_not_counted(family, cache, monkeypatch):
    """Every layer counts the calls of its own attention, and knows the dense step from the sparse ones."""
    plain, ran = enable(family.make(), cache, skips=True), []
    both = with_both(family, cache, SPARSE, skips=True, cache_first=False)
    applied = applied_to(both)
    for index, attention in enumerate(applied.family.attention_layers(plain)):

        def count(*args, index=index, processor=attention.processor, **kwargs):
            ran.append((index, plain.time_now))
            return processor(*args, **kwargs)

        attention.processor = count
    steps = steps_of(family)
    run_steps(plain, steps)
    run_steps(both, steps)
    first = max(time for _, time in ran)
    for index, layer in enumerate(blade_summary(both).transformers[0].layers):
        times = [time for which, time in ran if which == index]
        assert layer.dense_calls == sum(time == first for time in times)
        assert layer.sparse_calls == sum(time < first for time in times)


@pytest.mark.slow
@every_cache
def test_both_come_off_in_either_order(family, cache):
    steps = steps_of(family)
    plain, cached = run_steps(family.make(), steps), run_steps(enable(family.make(), cache, skips=True), steps)
    sparse = run_steps(apply_blade(family.make(), SPARSE), steps)
    processors = [type(attention.processor) for attention in attentions_of(family.make())]
    for cache_first, cache_off_first in product((True, False), repeat=2):
        both = with_both(family, cache, SPARSE, skips=True, cache_first=cache_first)
        if cache_off_first:
            both.disable_cache()
            assert torch.equal(run_steps(both, steps), sparse)
            remove_blade(both)
        else:
            remove_blade(both)
            assert torch.equal(run_steps(both, steps), cached)
            both.disable_cache()
        assert torch.equal(run_steps(both, steps), plain)
        assert hooks_of(both) == []
        assert [type(attention.processor) for attention in attentions_of(both)] == processors


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["first-block", "mag", "taylor-seer", "taylor-seer-lite", "sea"])
def test_the_passes_of_guidance_have_a_state_each(family, cache, keep_all):
    """The other caches of Diffusers have one state for both passes, with BLADE or without."""
    config = BladeConfig(sparsity=0.0, dense_steps=1, asa=DETAILS)
    pairs = [list(pair) for pair in zip(steps_of(family), steps_of(family, seed=3))]
    names = ("cond", "uncond")
    expected = run_steps(enable(family.make(), cache, skips=True), pairs, names)
    both = with_both(family, cache, config, skips=True, cache_first=True)
    torch.testing.assert_close(run_steps(both, pairs, names), expected, rtol=2e-3, atol=2e-4)
    alone = run_steps(enable(family.make(), cache, skips=True), [pair[1] for pair in pairs])
    torch.testing.assert_close(expected[1::2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_cache
def test_nothing_kept_outlives_a_change_of_the_order(family, cache):
    """BLADE is applied and removed between two steps, without the reset that ends a pipeline's run."""
    steps = steps_of(family)
    transformer = enable(family.make(), cache, skips=True)
    expected = run_steps(transformer, steps)
    for change in (lambda: apply_blade(transformer, SPARSE), lambda: remove_blade(transformer)):
        transformer.time_now = TIMES[0]
        with torch.no_grad(), context(transformer, "cond", 0):
            transformer(**steps[0])
        change()
        transformer.time_now = TIMES[1]
        with torch.no_grad(), context(transformer, "cond", 1):
            after = transformer(**steps[1]).sample
    fresh = enable(family.make(), cache, skips=True)
    fresh.time_now = TIMES[1]
    with torch.no_grad(), context(fresh, "cond", 1):
        assert torch.equal(after, fresh(**steps[1]).sample)
    transformer._reset_stateful_cache()
    assert torch.equal(run_steps(transformer, steps), expected)


@pytest.mark.parametrize("cache", ["first-block", "mag", "sea"])
def test_a_cache_of_blocks_is_refused_where_it_changes_what_does_not_change(family, cache):
    """Of two equal steps the second, whose blocks are skipped, must give what the first gave; in Diffusers alone."""
    transformer, steps = enable_unchecked(family.make(), cache, skips=True), steps_of(family)
    try:
        outputs = run_steps(transformer, [steps[0]] * STEPS)
        broken = bool((outputs[1] - outputs[0]).abs().max() > 1e-3)
    except (KeyError, ValueError):
        broken = True
    assert broken == (find_family(transformer).cache_problem(transformer, cache) is not None)
