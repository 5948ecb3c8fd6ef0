"""CogVideoX under BLADE: what other families do not have."""

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)

from blade import BladeConfig, TokenGrid, apply_blade, blade_summary, remove_blade
from blade.attention.applied import applied_to
from blade.attention.budget import BlockBudget, plan_budget
from blade.attention.config import AdaptiveConfig

DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)


@pytest.fixture
def tiny():
    """A transformer of two layers with RoPE, in whose attention positions matter."""
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=8, num_layers=2, max_text_seq_length=6, use_rotary_positional_embeddings=True,
    ).eval()  # fmt: skip
    for block in transformer.transformer_blocks:
        block.attn1.norm_q.weight.data.mul_(4.0)
    return transformer


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs).sample


def make_inputs(channels=4):
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(105, 8, generator=generator).repeat_interleave(2, -1) * 6
    return {
        "hidden_states": torch.randn(1, 3, channels, 10, 14, generator=generator),
        "encoder_hidden_states": torch.randn(1, 6, 8, generator=generator),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def test_rotary_tables_follow_their_tokens(tiny, monkeypatch):
    """With tables left in raster order the output is far off."""
    monkeypatch.setattr(BlockBudget, "is_full", False)
    inputs = make_inputs()
    plain = run(tiny, inputs)
    apply_blade(tiny, BladeConfig(sparsity=0.0, asa=DETAILS))
    torch.testing.assert_close(run(tiny, inputs), plain, rtol=1e-4, atol=1e-5)
    family = type(applied_to(tiny).family)
    monkeypatch.setattr(family, "permute_inputs", lambda self, transformer, inputs, permutation: inputs)
    assert (run(tiny, inputs) - plain).abs().max() > 0.01


@pytest.mark.parametrize("make", [CogVideoXDPMScheduler, CogVideoXDDIMScheduler])
def test_dense_steps_are_counted_with_schedulers_that_do_not_count(tiny, make):
    pipe = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=tiny, scheduler=make())
    pipe.set_progress_bar_config(disable=True)
    apply_blade(pipe, BladeConfig(dense_steps=0.5, asa=DETAILS))
    embeds = torch.randn(2, 1, 6, 8, generator=torch.Generator().manual_seed(3))
    for run_number in (1, 2):
        pipe(
            prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], height=80, width=112, num_frames=9,
            num_inference_steps=4, guidance_scale=6.0, output_type="latent",
        )  # fmt: skip
        layers = blade_summary(pipe).transformers[0].layers
        assert [(layer.sparse_calls, layer.dense_calls) for layer in layers] == [(2 * run_number, 2 * run_number)] * 2


def test_a_scheduler_that_counts_is_believed(tiny):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    pipe = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=tiny, scheduler=scheduler)
    apply_blade(pipe, BladeConfig(asa=DETAILS))
    assert applied_to(tiny).steps.resolve(torch.tensor([999])) == (0, 5)


def test_an_attention_mask_is_refused_where_a_layer_is_sparse(tiny):
    apply_blade(tiny, BladeConfig(asa=DETAILS))
    inputs = make_inputs() | {"attention_kwargs": {"attention_mask": torch.ones(1, 111)}}
    with pytest.raises(ValueError, match="A sparse CogVideoX layer takes no `attention_mask`"):
        run(tiny, inputs)
    remove_blade(tiny)


@pytest.mark.parametrize(
    ("heads", "patch_t", "preset"), [(30, None, "cogvideox"), (48, None, "cogvideox-5b"), (48, 2, "cogvideox-1.5")]
)
def test_the_preset_is_found_by_version_and_size(heads, patch_t, preset):
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=heads, num_layers=1, patch_size_t=patch_t, use_rotary_positional_embeddings=True
        )
    apply_blade(transformer)
    assert applied_to(transformer).family.preset_name(transformer) == preset
    assert applied_to(transformer).config == BladeConfig.from_preset(preset)


def test_the_students_budget_is_the_published_one():
    """480 x 720, 49 frames: 139 blocks, of which the last two hold text; sparsity 0.82 (BLADE, table 1)."""
    config = BladeConfig.from_preset("cogvideox-5b", "student")
    budget = plan_budget(
        TokenGrid(13, 30, 45, text_after=226), config.sparsity, block_size=128, pooled_tokens="all", pooled_window=15
    )
    assert (budget.blocks, budget.text_blocks, budget.kept_blocks) == (139, 2, 12)
    assert budget.density == pytest.approx(0.18, abs=0.006) and not budget.is_exceeded
