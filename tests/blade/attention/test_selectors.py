"""The table of selectors: what is declared there is accepted, applied, counted and saved without another edit."""

import sys
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from blade import BladeConfig, TokenGrid, apply_blade, blade_summary
from blade.attention.adaptive import AdaptivePlan, block_importance, draw_table, select
from blade.attention.applied import applied_to
from blade.attention.config import AdaptiveConfig
from blade.attention.selectors import SELECTORS, Selector, find_selector, register_selector, selector_names
from blade.models.costs import ForwardCost, run_cost

CPU = torch.device("cpu")


def config_with(selector, **options):
    details = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4, selector=selector)
    return BladeConfig(sparsity=0.5, asa=details, **options)


def run(transformer, make_inputs, steps):
    outputs = []
    with torch.no_grad():
        for step in range(steps):
            inputs = make_inputs((4, 4, 8))
            inputs["timestep"] = torch.full_like(inputs["timestep"], 900.0 - 100.0 * step)
            outputs.append(transformer(**inputs).sample)
    return torch.stack(outputs)


def test_a_selector_of_a_temporary_module_is_applied(later_selector, make_wan, wan_inputs, tmp_path):
    config = config_with("later", dense_layers=(0,), dense_steps=1)
    config.save_pretrained(tmp_path)
    assert BladeConfig.from_pretrained(tmp_path) == config
    transformer = apply_blade(make_wan(), config)
    output = run(transformer, wan_inputs, steps=3)
    summary = blade_summary(transformer)
    assert summary.layer_density == applied_to(transformer).plan.budget.density == 0.5
    assert [layer.sparse_calls for layer in summary.transformers[0].layers] == [0, 2, 2]
    assert "later selector" in str(summary)
    again = run(apply_blade(transformer, config), wan_inputs, steps=3)
    other = run(apply_blade(transformer, replace(config, seed=1)), wan_inputs, steps=3)
    assert torch.equal(again, output) and torch.equal(other[0], output[0]) and not torch.equal(other[1], output[1])


def test_its_scores_decide_what_is_kept(later_selector):
    grid, config = TokenGrid(4, 4, 8), config_with("later")
    plan, drawn = AdaptivePlan.of(config, grid, CPU), draw_table(config, layer=1, heads=2)[3]
    query = key = value = torch.randn(1, grid.sequence_length, 2, 16)
    keep = select(query, key, value, plan, drawn).keep
    places = (torch.arange(16) / 16 + drawn.unsqueeze(-1)) % 1
    expected = torch.zeros(2, 16, dtype=torch.bool).scatter_(-1, places.topk(8).indices, True)
    assert torch.equal(keep, expected[None, :, None].expand(1, 2, 16, 16))
    assert not torch.equal(drawn, draw_table(config, layer=2, heads=2)[3])


@pytest.mark.slow
@pytest.mark.parametrize("selector", ["later", "mean-pooled", "random", "local"])
def test_all_layers_and_steps_share_two_graphs(later_selector, selector, make_wan, wan_inputs):
    torch._dynamo.reset()
    config = config_with(selector, dense_steps=1)
    transformer = apply_blade(make_wan(layers=4), config)
    expected = run(transformer, wan_inputs, steps=4)
    apply_blade(transformer, config)
    backend = CompileCounterWithBackend("eager")
    transformer.compile_repeated_blocks(backend=backend)
    torch.testing.assert_close(run(transformer, wan_inputs, steps=4), expected)
    torch._dynamo.reset()
    assert backend.frame_count <= 2


def test_its_operations_are_counted(later_selector):
    forward = ForwardCost(
        grid=TokenGrid(4, 4, 8), layers=3, heads=2, head_dim=16, parameters=1, flops={"self-attention": 1000}
    )

    def selection(selector):
        config = config_with(selector, dense_layers=(0,))
        return run_cost(forward, 5, guidance=False, config=config).flops.get("block selection")

    assert selection("later") == 5 * 2 * 7.0 * 128 * 2
    assert selection("sampled") == 5 * 2 * 2.0 * 2 * 16 * (16 * 4) ** 2
    assert selection("mean-pooled") == 5 * 2 * 2.0 * 2 * 16 * 16**2
    assert selection("random") is None and selection("local") is None


@pytest.mark.parametrize("name", SELECTORS)
def test_controls_alone_look_at_neither_queries_nor_keys(name):
    grid, config = TokenGrid(3, 5, 7), config_with(name)
    plan, drawn = AdaptivePlan.of(config, grid, CPU), draw_table(config, layer=0, heads=2)[0]
    first, second = (
        block_importance(*torch.randn(3, 1, grid.sequence_length, 2, 16, generator=generator), plan, drawn)
        for generator in (torch.Generator().manual_seed(seed) for seed in (0, 1))
    )
    assert torch.equal(first, second) == SELECTORS[name].is_control


@pytest.fixture
def installed(import_temporary, tmp_path):
    """Return a function that installs a package without importing it: its entry point, by name and target."""

    def install(name, target, source):
        (tmp_path / "modules" / "their_selectors.py").write_text(source)
        information = tmp_path / "modules" / "theirs-1.0.dist-info"
        information.mkdir(exist_ok=True)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[blade.selectors]\n{name} = {target}\n")

    yield install
    sys.modules.pop("their_selectors", None)


THEIRS = """
from blade.attention.selectors import SELECTORS, Selector

THEIRS = Selector(name="theirs", description="what they like", score=SELECTORS["mean-pooled"].score)
OTHER = Selector(name="other", description="what others like", score=SELECTORS["mean-pooled"].score)
"""


THEIR_DETAILS = {"selector": "theirs", "block_size": 8, "probe_tokens": 4}


def test_a_package_brings_a_selector_that_is_loaded_where_its_name_is_met(installed, make_wan, wan_inputs):
    installed("theirs", "their_selectors:THEIRS", THEIRS)
    assert find_selector("local").is_control and AdaptiveConfig(selector="sampled")
    assert selector_names() == ("sampled", "mean-pooled", "random", "local", "theirs")
    assert "their_selectors" not in sys.modules and "theirs" not in SELECTORS
    config = BladeConfig.from_dict(config_with("sampled").to_dict() | {"asa": THEIR_DETAILS})
    assert SELECTORS["theirs"] is sys.modules["their_selectors"].THEIRS
    transformer = make_wan()
    theirs, same = (
        run(apply_blade(transformer, one), wan_inputs, steps=1)
        for one in (config, replace(config, asa=replace(config.asa, selector="mean-pooled")))
    )
    assert torch.equal(theirs, same)


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        ("their_selectors:NONE", THEIRS, "cannot be loaded from their_selectors:NONE: .*NONE"),
        (
            "their_selectors:THEIRS",
            "raise OSError('no disk')",
            "cannot be loaded from their_selectors:THEIRS: no disk",
        ),
        ("their_selectors:OTHER", THEIRS, "must be a Selector of this name in their_selectors:OTHER, got Selector"),
    ],
)
def test_a_package_whose_selector_is_broken_is_named(installed, target, source, message):
    installed("theirs", target, source)
    with pytest.raises(ValueError, match=f"`selector` 'theirs' {message}"):
        AdaptiveConfig(selector="theirs")


def test_bad_selectors_are_refused(later_selector):
    score = later_selector.score
    with pytest.raises(ValueError, match="`name` must be in kebab-case, such as mean-pooled, got 'mean_pooled'"):
        Selector(name="mean_pooled", description="", score=score)
    with pytest.raises(ValueError, match=r"`name` must be new in the table, which has .*later, got 'later'"):
        register_selector(Selector(name="later", description="another", score=score))
    assert register_selector(later_selector) is later_selector
    with pytest.raises(ValueError, match=r'`selector` must be one of "sampled", .*"later", got'):
        AdaptiveConfig(selector="latest")
    for name in (None, ["later"]):
        with pytest.raises(ValueError, match=r"`selector` must be a string, got"):
            AdaptiveConfig(selector=name)
