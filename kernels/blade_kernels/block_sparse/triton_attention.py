"""Block-sparse attention with Triton: limits of the kernels, and their launches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse.launch_table import (
    BLOCK_SIZES,
    HEAD_SIZES,
    Kernel,
    LaunchConfig,
    architecture,
    launch_config,
)
from blade_kernels.block_sparse.operators import Arguments, register, register_forward
from blade_kernels.block_sparse.pooled import PooledTokens
from blade_kernels.block_sparse.quantized import mean_keys, value_scales
from blade_kernels.triton_support import interpreted, missing_triton, on_device

_LN2 = math.log(2.0)
FLOAT8_FROM = (8, 9)
"""Lowest compute capability that multiplies 8-bit floats."""

FLOAT8_KEYS = 32
"""Fewest keys whose 8-bit weights Triton multiplies with their values."""

DELTA_TILE = 64
TRANSPOSE_TILE = 64
ROUNDED_TOKENS = 64
_POOLED_PROGRAMS = 512  # programs among which pooled gradients are divided: several for each multiprocessor


def unsupported(
    device_type: str, dtype: torch.dtype, head_size: int, block_size: tuple[int, int], precision: str = "full"
) -> str | None:
    """Return why the Triton kernels cannot compute a call, or None if they can.

    Args:
        device_type: of q, k and v.
        dtype: of q, k and v.
        head_size: channels of a head.
        block_size: tokens in a (query block, key block).
        precision: one of `quantized.PRECISIONS`.
    """
    if precision == "fp8" and device_type == "cuda":
        capability = torch.cuda.get_device_capability()
        if capability < FLOAT8_FROM:
            return "8-bit floats need compute capability {}.{}, got {}.{}".format(*FLOAT8_FROM, *capability)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels compute bfloat16, float16 and float32, not {dtype}"
    if head_size not in HEAD_SIZES:
        return f"the Triton kernels need heads of 64 or 128, got {head_size}"
    if precision == "fp8" and block_size[1] < FLOAT8_KEYS:
        return f"8-bit floats need key blocks of at least {FLOAT8_KEYS} tokens, got {block_size[1]}"
    if any(size not in BLOCK_SIZES for size in block_size):
        return f"the Triton kernels need blocks of 16, 32, 64 or 128 tokens, got {block_size}"
    return missing_triton(device_type)


def triton_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    pooled: PooledTokens | None,
    key_lengths: Tensor | None,
    scale: float,
    precision: str = "full",
) -> tuple[Tensor, Tensor]:
    """Attend to the kept blocks and the pooled tokens, in full precision differentiably.

    Args:
        q: (B, S, H, D), bfloat16, float16 or float32, D of 64 or 128.
        k: (B, T, H, D).
        v: (B, T, H, D).
        mask: the kept blocks, of 16, 32, 64 or 128 tokens.
        pooled: pooled tokens that share the softmax, or None.
        key_lengths: (B,) integers, number of valid keys; None if all are valid.
        scale: factor of the logits.
        precision: one of `quantized.PRECISIONS`.

    Returns:
        Output, (B, S, H, D) in the dtype of `q`, and log-sum-exp, (B, S, H) float32.
    """
    if scale < 0:  # the kernels take the maximum before they scale
        q, scale = -q, -scale
    return _OPERATORS[precision](*Arguments.of(q, k, v, mask, pooled, key_lengths, scale))


@functools.cache
def device_of(device: torch.device) -> tuple[str, str]:
    """Return a device's architecture in the launch table, and its name; the interpreter uses the table's 90."""
    if device.type != "cuda":
        return "90", device.type
    return architecture(torch.cuda.get_device_capability(device)), torch.cuda.get_device_name(device)


class _Call:
    """The arguments of an operator, in the form that the kernels take."""

    def __init__(self, arguments: Arguments) -> None:
        q, k, v, keep, counts, indices, order, block_size, *pooled, pooled_block, key_lengths, scale = arguments
        pooled_k, pooled_v, log_weight = pooled
        self.q, self.k, self.v, self.pooled_k, self.pooled_v = (_rows(x) for x in (q, k, v, pooled_k, pooled_v))
        self.keep, self.counts, self.indices = keep.contiguous(), counts.contiguous(), indices.contiguous()
        self.block_size = (block_size[0], block_size[1])
        self.scale = scale
        # kernels never read a tensor that is not given, so any tensor can take its place
        self.order = counts if order is None else order.contiguous()
        self.key_lengths = counts if key_lengths is None else key_lengths.to(q.device).contiguous()
        self.pooled_bias = log_weight / _LN2
        self.pooled_block = counts if pooled_block is None else pooled_block.contiguous()
        self.batch, self.queries, self.heads, self.head_size = q.shape
        self.keys, self.windows = k.shape[1], pooled_k.shape[1]
        self.masks = keep.shape[:2]
        self.query_blocks, self.key_blocks = keep.shape[2:]
        self.upcast = interpreted()
        self.flags = {
            "POOLED": self.windows > 0,
            "DROPPED": pooled_block is not None,
            "LENGTHS": key_lengths is not None,
            "TAIL": self.keys % block_size[1] != 0,
            "ORDERED": order is not None,
        }

    def config(self, kernel: Kernel) -> LaunchConfig:
        """Return the launch configuration of a kernel on this call's device."""
        arch, name = device_of(self.q.device)
        half = self.q.dtype != torch.float32
        return launch_config(kernel, arch, self.head_size, self.block_size, half=half, device=name)

    def mask_strides(self, rows: int) -> tuple[int, int]:
        """Return batch and head strides of a tensor with `rows` entries per mask: 0 where masks are shared."""
        batch, heads = self.masks
        return (0 if batch == 1 else heads * rows), (0 if heads == 1 else rows)

    def constants(self, config: LaunchConfig, *flags: str, tma: bool) -> dict[str, Any]:
        """Return compile-time arguments and launch options."""
        return {
            "D": self.head_size,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "TMA": tma,
            "UPCAST": self.upcast,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            **{name: self.flags[name] for name in flags},
        }

    def row_arguments(self, *others: Tensor) -> tuple[Any, ...]:
        """Return the common arguments of the kernels that iterate over a row's keys, with a kernel's other tensors."""
        return (
            self.counts, self.indices, self.keep, self.order, self.key_lengths,
            self.pooled_k, self.pooled_v, self.pooled_bias, self.pooled_block, *others,
            self.queries, self.keys, self.windows, self.heads, self.scale,
            self.query_blocks, self.key_blocks, self.indices.shape[-1],
        )  # fmt: skip

    def row_grid(self, config: LaunchConfig) -> tuple[int, int, int]:
        """Return a grid of one program per tile of queries; a head's tiles run together, sharing its keys in cache."""
        return self.query_blocks * (self.block_size[0] // config.block_m), self.heads, self.batch


def forward(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; return output and log-sum-exp."""
    return _forward(arguments)


def forward_int8(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel on 8-bit queries and keys; see `quantized`."""
    return _forward(arguments, eight_bits=True)


def forward_fp8(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel on 8-bit queries, keys, weights and values; see `quantized`."""
    return _forward(arguments, eight_bits=True, float8=True)


def add_pooled(arguments: Arguments, out: Tensor, lse: Tensor) -> None:
    """Add the pooled tokens to the result of the kept blocks, in place.

    Args:
        arguments: those of the operator.
        out: (B, S, H, D), contiguous.
        lse: (B, S, H) float32, contiguous.
    """
    _forward(arguments, resumed=(out, lse))


def _forward(
    arguments: Arguments,
    *,
    eight_bits: bool = False,
    float8: bool = False,
    resumed: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        arguments: those of the operator.
        eight_bits: queries and keys are 8-bit integers.
        float8: weights and values are 8-bit floats too.
        resumed: output and log-sum-exp of the kept blocks, which the pooled tokens are added to, in place.
    """
    from blade_kernels.block_sparse.triton_forward import forward_kernel

    lengths, mean = arguments.key_lengths, None
    if eight_bits:
        mean = mean_keys(arguments.k, lengths)
        pooled_k = (arguments.pooled_k.float() - mean.unsqueeze(1)).to(arguments.q.dtype)
        arguments = arguments._replace(pooled_k=pooled_k)
    q, call = arguments.q, _Call(arguments)
    config = call.config("forward")
    queries, keys, values = call.q, call.k, call.v
    q_scale = k_scale = v_scale = call.pooled_bias  # kernels never read what is not given
    if mean is not None:
        queries, q_scale = quantize_rows(call.q, call.block_size[0], None, None)
        keys, k_scale = quantize_rows(call.k, call.block_size[1], mean, lengths)
    if float8:
        v_scale = value_scales(arguments.v, lengths)
        values = round_values(call.v, v_scale, lengths)
    # descriptors are of tensors of one type
    (key_tiles, value_tiles), tma = _tiles((keys, values), config.block_n, config.tma)
    if resumed is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    else:
        out, lse = resumed
    with on_device(q):
        forward_kernel[call.row_grid(config)](
            queries, key_tiles, value_tiles, out, lse,
            *call.row_arguments(call.q, q_scale, k_scale, v_scale, call.pooled_bias if mean is None else mean),
            *_strides(queries, keys, values, call.pooled_k, call.pooled_v, call.q),
            *call.mask_strides(call.query_blocks),
            BQ=call.block_size[0], BK=call.block_size[1],
            QUANTIZED=eight_bits, FLOAT8=float8, RESUMED=resumed is not None,
            **call.constants(config, "POOLED", "DROPPED", "LENGTHS", "TAIL", "ORDERED", tma=tma),
        )  # fmt: skip
    return out, lse


def round_values(v: Tensor, scales: Tensor, key_lengths: Tensor | None) -> Tensor:
    """Divide values by their channels' scales, (B, H, D), and round them to 8-bit floats: (B, T, H, D)."""
    from blade_kernels.block_sparse.triton_quantize import round_values_kernel

    batch, tokens, heads, size = v.shape
    values = torch.empty(v.shape, dtype=torch.float8_e4m3fn, device=v.device)
    lengths = scales if key_lengths is None else key_lengths.to(v.device).contiguous()
    with on_device(v):
        round_values_kernel[(-(-tokens // ROUNDED_TOKENS), heads, batch)](
            v, scales, lengths, values, tokens, heads, *_strides(v),
            D=size, BLOCK=ROUNDED_TOKENS, LENGTHS=key_lengths is not None, UPCAST=interpreted(), num_warps=4,
        )  # fmt: skip
    return values


def quantize_rows(x: Tensor, block: int, mean: Tensor | None, key_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute `quantized.quantize` in one kernel, for tokens with contiguous heads."""
    from blade_kernels.block_sparse.triton_quantize import quantize_kernel

    batch, tokens, heads, size = x.shape
    blocks = -(-tokens // block)
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    lengths = scales if key_lengths is None else key_lengths.to(x.device).contiguous()
    with on_device(x):
        quantize_kernel[(blocks, heads, batch)](
            x, scales if mean is None else mean.contiguous(), lengths, values, scales, tokens, heads, *_strides(x),
            D=size, BLOCK=block, MEAN=mean is not None, LENGTHS=key_lengths is not None, num_warps=4,
        )  # fmt: skip
    return values, scales


def backward(
    arguments: Arguments, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, ...]:
    """Launch the backward kernels; return the gradients of q, k, v and of the pooled keys and values."""
    from blade_kernels.block_sparse.triton_backward import key_gradient_kernel

    (_, k, v), call, grad_out = arguments[:3], _Call(arguments), _rows(grad_out)
    with on_device(k):
        lse2, delta = _deltas(call, out, lse, grad_out, grad_lse)
        dq = _query_gradient(call, grad_out, lse2, delta)
        dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        config = call.config("key_gradient")
        (queries, grads), tma = _tiles((call.q, grad_out), config.block_m, config.tma)
        starts, rows = _transposed(call)
        tiles = call.key_blocks * (call.block_size[1] // config.block_n)
        key_gradient_kernel[(tiles, call.heads, call.batch)](
            queries, call.k, call.v, grads, lse2, delta, dk, dv,
            starts, rows, call.key_lengths,
            call.queries, call.keys, call.heads, call.scale, call.key_blocks, rows.shape[-1],
            *_strides(call.q, call.k, call.v, grad_out), *call.mask_strides(1),
            BQ=call.block_size[0], BK=call.block_size[1],
            **call.constants(config, "LENGTHS", tma=tma),
        )  # fmt: skip
        d_pooled = _pooled_gradients(call, grad_out, lse2, delta)
    return dq, dk, dv, *d_pooled


def pooled_backward(arguments: Arguments, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what the pooled tokens contribute to the gradients.

    Args:
        arguments: those of the operator.
        out: the output with the pooled tokens, (B, S, H, D).
        lse: the log-sum-exp with the pooled tokens, (B, S, H).
        grad_out: gradient of the output.

    Returns:
        Their part of the gradient of q, and the gradients of the pooled keys and values.
    """
    # a list of no blocks, while the map of kept ones still says which pooled tokens a row sees
    call, grad_out = _Call(arguments._replace(counts=torch.zeros_like(arguments.counts))), _rows(grad_out)
    with on_device(arguments.q):
        lse2, delta = _deltas(call, out, lse, grad_out, None)
        return _query_gradient(call, grad_out, lse2, delta), *_pooled_gradients(call, grad_out, lse2, delta)


def _deltas(call: _Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the base-2 log-sum-exp and delta, (B, H, S) each; see `triton_backward.delta_kernel`."""
    from blade_kernels.block_sparse.triton_backward import delta_kernel

    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    lse2, delta = (call.q.new_empty(call.batch, call.heads, call.queries, dtype=torch.float32) for _ in range(2))
    delta_kernel[(-(-call.queries // DELTA_TILE), call.heads, call.batch)](
        out, grad_out, lse, grad_lse, lse2, delta, call.queries, call.heads,
        *_strides(out, grad_out, lse, grad_lse), D=call.head_size, BLOCK_M=DELTA_TILE,
    )  # fmt: skip
    return lse2, delta


def _query_gradient(call: _Call, grad_out: Tensor, lse2: Tensor, delta: Tensor) -> Tensor:
    """Compute the gradient of q, contiguous."""
    from blade_kernels.block_sparse.triton_backward import query_gradient_kernel

    dq = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    config = call.config("query_gradient")
    (keys, values), tma = _tiles((call.k, call.v), config.block_n, config.tma)
    query_gradient_kernel[call.row_grid(config)](
        call.q, keys, values, grad_out, lse2, delta, dq,
        *call.row_arguments(),
        *_strides(call.q, call.k, call.v, grad_out, call.pooled_k, call.pooled_v),
        *call.mask_strides(call.query_blocks),
        BQ=call.block_size[0], BK=call.block_size[1],
        **call.constants(config, "POOLED", "DROPPED", "LENGTHS", "TAIL", "ORDERED", tma=tma),
    )  # fmt: skip
    return dq


def _transposed(call: _Call) -> tuple[Tensor, Tensor]:
    """List the query blocks that keep each key block, grouped by key block.

    Returns:
        (masks, key blocks + 1) int32, the start of each group; and (masks, query blocks * capacity) int32, the lists.
    """
    from blade_kernels.block_sparse.triton_backward import transpose_kernel

    masks = math.prod(call.masks)
    ends = call.keep.sum(-2, dtype=torch.int32).view(masks, -1).cumsum(-1, dtype=torch.int32)
    starts = torch.nn.functional.pad(ends, (1, 0))
    rows = call.counts.new_empty(masks, call.query_blocks * call.indices.shape[-1])
    transpose_kernel[(-(-call.key_blocks // TRANSPOSE_TILE), masks)](
        call.keep, starts, rows, call.query_blocks, call.key_blocks, rows.shape[-1],
        BLOCK_M=TRANSPOSE_TILE, BLOCK_N=TRANSPOSE_TILE,
    )  # fmt: skip
    return starts, rows


def _pooled_gradients(call: _Call, grad_out: Tensor, lse2: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of pooled keys and values: sums within shares of the queries, then over the shares."""
    from blade_kernels.block_sparse.triton_backward import pooled_gradient_kernel

    if not call.windows:
        return call.q.new_zeros(call.pooled_k.shape), call.q.new_zeros(call.pooled_v.shape)
    config = call.config("key_gradient")
    (queries, grads), tma = _tiles((call.q, grad_out), config.block_m, config.tma)
    tiles, heads = -(-call.windows // config.block_n), call.batch * call.heads
    shares = min(call.query_blocks, max(1, _POOLED_PROGRAMS // (tiles * heads)))
    rows_per_share = -(-call.query_blocks // shares)
    shares = -(-call.query_blocks // rows_per_share)
    dk, dv = (call.q.new_empty(shares, *call.pooled_k.shape, dtype=torch.float32) for _ in range(2))
    pooled_gradient_kernel[(tiles, shares, heads)](
        queries, grads, lse2, delta, dk, dv,
        call.keep, call.pooled_k, call.pooled_v, call.pooled_bias, call.pooled_block,
        call.queries, call.windows, call.heads, call.batch, call.scale,
        call.query_blocks, call.key_blocks, rows_per_share,
        *_strides(call.q, grad_out, call.pooled_k, call.pooled_v), *call.mask_strides(call.query_blocks),
        BQ=call.block_size[0], **call.constants(config, "DROPPED", tma=tma),
    )  # fmt: skip
    return dk.sum(0).to(call.q.dtype), dv.sum(0).to(call.q.dtype)


def _rows(x: Tensor) -> Tensor:
    """Return the tensor with contiguous heads and no expanded dimensions, copied only if needed."""
    return x if x.stride(-1) == 1 and all(x.stride()) else x.contiguous()


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Return batch, token and head strides of each tensor."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _tiles(tensors: tuple[Tensor, Tensor], tokens: int, tma: bool) -> tuple[tuple[Any, Any], bool]:
    """Return descriptors for loads of (tokens, D) tiles and true, or the tensors and false if not possible."""
    aligned = all(
        x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
        for x in tensors
    )
    if not (tma and aligned):
        return tensors, False
    from triton.tools.tensor_descriptor import TensorDescriptor

    first, second = (TensorDescriptor.from_tensor(x.transpose(1, 2), [1, 1, tokens, x.shape[-1]]) for x in tensors)
    return (first, second), True


_OPERATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "full": register("block_sparse_triton", forward, backward),
    "int8": register_forward("block_sparse_triton_int8", forward_int8),
    "fp8": register_forward("block_sparse_triton_fp8", forward_fp8),
}
"""Operators by precision."""
