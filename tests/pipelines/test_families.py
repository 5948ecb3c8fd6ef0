"""Properties of every family's transformers, on small random instances of Diffusers' own classes."""

import copy

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from blade import BladeConfig, TokenGrid, apply_blade, blade_summary, remove_blade
from blade.attention import adaptive
from blade.attention.applied import applied_to
from blade.attention.budget import BlockBudget
from blade.attention.config import AdaptiveConfig
from blade.families.registry import find_family

GRIDS = [(3, 5, 7), (1, 6, 5), (4, 1, 9), (5, 4, 1), (1, 1, 11)]
DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)


def run(transformer, inputs):
    with torch.no_grad():
        return as_batch(transformer(**inputs).sample)


def as_batch(sample):
    """A batch of what a class that takes lists of latents predicts for each."""
    return torch.stack(sample) if isinstance(sample, list) else sample


def attentions(transformer):
    """The self-attention modules that BLADE makes sparse."""
    return find_family(transformer).attention_layers(transformer)


@pytest.fixture
def keep_all(monkeypatch):
    """Let the sparse path run with every block kept, where it would be left to Diffusers' attention otherwise."""
    monkeypatch.setattr(BlockBudget, "is_full", False)


def in_float64(value):
    if isinstance(value, tuple):
        return tuple(in_float64(one) for one in value)
    if isinstance(value, list):
        return [in_float64(one) for one in value]
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def rounding_errors(family, transformer, inputs, output):
    """Largest errors of an output and of the plain model's, both against the plain model in float64."""
    exact = copy.deepcopy(transformer).double()
    for name, module in exact.named_modules():
        if name.endswith(family.float32_parts):
            module.float()
    if hasattr(getattr(exact, "rope", None), "freqs_cos"):
        for name in ("freqs_cos", "freqs_sin"):
            setattr(exact.rope, name, getattr(transformer.rope, name).double())
    oracle = run(exact, {name: in_float64(value) for name, value in inputs.items()})
    plain = run(transformer, inputs)
    return (output - oracle).abs().max().item(), (plain - oracle).abs().max().item()


@pytest.mark.parametrize(
    "config",
    [BladeConfig(attention="dense"), BladeConfig(sparsity=0.0, asa=DETAILS), BladeConfig(dense_layers="0-2")],
    ids=["dense", "sparsity 0", "dense layers"],
)
def test_where_every_layer_is_dense_the_output_is_bitwise_the_same(family, config):
    transformer, inputs = family.make(), family.inputs()
    plain = run(transformer, inputs)
    assert torch.equal(run(apply_blade(transformer, config), inputs), plain)
    summary = blade_summary(transformer)
    assert (summary.layer_density, summary.run_density) == (None, 1.0)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", ["gilbert", "token-major"])
def test_with_every_block_kept_the_output_is_dense_but_for_rounding(family, keep_all, grid, order):
    transformer, inputs = family.make(), family.inputs(family.grid(grid), batch=2)
    details = AdaptiveConfig(block_size=8, probe_tokens=4, token_order=order)
    sparse = run(apply_blade(transformer, BladeConfig(sparsity=0.0, asa=details)), inputs)
    calls = [layer.sparse_calls for layer in blade_summary(transformer).transformers[0].layers]
    assert calls == [1] * len(calls)
    error, plain_error = rounding_errors(family, remove_blade(transformer), inputs, sparse)
    assert error < 6 * plain_error


@pytest.mark.parametrize("grid", GRIDS[:2])
def test_sparse_layers_are_diffusers_own_with_the_blocks_as_a_mask(family, monkeypatch, grid):
    """Blocks are cut from tokens in Gilbert order, before the text; the oracle has the model's own order."""
    grid = family.grid(grid)
    transformer, inputs = family.make(), family.inputs(grid, batch=2)
    masks, attend = [], adaptive.block_sparse_attention

    def spy(query, key, value, mask, **options):
        keep = mask.keep.repeat_interleave(8, -1).repeat_interleave(8, -2)
        dense = keep.shape[-1] - keep.shape[-2]  # rows that have a dense call of their own
        masks.append(torch.nn.functional.pad(keep, (0, 0, 0, dense), value=True))
        return attend(query, key, value, mask, **options)

    monkeypatch.setattr(adaptive, "block_sparse_attention", spy)
    sparse = run(apply_blade(transformer, BladeConfig(sparsity=0.5, asa=DETAILS)), inputs)
    most = 0.8 if family.text < grid[1] * grid[2] else 0.95  # what is no video is most of a short sequence
    assert len(masks) == len(applied_to(transformer).layers) and 0.2 < blade_summary(transformer).layer_density < most
    remove_blade(transformer)
    plain = run(transformer, inputs)

    before = family.history(grid) + (family.text if family.text_first else 0)
    after = 0 if family.text_first else family.text
    grid = TokenGrid(*grid, first_frame_apart=family.first_frame_apart, frames_apart=family.frames_apart)
    video, tokens = grid.video_tokens, grid.video_tokens + before + after
    text = torch.arange(before + after)
    text = torch.where(text < before, text, text + video)
    places = torch.cat((grid.order("gilbert") + before, text)).argsort()
    waiting = iter(masks)
    dense = torch.nn.functional.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, **options):
        if query.shape[-2] == key.shape[-2] == tokens:
            kept = next(waiting)[..., places, :][..., places]
            attn_mask = kept if attn_mask is None else kept & attn_mask
        return dense(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)
    oracle = run(transformer, inputs)
    assert next(waiting, None) is None
    torch.testing.assert_close(sparse, oracle, rtol=1e-4, atol=1e-5)
    assert (oracle - plain).abs().max() > 0.01


def test_removal_is_exact(family):
    transformer, inputs = family.make(), family.inputs()
    plain = run(transformer, inputs)
    assert not torch.equal(run(apply_blade(transformer, BladeConfig(asa=DETAILS)), inputs), plain)
    assert torch.equal(run(remove_blade(transformer), inputs), plain)


def test_saved_loaded_and_applied_again_the_output_is_the_same(family, tmp_path):
    transformer, inputs = family.make(), family.inputs()
    config = BladeConfig(attention="asa-gt", sparsity=0.4, seed=3, asa=DETAILS)
    expected = run(apply_blade(transformer, config), inputs)
    config.save_pretrained(tmp_path)
    again = run(apply_blade(family.make(), BladeConfig.from_pretrained(tmp_path)), inputs)
    assert torch.equal(again, expected)


def test_guidance_as_a_batch_and_as_two_calls_is_the_same(family):
    transformer, inputs = apply_blade(family.make(), BladeConfig(asa=DETAILS)), family.inputs(batch=2)
    together = run(transformer, inputs)
    for item in range(2):
        alone = {
            name: value[item : item + 1]
            if isinstance(value, torch.Tensor | list) and name not in family.shared
            else value
            for name, value in inputs.items()
        }
        torch.testing.assert_close(run(transformer, alone), together[item : item + 1], rtol=1e-4, atol=1e-5)


def test_positional_arguments_and_tuples_are_as_good(family):
    transformer, inputs = apply_blade(family.make(), BladeConfig(asa=DETAILS)), family.inputs()
    expected = run(transformer, inputs)
    positional = [inputs.pop(name) for name in applied_to(transformer)._parameters[:3]]
    with torch.no_grad():
        output = transformer(*positional, **inputs, return_dict=False)
    if isinstance(output, tuple):
        output, *_ = output
    assert torch.equal(as_batch(output), expected)


def test_gradients_pass_and_survive_checkpointing(family):
    gradients = []
    for checkpointing in (False, family.checkpoints):
        transformer = apply_blade(family.make(), BladeConfig(attention="asa-gt", asa=DETAILS)).train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        as_batch(transformer(**family.inputs()).sample).square().sum().backward()
        attention = applied_to(transformer).attentions[0]
        gradients.append([parameter.grad for parameter in attention.parameters()])
    for plain, recomputed in zip(*gradients):
        assert plain.abs().max() > 0
        torch.testing.assert_close(recomputed, plain)


def test_fused_projections_give_the_same_before_and_are_noticed_after(family):
    inputs, config = family.inputs(), BladeConfig(asa=DETAILS)
    fused = family.make()
    if not hasattr(fused, "fuse_qkv_projections") or not hasattr(attentions(fused)[0], "to_q"):
        pytest.skip("Diffusers cannot fuse this transformer's projections")
    try:
        fused.fuse_qkv_projections()
    except RuntimeError as error:
        pytest.skip(f"Diffusers cannot fuse this transformer's projections: {error}")
    if (run(fused, inputs) - run(family.make(), inputs)).abs().max() > 1e-3:
        pytest.skip("this Diffusers computes something else with fused projections, as 0.36 does with VACE")
    expected = run(apply_blade(family.make(), config), inputs)
    before = family.make()
    before.fuse_qkv_projections()
    torch.testing.assert_close(run(apply_blade(before, config), inputs), expected, rtol=1e-4, atol=1e-5)
    after = apply_blade(family.make(), config)
    after.fuse_qkv_projections()
    try:
        output = run(after, inputs)  # Wan's processors stay
    except ValueError as error:
        assert "was replaced" in str(error) and "Call `apply_blade` again" in str(error)
        output = run(apply_blade(after, config), inputs)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_at_two_sizes(family):
    """One by one, since Diffusers does not name CogVideoX's repeated blocks."""
    if not family.blocks_compile:
        pytest.skip("Diffusers' own blocks are no single graph: they read values of their inputs")
    torch._dynamo.reset()
    config = BladeConfig(sparsity=0.5, dense_layers=[0], pooled_tokens="dropped", asa=DETAILS)
    plain, compiled = apply_blade(family.make(), config), apply_blade(family.make(), config)
    for block in applied_to(compiled).family.blocks(compiled):
        block.compile(backend="eager", fullgraph=True)
    for grid in ((3, 5, 7), (2, 6, 4)):
        torch.testing.assert_close(run(compiled, family.inputs(grid)), run(plain, family.inputs(grid)))


@pytest.mark.parametrize("loaded", ["before", "after"])
def test_a_lora_works_whenever_it_is_loaded(family, keep_all, loaded):
    transformer, inputs = family.make(), family.inputs()
    without = run(transformer, inputs)
    generator = torch.Generator().manual_seed(1)
    names = {module: name for name, module in transformer.named_modules()}
    attention = names[attentions(transformer)[0]]
    projections = [f"{attention}.{name}" for name in ("to_q", "to_v", "to_query", "to_value")]
    lora = {}
    for projection in (*projections, "proj_out", "out_layer.out_layer", "head.head"):
        if projection not in names.values():
            continue
        rows, columns = transformer.get_submodule(projection).weight.shape
        lora[f"transformer.{projection}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        lora[f"transformer.{projection}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    if loaded == "before":
        transformer.load_lora_adapter(lora)
    apply_blade(transformer, BladeConfig(sparsity=0.0, asa=DETAILS))
    if loaded == "after":
        transformer.load_lora_adapter(lora)
    output = run(transformer, inputs)
    assert (output - without).abs().max() > 0.1
    torch.testing.assert_close(output, run(remove_blade(transformer), inputs), rtol=1e-3, atol=1e-4)


def with_and_without_first_block_cache(make, inputs):
    """Outputs of two runs without, and of two with Diffusers' cache."""
    outputs = []
    for cached in (False, True):
        transformer = make()
        if cached:
            transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-6))
        with transformer.cache_context("cond"):
            outputs += [run(transformer, inputs), run(transformer, inputs)]
    return torch.stack(outputs)


def test_first_block_cache_runs_on_tokens_in_order(family):
    inputs = family.inputs()
    if not hasattr(family.make(), "enable_cache"):
        pytest.skip("Diffusers has no caches for this transformer")
    problem = find_family(family.make()).cache_problem(family.make(), "first-block")
    if problem is not None:
        pytest.skip(f"refused: {problem}")
    try:
        plain = with_and_without_first_block_cache(family.make, inputs)
    except ValueError as error:
        pytest.skip(f"Diffusers' cache does not know this transformer: {error}")
    assert (plain - plain[0]).abs().max() < 1e-3
    sparse = with_and_without_first_block_cache(lambda: apply_blade(family.make(), BladeConfig(asa=DETAILS)), inputs)
    torch.testing.assert_close(sparse, sparse[:1].expand_as(sparse), rtol=1e-4, atol=1e-5)
