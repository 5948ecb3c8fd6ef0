"""Block-sparse attention with compiled FlexAttention.

On the CPU FlexAttention computes the forward pass only, without log-sum-exp; on CUDA everything, with restrictions on
block sizes. `unsupported` checks all of this. The first call with new shapes takes seconds to compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention, noop_mask
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse.flex_lists import FlexLists, flex_lists
from blade_kernels.block_sparse.pooled import PooledTokens
from blade_kernels.toolchain import missing_c_toolchain, missing_cpp_toolchain
from blade_kernels.triton_support import triton_installed

_Attend = Callable[..., tuple[Tensor, Tensor | None]]

_RECOMPILE_LIMIT = 64  # different shapes, dtypes and options in one process
_TILE = 128  # FlexAttention's own configurations need blocks of a multiple of this
_VECTOR_BITS = {"AVX2": 256, "AVX512": 512}
# With these head sizes PyTorch 2.13's `CppMicroGemmFP32Vec` transposes the keys; where a block has 8 keys more than a
# multiple of 16 it writes 16 logits instead of 8, over the row maxima that follow them in memory.
_OVERRUNNING_HEADS = (8, 16)


def unsupported(
    device_type: str,
    dtype: torch.dtype,
    head_size: int,
    block_size: tuple[int, int],
    needs_grad: bool,
    return_lse: bool,
) -> str | None:
    """Return why FlexAttention cannot compute a call, or None if it can.

    Args:
        device_type: of q, k and v.
        dtype: of q, k and v.
        head_size: channels of a head.
        block_size: tokens in a (query block, key block).
        needs_grad: gradients are needed.
        return_lse: the log-sum-exp is needed.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention computes float32, bfloat16 and float16, not {dtype}"
    if device_type == "cpu":
        return _unsupported_on_cpu(head_size, needs_grad, return_lse)
    if device_type == "cuda":
        return _unsupported_on_cuda(head_size, block_size, needs_grad)
    return f"FlexAttention is not used on {device_type}"


def _unsupported_on_cpu(head_size: int, needs_grad: bool, return_lse: bool) -> str | None:
    if needs_grad:
        return "FlexAttention has no backward on the CPU"
    if return_lse:
        return "FlexAttention gives no log-sum-exp on the CPU"
    instructions = torch.backends.cpu.get_cpu_capability()
    if instructions not in _VECTOR_BITS:
        return "FlexAttention on the CPU needs AVX2"
    if instructions == "AVX2" and head_size in _OVERRUNNING_HEADS:
        return f"FlexAttention on AVX2 gives wrong values with heads of {head_size} channels"
    missing = missing_cpp_toolchain()
    return missing and f"FlexAttention has to be compiled, and {missing}"


def _unsupported_on_cuda(head_size: int, block_size: tuple[int, int], needs_grad: bool) -> str | None:
    if head_size < 16:
        return f"FlexAttention needs heads of at least 16, got {head_size}"
    if any(size % 16 for size in block_size):
        return f"FlexAttention needs blocks of a multiple of 16 tokens, got {block_size}"
    if needs_grad and any(size % _TILE for size in block_size):
        return f"FlexAttention's backward needs blocks of a multiple of {_TILE} tokens, got {block_size}"
    if not triton_installed():
        return "Triton, with which PyTorch compiles for GPUs, is not installed"
    missing = missing_c_toolchain()
    return missing and f"Triton's launcher has to be compiled, and {missing}"


def flex_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    pooled: PooledTokens | None,
    key_lengths: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend to the kept blocks and the pooled tokens.

    Pooled tokens are appended to the keys in blocks of their own, with their weights as a bias on the logits.

    Args:
        q: (B, S, H, D), float32, bfloat16 or float16.
        k: (B, T, H, D).
        v: (B, T, H, D).
        mask: the kept blocks.
        pooled: pooled tokens that share the softmax, or None.
        key_lengths: (B,) integers, number of valid keys; None if all are valid.
        scale: factor of the logits.
        return_lse: also compute the log-sum-exp.

    Returns:
        Output, (B, S, H, D), and log-sum-exp, (B, S, H) float32, or None.
    """
    bias = None  # (B or 1, keys) added to the logits
    if key_lengths is not None:
        absent = torch.arange(k.shape[1], device=k.device) >= key_lengths.to(k.device).unsqueeze(-1)
        k, v = (x.masked_fill(absent[:, :, None, None], 0.0) for x in (k, v))  # invalid keys may hold anything
        bias = torch.zeros_like(absent, dtype=torch.float32).masked_fill(absent, -torch.inf)

    extra = 0  # key blocks of pooled tokens
    keep = owner = None
    lists = mask
    if pooled is not None:
        size = mask.block_size[1]
        extra = -(-len(pooled) // size)
        tokens = torch.zeros(1, k.shape[1], device=k.device) if bias is None else bias
        weights = pooled.log_weight.expand(tokens.shape[0], -1)
        bias = torch.cat((_fill_block(tokens, size, -torch.inf), _fill_block(weights, size, -torch.inf)), dim=1)
        k = torch.cat((_fill_block(k, size), _fill_block(pooled.k, size)), dim=1)
        v = torch.cat((_fill_block(v, size), _fill_block(pooled.v, size)), dim=1)
        if pooled.key_block is None:
            visible = mask.keep.new_ones(()).expand(*mask.keep.shape[:3], extra)
            lists = BlockMask.from_dense(torch.cat((mask.keep, visible), dim=-1), mask.block_size)
        else:
            keep = mask.keep.expand(q.shape[0], q.shape[2], -1, -1)
            owner = torch.nn.functional.pad(pooled.key_block, (mask.key_blocks * size, -len(pooled) % size))

    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    blocks = flex_lists(lists, 0 if keep is None else extra, needs_grad)
    return _compiled()(
        q, k, v, blocks, bias, keep, owner, mask.block_size, scale, return_lse, _kernel_options(q, mask.block_size)
    )


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: FlexLists,
    bias: Tensor | None,
    keep: Tensor | None,
    owner: Tensor | None,
    block_size: tuple[int, int],
    scale: float,
    return_lse: bool,
    kernel_options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Run FlexAttention: the mask's blocks are full blocks, those of pooled tokens that rows may not see are partial.

    Args:
        q: (B, S, H, D).
        k: (B, keys, H, D), pooled ones appended.
        v: (B, keys, H, D).
        lists: the blocks.
        bias: (B or 1, keys), added to the logits, or None.
        keep: (B, H, QB, KB), the mask, if it hides pooled tokens from rows; else None.
        owner: (keys,), the key block that each pooled token represents, if `keep` is given; else None.
        block_size: tokens in a (query block, key block).
        scale: factor of the logits.
        return_lse: also compute the log-sum-exp.
        kernel_options: options of FlexAttention.
    """
    block_mask = FlexBlockMask(
        (q.shape[1], k.shape[1]),
        *lists,
        BLOCK_SIZE=block_size,
        mask_mod=noop_mask if keep is None or owner is None else _dropped(keep, owner, block_size[0]),
    )
    arguments: dict[str, Any] = dict(
        score_mod=None if bias is None else _biased(bias),
        block_mask=block_mask,
        scale=scale,
        kernel_options=kernel_options,
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if return_lse:
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **arguments)
        return out.transpose(1, 2), aux.lse.transpose(1, 2)
    return flex_attention(q, k, v, **arguments).transpose(1, 2), None


def _biased(bias: Tensor) -> Callable[..., Tensor]:
    """Return a function that adds (B or 1, keys) to the logits."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return score + bias[b if bias.shape[0] > 1 else 0, k_index]

    return score_mod


def _dropped(keep: Tensor, owner: Tensor, query_block: int) -> Callable[..., Tensor]:
    """Return a mask function that shows a pooled token to the rows that do not keep the key block it represents.

    Args:
        keep: (B, H, QB, KB) bool.
        owner: (keys,), the key block that each pooled token represents.
        query_block: tokens in a query block.
    """

    def mask_mod(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return ~keep[b, h, q_index // query_block, owner[k_index]]

    return mask_mod


def _compiled() -> _Attend:
    """Return `_attend`, compiled; eagerly it would build an S x S tensor."""
    return _attend if torch.compiler.is_compiling() else _compile_once()


@functools.cache
def _compile_once() -> _Attend:
    # The code that PyTorch 2.13 generates for the CPU with symbolic sizes does not compile, so every size is compiled
    # separately; beyond the limit `fullgraph` raises an error instead of running `_attend` eagerly.
    # `unsupported` has already checked the vector instructions; the compiler's own probe would take seconds.
    # Their width is part of the key of PyTorch's cache, which otherwise hands code for AVX2 to a machine with AVX512,
    # where it gives wrong values.
    vector_bits = _VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability())
    options: dict[str, Any] = {"cpp.vec_isa_ok": True, "cpp.simdlen": vector_bits}
    compiled = torch.compile(_attend, fullgraph=True, dynamic=False, options=options)
    limited: _Attend = torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT)(compiled)
    return limited


def _kernel_options(q: Tensor, block_size: tuple[int, int]) -> dict[str, Any]:
    """Choose, on CUDA, tiles that divide blocks which FlexAttention's own tiles do not."""
    if q.device.type != "cuda" or not any(size % _TILE for size in block_size):
        return {}
    tiles = [next(tile for tile in (64, 32, 16) if size % tile == 0) for size in block_size]
    return {"fwd_BLOCK_M": tiles[0], "fwd_BLOCK_N": tiles[1]}


def _fill_block(x: Tensor, size: int, value: float = 0.0) -> Tensor:
    """Pad dimension 1 with `value` to a multiple of `size`."""
    missing = -x.shape[1] % size
    if not missing:
        return x
    return torch.cat((x, x.new_full((x.shape[0], missing, *x.shape[2:]), value)), dim=1)
