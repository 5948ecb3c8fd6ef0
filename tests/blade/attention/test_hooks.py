"""BLADE's hook on a transformer beside other hooks: offloading, caches, layer skipping."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook

from blade import BladeConfig, apply_blade, blade_summary, remove_blade
from blade.attention.applied import applied_to
from blade.attention.config import AdaptiveConfig

CONFIG = BladeConfig(sparsity=0.5, asa=AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4))


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs).sample


def test_offloading_hooks_may_come_before_or_after(make_wan, wan_inputs):
    inputs = wan_inputs()
    expected = run(apply_blade(make_wan(), CONFIG), inputs)
    for offloading_first in (True, False):
        transformer = make_wan()
        plain = run(transformer, inputs)
        if offloading_first:
            add_hook_to_module(transformer, ModelHook())
        apply_blade(transformer, CONFIG)
        if not offloading_first:
            add_hook_to_module(transformer, ModelHook())
        assert torch.equal(run(transformer, inputs), expected)
        # `enable_model_cpu_offload` takes its hooks off and puts them on again after each generation
        remove_hook_from_module(transformer)
        assert torch.equal(run(transformer, inputs), expected)
        add_hook_to_module(transformer, ModelHook())
        remove_blade(transformer)
        assert torch.equal(run(transformer, inputs), plain)
        remove_hook_from_module(transformer)
        assert torch.equal(run(transformer, inputs), plain)


def test_a_hook_beneath_may_take_itself_off(make_wan, wan_inputs):
    class FirstPass(DiffusersHook):  # as group offloading with streams has one
        def post_forward(self, module, output):
            module._diffusers_hook.remove_hook("first_pass", recurse=False)
            return output

    transformer, inputs = make_wan(), wan_inputs()
    expected = run(apply_blade(make_wan(), CONFIG), inputs)
    plain = run(transformer, inputs)
    HookRegistry.check_if_exists_or_initialize(transformer).register_hook(FirstPass(), "first_pass")
    apply_blade(transformer, CONFIG)
    for _ in range(2):
        assert torch.equal(run(transformer, inputs), expected)
    assert torch.equal(run(remove_blade(transformer), inputs), plain)


def test_an_error_in_a_pass_leaves_nothing_behind(make_wan, wan_inputs):
    transformer, inputs = make_wan(), wan_inputs()
    plain = run(transformer, inputs)
    expected = run(apply_blade(transformer, CONFIG), inputs)
    with pytest.raises(RuntimeError):
        run(transformer, {**inputs, "encoder_hidden_states": torch.zeros(1, 2, 3)})
    assert torch.equal(run(transformer, inputs), expected)
    with pytest.raises(RuntimeError):
        run(transformer, {**inputs, "encoder_hidden_states": torch.zeros(1, 2, 3)})
    assert torch.equal(run(remove_blade(transformer), inputs), plain)


@pytest.mark.parametrize("blade_first", [True, False])
@pytest.mark.parametrize("blade_off_first", [True, False])
def test_a_cache_around_the_transformer_may_come_before_or_after(make_wan, wan_inputs, blade_first, blade_off_first):
    """Whichever way, it sees latents and predictions in raster order, and the other one stays when one goes."""

    class Cache(DiffusersHook):
        seen = None

        def new_forward(self, module, *args, **kwargs):
            self.seen = kwargs["hidden_states"], self.fn_ref.original_forward(*args, **kwargs).sample
            return (self.seen[1],)

    def outputs():
        with torch.no_grad():
            return transformer(**inputs)[0]

    transformer, inputs, cache = make_wan(), wan_inputs(), Cache()
    plain = run(transformer, inputs)
    sparse = run(apply_blade(make_wan(), CONFIG), inputs)
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    if blade_first:
        apply_blade(transformer, CONFIG)
    registry.register_hook(cache, "a_cache")
    if not blade_first:
        apply_blade(transformer, CONFIG)
    for _ in range(2):
        assert torch.equal(outputs(), sparse)
        latent, predicted = cache.seen
        assert latent is inputs["hidden_states"] and torch.equal(predicted, sparse)
        apply_blade(transformer, CONFIG)  # a second time, in its place
    if blade_off_first:
        remove_blade(transformer)
        assert torch.equal(outputs(), plain) and torch.equal(cache.seen[1], plain)
        registry.remove_hook("a_cache")
    else:
        registry.remove_hook("a_cache")
        assert torch.equal(run(transformer, inputs), sparse)
        remove_blade(transformer)
    cache.seen = None
    assert torch.equal(run(transformer, inputs), plain) and cache.seen is None
    assert applied_to(transformer) is None and registry.hooks == {}


def test_a_forward_set_since_stays_when_blade_goes(make_wan, wan_inputs):
    transformer, inputs = make_wan(), wan_inputs()
    plain, original = run(transformer, inputs), transformer.forward
    apply_blade(transformer, CONFIG)
    transformer.forward = lambda **given: original(**given)  # as what came before BLADE puts back when it goes
    remove_blade(transformer)
    assert torch.equal(run(transformer, inputs), plain)


def test_a_lost_hook_is_an_error_and_no_silent_damage(make_wan, wan_inputs):
    transformer, inputs = apply_blade(make_wan(), CONFIG), wan_inputs()
    run(transformer, inputs)
    del transformer.forward
    with pytest.raises(RuntimeError, match="BLADE's hook on the transformer did not run"):
        run(transformer, inputs)


def test_skipped_layers_stay_skipped_and_skipped_scores_are_refused(make_wan, wan_inputs):
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip
    from diffusers.hooks.layer_skip import AttentionProcessorSkipHook

    inputs = wan_inputs()
    plain, sparse, scores = make_wan(), make_wan(), make_wan()
    for transformer in (plain, sparse):
        apply_layer_skip(transformer, LayerSkipConfig(indices=[1], fqn="blocks"))
    expected = run(plain, inputs)
    torch.testing.assert_close(run(apply_blade(sparse, BladeConfig(attention="dense")), inputs), expected)
    run(apply_blade(sparse, CONFIG), inputs)
    assert [layer.sparse_calls for layer in blade_summary(sparse).transformers[0].layers][1] == 0
    # as Diffusers does for the processors that it knows, of which Wan's is none
    attention = scores.blocks[1].attn1
    hook = AttentionProcessorSkipHook(lambda *args: None, skip_attention_scores=True)
    HookRegistry.check_if_exists_or_initialize(attention).register_hook(hook, "layer_skip")
    with pytest.raises(ValueError, match="Layer 1 skips its attention scores"):
        run(apply_blade(scores, CONFIG), inputs)
