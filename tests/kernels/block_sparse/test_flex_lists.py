"""The lists that FlexAttention's kernels read: what they hold, and how they lie in memory, also in compiled graphs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import flex, pool_tokens
from blade_kernels.block_sparse.flex_lists import flex_lists

BLOCKS = 37
"""Their square is above 1,024, from where on the compiler pads strides, and no multiple of 32, to which it pads."""

LOWERING = Path(__file__).resolve().parents[1] / "lowered_for_cuda.py"


def contiguous(size):
    return torch.empty(size, device="meta").stride()


@pytest.mark.parametrize("appended", [0, 2])
def test_each_block_is_listed_by_row_and_by_column(appended):
    keep = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.4
    keep[0, 0, 1] = False
    mask = BlockMask.from_dense(keep, (16, 16), capacity=6)
    lists = flex_lists(mask, appended, by_column=True)
    for counts, indices, expected in (
        (lists.full_key_counts, lists.full_keys, mask.keep),
        (lists.full_query_counts[..., :7], lists.full_queries, mask.keep.transpose(2, 3)),
        (lists.key_counts, lists.keys, torch.zeros_like(keep)),
    ):
        for place in torch.cartesian_prod(*map(torch.arange, expected.shape[:3])).tolist():
            b, h, row = place
            count = int(counts[b, h, row])
            listed = indices[b, h, row, :count].tolist()
            partial = [7, 8][:appended] if counts is lists.key_counts else []
            assert listed == [*expected[b, h, row].nonzero().flatten().tolist(), *partial]
    assert lists.query_counts.shape[-1] == 7 + appended and lists.query_counts[..., :7].sum() == 0
    assert lists.query_counts[..., 7:].eq(5).all() and lists.full_query_counts[..., 7:].eq(0).all()
    assert torch.equal(lists.queries[..., 7:, :], torch.arange(5, dtype=torch.int32).expand(2, 3, appended, 5))
    assert [x.dtype for x in lists] == [torch.int32] * 8
    assert all(x.stride() == contiguous(x.shape) for x in lists)


def test_the_operator_is_one_to_pytorch():
    mask = BlockMask.from_dense(torch.rand(1, 2, 4, 4) < 0.5, (16, 16))
    for by_column in (False, True):
        arguments = (mask.keep, mask.counts, mask.indices, 1, by_column)
        torch.library.opcheck(torch.ops.blade.flex_lists.default, arguments)


class Watched:
    """A compiler that keeps the graph of FlexAttention's call, and runs it as it is."""

    def __call__(self, graph, inputs):
        self.graph = graph
        return graph.forward

    def lists(self):
        """The nodes of the graph that the kernels take as lists."""
        (call,) = [node for node in self.graph.graph.nodes if "flex_attention" in str(node.target)]
        mask = next(argument for argument in call.args if isinstance(argument, tuple))
        return [node for node in mask if isinstance(node, torch.fx.Node)]


@pytest.mark.parametrize("pooled", [None, "all", "dropped"])
@pytest.mark.parametrize("whole", [False, True], ids=["alone", "in a compiled model"])
def test_kernels_read_no_list_that_the_compiler_lays_out(monkeypatch, pooled, whole):
    q, k, v = torch.randn(3, 2, BLOCKS * 16 - 3, 2, 16).unbind()
    keep = torch.rand(2, 2, BLOCKS, BLOCKS) < 0.3
    watched = Watched()

    def attend(q, k, v, keep):
        mask = BlockMask.from_dense(keep, (16, 16))  # capacity is the number of key blocks
        windows = {None: None, "all": 16, "dropped": 16}[pooled]
        block = 16 if pooled == "dropped" else None
        tokens = None if windows is None else pool_tokens(k, v, windows, block_size=block)
        return flex.flex_block_attention(q, k, v, mask, tokens, None, 0.25, False)[0]

    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)  # gradients on a CPU
    torch.compiler.reset()
    compiled = torch.compile(flex._attend, fullgraph=True, dynamic=False, backend=watched)
    monkeypatch.setattr(flex, "_compile_once", lambda: compiled)
    function = torch.compile(attend, fullgraph=True, dynamic=False, backend=watched) if whole else attend
    function(q.requires_grad_(), k, v, keep)
    nodes = watched.lists()
    lists = [node for node in nodes if getattr(node.meta.get("example_value"), "dtype", None) == torch.int32]
    assert len(lists) == 8
    for node in lists:
        made = node.args[0] if "getitem" in str(node.target) else node
        assert node.op == "placeholder" or "flex_lists" in str(made.target), node.format_node()
        assert node.meta["example_value"].stride() == contiguous(node.meta["example_value"].shape)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__[:5] != "2.13.", reason="takes private parts of PyTorch 2.13")
def test_the_compiler_pads_no_list_on_a_gpu():
    """Lowered by Inductor for an H200 without one; lists that are made inside of the graph are padded there."""
    pytest.importorskip("triton")
    result = subprocess.run([sys.executable, LOWERING], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    head = BLOCKS**2
    padded = -(-head // 32) * 32
    for lowered in found["operator"].values():
        for size, stride in (*lowered["read"], *lowered["saved"]):
            assert tuple(stride) == contiguous(size)
    for training in (False, True):
        plain, old = (found[way]["training" if training else "alone"] for way in ("operator", "graph"))
        assert len(plain["read"]) == len(old["read"]) == 4 and len(plain["saved"]) == len(old["saved"]) == 8 * training
        for lowered, expected in ((plain, head), (old, padded)):
            lists = [stride[1] for size, stride in (*lowered["read"], *lowered["saved"]) if len(size) == 4]
            assert {*lists} == {expected}
            assert {lowered["source"][f"stride_{kind}kv_idx_h"] for kind in ("", "full_")} == {expected}
            assert {lowered["source"][f"stride_{kind}kv_num_blks_h"] for kind in ("", "full_")} == {BLOCKS}
