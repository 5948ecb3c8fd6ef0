"""Block-sparse attention with the CuTe kernels of cuDNN and FlashAttention-4, which need no compiler but their wheels.

They compute the kept blocks. Pooled tokens finish the same softmax in a Triton kernel, which starts from the output
and the log-sum-exp of the kept blocks; in the backward pass both branches get the whole output, its log-sum-exp and
its gradient, from which each recomputes its own weights. What they lack is left to the Triton kernels: a gradient of
the log-sum-exp, a backward pass where the table has none, and one that is asked to be deterministic.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import triton_attention
from blade_kernels.block_sparse.cute_libraries import library, missing_library
from blade_kernels.block_sparse.cute_table import ROWS, Direction, Kernel, kernels, verified
from blade_kernels.block_sparse.launch_table import BLOCK_SIZES
from blade_kernels.block_sparse.operators import Arguments, register
from blade_kernels.block_sparse.pooled import PooledTokens

_ALIGNED_BYTES = 128
_ROW_BYTES = 16

_library: ContextVar[str | None] = ContextVar("cute_library", default=None)


@contextmanager
def only_library(name: str) -> Iterator[None]:
    """Take kernels of one library alone, "cudnn" or "flash", to measure or check them."""
    token = _library.set(name)
    try:
        yield
    finally:
        _library.reset(token)


def unsupported(
    device_type: str,
    dtype: torch.dtype,
    head_size: int,
    block_size: tuple[int, int],
    *,
    pooled: bool = False,
    lengths: bool = False,
) -> str | None:
    """Return why no CuTe kernel can compute a call, or None if one can.

    Args:
        device_type: of q, k and v.
        dtype: of q, k and v.
        head_size: channels of a head.
        block_size: tokens in a (query block, key block).
        pooled: there are pooled tokens.
        lengths: there are numbers of valid keys.
    """
    number = architecture(device_type)
    if number is None:
        return f"the CuTe kernels run on NVIDIA GPUs, not on {device_type}"
    known = sorted({number for row in ROWS for number in row.architectures})
    if number not in known:
        return f"the CuTe kernels need compute capability {', '.join(map(_dotted, known))}, got {_dotted(number)}"
    fitting = kernels("forward", number, dtype, head_size, block_size, lengths=lengths)
    if not fitting:
        queries, keys = block_size
        return (
            f"no CuTe kernel of sm_{number} computes {dtype} with heads of {head_size}, blocks of {queries} queries "
            f"by {keys} keys{' and key lengths' if lengths else ''}"
        )
    missing = [missing_library(kernel.row.library) for kernel in fitting]
    if all(missing):
        return missing[0]
    if pooled and (problem := triton_attention.unsupported(device_type, dtype, head_size, _triton_blocks(block_size))):
        return f"pooled tokens are added with Triton, and {problem}"
    return None


def is_verified(
    device_type: str,
    dtype: torch.dtype,
    head_size: int,
    block_size: tuple[int, int],
    *,
    lengths: bool,
    needs_grad: bool,
) -> bool:
    """Return whether a card's report has found the kernels right that a supported call would take.

    Args:
        device_type: of q, k and v.
        dtype: of q, k and v.
        head_size: channels of a head.
        block_size: tokens in a (query block, key block).
        lengths: there are numbers of valid keys.
        needs_grad: gradients are needed.
    """
    directions: tuple[Direction, ...] = ("forward", "backward") if needs_grad else ("forward",)
    chosen = [_choose(direction, device_type, dtype, head_size, block_size, lengths) for direction in directions]
    return all(kernel is None or str(kernel) in verified() for kernel in chosen)


@functools.cache
def architecture(device_type: str) -> int | None:
    """Return the compute capability of the current device, such as 90, or None if it is no NVIDIA GPU.

    Args:
        device_type: of the tensors.
    """
    if device_type != "cuda" or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _dotted(number: int) -> str:
    return f"{number // 10}.{number % 10}"


def cute_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    pooled: PooledTokens | None,
    key_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend to the kept blocks and the pooled tokens, differentiably.

    Args:
        q: (B, S, H, D), bfloat16 or float16.
        k: (B, T, H, D).
        v: (B, T, H, D).
        mask: the kept blocks.
        pooled: pooled tokens that share the softmax, or None.
        key_lengths: (B,) integers, number of valid keys; None if all are valid.
        scale: factor of the logits.

    Returns:
        Output, (B, S, H, D) in the dtype of `q`, and log-sum-exp, (B, S, H) float32.
    """
    if scale < 0:  # not every kernel takes such a scale
        q, scale = -q, -scale
    return _attention(*Arguments.of(q, k, v, mask, pooled, key_lengths, scale))


def forward(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Compute the kept blocks with a CuTe kernel, and add the pooled tokens."""
    kernel = _kernel("forward", arguments)
    if kernel is None:
        raise NotImplementedError("No CuTe kernel computes this call.")
    compute = library(kernel.row.library).forward
    parts = [
        compute(part.q, part.k, part.v, part.mask, part.valid_keys, arguments.scale)
        for part in _parts(kernel, arguments)
    ]
    queries = arguments.q.shape[1]
    out = _joined([part_out[:, :queries] for part_out, _ in parts])
    lse = _joined([part_lse[..., :queries].transpose(1, 2) for _, part_lse in parts])
    if arguments.pooled_k.shape[1]:
        triton_attention.add_pooled(_for_triton(arguments), out, lse)
    return out, lse


def backward(
    arguments: Arguments, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, ...]:
    """Compute the gradients of q, k, v and of the pooled keys and values."""
    kernel = _kernel("backward", arguments)
    if kernel is None or grad_lse is not None or torch.are_deterministic_algorithms_enabled():
        return triton_attention.backward(_for_triton(arguments), out, lse, grad_out, grad_lse)
    compute = library(kernel.row.library).backward
    sums = lse.transpose(1, 2)
    gradients = []
    for part in _parts(kernel, arguments):
        wide_out, wide_grad = (_filled(x[part.items], part.q.shape[1]) for x in (out, grad_out))
        wide_lse = torch.nn.functional.pad(sums[part.items], (0, part.q.shape[1] - sums.shape[2])).contiguous()
        dq, dk, dv = compute(
            part.q, part.k, part.v, part.mask, part.valid_keys, arguments.scale, wide_out, wide_lse, wide_grad
        )
        rows, columns = part.mask.counts > 0, part.mask.keep.any(2)
        gradients.append(
            (
                _cleared(dq, rows, kernel.block_size[0])[:, : out.shape[1]],
                _cleared(dk, columns, kernel.block_size[1]),
                _cleared(dv, columns, kernel.block_size[1]),
            )
        )
    dq, dk, dv = (_joined(x) for x in zip(*gradients, strict=True))
    if arguments.key_lengths is not None:
        absent = ~_present(arguments)
        dk, dv = (x.masked_fill(absent, 0.0) for x in (dk, dv))
    if not arguments.pooled_k.shape[1]:
        return dq, dk, dv, torch.zeros_like(arguments.pooled_k), torch.zeros_like(arguments.pooled_v)
    by_pooled, *d_pooled = triton_attention.pooled_backward(_for_triton(arguments), out, lse, grad_out)
    return dq + by_pooled, dk, dv, *d_pooled


class _Part(NamedTuple):
    """What a library is called with: the whole batch, or an item of it."""

    items: slice
    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockMask
    valid_keys: Tensor | None


def _parts(kernel: Kernel, arguments: Arguments) -> Iterator[_Part]:
    """Bring the arguments into the form that a kernel takes."""
    (q, k, v), row = arguments[:3], kernel.row
    query_block, key_block = kernel.block_size
    batch, heads, keys = q.shape[0], q.shape[2], k.shape[1]
    mask, valid_keys = _divided(arguments.mask, kernel.block_size, q.shape[1], keys), None
    mask = replace(
        mask,
        keep=mask.keep.expand(batch, heads, -1, -1),
        counts=mask.counts.expand(batch, heads, -1).contiguous(),
        indices=mask.indices.expand(batch, heads, -1, -1).contiguous(),
        order=None,
    )
    starts = torch.arange(mask.key_blocks, device=q.device) * key_block
    if arguments.key_lengths is not None:
        k, v = (x.masked_fill(~_present(arguments), 0.0) for x in (k, v))  # weights of 0 times NaN would be NaN
        stops = arguments.key_lengths.to(q.device).clamp(0, keys)
        blocks = -(-stops // key_block)
        mask = _shortened(mask, blocks)
        # a kernel does not look at blocks that no list holds, and takes no block of 0 keys
        valid_keys = (stops[:, None] - starts).clamp(1, key_block).to(torch.int32)
    elif keys % key_block:
        valid_keys = (keys - starts).clamp(max=key_block).to(torch.int32)
    q = _filled(q, mask.query_blocks * query_block) if row.whole_queries else q
    q, k, v = (_aligned(x) for x in (q, k, v))
    if valid_keys is None or valid_keys.ndim == 1 or row.lengths == "items":
        yield _Part(slice(None), q, k, v, mask, valid_keys)
        return
    for item in range(batch):
        only = slice(item, item + 1)
        part = replace(mask, keep=mask.keep[only], counts=mask.counts[only], indices=mask.indices[only])
        yield _Part(only, q[only], k[only], v[only], part, valid_keys[item])


def _divided(mask: BlockMask, block_size: tuple[int, int], queries: int, keys: int) -> BlockMask:
    """Divide the blocks of a mask into smaller ones; blocks past the end of the sequences are left out."""
    rows, columns = (size // part for size, part in zip(mask.block_size, block_size, strict=True))
    if rows == columns == 1:
        return mask
    query_blocks, key_blocks = -(-queries // block_size[0]), -(-keys // block_size[1])
    keep = mask.keep.repeat_interleave(rows, 2)[:, :, :query_blocks].repeat_interleave(columns, 3)[..., :key_blocks]
    indices = mask.indices.unsqueeze(-1) * columns + torch.arange(columns, device=mask.device, dtype=torch.int32)
    indices = indices.flatten(-2).repeat_interleave(rows, 2)[:, :, :query_blocks]
    return BlockMask(keep, keep.sum(-1, dtype=torch.int32), indices, block_size)


def _shortened(mask: BlockMask, blocks: Tensor) -> BlockMask:
    """Leave out the blocks of each item from the given one on: (B,) integers."""
    blocks = blocks.view(-1, 1, 1, 1)
    filled = torch.arange(mask.capacity, device=mask.device) < mask.counts.unsqueeze(-1)
    return replace(
        mask,
        keep=mask.keep & (torch.arange(mask.key_blocks, device=mask.device) < blocks),
        counts=(filled & (mask.indices < blocks)).sum(-1, dtype=torch.int32),
    )


def _present(arguments: Arguments) -> Tensor:
    """Mark the valid keys: (B, T, 1, 1) bool."""
    k, lengths = arguments.k, arguments.key_lengths
    assert lengths is not None  # asked only where there are some
    places = torch.arange(k.shape[1], device=k.device)
    return (places < lengths.to(k.device).unsqueeze(-1))[:, :, None, None]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the parts of a batch as one contiguous tensor."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts))


def _filled(x: Tensor, tokens: int) -> Tensor:
    """Pad dimension 1 with zeros."""
    missing = tokens - x.shape[1]
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x


def _aligned(x: Tensor) -> Tensor:
    """Return the tensor with heads in one piece, and rows where the kernels can load them, copied only if needed."""
    rows = (stride * x.element_size() for stride in x.stride()[:3])
    if x.stride(-1) == 1 and all(stride and stride % _ROW_BYTES == 0 for stride in rows):
        return x if x.data_ptr() % _ALIGNED_BYTES == 0 else x.clone(memory_format=torch.contiguous_format)
    return x.clone(memory_format=torch.contiguous_format)


def _cleared(x: Tensor, computed: Tensor, block: int) -> Tensor:
    """Set the tokens to zero of blocks that no kernel has computed.

    Args:
        x: (B, tokens, H, D).
        computed: (B, H, blocks) bool.
        block: tokens in a block.
    """
    tokens = computed.repeat_interleave(block, 2)[..., : x.shape[1]]
    return x.masked_fill(~tokens.transpose(1, 2).unsqueeze(-1), 0.0)


def _triton_blocks(block_size: tuple[int, int]) -> tuple[int, int]:
    """Return blocks that Triton's kernels take and that divide these."""
    largest = max(BLOCK_SIZES)
    return (min(block_size[0], largest), min(block_size[1], largest))


def _for_triton(arguments: Arguments) -> Arguments:
    """Divide the blocks where they are larger than the Triton kernels take."""
    mask, (queries, keys) = arguments.mask, _triton_blocks(arguments.mask.block_size)
    if (queries, keys) == mask.block_size:
        return arguments
    divided = _divided(mask, (queries, keys), arguments.q.shape[1], arguments.k.shape[1])
    owner = arguments.pooled_block
    return arguments._replace(
        keep=divided.keep,
        counts=divided.counts,
        indices=divided.indices,
        order=None,
        block_size=[queries, keys],
        pooled_block=None if owner is None else owner * (mask.block_size[1] // keys),
    )


def _kernel(direction: Direction, arguments: Arguments) -> Kernel | None:
    """Choose the kernel for the arguments of the operator, or None if the table has none that is installed."""
    q, lengths = arguments.q, arguments.key_lengths
    return _choose(direction, q.device.type, q.dtype, q.shape[-1], arguments.mask.block_size, lengths is not None)


def _choose(
    direction: Direction,
    device_type: str,
    dtype: torch.dtype,
    head_size: int,
    block_size: tuple[int, int],
    lengths: bool,
) -> Kernel | None:
    """Choose a kernel."""
    fitting = kernels(direction, architecture(device_type) or 0, dtype, head_size, block_size, lengths=lengths)
    only = _library.get()
    return next(
        (
            kernel
            for kernel in fitting
            if only in (None, kernel.row.library) and missing_library(kernel.row.library) is None
        ),
        None,
    )


_attention = register("block_sparse_cute", forward, backward)
