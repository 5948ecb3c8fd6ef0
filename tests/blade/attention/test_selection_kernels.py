"""The kernels choose what the specification chooses, on queries, keys and values of the bundled model."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from blade_kernels.block_selection import importance, selection

from blade import BladeConfig
from blade.attention.adaptive import AdaptivePlan, draw_table, select
from blade.token_grid import TokenGrid

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU"),
]


@pytest.fixture(scope="module")
def heads():
    sys.path.insert(0, str(SCRIPTS))
    try:
        from attention_heads import captured_heads

        order = BladeConfig.from_preset("shapes").asa.token_order
        yield captured_heads(["a red ball moves left"], block=32, token_order=order, steps=4, at=(1,))
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mass_that_is_kept_is_that_of_the_specification(heads, dtype, monkeypatch):
    config, grid = BladeConfig.from_preset("shapes"), TokenGrid(9, 12, 12)
    plan = AdaptivePlan.of(config, grid, torch.device("cpu"))
    differing = kept = 0
    for layer, head in enumerate(heads):
        q, k, v = (x.transpose(0, 1)[None].to(dtype) for x in (head.q, head.k, head.v))
        draw = draw_table(config, layer=layer, heads=len(head.q), steps=1)[0]
        masks = {}
        for name in ("triton", "naive"):
            for module in (importance, selection):
                monkeypatch.setattr(module, "choose_implementation", lambda *arguments, name=name: name)
            masks[name] = select(q, k, v, plan, draw)
        weights = (head.q @ head.k.mT * head.size**-0.5).softmax(-1)
        by_block = torch.nn.functional.pad(weights, (0, -grid.video_tokens % 32, 0, -grid.video_tokens % 32))
        mass = by_block.unflatten(2, (-1, 32)).unflatten(1, (-1, 32)).sum((2, 4))
        found, expected = ((mass * masks[name].keep[0]).sum() for name in ("triton", "naive"))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
        assert torch.equal(*(masks[name].counts.sum() for name in ("triton", "naive")))
        differing += int((masks["triton"].keep != masks["naive"].keep).sum())
        kept += int(masks["naive"].keep.sum())
    assert differing // 2 <= 0.001 * kept
