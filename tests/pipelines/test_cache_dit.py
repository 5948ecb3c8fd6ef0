"""cache-dit around small pipelines with BLADE: exact where nothing is skipped, in token order where it is."""

import pytest
import torch

from blade import BladeConfig, apply_blade, blade_summary, remove_blade
from blade.attention.budget import BlockBudget
from blade.attention.config import AdaptiveConfig

cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed (the extra `cache-dit`)")

DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)
SPARSE = BladeConfig(sparsity=0.5, dense_steps=1, asa=DETAILS)
STEPS = 3

PIPELINES = ("WanPipeline", "CogVideoXPipeline", "HunyuanVideoPipeline", "HunyuanVideo15Pipeline", "LTXPipeline")


@pytest.fixture(params=PIPELINES)
def pipe(request, small_pipelines):
    """A small pipeline under its own name, by which cache-dit knows it."""
    torch.manual_seed(1)
    made = small_pipelines[request.param]()
    type(made).__name__ = request.param
    if request.param == "HunyuanVideoPipeline":  # whose two kinds of blocks have a cache each, beyond their first
        config = {**made.transformer.config, "num_layers": 2, "num_single_layers": 2}
        made.transformer = type(made.transformer).from_config(config).eval()
    made.set_progress_bar_config(disable=True)
    yield made
    cache_dit.disable_cache(made)


@pytest.fixture
def keep_all(monkeypatch):
    """Let the sparse path run with every block kept."""
    monkeypatch.setattr(BlockBudget, "is_full", False)


def latents(pipe):
    torch.manual_seed(0)
    return pipe(prompt="", output_type="latent", generator=torch.Generator().manual_seed(0))[0]


def cached(pipe, *, skips):
    """Enable a cache that computes the first block, and of the others all, or none after the first step."""
    cache_dit.enable_cache(
        pipe,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, max_warmup_steps=1, residual_diff_threshold=1e9 if skips else -1.0
        ),
    )


def off(pipe):
    cache_dit.disable_cache(pipe)


def calls(pipe):
    return sum(layer.dense_calls + layer.sparse_calls for layer in blade_summary(pipe).transformers[0].layers)


def test_a_cache_that_never_skips_changes_no_bit(pipe):
    plain = latents(pipe)
    for sparsity in (0.0, 0.5):
        config = BladeConfig(sparsity=sparsity, dense_steps=1, asa=DETAILS)
        apply_blade(pipe, config)
        expected, alone = latents(pipe), calls(pipe)
        assert torch.equal(expected, plain) == (sparsity == 0)
        apply_blade(pipe, config)
        cached(pipe, skips=False)
        assert torch.equal(latents(pipe), expected) and calls(pipe) == alone
        off(pipe)
        remove_blade(pipe)
        assert torch.equal(latents(pipe), plain)


def test_cached_tokens_are_in_the_order_of_the_next_step(pipe, keep_all):
    config = BladeConfig(sparsity=0.0, dense_steps=1, asa=DETAILS)
    plain = latents(pipe)
    cached(pipe, skips=True)
    expected = latents(pipe)
    assert not torch.allclose(expected, plain, rtol=2e-3, atol=2e-3)
    apply_blade(pipe, config)  # around cache-dit
    torch.testing.assert_close(latents(pipe), expected, rtol=2e-3, atol=2e-3)
    remove_blade(pipe)
    assert torch.equal(latents(pipe), expected)
    off(pipe)
    assert torch.equal(latents(pipe), plain)
    apply_blade(pipe, config)
    latents(pipe)
    every = calls(pipe)
    apply_blade(pipe, config)
    cached(pipe, skips=True)  # around BLADE
    torch.testing.assert_close(latents(pipe), expected, rtol=2e-3, atol=2e-3)
    assert 0 < calls(pipe) < every


def test_blade_beneath_cache_dit_comes_off_after_it(pipe):
    plain = latents(pipe)
    apply_blade(pipe, SPARSE)
    sparse = latents(pipe)
    cached(pipe, skips=True)
    both = latents(pipe)
    for change in (remove_blade, lambda given: apply_blade(given, SPARSE)):
        with pytest.raises(ValueError, match=r"cache-dit was enabled after .* call `cache_dit.disable_cache` first"):
            change(pipe)
        assert torch.equal(latents(pipe), both)
    off(pipe)
    assert torch.equal(latents(pipe), sparse)
    remove_blade(pipe)
    assert torch.equal(latents(pipe), plain)


def test_blade_that_cache_dit_has_taken_along_says_so(pipe):
    plain = latents(pipe)
    cached(pipe, skips=True)
    apply_blade(pipe, SPARSE)
    latents(pipe)
    off(pipe)  # puts back the forward from before BLADE
    with pytest.raises(RuntimeError, match=r"hook on the transformer did not run: .* Call `apply_blade` again"):
        latents(pipe)
    remove_blade(pipe)
    assert torch.equal(latents(pipe), plain)
