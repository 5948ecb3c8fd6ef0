"""Compiled as a whole, a transformer with BLADE is one graph for each set of sparse layers, at every step."""

import shutil

import numpy as np
import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend

from blade import BladeConfig, PatternTable, apply_blade, blade_summary, remove_blade
from blade.attention.config import AdaptiveConfig
from blade.attention.patterns import HeadPattern, Window
from blade.families.registry import find_family

SIZES = ((3, 5, 7), (2, 6, 4))
STEPS = 4
LONG = pytest.mark.long
COMPILED = ("wan", "cogvideox", "hunyuan-video", "ltx-video", "ltx-2.3", "minimax-h3")
EACH_FAMILY = pytest.mark.parametrize("family", COMPILED, indirect=True)
PRESET = BladeConfig(
    sparsity=0.6,
    pooled_tokens="dropped",
    dense_steps=2,
    dense_layers=[0],
    asa=AdaptiveConfig(
        block_size=8, probe_tokens=4, pooled_window=8, rounding="spread", probe_keys="half-largest",
        statistic="residual", value_weighting=True, budget="layer",
    ),
)  # fmt: skip
"""As the training-free presets have it."""
STUDENT = BladeConfig(attention="asa-gt", sparsity=0.6, asa=AdaptiveConfig(block_size=8, probe_tokens=4))
"""As the paper's student has it: sparse from the first step and layer on."""
CHANCE = BladeConfig(sparsity=0.6, asa=AdaptiveConfig(block_size=8, probe_tokens=4, selector="random"))
"""A stale draw shows in every output."""
PATTERNS = BladeConfig(
    attention="patterns",
    sparsity=0.6,
    asa=AdaptiveConfig(block_size=8, probe_tokens=4),
    patterns=PatternTable(
        patterns=(
            HeadPattern(kind="full"),
            HeadPattern(kind="diagonal", frames=0.5),
            HeadPattern(kind="window", windows={"frame": Window(width=1)}, order="token-major"),
            HeadPattern(kind="asa"),
        ),
        # the second layer is full in the first steps, the third always sparse
        assignment=np.array([[[0, 1], [0, 0], [2, 3]], [[3, 0], [1, 2], [1, 1]]]),
        block_size=8,
        group_starts=(0, 2),
        steps=STEPS,
    ),
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(transformer, inputs, steps=STEPS):
    outputs, rise = [], find_family(getattr(transformer, "_orig_mod", transformer)).timesteps_rise
    with torch.no_grad():
        for step in range(steps):
            time = 0.1 * step if rise else 900.0 - 100.0 * step
            inputs["timestep"] = torch.full_like(inputs["timestep"], time)
            outputs.append(transformer(**inputs).sample)
    return torch.stack(outputs)


def compiled_as_one(transformer):
    """The compiled transformer, and the backend that counts its graphs."""
    backend = CompileCounterWithBackend("aot_eager")
    return torch.compile(transformer, backend=backend, fullgraph=True), backend


def calls(transformer):
    return [
        (layer.sparse_calls, layer.dense_calls, layer.density)
        for layer in blade_summary(transformer).transformers[0].layers
    ]


@pytest.mark.parametrize("config", [STUDENT, CHANCE], ids=["student", "chance"])
def test_all_steps_share_a_graph(make_wan, wan_inputs, config):
    transformer = apply_blade(make_wan(layers=2), config)
    expected, expected_calls = run(transformer, wan_inputs()), calls(transformer)
    compiled, backend = compiled_as_one(apply_blade(transformer, config))
    torch.testing.assert_close(run(compiled, wan_inputs()), expected)
    assert backend.frame_count == 1
    assert calls(transformer) == expected_calls


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "wan-vace",
        "cogvideox-2b",
        "cogvideox-1.5",
        "hunyuan-video-i2v",
        "ltx-2",
        "minimax-h3-references",
        "wan-animate",
        "chronoedit",
        "skyreels-v2",
        "skyreels-v2-forcing",
        "anyflow",
        "framepack",
        "kandinsky5",
    ],
    indirect=True,
)
def test_every_other_kind_compiles(family):
    transformer, inputs = apply_blade(family.make(), STUDENT), family.inputs()
    expected = run(transformer, inputs, steps=2)
    compiled, backend = compiled_as_one(transformer)
    torch.testing.assert_close(run(compiled, inputs, steps=2), expected)
    assert backend.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "config", "graphs"),
    [
        pytest.param(name, config, graphs, id=f"{kind}-{name}", marks=LONG if name != "wan" and graphs == 2 else ())
        for name in COMPILED
        for kind, config, graphs in (("preset", PRESET, 2), ("student", STUDENT, 1), ("patterns", PATTERNS, 2))
    ],
    indirect=["family"],
)
def test_every_step_of_two_sizes_is_right(family, config, graphs):
    transformer = apply_blade(family.make(), config)
    expected = [run(transformer, family.inputs(grid)) for grid in SIZES]
    expected_calls = calls(transformer)
    compiled, backend = compiled_as_one(apply_blade(transformer, config))
    for number, grid in enumerate(SIZES, start=1):
        torch.testing.assert_close(run(compiled, family.inputs(grid)), expected[number - 1])
        assert backend.frame_count <= number * graphs
    torch.testing.assert_close(run(compiled, family.inputs(SIZES[0])), expected[0])
    assert backend.frame_count <= 2 * graphs
    assert [layer[:2] for layer in calls(transformer)] == [
        (sparse * 3 // 2, dense * 3 // 2) for sparse, dense, _ in expected_calls
    ]


@EACH_FAMILY
@pytest.mark.slow
def test_guidance_as_a_batch_and_as_two_calls(family):
    transformer = apply_blade(family.make(), PRESET)
    compiled, backend = compiled_as_one(transformer)
    together = family.inputs(batch=2)
    expected = run(transformer, dict(together))
    torch.testing.assert_close(run(compiled, dict(together)), expected)
    assert backend.frame_count == 2
    apply_blade(transformer, PRESET)
    shared = ("image_rotary_emb", *family.shared)
    for item in range(2):
        alone = {
            name: value[item : item + 1] if isinstance(value, torch.Tensor) and name not in shared else value
            for name, value in together.items()
        }
        torch.testing.assert_close(run(compiled, alone), expected[:, item : item + 1], rtol=1e-4, atol=1e-5)
    assert backend.frame_count <= 4


@EACH_FAMILY
@pytest.mark.slow
def test_removal_leaves_the_plain_graph(family):
    transformer, inputs = family.make(), family.inputs()
    plain = run(compiled_as_one(transformer)[0], inputs)
    torch._dynamo.reset()
    compiled, _ = compiled_as_one(transformer)
    assert not torch.equal(run(apply_blade(compiled, STUDENT), inputs), plain)
    assert torch.equal(run(remove_blade(compiled), inputs), plain)
    assert not transformer._forward_pre_hooks


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "WanPipeline",
        "CogVideoXPipeline",
        "HunyuanVideoPipeline",
        "LTXPipeline",
        pytest.param("LTX2Pipeline", marks=LONG),
    ],
)
@pytest.mark.parametrize("config", [PRESET, CHANCE], ids=["preset", "chance"])
def test_pipelines_make_the_same_video(small_pipelines, name, config):
    """Steps come from the scheduler, or from the context that newer pipelines name."""
    pipe = apply_blade(small_pipelines[name](), config, dense_steps=1)
    pipe.transformer.eval()

    def latents():
        torch.manual_seed(0)
        return pipe("a cat", output_type="latent").frames

    expected = [latents(), latents()]
    expected_calls = calls(pipe)
    apply_blade(pipe, config, dense_steps=1)
    backend = CompileCounterWithBackend("aot_eager")
    pipe.transformer.compile(backend=backend, fullgraph=True)
    for video in expected:
        torch.testing.assert_close(latents(), video, rtol=1e-4, atol=1e-4)
    kinds = 3 if name == "LTX2Pipeline" else 1  # of passes: guidance in a batch, perturbed, with modalities apart
    assert 0 < backend.frame_count <= 2 * kinds
    assert [layer[:2] for layer in calls(pipe)] == [layer[:2] for layer in expected_calls]


@pytest.mark.slow
def test_compiled_layers_choose_at_every_step(make_wan, wan_inputs):
    expected = run(apply_blade(make_wan(), STUDENT), wan_inputs())
    kept = AdaptiveConfig(block_size=8, probe_tokens=4, reselect_every=2)
    transformer = apply_blade(make_wan(), STUDENT, asa=kept)
    assert not torch.allclose(run(transformer, wan_inputs()), expected)
    compiled, backend = compiled_as_one(apply_blade(transformer, STUDENT, asa=kept))
    torch.testing.assert_close(run(compiled, wan_inputs()), expected)
    assert backend.frame_count == 1


def test_inputs_that_a_later_hook_changes_are_those_that_count(make_wan, wan_inputs):
    transformer = apply_blade(make_wan(), PRESET)
    latent = wan_inputs(SIZES[1])["hidden_states"]
    expected = run(transformer, {**wan_inputs(), "hidden_states": latent})
    apply_blade(transformer, PRESET)
    transformer.register_forward_pre_hook(
        lambda module, args, inputs: (args, {**inputs, "hidden_states": latent}), with_kwargs=True
    )
    assert torch.equal(run(transformer, wan_inputs()), expected)


def test_forward_called_by_itself_gives_the_same(make_wan, wan_inputs):
    transformer, inputs = apply_blade(make_wan(), STUDENT), wan_inputs()
    with torch.no_grad():
        called = transformer(**inputs).sample
        assert torch.equal(transformer.forward(**inputs).sample, called)


def test_a_lost_hook_is_an_error_when_compiled_too(make_wan, wan_inputs):
    transformer = apply_blade(make_wan(layers=1), STUDENT)
    compiled, _ = compiled_as_one(transformer)
    run(compiled, wan_inputs(), steps=1)
    del transformer.forward
    with pytest.raises(Exception, match="BLADE's hook on the transformer did not run"):
        run(compiled, wan_inputs(), steps=1)


@pytest.mark.parametrize("family", ["hunyuan-video-1.5"], indirect=True)
def test_hunyuan_video_15_does_not_compile_in_diffusers_either(family):
    for transformer in (family.make(), apply_blade(family.make(), STUDENT)):
        with pytest.raises(Unsupported, match="is_t2v"):
            run(compiled_as_one(transformer)[0], family.inputs(), steps=1)


@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize(
    "sizes",
    [pytest.param(SIZES[:1], marks=pytest.mark.slow), pytest.param(SIZES, marks=pytest.mark.long)],
    ids=["one size", "two sizes"],
)
def test_inductor_compiles_wan(make_wan, wan_inputs, sizes):
    transformer = apply_blade(make_wan(layers=2), PRESET)
    expected = [run(transformer, wan_inputs(grid)) for grid in sizes]
    backend = CompileCounterWithBackend("inductor")
    compiled = torch.compile(apply_blade(transformer, PRESET), backend=backend, fullgraph=True)
    for grid, plain in zip(sizes, expected):
        torch.testing.assert_close(run(compiled, wan_inputs(grid)), plain, rtol=1e-4, atol=1e-4)
    assert backend.frame_count == 2 * len(sizes)  # a dense and a sparse one of each
