"""Kandinsky 5 under BLADE: NABLA is left as it is in dense runs, and stood in for in sparse ones."""

import pytest
import torch
from diffusers import Kandinsky5T2VPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.transformers import transformer_kandinsky

from blade import BladeConfig, apply_blade, blade_summary, remove_blade
from blade.attention.budget import BlockBudget
from blade.attention.config import AdaptiveConfig
from blade.generation.request import GenerationRequest
from blade.models.loaded import LoadedModel

NABLA = {
    "attention_type": "nabla", "attention_P": 0.3, "attention_wT": 1, "attention_wH": 1, "attention_wW": 1,
    "attention_add_sta": True, "attention_method": "topcdf",
}  # fmt: skip
GRID = (4, 16, 16)
DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs).sample


@pytest.fixture
def nabla(make_kandinsky5, kandinsky5_inputs, small_pipelines):
    """A function that makes a tiny transformer with NABLA, and inputs with the pipeline's parameters of it."""
    pipe = small_pipelines["Kandinsky5T2VPipeline"]()
    pipe.transformer = make_kandinsky5(**NABLA)
    inputs = kandinsky5_inputs(GRID)
    parameters = Kandinsky5T2VPipeline.get_sparse_params(pipe, inputs["hidden_states"], "cpu")

    def make():
        transformer = make_kandinsky5(**NABLA)
        transformer.set_attention_backend("flex")
        return transformer

    with attention_backend(AttentionBackendName.NATIVE):  # restores the default, which `make` changes too
        yield make, {**inputs, "sparse_params": parameters}


@pytest.fixture
def estimates(monkeypatch):
    """The calls of NABLA's estimate of a mask: uncompiled, FlexAttention does not heed the mask itself."""
    calls, estimate = [], transformer_kandinsky.nablaT_v2
    monkeypatch.setattr(
        transformer_kandinsky, "nablaT_v2", lambda *args, **options: (calls.append(1), estimate(*args, **options))[1]
    )
    return calls


def test_nabla_stays_in_dense_runs(nabla, estimates):
    make, inputs = nabla
    plain = run(make(), inputs)
    assert len(estimates) == 3
    assert torch.equal(run(apply_blade(make(), BladeConfig(attention="dense")), inputs), plain)
    assert len(estimates) == 6


def test_blade_stands_in_for_nabla(nabla, estimates, monkeypatch):
    """With every block kept the output is that of full attention; without rounding, so that it shows."""
    monkeypatch.setattr(torch, "bfloat16", torch.float32)
    monkeypatch.setattr(BlockBudget, "is_full", False)
    make, inputs = nabla
    full = run(make(), {**inputs, "sparse_params": None})
    transformer = apply_blade(make(), BladeConfig(sparsity=0.0, dense_layers=[1], asa=DETAILS))
    torch.testing.assert_close(run(transformer, inputs), full, rtol=1e-4, atol=1e-5)
    assert [layer.sparse_calls for layer in blade_summary(transformer).transformers[0].layers] == [1, 0, 1]
    assert not estimates
    run(remove_blade(transformer), inputs)
    assert len(estimates) == 3


def test_queries_and_keys_are_rounded_as_diffusers_does(make_kandinsky5, kandinsky5_inputs):
    """One sparse layer sees bitwise the queries, keys and values that Diffusers' attention sees."""
    seen = []
    transformer, inputs = make_kandinsky5(num_visual_blocks=1), kandinsky5_inputs()
    dense = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, *args, **options):
        if query.shape[-2] == key.shape[-2] == 105:
            seen.append([tensor.transpose(1, 2) for tensor in (query, key, value)])
        return dense(query, key, value, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        run(transformer, inputs)
    apply_blade(transformer, BladeConfig(asa=AdaptiveConfig(block_size=8, probe_tokens=4, token_order="raster")))
    layer = transformer.visual_transformer_blocks[0].self_attention.processor.layer
    attend = layer.attend
    layer.attend = lambda *tensors: (seen.append(tensors), attend(*tensors))[1]
    run(transformer, inputs)
    for mine, theirs in zip(seen[1], seen[0], strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(seen[0][0], seen[0][0].to(torch.bfloat16).to(torch.float32))


def test_a_short_video_from_an_image_is_refused(small_pipelines):
    request = GenerationRequest(prompt="a cat", steps=3, height=128, width=128, frames=13, image="cat.png")
    model = LoadedModel(small_pipelines["Kandinsky5I2VPipeline"]())
    with pytest.raises(ValueError, match=r"`frames` must be at least 17 for a Kandinsky5I2VPipeline, .*, got 13"):
        model.family.call_options(model.pipe, request)
