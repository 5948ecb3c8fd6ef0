"""Candidates of the attention benchmark: PyTorch's dense backends, BLADE's implementations, installed peers.

They are declared in a table. A new candidate takes one file: it makes a `Candidate`, and either calls
`register_candidate`, or belongs to an installed package whose entry point in the group `blade.attention_candidates`
names its candidates.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
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
"""Takes the arguments of `Attend`; returns the reason why they are not supported, or None."""

Takes = Callable[[Tensor, int], bool]
"""Takes queries, (B, S, H, D), and the tokens in a block; returns whether such inputs are measured."""

MATH_BYTES = 2**30
"""Most bytes of logits with which the dense backend that materializes them is measured."""


def _any(q: Tensor, block_size: int) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to compute attention, and the inputs with which it is measured."""

    name: str
    """Name in tables, plots and records; for BLADE's implementations, the implementation's and, after a comma,
    the precision's where it is not full."""
    attend: Attend
    """Computes attention."""
    sparse: bool = False
    """If true, it computes the kept blocks only."""
    own: bool = False
    """If true, it is one of BLADE's implementations, whose output must be right."""
    tried: bool = False
    """If true, what it fails at, or computes wrongly, is recorded as missing and ends nothing."""
    takes: Takes = _any
    """Returns whether queries and blocks are measured."""
    module: str | None = None
    """Module that it imports; it is measured only if the module is installed."""
    package: str | None = None
    """Package of the module, whose version is recorded."""
    refuses: Refuse | None = None
    """Called for every case; a reason that it returns is recorded."""
    has_backward: Callable[[Tensor], bool] = lambda q: True
    """Takes queries; returns whether there is a backward pass for them."""
    heads_first: bool = False
    """If true, its inputs have heads before tokens in memory."""
    deterministic: bool = False
    """If true, its backward pass is measured with PyTorch's deterministic algorithms."""

    def is_for(self, q: Tensor, block_size: int) -> bool:
        """Return whether it is measured on such queries."""
        return self.takes(q, block_size) and (self.module is None or _installed(self.module))

    def absent_because(self, q: Tensor, block_size: int) -> str | None:
        """Return why a peer is not measured on such queries; None for one that is, and for all others."""
        if self.module is None or self.is_for(q, block_size):
            return None
        if not _installed(self.module):
            return f"`{self.package or self.module}` is not installed"
        kind = str(q.dtype).removeprefix("torch.")
        return f"it takes no {kind} on {q.device.type} in blocks of {block_size}, batch {q.shape[0]}"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package around a module
        return False


def _sdpa(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return attend


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(q, k, v)
    return out


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    from flash_attn_interface import flash_attn_func

    return _output(flash_attn_func(q, k, v))


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    from flash_attn.cute import flash_attn_func

    return _output(flash_attn_func(q, k, v))


def _flashinfer(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attend with FlashInfer, which takes one sequence."""
    from flashinfer import single_prefill_with_kv_cache

    out: Tensor = single_prefill_with_kv_cache(q[0], k[0], v[0], causal=False)
    return out.unsqueeze(0)


def _sageattention(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    from sageattention import sageattn

    out: Tensor = sageattn(q, k, v, tensor_layout="NHD", is_causal=False)
    return out


def _sparge_attn(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attend with SpargeAttn, whose blocks are 128 queries by 64 keys, or 64 by 128 on compute capability 9.0."""
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    query_block, key_block = (64, 128) if torch.cuda.get_device_capability(q.device) == (9, 0) else (128, 64)
    keep = mask.keep.repeat_interleave(128 // query_block, 2).repeat_interleave(128 // key_block, 3)
    keep = keep[:, :, : -(-q.shape[1] // query_block), : -(-k.shape[1] // key_block)]
    heads_first = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    out: Tensor = block_sparse_sage2_attn_cuda(*heads_first, mask_id=keep.to(torch.int8))
    return out.transpose(1, 2)


def _fastvideo_kernel(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """Attend with fastvideo-kernel, which takes whole blocks of 64 and the number of valid tokens in each."""
    from fastvideo_kernel import block_sparse_attn

    tokens, blocks = q.shape[1], mask.query_blocks
    padding = 64 * blocks - tokens
    padded = (functional.pad(x.transpose(1, 2), (0, 0, 0, padding)).contiguous() for x in (q, k, v))
    block_lengths = torch.full((blocks,), 64, dtype=torch.int32, device=q.device)
    block_lengths[-1] -= padding
    out = _output(block_sparse_attn(*padded, mask.keep.expand(-1, q.shape[2], -1, -1).contiguous(), block_lengths))
    return out[:, :, :tokens].transpose(1, 2)


def _output(returned: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the output of a peer, some releases of which return the log-sum-exp too."""
    return returned[0] if isinstance(returned, tuple) else returned


def _dense(backend: SDPBackend, takes: Takes) -> tuple[Candidate, Candidate]:
    """Declare one of PyTorch's backends, and the same with heads before tokens in memory, measured on the CPU only."""
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


def _implementation(name: str, precision: str = "full", **conditions: Any) -> Candidate:
    """Declare one of BLADE's implementations of block-sparse attention, in a precision."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        return block_sparse_attention(q, k, v, mask, implementation=name, precision=precision)

    def refuses(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> str | None:
        try:
            resolve_implementation(q, k, v, mask, implementation=name, precision=precision)
        except NotImplementedError as reason:
            return str(reason)
        return None

    shown = name if precision == "full" else f"{name}, {precision}"
    return Candidate(name=shown, attend=attend, refuses=refuses, sparse=True, own=True, **conditions)


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
        _implementation("triton", "int8", takes=_half_on_cuda, has_backward=lambda q: False),
        _implementation("triton", "fp8", takes=_half_on_cuda, has_backward=lambda q: False),
        # kernels of other projects, not verified on every card
        _implementation("cute", takes=_half_on_cuda, tried=True),
        _implementation("flex", has_backward=lambda q: q.is_cuda),
        # on CUDA it is only the last resort
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
            name="flash-attn 4",
            attend=_flash_attn_4,
            takes=_half_on_cuda,
            module="flash_attn.cute",
            package="flash-attn-4",
        ),
        Candidate(
            name="flashinfer",
            attend=_flashinfer,
            takes=lambda q, block_size: _half_on_cuda(q, block_size) and q.shape[0] == 1,
            module="flashinfer",
            package="flashinfer-python",
            has_backward=lambda q: False,
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
"""The candidates by name, including those that were registered."""


def register_candidate(candidate: Candidate) -> Candidate:
    """Declare a candidate and return it.

    Raises:
        ValueError: If a candidate of this name exists.
    """
    return declare(CANDIDATES, candidate)


def candidates_for(q: Tensor, block_size: int) -> tuple[Candidate, ...]:
    """Return the candidates that are measured on such queries, including those of installed packages.

    Args:
        q: (B, S, H, D), of the size and type and on the device that will be measured.
        block_size: Tokens in a block.
    """
    _declare_installed()
    return tuple(candidate for candidate in CANDIDATES.values() if candidate.is_for(q, block_size))


def absent_candidates(q: Tensor, block_size: int) -> dict[str, str]:
    """Return, by name, why peers are not measured on such queries; see `candidates_for`."""
    _declare_installed()
    reasons = {name: candidate.absent_because(q, block_size) for name, candidate in CANDIDATES.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def recorded_packages() -> tuple[str, ...]:
    """Return the packages of all candidates, whose versions are recorded."""
    _declare_installed()
    packages = (candidate.package for candidate in CANDIDATES.values())
    return tuple(dict.fromkeys(package for package in packages if package is not None))


@cache
def _declare_installed() -> None:
    declare_installed(CANDIDATES, Candidate, ENTRY_POINTS)
