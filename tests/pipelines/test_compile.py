"""Compiled regionally, all layers and steps share two graphs, one dense and one sparse; a new resolution adds two."""

import shutil

import diffusers
import pytest
import torch
from packaging.version import Version
from torch._dynamo.testing import CompileCounterWithBackend

from blade import BladeConfig, apply_blade, blade_summary
from blade.attention.config import AdaptiveConfig

VIEW_COMPILED_APART = Version(diffusers.__version__) < Version("0.37")
"""The first block's input is a view there, which PyTorch compiles by itself once sizes vary, with BLADE or without."""


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(transformer, inputs, steps=6):
    outputs = []
    with torch.no_grad():
        for step in range(steps):
            inputs["timestep"] = torch.full_like(inputs["timestep"], 900.0 - 100.0 * step)
            outputs.append(transformer(**inputs).sample)
    return torch.stack(outputs)


@pytest.mark.slow
def test_ten_layers_and_six_steps_make_two_graphs_and_two_resolutions_four(make_wan, wan_inputs):
    """The backend runs the graphs as they are, so that no C compiler is needed."""
    details = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4, cumulative_mass=0.9)
    config = BladeConfig(sparsity=0.5, pooled_tokens="dropped", dense_layers=[0], dense_steps=2, asa=details)
    transformer = apply_blade(make_wan(layers=10), config)
    expected = run(transformer, wan_inputs())
    apply_blade(transformer, config)
    backend = CompileCounterWithBackend("eager")
    transformer.compile_repeated_blocks(backend=backend)
    torch.testing.assert_close(run(transformer, wan_inputs()), expected)
    assert backend.frame_count <= 2
    layers = blade_summary(transformer).transformers[0].layers
    assert [(layer.sparse_calls, layer.dense_calls) for layer in layers] == [(0, 6)] + [(4, 2)] * 9

    for grid in ((5, 6, 3), (3, 5, 7)):
        run(transformer, wan_inputs(grid), steps=3)
    assert backend.frame_count <= 4 + (1 if VIEW_COMPILED_APART else 0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is off")
def test_inductor_compiles_blocks_around_the_triton_kernels(make_wan, wan_inputs):
    """Each block is one graph, in which the kernels are opaque."""
    details = AdaptiveConfig(block_size=32, probe_tokens=8, pooled_window=16, cumulative_mass=0.9)
    config = BladeConfig(sparsity=0.5, pooled_tokens="dropped", dense_steps=1, implementation="triton", asa=details)
    transformer = apply_blade(make_wan(layers=2, attention_head_dim=64), config)
    expected = run(transformer, wan_inputs((3, 6, 7)), steps=2)
    apply_blade(transformer, config)
    transformer.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(run(transformer, wan_inputs((3, 6, 7)), steps=2), expected)
    assert "block-sparse attention by triton" in str(blade_summary(transformer))
