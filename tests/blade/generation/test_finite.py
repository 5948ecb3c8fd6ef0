"""Non-finite values are traced to a step and a layer."""

import pytest
import torch

from blade.generation.finite import NonFiniteError, watch_finite


def test_the_first_layer_is_named(make_wan, wan_inputs):
    transformer, inputs = make_wan(), wan_inputs()
    with watch_finite(transformer) as watch, torch.no_grad():
        transformer(**inputs)
        watch.check(0, inputs["hidden_states"])
        transformer.blocks[1].ffn.net[2].bias.data[3] = float("inf")
        transformer(**inputs)
        with pytest.raises(NonFiniteError, match=r"Non-finite values at step 4, .*output of layer 1 of `transformer`"):
            watch.check(4)


def test_a_scheduler_that_makes_them_is_named(make_wan, wan_inputs):
    transformer, inputs = make_wan(), wan_inputs()
    with watch_finite(transformer) as watch, torch.no_grad():
        transformer(**inputs)
        latents = {"latents": torch.tensor([1.0, float("nan")])}
        with pytest.raises(NonFiniteError, match="at step 2, in the latents that the scheduler made"):
            watch.on_step_end(None, 2, None, latents)
        assert watch.on_step_end(None, 2, None, {}) == {}


def test_the_hooks_are_taken_off(make_wan):
    transformer = make_wan()
    with watch_finite(transformer):
        assert all(block._forward_hooks for block in transformer.blocks)
    assert not any(block._forward_hooks for block in transformer.blocks)
