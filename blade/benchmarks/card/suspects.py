"""Calls that may crash a card, at the size of a layer of 75,600 tokens in 40 heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import block_sparse_attention
from blade_kernels.crashes import naming_crashes
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

SUSPECTS = (
    "flex, lists of all blocks", "flex, lists of the longest row", "triton", "exact", "cudnn", "efficient", "flash",
    "flash, deterministic",
)  # fmt: skip
"""Calls, those that are most likely to crash first."""

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "flash, deterministic": SDPBackend.FLASH_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Dense attention of PyTorch."""


@dataclass(frozen=True)
class LayerSize:
    """Size of an attention layer."""

    tokens: int = 75600
    heads: int = 40
    head_dim: int = 128
    block: int = 128


def call_suspect(name: str, device: torch.device, size: LayerSize = LayerSize()) -> dict[str, float]:
    """Compute attention forward and backward, and wait for the device after each.

    The mask is a diagonal band, and in every fourth head columns instead, so that lists have different lengths.

    Args:
        name: one of `SUSPECTS`.
        device: where.
        size: of the layer.

    Returns:
        For `flex`, how much output and gradients differ from those of another implementation: root mean square,
        relative.

    Raises:
        DeviceCrashError: if it crashes the GPU.
        NotImplementedError: if there is no such implementation here.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (1, size.tokens, size.heads, size.head_dim)
    q, k, v, grad = (torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(4))
    if name == "exact":
        with naming_crashes(f"{name}, forward", device):
            rows, keys, values = (x.double().transpose(1, 2) for x in (q[:, : size.block], k, v))
            seen = torch.ones(1, size.heads, 1, size.tokens, dtype=torch.bool, device=device)
            functional.scaled_dot_product_attention(rows, keys, values, attn_mask=seen)
        return {}
    if name in BACKENDS:
        _dense(name, q, k, v, grad)
        return {}
    whole, cut = _masks(size, device)
    other = "triton" if device.type == "cuda" else "cpu"
    expected = _sparse(name if name == "triton" else other, cut, q, k, v, grad)
    if not name.startswith("flex"):
        return {}
    results = _sparse("flex", cut if "longest" in name else whole, q, k, v, grad)
    return {
        name: float((result.float() - right.float()).square().mean().sqrt() / right.float().square().mean().sqrt())
        for name, result, right in zip(("output", "dq", "dk", "dv"), results, expected, strict=False)
    }


def _masks(size: LayerSize, device: torch.device) -> tuple[BlockMask, BlockMask]:
    """Return the mask with room for all blocks in its lists, and for those of the longest row."""
    blocks = -(-size.tokens // size.block)
    at = torch.arange(blocks, device=device)
    keep = ((at[:, None] - at).abs() <= max(1, blocks // 12)).repeat(1, size.heads, 1, 1)
    keep[:, 2::4] = False
    keep[:, 2::4, :, ::7] = True
    block_size, longest = (size.block, size.block), int(keep.sum(-1).max())
    masks = (BlockMask.from_dense(keep, block_size), BlockMask.from_dense(keep, block_size, longest))
    return masks[0].longest_rows_first(), masks[1].longest_rows_first()


def _sparse(implementation: str, mask: BlockMask, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    differentiable = implementation != "flex" or q.device.type == "cuda"
    tensors = [x.detach().requires_grad_(differentiable) for x in (q, k, v)]
    with naming_crashes(f"{implementation}, forward", q.device):
        queries, keys, values = tensors
        out = block_sparse_attention(queries, keys, values, mask, implementation=implementation)
    if not differentiable:
        return [out]
    with naming_crashes(f"{implementation}, backward", q.device):
        return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def _dense(name: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or name.endswith("deterministic"))
    try:
        with sdpa_kernel(BACKENDS[name]):
            with naming_crashes(f"{name}, forward", q.device):
                queries, keys, values = (x.transpose(1, 2) for x in tensors)
                out = functional.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)
            with naming_crashes(f"{name}, backward", q.device):
                torch.autograd.grad(out, tensors, grad)
    except RuntimeError as error:
        if "No viable backend" in str(error):
            raise NotImplementedError(f"PyTorch has no backend {name} for this") from error
        raise
    finally:
        torch.use_deterministic_algorithms(before)
