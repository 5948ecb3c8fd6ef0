"""apply_blade, remove_blade, use_blade and blade_summary on a tiny Wan model and pipeline."""

import logging
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import nn

from blade import BladeConfig, apply_blade, blade_summary, remove_blade, use_blade
from blade.attention.applied import applied_to
from blade.attention.config import AdaptiveConfig

DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)
CONFIG = BladeConfig(sparsity=0.5, asa=DETAILS)


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs).sample


def processors(transformer):
    return [block.attn1.processor for block in transformer.blocks]


def calls(transformer):
    layers = blade_summary(transformer).transformers[0].layers
    return [(layer.sparse_calls, layer.dense_calls) for layer in layers]


@pytest.fixture
def pipe(make_wan):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=make_wan())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, steps=4, guidance_scale=5.0, **options):
    embeds = torch.randn(2, 1, 6, 8, generator=torch.Generator().manual_seed(3))
    return pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        height=80,
        width=112,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
        **options,
    ).frames


def test_the_same_object_comes_back_and_cross_attention_stays(make_wan):
    transformer = make_wan()
    before = transformer.attn_processors
    assert apply_blade(transformer, CONFIG) is transformer
    after = transformer.attn_processors
    changed = {name for name in before if before[name] is not after[name]}
    assert changed == {f"blocks.{index}.attn1.processor" for index in range(3)}
    assert not any(isinstance(processor, nn.Module) for processor in after.values())
    assert remove_blade(transformer) is transformer


def test_removing_puts_everything_back(make_wan, wan_inputs):
    transformer, inputs = make_wan(), wan_inputs()
    plain, before, state = run(transformer, inputs), processors(transformer), list(transformer.state_dict())
    forward = type(transformer).forward
    apply_blade(transformer, CONFIG)
    assert not torch.equal(run(transformer, inputs), plain)
    assert list(transformer.state_dict()) == state
    remove_blade(transformer)
    assert all(now is then for now, then in zip(processors(transformer), before))
    assert not transformer.rope._forward_hooks
    assert applied_to(transformer) is None
    assert torch.equal(run(transformer, inputs), plain)
    assert type(transformer).forward is forward
    remove_blade(transformer)  # once more does nothing


def test_a_second_call_replaces_the_first(make_wan, wan_inputs):
    transformer, inputs = make_wan(), wan_inputs()
    before = processors(transformer)
    apply_blade(transformer, BladeConfig(sparsity=0.8, asa=DETAILS))
    apply_blade(transformer, CONFIG)
    assert all(now.previous is then for now, then in zip(processors(transformer), before))
    assert len(transformer.rope._forward_hooks) == 1
    assert torch.equal(run(transformer, inputs), run(apply_blade(make_wan(), CONFIG), inputs))


def test_a_call_that_fails_changes_nothing(make_wan, wan_inputs):
    transformer, inputs = apply_blade(make_wan(), CONFIG), wan_inputs()
    expected = run(transformer, inputs)
    with pytest.raises(ValueError, match=r"`dense_layers` must be from 0 to 2, the last layer here, got \[7\]"):
        apply_blade(transformer, BladeConfig(dense_layers=[0, 7]))
    assert torch.equal(run(transformer, inputs), expected)


def test_use_blade_puts_back_what_was_there(make_wan, wan_inputs):
    transformer, inputs = make_wan(), wan_inputs()
    plain = run(transformer, inputs)
    with use_blade(transformer, CONFIG) as same:
        assert same is transformer
        sparse = run(transformer, inputs)
        with use_blade(transformer, BladeConfig(sparsity=0.8, asa=DETAILS)):
            assert not torch.equal(run(transformer, inputs), sparse)
        assert torch.equal(run(transformer, inputs), sparse)
        assert calls(transformer) == [(2, 0)] * 3  # the inner block's calls are not counted here
    assert torch.equal(run(transformer, inputs), plain)
    with pytest.raises(RuntimeError, match="inside"), use_blade(transformer, CONFIG):
        raise RuntimeError("inside")
    assert applied_to(transformer) is None


def test_a_processor_set_later_by_someone_else_is_told_and_stays(make_wan, wan_inputs):
    transformer = apply_blade(make_wan(), CONFIG)
    theirs = WanAttnProcessor()
    transformer.blocks[1].attn1.set_processor(theirs)
    with pytest.raises(ValueError, match="of layer 1 was replaced by a WanAttnProcessor after `apply_blade`, as"):
        run(transformer, wan_inputs())
    apply_blade(transformer, CONFIG)
    run(transformer, wan_inputs())
    assert calls(transformer) == [(1, 0)] * 3
    remove_blade(transformer)
    assert transformer.blocks[1].attn1.processor is theirs


def test_a_layer_that_cannot_be_sparse_says_why_once(make_wan, wan_inputs, caplog):
    class TheirProcessor(WanAttnProcessor):
        pass

    transformer, inputs = make_wan(), wan_inputs()
    transformer.blocks[1].attn1.set_processor(TheirProcessor())
    with pytest.raises(ValueError, match=r"Layer 1 stays dense: its processor is a TheirProcessor.*`strict=True`"):
        apply_blade(transformer, BladeConfig(strict=True, asa=DETAILS))
    with caplog.at_level(logging.WARNING, logger="blade"):
        apply_blade(transformer, CONFIG)
        run(transformer, inputs)
        run(transformer, inputs)
    assert [record.message for record in caplog.records] == [
        "Layer 1 stays dense: its processor is a TheirProcessor, not Diffusers' WanAttnProcessor."
    ]
    assert calls(transformer) == [(2, 0), (0, 2), (2, 0)]
    assert "dense layer 1: its processor is a TheirProcessor" in str(blade_summary(transformer))


def test_a_video_of_one_block_stays_dense_and_says_so(make_wan, wan_inputs, caplog):
    inputs = wan_inputs(grid=(1, 2, 3))
    transformer = make_wan()
    plain = run(transformer, inputs)
    with caplog.at_level(logging.WARNING, logger="blade"):
        assert torch.equal(run(apply_blade(transformer, CONFIG), inputs), plain)
    assert "All layers stay dense at 1 x 2 x 3 tokens in 1 blocks" in caplog.text
    apply_blade(transformer, BladeConfig(strict=True, asa=DETAILS))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"All layers stay dense at .*`strict=True`"):
            run(transformer, inputs)


def test_the_summary_names_what_computed_the_attention(make_wan, wan_inputs):
    transformer = apply_blade(make_wan(layers=2), BladeConfig(sparsity=0.5, dense_layers=[0], asa=DETAILS))
    assert "block-sparse attention by" not in str(blade_summary(transformer))
    run(transformer, wan_inputs())
    summary = blade_summary(transformer)
    assert [layer.implementation for layer in summary.transformers[0].layers] == [None, "cpu"]
    assert "block-sparse attention by cpu" in str(summary)


def relative_change(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("pooled", ["none", "all", "dropped"])
def test_eight_bits_change_little_and_train_nothing(make_wan, wan_inputs, pooled):
    config = BladeConfig(sparsity=0.5, pooled_tokens=pooled, asa=DETAILS)
    # one layer, as the next ones choose other blocks where little has changed
    full = run(apply_blade(make_wan(layers=1), config), wan_inputs())
    transformer = apply_blade(make_wan(layers=1), replace(config, precision="int8"))
    assert 1e-5 < relative_change(run(transformer, wan_inputs()), full) < 0.02
    apply_blade(transformer, config)
    torch.testing.assert_close(run(transformer, wan_inputs()), full)
    apply_blade(transformer, replace(config, precision="int8"))
    with pytest.raises(NotImplementedError, match='`precision` must be "full" where gradients are needed'):
        transformer(**wan_inputs())


@pytest.mark.parametrize(("implementation", "used"), [("cpu", "cpu"), ("reference", "cpu"), ("naive", "naive")])
def test_the_implementation_that_was_asked_for_computes_the_attention(make_wan, wan_inputs, implementation, used):
    config = BladeConfig(sparsity=0.5, pooled_tokens="dropped", asa=DETAILS)
    expected = run(apply_blade(make_wan(), config), wan_inputs())
    transformer = apply_blade(make_wan(), replace(config, implementation=implementation))
    torch.testing.assert_close(run(transformer, wan_inputs()), expected)
    assert {layer.implementation for layer in blade_summary(transformer).transformers[0].layers} == {used}


def test_a_budget_that_is_too_small_is_told(make_wan, wan_inputs):
    config = BladeConfig(attention="asa-gt", sparsity=0.9, asa=DETAILS)  # pooled tokens alone are a quarter
    transformer = apply_blade(make_wan(), config)
    run(transformer, wan_inputs())
    summary = blade_summary(transformer)
    assert summary.transformers[0].budget.kept_blocks == 1
    assert "take a density of 0.333, more than the 0.100 that was requested" in str(summary)
    assert summary.layer_density == pytest.approx(0.333, abs=0.01)


@pytest.mark.parametrize("pooled", ["none", "all", "dropped"])
@pytest.mark.parametrize("selector", ["sampled", "mean-pooled", "random", "local"])
def test_densities_are_those_of_the_masks(make_wan, wan_inputs, monkeypatch, pooled, selector):
    """The densities come from what the attention was given, read apart from the counters."""
    from blade.attention import adaptive

    seen = []
    attend = adaptive.block_sparse_attention

    def spy(query, key, value, mask, *, pooled=None, **options):
        pairs = mask.keep.repeat_interleave(8, -1).repeat_interleave(8, -2)[..., :105, :105].sum((-1, -2)).double()
        if pooled is not None and pooled.key_block is None:
            pairs += 105 * len(pooled)
        elif pooled is not None:
            dropped = ~mask.keep[..., pooled.key_block.long()]
            pairs += dropped.repeat_interleave(8, -2)[..., :105, :].sum((-1, -2))
        seen.append((pairs / 105**2).mean().item())
        return attend(query, key, value, mask, pooled=pooled, **options)

    monkeypatch.setattr(adaptive, "block_sparse_attention", spy)
    details = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4, selector=selector)
    config = BladeConfig(sparsity=0.5, pooled_tokens=pooled, dense_layers=[0], dense_steps=1, asa=details)
    transformer = apply_blade(make_wan(), config)
    for timestep in (900.0, 600.0, 300.0):
        run(transformer, wan_inputs(batch=2, timestep=timestep))
    summary = blade_summary(transformer)
    assert calls(transformer) == [(0, 3), (2, 1), (2, 1)]
    assert len(seen) == 4
    assert summary.layer_density == pytest.approx(sum(seen) / 4, rel=1e-5)
    assert summary.run_density == pytest.approx((sum(seen) + 5) / 9, rel=1e-5)
    assert 0.4 < summary.layer_density <= 0.5
    text = str(summary)
    assert f"layer density {summary.layer_density:.4f} (sparse layers and steps)" in text
    assert f"run density {summary.run_density:.4f} (dense ones included)" in text
    assert "dense layer 0: it is one of `dense_layers`" in text


def test_the_summary_before_the_first_run_and_without_blade(make_wan):
    transformer = apply_blade(make_wan(), CONFIG)
    summary = blade_summary(transformer)
    assert (summary.layer_density, summary.run_density) == (None, None)
    assert "no forward pass yet" in str(summary)
    with pytest.raises(ValueError, match="BLADE is not applied here"):
        blade_summary(remove_blade(transformer))


def test_a_pipelines_steps_are_counted_with_guidance(pipe):
    apply_blade(pipe, BladeConfig(dense_steps=0.25, asa=DETAILS))
    generate(pipe, steps=4)
    assert calls(pipe) == [(6, 2)] * 3
    generate(pipe, steps=2, guidance_scale=1.0)  # a quarter of two steps is rounded up to one
    assert calls(pipe) == [(7, 3)] * 3


def test_an_older_pipeline_that_names_no_step_counts_the_same(pipe, monkeypatch):
    expected = generate(apply_blade(pipe, BladeConfig(dense_steps=1, asa=DETAILS)))
    context = type(pipe.transformer).cache_context
    monkeypatch.setattr(type(pipe.transformer), "cache_context", lambda self, name, **options: context(self, name))
    apply_blade(pipe, BladeConfig(dense_steps=1, asa=DETAILS))
    assert torch.equal(generate(pipe), expected)
    assert calls(pipe) == [(6, 2)] * 3


def test_a_run_of_dense_steps_is_bitwise_the_same(pipe):
    plain = generate(pipe)
    assert torch.equal(generate(apply_blade(pipe, BladeConfig(dense_steps=4, asa=DETAILS))), plain)
    assert blade_summary(pipe).run_density == 1.0


def test_an_unknown_number_of_steps_is_taken_for_fifty(make_wan, wan_inputs, caplog):
    transformer = apply_blade(make_wan(layers=1), BladeConfig(dense_steps=0.04, asa=DETAILS))
    with caplog.at_level(logging.WARNING, logger="blade"):
        for timestep in (900.0, 800.0, 700.0):
            run(transformer, wan_inputs(timestep=timestep))
    assert calls(transformer) == [(1, 2)]
    assert caplog.text.count("The number of steps is unknown") == 1
    apply_blade(transformer, BladeConfig(dense_steps=60, asa=DETAILS))
    for timestep in range(600, 535, -1):
        run(transformer, wan_inputs(grid=(1, 2, 5), timestep=float(timestep)))
    assert calls(transformer) == [(5, 60)]


def test_the_seed_alone_decides(pipe):
    first = generate(apply_blade(pipe, CONFIG))
    torch.manual_seed(99)
    assert torch.equal(generate(apply_blade(pipe, CONFIG)), first)
    assert torch.equal(generate(pipe), first)
    other = generate(apply_blade(pipe, BladeConfig(seed=1, asa=DETAILS)))
    assert not torch.equal(other, first)


def test_every_layer_and_step_draws_its_own_and_guidance_shares_them(pipe, monkeypatch):
    from blade.attention import adaptive

    draws = []
    attend = adaptive.adaptive_attention

    def spy(query, key, value, plan, draw, *options):
        draws.append(tuple(draw.flatten().tolist()))
        return attend(query, key, value, plan, draw, *options)

    monkeypatch.setattr(adaptive, "adaptive_attention", spy)
    generate(apply_blade(pipe, CONFIG), steps=3)
    conditional, unconditional = ([draws[i : i + 3] for i in range(first, 18, 6)] for first in (0, 3))
    assert conditional == unconditional
    assert len({draw for step in conditional for draw in step}) == 9


def test_both_transformers_of_a_pipeline_are_sparse(make_wan, pipe):
    two = WanPipeline(**pipe.components | {"transformer_2": make_wan(seed=1)}, boundary_ratio=0.5)
    two.set_progress_bar_config(disable=True)
    generate(apply_blade(two, BladeConfig(dense_steps=1, asa=DETAILS)), steps=6)
    summary = blade_summary(two)
    assert [transformer.name for transformer in summary.transformers] == ["transformer", "transformer_2"]
    high, low = ([(layer.sparse_calls, layer.dense_calls) for layer in one.layers] for one in summary.transformers)
    # steps are those of the scheduler: the second transformer has no dense step of its own
    assert high[0][1] == 2 and low[0][1] == 0
    assert high[0][0] + low[0][0] == 10 and low[0][0] > 0
    remove_blade(two)
    assert applied_to(two.transformer) is None and applied_to(two.transformer_2) is None


def test_each_of_two_transformers_takes_its_own_configuration(make_wan, pipe):
    two = WanPipeline(**pipe.components | {"transformer_2": make_wan(seed=1)}, boundary_ratio=0.5)
    first, second = (BladeConfig(sparsity=sparsity, asa=DETAILS) for sparsity in (0.3, 0.6))
    apply_blade(two, {"transformer": first, "transformer_2": second})
    assert (applied_to(two.transformer).config, applied_to(two.transformer_2).config) == (first, second)
    apply_blade(two, {"transformer_2": first})
    assert applied_to(two.transformer) is None and applied_to(two.transformer_2).config == first
    with pytest.raises(ValueError, match="`config` must be for transformer and transformer_2, got one for 'second'"):
        apply_blade(two, {"second": first})
    with pytest.raises(ValueError, match="`config` must be a BladeConfig, or several by name, or None, got dict"):
        apply_blade(two, {"transformer": {"sparsity": 0.5}})
    assert applied_to(two.transformer_2).config == first
    remove_blade(two)


def test_what_torch_compile_returns_is_looked_through(make_wan):
    transformer = make_wan()
    compiled = torch.compile(transformer, backend="eager")
    assert apply_blade(compiled, CONFIG) is compiled
    assert applied_to(transformer) is not None
    remove_blade(compiled)
    assert applied_to(transformer) is None


def test_a_students_values_warn(make_wan):
    with pytest.warns(UserWarning, match="a student's values, for weights that were trained with them"):
        apply_blade(make_wan(), BladeConfig(kind="student"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_blade(make_wan(), CONFIG, dense_steps=0)


@pytest.mark.parametrize("target", [None, 3, object()])
def test_what_is_no_model_is_refused(target):
    with pytest.raises(ValueError, match="`pipe_or_transformer` must be a Diffusers pipeline with a `transformer`"):
        apply_blade(target, CONFIG)


def test_an_unknown_implementation_is_refused(make_wan):
    with pytest.raises(ValueError, match=r"`implementation` must be one of auto, triton, .*got 'cuda'"):
        apply_blade(make_wan(), BladeConfig(implementation="cuda"))


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match=r"`Linear` is of no model family that BLADE knows; it must be one of: .*Wan"):
        apply_blade(nn.Linear(2, 2), CONFIG)


def test_a_wrong_configuration_is_refused(make_wan):
    with pytest.raises(ValueError, match="`config` must be a BladeConfig, or several by name, or None, got float"):
        apply_blade(make_wan(), {"sparsity": 0.5})


def applied_config(part):
    return applied_to(getattr(part, "transformer", part)).config


def test_changes_start_from_the_preset(pipe):
    preset = BladeConfig.from_preset("shapes")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_blade(pipe, sparsity=0.6)
        assert applied_config(pipe) == replace(preset, sparsity=0.6)
        apply_blade(pipe.transformer, dense_layers="0-1", attention="asa-gt")
        assert applied_config(pipe) == replace(preset, dense_layers=(0, 1), pooled_tokens="all")
        with use_blade(pipe, sparsity=0.7):
            assert applied_config(pipe) == replace(preset, sparsity=0.7)
        assert applied_config(pipe) == replace(preset, dense_layers=(0, 1), pooled_tokens="all")


def test_a_kind_of_preset_is_named(pipe):
    apply_blade(pipe, kind="few-step", sparsity=0.6)
    assert applied_config(pipe) == replace(BladeConfig.from_preset("shapes", "few-step"), sparsity=0.6)
    with use_blade(pipe.transformer, kind="training-free"):
        assert applied_config(pipe) == BladeConfig.from_preset("shapes")
    with pytest.warns(UserWarning, match="These are a student's values"):
        apply_blade(pipe, kind="student")
    before = applied_to(pipe.transformer)
    with pytest.raises(ValueError, match=r"`kind` must not be given with `config`: .* got 'few-step'"):
        apply_blade(pipe, CONFIG, kind="few-step")
    with pytest.raises(ValueError, match='`kind` must be one of "training-free", "few-step", "student", got \'fast\''):
        apply_blade(pipe, kind="fast")
    assert applied_to(pipe.transformer) is before


def test_changes_are_made_to_a_given_configuration(pipe):
    config = replace(CONFIG, dense_steps=1)
    apply_blade(pipe, config, sparsity=0.75)
    assert applied_config(pipe) == replace(config, sparsity=0.75)
    apply_blade(pipe, {"transformer": config}, seed=3)
    assert applied_config(pipe) == replace(config, seed=3)


def test_a_change_that_is_no_field_is_refused(pipe):
    with pytest.raises(ValueError, match="`sparcity` must be a field of BladeConfig: attention, sparsity, "):
        apply_blade(pipe, sparcity=0.6)
    assert applied_to(pipe.transformer) is None


def test_a_configuration_that_loses_the_presets_dense_parts_is_warned_of(pipe):
    with pytest.warns(UserWarning, match=r"dense_steps=0\.2, dense_layers=\(0,\) and blocks of 32 tokens\. .*=0\.6\)"):
        apply_blade(pipe, BladeConfig(sparsity=0.6, asa=DETAILS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_blade(pipe, BladeConfig(sparsity=0.6, asa=DETAILS), dense_steps=0)
        apply_blade(pipe, BladeConfig(sparsity=0.6, dense_layers=(0,), asa=DETAILS))
        apply_blade(pipe, BladeConfig(attention="dense"))
        apply_blade(pipe, BladeConfig(sparsity=0, asa=DETAILS))
    assert applied_config(pipe).dense_steps == 0
