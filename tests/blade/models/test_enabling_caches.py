"""Caches by their names: enabled on every transformer, or refused with the reason and without a trace."""

import sys

import diffusers
import pytest
import torch
from cache_settings import hooks_of

from blade import BladeConfig, apply_blade, blade_summary, remove_blade
from blade.attention.budget import BlockBudget
from blade.attention.config import AdaptiveConfig
from blade.models.caches import enable_cache
from blade.models.loaded import LoadedModel

DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)


def enable(pipe, text, *, guidance=True, steps=3):
    enable_cache(LoadedModel(pipe), text, steps=steps, guidance=guidance)
    return pipe


def latents(pipe):
    """Output of a small pipeline, and the timesteps that it went through."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    return pipe(prompt="", output_type="latent", generator=torch.Generator().manual_seed(0))[0]


@pytest.fixture
def two_experts(small_pipelines, make_wan):
    """A small Wan 2.2 pipeline, whose second transformer takes over in the middle."""
    pipe = small_pipelines["WanPipeline"]()
    return type(pipe)(**pipe.components | {"transformer_2": make_wan(seed=1)}, boundary_ratio=0.8)


@pytest.mark.parametrize("cache", ["first-block", "sea", "taylor-seer=2"])
def test_a_cache_is_enabled_on_both_experts(two_experts, cache):
    plain = latents(two_experts)
    enable(two_experts, cache)
    experts = (two_experts.transformer, two_experts.transformer_2)
    assert all(transformer.is_cache_enabled and hooks_of(transformer) for transformer in experts)
    apply_blade(two_experts, BladeConfig(sparsity=0.5, dense_steps=1, asa=DETAILS))
    assert latents(two_experts).isfinite().all()
    for part in blade_summary(two_experts).transformers:
        assert any(layer.dense_calls + layer.sparse_calls for layer in part.layers)
    remove_blade(two_experts)
    for transformer in experts:
        transformer.disable_cache()
    assert torch.equal(latents(two_experts), plain)


REFUSED = [
    ("WanPipeline", "pyramid", "must not be pyramid with guidance: a Small runs its passes one after the other"),
    ("WanPipeline", "faster", "must not be faster with guidance"),
    ("WanPipeline", "mag", "mag needs the magnitude ratios of these weights, and none are known for shapes-unknown"),
    ("WanImageToVideoPipeline", "sea", "sea is not known to Diffusers for this WanTransformer3DModel"),
    ("CogVideoXPipeline", "sea", "sea is not known to Diffusers for this CogVideoXTransformer3DModel"),
    ("LTXPipeline", "faster", "takes latents of height and width, and a Small packs them into tokens"),
    ("HunyuanVideo15Pipeline", "first-block", "first-block is not known to Diffusers for a HunyuanVideo15Transformer"),
]


@pytest.mark.parametrize(("name", "cache", "message"), REFUSED)
def test_what_cannot_work_is_refused_without_a_trace(small_pipelines, monkeypatch, name, cache, message):
    pipe = small_pipelines[name]()
    monkeypatch.setattr(LoadedModel, "preset_name", "shapes-unknown")
    before = [sorted(vars(module)) for module in pipe.transformer.modules()]
    with pytest.raises(ValueError, match=f"`cache` .*{message}"):
        enable(pipe, cache)
    assert [sorted(vars(module)) for module in pipe.transformer.modules()] == before
    assert not pipe.transformer.is_cache_enabled


def test_a_failure_on_the_second_expert_leaves_the_first_alone(two_experts):
    two_experts.transformer_2.enable_cache(diffusers.FirstBlockCacheConfig())
    before = hooks_of(two_experts.transformer), hooks_of(two_experts.transformer_2)
    with pytest.raises(ValueError, match="Caching has already been enabled"):
        enable(two_experts, "taylor-seer")
    assert (hooks_of(two_experts.transformer), hooks_of(two_experts.transformer_2)) == before
    assert not two_experts.transformer.is_cache_enabled


def test_a_pipeline_that_does_not_name_its_passes_is_refused(make_wan, small_pipelines):
    parts = small_pipelines["WanPipeline"]().components
    parts = {name: parts[name] for name in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")}
    pipe = diffusers.WanVideoToVideoPipeline(**parts)
    for cache in ("first-block", "taylor-seer", "sea"):
        with pytest.raises(ValueError, match="a WanVideoToVideoPipeline does not name its passes"):
            enable(pipe, cache)
    enable(pipe, "pyramid", guidance=False)


def test_without_cache_dit_it_says_what_to_install(small_pipelines, monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    with pytest.raises(ValueError, match=r'needs cache-dit: pip install "blade-video\[cache-dit\]"'):
        enable(small_pipelines["WanPipeline"](), "cache-dit")


def test_one_state_for_two_passes_is_wrong_in_diffusers_itself(make_wan, wan_inputs):
    """Why PyramidAttentionBroadcast and FasterCache are refused with passes that run one after the other."""
    first, second = wan_inputs(seed=1), wan_inputs(seed=2)
    transformer = make_wan()
    with torch.no_grad():
        expected = transformer(**second).sample
        transformer.enable_cache(
            diffusers.PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
            )
        )
        transformer(**first)
        assert (transformer(**second).sample - expected).abs().max() > 0.1


def test_faster_cache_leaves_out_unconditional_passes(small_pipelines, monkeypatch):
    """Later steps of a batch of two have the condition alone, whichever of cache and BLADE came first."""
    monkeypatch.setattr(BlockBudget, "is_full", False)
    config = BladeConfig(sparsity=0.0, dense_steps=1, asa=DETAILS)
    torch.manual_seed(1)
    pipe = small_pipelines["CogVideoXPipeline"]()
    batches = []
    block = pipe.transformer.transformer_blocks[0]
    block.register_forward_hook(lambda module, args, output: batches.append(len(output[0])))
    plain = latents(pipe)
    assert batches == [2, 2, 2]
    batches.clear()
    expected, wanted = latents(enable(pipe, "faster")), list(batches)
    assert wanted[0] == 2 and wanted[-1] == 1 and (expected - plain).abs().max() > 1e-3
    pipe.transformer.disable_cache()
    both = (lambda: enable(pipe, "faster"), lambda: apply_blade(pipe, config))
    for changes in (both, both[::-1]):
        for change in changes:
            change()
        batches.clear()
        torch.testing.assert_close(latents(pipe), expected, rtol=2e-3, atol=2e-3)
        assert batches == wanted
        (counted,) = blade_summary(pipe).transformers
        assert [layer.dense_calls for layer in counted.layers] == [1, 1], "the dense step is the first"
        assert all(1 <= layer.sparse_calls <= 2 for layer in counted.layers)
        remove_blade(pipe)
        pipe.transformer.disable_cache()
        assert torch.equal(latents(pipe), plain)
