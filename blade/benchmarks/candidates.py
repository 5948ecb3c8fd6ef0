"""Who computes attention in the benchmark: PyTorch's dense backends, BLADE's implementations, installed peers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import block_sparse_attention, resolve_implementation
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]
"""Takes q, k, v of (B, S, H, D) and a mask; returns (B, S, H, D)."""

IMPLEMENTATIONS = ("triton", "flex", "cpu")
"""BLADE's implementations of block-sparse attention that are made to be fast."""

MATH_BYTES = 2**30
"""The dense backend that holds all logits is tried where they take no more than this."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Somebody who computes attention."""

    name: str
    attend: Attend
    sparse: bool = False
    """Whether it computes the kept blocks alone."""
    own: bool = False
    """Whether it is one of `IMPLEMENTATIONS`, whose output must be right."""
    differentiable: bool = True
    """Whether it has a backward pass."""
    heads_first: bool = False
    """Whether it is given tensors in which heads come before tokens in memory."""
    deterministic: bool = False
    """Whether PyTorch is told to be deterministic in the backward pass."""


def dense_candidates(q: Tensor) -> list[Candidate]:
    """PyTorch's backends that might compute dense attention.

    Args:
        q: (B, S, H, D), of the size and type and on the device that will be measured.
    """
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if q.shape[0] * q.shape[2] * q.shape[1] ** 2 * 4 <= MATH_BYTES:
        backends.append(SDPBackend.MATH)
    found = []
    for backend in backends:
        plain = Candidate(name=backend.name.lower().removesuffix("_attention"), attend=_sdpa(backend))
        found.append(plain)
        if not q.is_cuda:
            found.append(replace(plain, name=f"{plain.name}, heads first", heads_first=True))
        elif backend is SDPBackend.FLASH_ATTENTION:
            found.append(replace(plain, name=f"{plain.name}, deterministic", deterministic=True))
    return found


def own_candidates(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> tuple[list[Candidate], dict[str, str]]:
    """BLADE's implementations that can compute a case, and why the others cannot.

    On CUDA `cpu` is not among them: there it only stands in where nothing else can compute a call.
    """
    found, missing = [], dict[str, str]()
    for name in IMPLEMENTATIONS:
        if name == "cpu" and q.is_cuda:
            continue
        try:
            resolve_implementation(q, k, v, mask, implementation=name)
        except NotImplementedError as reason:
            missing[name] = str(reason)
            continue
        differentiable = name != "flex" or q.is_cuda
        found.append(Candidate(name=name, attend=_own(name), sparse=True, own=True, differentiable=differentiable))
    return found, missing


def installed_peers(q: Tensor, block_size: int) -> list[Candidate]:
    """Other packages' attention that is installed and takes such blocks, on CUDA in half precision."""
    if not q.is_cuda or q.dtype == torch.float32:
        return []
    peers = {
        "flash_attn": Candidate(name="flash-attn", attend=_flash_attn),
        "flash_attn_interface": Candidate(name="flash-attn 3", attend=_flash_attn_3),
        "sageattention": Candidate(name="sageattention", attend=_sageattention, differentiable=False),
    }
    if block_size == 128:
        sparge = Candidate(name="SpargeAttn", attend=_sparge_attn, sparse=True, differentiable=False)
        peers["spas_sage_attn"] = sparge
    if block_size == 64 and q.shape[0] == 1:
        peers["fastvideo_kernel"] = Candidate(name="fastvideo-kernel", attend=_fastvideo_kernel, sparse=True)
    return [peer for module, peer in peers.items() if importlib.util.find_spec(module) is not None]


def _own(name: str) -> Attend:
    return lambda q, k, v, mask: block_sparse_attention(q, k, v, mask, implementation=name)


def _sdpa(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        with sdpa_kernel(backend):
            tensors = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(*tensors).transpose(1, 2)

    return attend


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # some releases return the log-sum-exp too


def _sageattention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="NHD", is_causal=False)


def _sparge_attn(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Its blocks are 128 queries by 64 keys, and on compute capability 9.0 64 by 128."""
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    query_block, key_block = (64, 128) if torch.cuda.get_device_capability(q.device) == (9, 0) else (128, 64)
    keep = mask.keep.repeat_interleave(128 // query_block, 2).repeat_interleave(128 // key_block, 3)
    keep = keep[:, :, : -(-q.shape[1] // query_block), : -(-k.shape[1] // key_block)]
    heads_first = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return block_sparse_sage2_attn_cuda(*heads_first, mask_id=keep.to(torch.int8)).transpose(1, 2)


def _fastvideo_kernel(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """It takes whole blocks of 64 alone, and is told how many tokens of each count."""
    from fastvideo_kernel import block_sparse_attn

    tokens, blocks = q.shape[1], mask.query_blocks
    rest = 64 * blocks - tokens
    padded = (torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 0, rest)).contiguous() for x in (q, k, v))
    held = torch.full((blocks,), 64, dtype=torch.int32, device=q.device)
    held[-1] -= rest
    out = block_sparse_attn(*padded, mask.keep.expand(-1, q.shape[2], -1, -1).contiguous(), held)
    out = out[0] if isinstance(out, tuple) else out
    return out[:, :, :tokens].transpose(1, 2)
