"""The comparison of caches counts what runs, and foresees which passes a threshold skips."""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from blade import BladeConfig, apply_blade
from blade.models.costs import forward_cost

CAPTIONS = ("a", "bb", "ccc", "dddd", "eeeee")
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compare_caches.py"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("compare_caches", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def steps(wan_inputs):
    """Inputs of five steps whose latents change more and more."""
    first, other = wan_inputs(), wan_inputs(seed=1)["hidden_states"]
    return [{**first, "hidden_states": first["hidden_states"] + 0.05 * step**2 * other} for step in range(5)]


def run(transformer, steps):
    with torch.no_grad():
        for inputs in steps:
            with transformer.cache_context("cond"):
                transformer(**inputs)


def test_operations_are_pytorchs_own_count_and_less_with_a_cache(script, make_wan, steps):
    transformer = apply_blade(make_wan(), BladeConfig(attention="dense"))
    with torch.device("meta"):
        forward = forward_cost(type(transformer).from_config(transformer.config), (3, 10, 14), text_tokens=6)
    dense = script.Operations(transformer, forward)
    with dense.counting():
        run(transformer, steps)
    assert dense.total() == pytest.approx(5 * forward.total, rel=1e-3)
    cached = apply_blade(make_wan(), BladeConfig(attention="dense"))
    cached.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    operations = script.Operations(cached, forward)
    with operations.counting():
        run(cached, steps)
    blocks = sum(forward.flops[part] for part in ("self-attention", "other attention")) / forward.layers
    assert operations.total() < dense.total() - 4 * (forward.layers - 1) * blocks


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.3, 1.0])
def test_the_passes_that_a_threshold_skips_are_foreseen(script, make_wan, steps, threshold):
    transformer, ran = make_wan(), []
    with script.first_residuals(transformer) as residuals:
        run(transformer, steps)
    transformer.blocks[1].norm1.register_forward_hook(lambda *_: ran.append(True))
    transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    skipped = []
    for inputs in steps:
        ran.clear()
        run(transformer, [inputs])
        skipped.append(not ran)
    assert script.skipped_passes(residuals, threshold) == skipped


def test_the_table_has_a_row_for_every_method(script):
    records = {
        (text, method.name, method.share): {
            "threshold": 0.1 if method.cached else None,
            "psnr": None if method is script.DENSE else 30.0 + len(text),
            "ssim": None if method is script.DENSE else 0.9,
            "flops": method.share,
            "right": 1.0,
            "all_attributes": True,
        }
        for text in CAPTIONS
        for method in (script.DENSE, *script.METHODS)
    }
    lines = script.table(records, CAPTIONS)
    assert len(lines) == 2 + 1 + len(script.METHODS)
    fewer, sparse = lines[3].split(" | "), lines[4].split(" | ")
    assert fewer[3].startswith("33.0 (3") and fewer[5] == ""
    assert sparse[5] == "+0.0 (+0.0 to +0.0)" and sparse[7] == "5 of 5 |"
