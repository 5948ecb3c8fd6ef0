"""Wan under BLADE: tokens, positions and timesteps travel together, in any grid, and everything can be undone."""

import copy
from types import SimpleNamespace

import pytest
import torch
from blade_pipelines.shared.patches import permute_patches
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from blade import BladeConfig, TokenGrid, apply_blade, remove_blade
from blade.attention.applied import applied_to
from blade.attention.budget import BlockBudget
from blade.attention.config import AdaptiveConfig

DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs).sample


@pytest.fixture
def keep_all(monkeypatch):
    """Let the sparse path run with every block kept, where it would be left to Diffusers' attention otherwise."""
    monkeypatch.setattr(BlockBudget, "is_full", False)


def rounding_errors(transformer, inputs, output):
    """Largest errors of an output and of the plain model's, both against the plain model in float64."""
    in_float64 = copy.deepcopy(transformer).double()
    for name in ("freqs_cos", "freqs_sin"):
        setattr(in_float64.rope, name, getattr(transformer.rope, name).double())
    oracle = run(in_float64, {name: tensor.double() for name, tensor in inputs.items()})
    plain = run(transformer, inputs)
    return (output - oracle).abs().max().item(), (plain - oracle).abs().max().item()


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([(1, 2, 2), (2, 1, 3)]),
    st.sampled_from(["gilbert", "token-major", "bricks(2,2,2)"]),
    st.integers(0, 1),
)
def test_permuted_patches_are_embedded_as_permuted_tokens(shape, patch, order, rest):
    """Also where the latent ends in the middle of a patch, which the embedding ignores."""
    grid = TokenGrid(*shape)
    latent = torch.randn(2, 3, *(size * length for size, length in zip(shape, patch)))
    embed = torch.nn.Conv3d(3, 6, kernel_size=patch, stride=patch)
    padded = torch.nn.functional.pad(latent, (0, rest * (patch[2] - 1)))
    permutation = grid.order(order)
    permuted = permute_patches(padded, patch, permutation)
    torch.testing.assert_close(embed(permuted).flatten(2), embed(latent).flatten(2)[..., permutation])
    assert torch.equal(permute_patches(permuted, patch, grid.inverse_order(order)), latent)


def test_positions_follow_their_tokens(make_wan, wan_inputs, keep_all):
    """The test above is worth something: with RoPE tables left in raster order it fails by far."""
    transformer, inputs = make_wan(), wan_inputs()
    captured = {}
    attention = transformer.blocks[0].attn1

    def capture(module, args, output):
        query, key = (norm(project(args[0])) for norm, project in pairs)
        query, key = (tensor.unflatten(2, (2, 16)).transpose(1, 2) for tensor in (query, key))
        captured["weights"] = (query @ key.transpose(2, 3) / 4).softmax(-1)

    pairs = ((attention.norm_q, attention.to_q), (attention.norm_k, attention.to_k))
    handle = attention.register_forward_hook(capture)
    apply_blade(transformer, BladeConfig(sparsity=0.0, asa=DETAILS))
    right = run(transformer, inputs)
    handle.remove()
    assert captured["weights"].amax(-1).mean() > 0.5  # peaked, where even attention would give 1/105

    for rope_hook in applied_to(transformer)._handles:
        rope_hook.remove()
    wrong = run(transformer, inputs)
    right_error, plain_error = rounding_errors(remove_blade(transformer), inputs, right)
    wrong_error, _ = rounding_errors(transformer, inputs, wrong)
    assert right_error < 4 * plain_error
    assert wrong_error > 1000 * plain_error


def test_timesteps_of_single_tokens_follow_them(make_wan, wan_inputs, keep_all):
    """TI2V-5B gives every token a timestep of its own; the first frame's is 0 in image to video."""
    transformer, inputs = make_wan(), wan_inputs(batch=2)
    timestep = torch.full((2, 105), 700.0)
    timestep[:, :35] = 0.0
    timestep[:, 60] = 300.0
    inputs["timestep"] = timestep
    sparse = run(apply_blade(transformer, BladeConfig(sparsity=0.0, asa=DETAILS)), inputs)
    error, plain_error = rounding_errors(remove_blade(transformer), inputs, sparse)
    assert error < 4 * plain_error


def test_timesteps_of_another_number_of_tokens_are_refused(make_wan, wan_inputs):
    transformer, inputs = make_wan(), wan_inputs()
    inputs["timestep"] = torch.zeros(1, 100)
    apply_blade(transformer, BladeConfig(asa=DETAILS))
    with pytest.raises(ValueError, match=r"`timestep` must be \(B,\) or \(B, tokens\) with 105 tokens, got shape"):
        run(transformer, inputs)


def test_image_to_video_latents_with_more_channels_than_the_output(make_wan, wan_inputs, keep_all):
    transformer, inputs = make_wan(in_channels=9), wan_inputs(channels=9)
    sparse = run(apply_blade(transformer, BladeConfig(sparsity=0.0, asa=DETAILS)), inputs)
    assert sparse.shape == (1, 4, 3, 10, 14)
    error, plain_error = rounding_errors(remove_blade(transformer), inputs, sparse)
    assert error < 4 * plain_error


def test_first_block_caches_residual_is_the_dense_one_in_token_order(make_wan, wan_inputs):
    inputs = wan_inputs()
    residuals = []
    for sparse in (False, True):
        transformer = make_wan()
        if sparse:
            apply_blade(transformer, BladeConfig(dense_layers=[0], asa=DETAILS))
        transformer.enable_cache(FirstBlockCacheConfig(threshold=0.05))
        with transformer.cache_context("cond"):
            run(transformer, inputs)
        hook = transformer.blocks[0]._diffusers_hook.get_hook("fbc_leader_block_hook")
        residuals.append(hook.state_manager._state_cache["cond"].head_block_residual)
    dense, permuted = residuals
    order = TokenGrid(3, 5, 7).order("gilbert")
    torch.testing.assert_close(permuted, dense[:, order], rtol=1e-4, atol=1e-5)
    assert (permuted - dense).abs().max() > 0.1


def test_a_lora_on_the_output_projection_loaded_later_works(make_wan, wan_inputs, keep_all):
    inputs = wan_inputs()
    generator = torch.Generator().manual_seed(1)
    lora = {
        "transformer.proj_out.lora_A.weight": torch.randn(2, 32, generator=generator),
        "transformer.proj_out.lora_B.weight": torch.randn(16, 2, generator=generator),
    }
    transformer = apply_blade(make_wan(), BladeConfig(sparsity=0.0, asa=DETAILS))
    without = run(transformer, inputs)
    transformer.load_lora_adapter(lora)
    with_lora = run(transformer, inputs)
    assert (with_lora - without).abs().max() > 0.1
    error, plain_error = rounding_errors(remove_blade(transformer), inputs, with_lora)
    assert error < 4 * plain_error


def test_the_dense_fallback_keeps_its_attention_backend(make_wan):
    transformer = make_wan()
    previous = transformer.blocks[1].attn1.processor
    apply_blade(transformer, BladeConfig(asa=DETAILS))
    with attention_backend(AttentionBackendName.NATIVE):  # restores the default, which the next line also changes
        transformer.set_attention_backend("_native_math")
    assert transformer.blocks[1].attn1.processor._attention_backend == "_native_math"
    assert previous._attention_backend == "_native_math"
    transformer.reset_attention_backend()
    assert previous._attention_backend is None


def test_control_latents_of_another_size_are_refused(make_wan, wan_inputs):
    from blade_pipelines.wan import WanFamily

    inputs = {**wan_inputs(), "control_hidden_states": torch.zeros(1, 6, 2, 10, 14)}
    with pytest.raises(ValueError, match=r"as large as the latent, \(3, 10, 14\) in frames, .*got \(2, 10, 14\)"):
        WanFamily().permute_inputs(make_wan(), inputs, torch.arange(105))


@pytest.mark.parametrize(
    ("heads", "head_size", "preset"), [(3, 64, "shapes"), (12, 128, "wan2.1-t2v-1.3b"), (40, 128, "wan")]
)
def test_the_preset_is_found_by_the_models_size(make_wan, heads, head_size, preset):
    with torch.device("meta"):
        transformer = make_wan(layers=1, heads=heads, attention_head_dim=head_size)
    apply_blade(transformer)
    assert applied_to(transformer).config == BladeConfig.from_preset(preset)


class HostReads(TorchDispatchMode):
    """Counts the operators by which the host waits for a value or a shape from the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        self.count += name in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "repeat_interleave")
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("selector", ["sampled", "mean-pooled", "random", "local"])
def test_nothing_waits_for_the_device(make_wan, wan_inputs, selector):
    """Attention itself is one operator here, that may look inside."""
    details = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4, selector=selector, cumulative_mass=0.9)
    transformer = apply_blade(make_wan(), BladeConfig(pooled_tokens="dropped", asa=details))
    inputs = wan_inputs()
    with HostReads() as reads:
        run(transformer, inputs)
    assert reads.count == 1  # the timestep, where nobody says which step this is
    applied_to(transformer).steps.context.latest = SimpleNamespace(step_index=2, num_inference_steps=9)
    with HostReads() as reads:
        run(transformer, inputs)
    assert reads.count == 0
