"""What Inductor makes of block-sparse FlexAttention for an H200, on a machine without a GPU: nothing is computed.

    python tests/kernels/lowered_for_cuda.py

Prints, as JSON, how the lists of blocks lie in memory that the kernel reads and that the backward pass is given: made
by the operator of `flex_lists`, and made inside of the graph. In a process of its own, since PyTorch remembers the
device. Of PyTorch it takes private parts of version 2.13: the graph is traced on the CPU, its tensors are said to be
on a GPU, and lowered with the properties of an H200.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import flex
from blade_kernels.block_sparse.flex_lists import FlexLists
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor import config, ir
from torch._inductor.codecache import PyCodeCache
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask
from torch.utils._pytree import tree_map_only

BLOCKS = 37
"""Their square is above 1,024, from where on the compiler pads strides, and no multiple of 32, to which it pads."""

CUDA = torch.device("cuda", 0)

H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    gcnArchName="",
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    total_memory=141 * 2**30,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    L2_cache_size=50 * 2**20,
)


def lists_in_the_graph(mask: BlockMask, appended: int, by_column: bool) -> FlexLists:
    """Make the lists by plain operations, as FlexAttention's own functions do; the compiler then lays them out."""
    partial = torch.zeros_like(mask.indices)
    made = FlexBlockMask.from_kv_blocks(
        torch.zeros_like(mask.counts), partial, mask.counts, mask.indices, mask.block_size, compute_q_blocks=by_column
    )
    return FlexLists(
        made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices, made.q_num_blocks,
        made.q_indices, made.full_q_num_blocks, made.full_q_indices,
    )  # fmt: skip


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Attend to the kept blocks of 128; the lists are made in the same graph."""
    mask = BlockMask.from_dense(keep, (128, 128))
    return flex.flex_block_attention(q, k, v, mask, None, None, 0.25, False)[0]


def on_a_gpu() -> ExitStack:
    """Enter a context in which PyTorch is told of an H200 that is not there."""
    stack = ExitStack()
    for target, value in {
        "torch.cuda.get_device_properties": H200,
        "torch.cuda.get_device_capability": (9, 0),
        "torch.cuda.current_device": 0,
        "torch.cuda.device_count": 1,
        "torch.utils._triton.triton_hash_with_backend": "none",
    }.items():
        stack.enter_context(mock.patch(target, lambda *_, value=value: value))
    for owner in (CudaInterface, CudaInterface.Worker):
        stack.enter_context(mock.patch.object(owner, "get_device_properties", staticmethod(lambda *_: H200)))
    stack.enter_context(config.patch(comprehensive_padding=True, force_disable_caches=True))
    return stack


def gradients_on_a_cpu() -> Any:
    """Enter a context in which FlexAttention can be traced with gradients on a CPU."""
    return mock.patch("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


def moved(graph: torch.fx.GraphModule, mode: Any) -> torch.fx.GraphModule:
    """Say of a graph's tensors, those of its functions included, that they are on the GPU."""
    for module in graph.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": CUDA}
                node.meta["val"] = tree_map_only(torch.Tensor, lambda x: like(x, mode), node.meta.get("val"))
            module.recompile()
    return graph


def like(x: torch.Tensor, mode: Any) -> torch.Tensor:
    """Return a tensor without values on the GPU."""
    with mode:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)


def lowered(needs_grad: bool) -> dict[str, Any]:
    """Lower the forward graph of `attend`.

    Returns:
        `read`: sizes and strides of the lists that the kernel reads; `saved`: those of the lists that the backward
        pass is given; `source`: the strides of lists that the kernel's source names.
    """
    captured: list[Any] = []

    def keep_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        captured.append(graph)
        return graph.forward

    q, k, v = (torch.randn(1, BLOCKS * 128 - 3, 2, 64, requires_grad=needs_grad) for _ in range(3))
    inputs = [q, k, v, torch.rand(1, 2, BLOCKS, BLOCKS) < 0.3]
    torch.compiler.reset()
    with gradients_on_a_cpu():
        torch.compile(attend, fullgraph=True, dynamic=False, backend=keep_graph)(*inputs)
    placeholders = [node.name for node in captured[0].graph.nodes if node.op == "placeholder"]
    by_name = {f"l_{name}_": x for name, x in zip(("q", "k", "v", "keep"), inputs, strict=True)}
    found: dict[str, Any] = {}

    def lower(graph: torch.fx.GraphModule, traced: list[Any]) -> Any:
        if not found:  # the forward graph comes first
            mode, sources, load = traced[0].fake_mode, list[str](), PyCodeCache.load

            def keep_source(code: str, *arguments: Any, **options: Any) -> Any:
                sources.append(code)
                return load(code, *arguments, **options)

            keeping = mock.patch.object(PyCodeCache, "load", keep_source)
            with on_a_gpu(), keeping:
                given = [like(x, mode) for x in traced]
                lowering = GraphLowering(moved(graph, mode), example_inputs=given)
                with V.set_fake_mode(mode), V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]):
                    lowering.run(*given)
            found.update(layouts(lowering), source=named_strides(sources))
        return lambda *_: None

    with gradients_on_a_cpu():
        aot_module_simplified(
            captured[0],
            [by_name[name.lower()] for name in placeholders],
            fw_compiler=lower,
            bw_compiler=lower,
            decompositions=select_decomp_table(),
        )
    return found


def layouts(lowering: GraphLowering) -> dict[str, Any]:
    """Return sizes and strides of the lists in a lowered graph."""
    (kernel,) = [buffer for buffer in lowering.buffers if isinstance(buffer, ir.TritonTemplateBuffer)]
    named = {"read": kernel.inputs, "saved": lowering.graph_outputs}
    return {
        what: [[[*map(int, x.get_size())], [*map(int, x.get_stride())]] for x in nodes if x.get_dtype() == torch.int32]
        for what, nodes in named.items()
    }


def named_strides(sources: list[str]) -> dict[str, int]:
    """Return the strides of the lists that the sources of kernels name."""
    pattern = re.compile(r"(stride_(?:full_)?kv_\w+_h)\s*=\s*(\d+)")
    return {name: int(value) for source in sources for name, value in pattern.findall(source)}


def main() -> None:
    """Print the layouts of both ways."""
    result = {"torch": torch.__version__}
    for way in ("operator", "graph"):
        with ExitStack() as stack:
            if way == "graph":
                stack.enter_context(mock.patch.object(flex, "flex_lists", lists_in_the_graph))
            result[way] = {name: lowered(needs_grad) for name, needs_grad in (("alone", False), ("training", True))}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
