"""Who computes attention in the benchmark: PyTorch's dense backends, BLADE's implementations, installed peers.

They are declared in a table. A candidate of one's own is one file: it makes a `Candidate`, and either calls
`register_candidate`, or belongs to an installed package whose entry point of the group `blade.attention_candidates`
names its candidates.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import block_sparse_attention, resolve_implementation
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from blade.common.declared import declare, declare_installed

Attend = Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]
"""Takes q, k, v of (B, S, H, D) and a mask; returns (B, S, H, D)."""

Refuse = Callable[[Tensor, Tensor, Tensor, BlockMask], str | None]
"""Takes what `Attend` takes; returns why it cannot be computed, None if it can."""

Takes = Callable[[Tensor, int], bool]
"""Takes queries, (B, S, H, D), and the tokens in a block; tells if such are measured."""

MATH_BYTES = 2**30
"""The dense backend that holds all logits is tried where they take no more than this."""


def _any(q: Tensor, block_size: int) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Somebody who computes attention, and when that is measured."""

    name: str
    """Its name in tables, plots and records; an implementation of BLADE has the implementation's."""
    attend: Attend
    """Computes it."""
    sparse: bool = False
    """Computes the kept blocks alone."""
    own: bool = False
    """Is one of BLADE's implementations, whose output must be right."""
    takes: Takes = _any
    """Tells with which queries and blocks it is measured."""
    module: str | None = None
    """Module that it imports; it is measured if that is installed."""
    package: str | None = None
    """The package that brings the module, whose version is recorded."""
    refuses: Refuse | None = None
    """Asked for every case; a refusal is recorded."""
    has_backward: Callable[[Tensor], bool] = lambda q: True
    """Takes queries; tells if it has a backward pass for such."""
    heads_first: bool = False
    """Is given tensors in which heads come before tokens in memory."""
    deterministic: bool = False
    """Is measured with PyTorch told to be deterministic in the backward pass."""

    def is_for(self, q: Tensor, block_size: int) -> bool:
        """Tell if it is measured on such queries."""
        if not self.takes(q, block_size):
            return False
        return self.module is None or importlib.util.find_spec(self.module) is not None


def _sdpa(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return attend


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    out: Tensor = import_module("flash_attn").flash_attn_func(q, k, v)
    return out


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    return _output(import_module("flash_attn_interface").flash_attn_func(q, k, v))


def _sageattention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    out: Tensor = import_module("sageattention").sageattn(q, k, v, tensor_layout="NHD", is_causal=False)
    return out


def _sparge_attn(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Its blocks are 128 queries by 64 keys, and on compute capability 9.0 64 by 128."""
    attend = import_module("spas_sage_attn").block_sparse_sage2_attn_cuda
    query_block, key_block = (64, 128) if torch.cuda.get_device_capability(q.device) == (9, 0) else (128, 64)
    keep = mask.keep.repeat_interleave(128 // query_block, 2).repeat_interleave(128 // key_block, 3)
    keep = keep[:, :, : -(-q.shape[1] // query_block), : -(-k.shape[1] // key_block)]
    heads_first = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out: Tensor = attend(*heads_first, mask_id=keep.to(torch.int8))
    return out.transpose(1, 2)


def _fastvideo_kernel(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """It takes whole blocks of 64 alone, and is told how many tokens of each count."""
    attend = import_module("fastvideo_kernel").block_sparse_attn
    tokens, blocks = q.shape[1], mask.query_blocks
    rest = 64 * blocks - tokens
    padded = (functional.pad(x.transpose(1, 2), (0, 0, 0, rest)).contiguous() for x in (q, k, v))
    held = torch.full((blocks,), 64, dtype=torch.int32, device=q.device)
    held[-1] -= rest
    out = _output(attend(*padded, mask.keep.expand(-1, q.shape[2], -1, -1).contiguous(), held))
    return out[:, :, :tokens].transpose(1, 2)


def _output(returned: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the output of a peer, some releases of which return the log-sum-exp too."""
    return returned[0] if isinstance(returned, tuple) else returned


def _dense(backend: SDPBackend, takes: Takes) -> tuple[Candidate, Candidate]:
    """One of PyTorch's backends, and, on the CPU, the same with heads before tokens in memory."""
    name = backend.name.lower().removesuffix("_attention")
    return (
        Candidate(name=name, attend=_sdpa(backend), takes=takes),
        Candidate(
            name=f"{name}, heads first",
            attend=_sdpa(backend),
            takes=lambda q, block_size: not q.is_cuda and takes(q, block_size),
            heads_first=True,
        ),
    )


def _implementation(name: str, **conditions: Any) -> Candidate:
    """One of BLADE's implementations of block-sparse attention."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        return block_sparse_attention(q, k, v, mask, implementation=name)

    def refuses(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> str | None:
        try:
            resolve_implementation(q, k, v, mask, implementation=name)
        except NotImplementedError as reason:
            return str(reason)
        return None

    return Candidate(name=name, attend=attend, refuses=refuses, sparse=True, own=True, **conditions)


def _logits_fit(q: Tensor, block_size: int) -> bool:
    return bool(q.shape[0] * q.shape[2] * q.shape[1] ** 2 * 4 <= MATH_BYTES)


def _half_on_cuda(q: Tensor, block_size: int) -> bool:
    return bool(q.is_cuda and q.dtype != torch.float32)


ENTRY_POINTS = "blade.attention_candidates"
"""Entry point group of other packages' candidates."""

CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        *_dense(SDPBackend.FLASH_ATTENTION, _any),
        Candidate(
            name="flash, deterministic",
            attend=_sdpa(SDPBackend.FLASH_ATTENTION),
            takes=lambda q, block_size: q.is_cuda,
            deterministic=True,
        ),
        *_dense(SDPBackend.EFFICIENT_ATTENTION, _any),
        *_dense(SDPBackend.CUDNN_ATTENTION, _any),
        *_dense(SDPBackend.MATH, _logits_fit),
        _implementation("triton"),
        _implementation("flex", has_backward=lambda q: q.is_cuda),
        # on CUDA it only stands in where nothing else can compute a call
        _implementation("cpu", takes=lambda q, block_size: not q.is_cuda),
        Candidate(
            name="flash-attn",
            attend=_flash_attn,
            takes=_half_on_cuda,
            module="flash_attn",
            package="flash-attn",
        ),
        Candidate(
            name="flash-attn 3",
            attend=_flash_attn_3,
            takes=_half_on_cuda,
            module="flash_attn_interface",
            package="flash-attn-3",
        ),
        Candidate(
            name="sageattention",
            attend=_sageattention,
            takes=_half_on_cuda,
            module="sageattention",
            package="sageattention",
            has_backward=lambda q: False,
        ),
        Candidate(
            name="SpargeAttn",
            attend=_sparge_attn,
            sparse=True,
            takes=lambda q, block_size: _half_on_cuda(q, block_size) and block_size == 128,
            module="spas_sage_attn",
            package="spas-sage-attn",
            has_backward=lambda q: False,
        ),
        Candidate(
            name="fastvideo-kernel",
            attend=_fastvideo_kernel,
            sparse=True,
            takes=lambda q, block_size: _half_on_cuda(q, block_size) and block_size == 64 and q.shape[0] == 1,
            module="fastvideo_kernel",
            package="fastvideo-kernel",
        ),
    )
}
"""The candidates by name; of other packages, those that were registered."""


def register_candidate(candidate: Candidate) -> Candidate:
    """Declare a candidate, and return it.

    Raises:
        ValueError: If there is a candidate of this name.
    """
    return declare(CANDIDATES, candidate)


def candidates_for(q: Tensor, block_size: int) -> tuple[Candidate, ...]:
    """Return the candidates that are measured on such queries, those that installed packages bring included.

    Args:
        q: (B, S, H, D), of the size and type and on the device that will be measured.
        block_size: Tokens in a block.
    """
    _declare_installed()
    return tuple(candidate for candidate in CANDIDATES.values() if candidate.is_for(q, block_size))


def recorded_packages() -> tuple[str, ...]:
    """Return the packages of all candidates, whose versions are recorded."""
    _declare_installed()
    packages = (candidate.package for candidate in CANDIDATES.values())
    return tuple(dict.fromkeys(package for package in packages if package is not None))


@cache
def _declare_installed() -> None:
    declare_installed(CANDIDATES, Candidate, ENTRY_POINTS)
