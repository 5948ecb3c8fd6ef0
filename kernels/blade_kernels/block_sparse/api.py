"""Block-sparse attention: semantics, accepted arguments and choice of the implementation."""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import cute, flex, triton_attention
from blade_kernels.block_sparse.cpu import cpu_attention
from blade_kernels.block_sparse.naive import naive_attention
from blade_kernels.block_sparse.pooled import PooledTokens
from blade_kernels.block_sparse.quantized import PRECISIONS, rounded_inputs, rounded_values
from blade_kernels.compiler import constant_when_compiled
from blade_kernels.implementations import check_implementation

IMPLEMENTATIONS = ("auto", "triton", "cute", "flex", "cpu", "naive")
"""Those of `blade_kernels.implementations`; `cute`: kernels of cuDNN and FlashAttention-4; `flex`: compiled
FlexAttention."""

_logger = logging.getLogger(__name__)


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    pooled: PooledTokens | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    implementation: str = "auto",
    precision: str = "full",
) -> Tensor: ...


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    pooled: PooledTokens | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    implementation: str = "auto",
    precision: str = "full",
) -> tuple[Tensor, Tensor]: ...


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    pooled: PooledTokens | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
    precision: str = "full",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every query to the keys in the blocks kept by its row of `mask`.

    Differentiable in `q`, `k`, `v` and the pooled keys and values, through the output and the log-sum-exp. Sequences
    need not fill their last block. Under autocast the inputs are cast as for PyTorch's own attention.

    Args:
        q: (B, S, H, D) queries.
        k: (B, T, H, D) keys; T equals S in self-attention.
        v: (B, T, H, D) values.
        mask: the kept blocks: ceil(S / bq) x ceil(T / bk) blocks of (bq, bk) tokens. A row may keep none.
        pooled: pooled tokens that share the softmax with the kept keys.
        key_lengths: (B,) integers from 0 to T, number of valid keys in each batch item. The rest may hold anything.
            Pooled tokens are not affected.
        scale: factor of the logits. None means 1 / sqrt(D).
        return_lse: also return the log-sum-exp.
        implementation: "auto"; "triton", kernels for NVIDIA GPUs; "cute", kernels of cuDNN and FlashAttention-4 for
            Hopper and Blackwell, which the extra `cute` installs; "flex", compiled FlexAttention; "cpu", plain
            PyTorch on any device, arranged for a CPU; "naive", the specification, which stores all logits and is for
            tests. "reference" is an alias of "cpu". See `resolve_implementation` for the choice of "auto".
        precision: "full", the inputs' own; "int8", queries and keys rounded to 8-bit integers as SageAttention does
            (arXiv 2410.02367); or "fp8", with them weights and values rounded to 8-bit floats as SageAttention2 does
            (arXiv 2411.10958). Without gradients. Triton multiplies in 8 bits; the others ("fp8": "naive" alone)
            compute with what these stand for, at no gain, to tell what it costs in quality.

    Returns:
        The output, (B, S, H, D) in the dtype of `q`, zero for queries that see no key. With `return_lse` also the
        natural log-sum-exp of the scaled logits, pooled ones included: (B, S, H) in float32 (float64 for float64
        inputs), -inf for queries that see no key.

    Raises:
        ValueError: inconsistent shapes, dtypes or devices, or an unknown implementation or precision.
        NotImplementedError: the requested implementation cannot compute this, or 8-bit integers have no gradients.

    Example:
        ```python
        import torch

        from blade import BlockMask, block_sparse_attention

        q, k, v = torch.randn(3, 1, 256, 2, 32)
        near = torch.eye(4, dtype=torch.bool) | torch.eye(4, dtype=torch.bool).roll(1, 0)
        out = block_sparse_attention(q, k, v, BlockMask.from_dense(near[None, None], block_size=(64, 64)))
        ```
    """
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if pooled is not None:
            pooled = PooledTokens(pooled.k.to(dtype), pooled.v.to(dtype), pooled.log_weight, pooled.key_block)
    _check(q, k, v, mask, pooled, key_lengths)
    if pooled is not None and not len(pooled):
        pooled = None
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    _check_precision(precision, q, k, v, pooled)
    chosen = resolve_implementation(
        q, k, v, mask,
        pooled=pooled, key_lengths=key_lengths, return_lse=return_lse, implementation=implementation,
        precision=precision,
    )  # fmt: skip
    lse: Tensor | None
    if chosen == "triton":
        out, lse = triton_attention.triton_block_attention(q, k, v, mask, pooled, key_lengths, scale, precision)
        return (out, lse) if return_lse else out
    if chosen == "cute":
        out, lse = cute.cute_block_attention(q, k, v, mask, pooled, key_lengths, scale)
        return (out, lse) if return_lse else out
    dtype, lacking = q.dtype, None
    if precision != "full":
        values = rounded_values(v, key_lengths) if precision == "fp8" else v
        q, k, pooled, lacking = rounded_inputs(q, k, pooled, key_lengths, mask.block_size)
        v = values.to(q.dtype)
    if chosen == "flex":
        out, lse = flex.flex_block_attention(q, k, v, mask, pooled, key_lengths, scale, return_lse)
    elif chosen == "naive":
        out, lse = naive_attention(q, k, v, mask, pooled, key_lengths, scale, round_weights=precision == "fp8")
    else:
        out, lse = cpu_attention(q, k, v, mask, pooled, key_lengths, scale)
    out = out.to(dtype)
    if not return_lse:
        return out
    assert lse is not None  # every implementation returns it on request
    return out, lse if lacking is None else lse + scale * lacking


def _check_precision(precision: str, q: Tensor, k: Tensor, v: Tensor, pooled: PooledTokens | None) -> None:
    """Raise an error for an unknown precision, or where gradients are needed that it has not."""
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    tensors = (q, k, v) if pooled is None else (q, k, v, pooled.k, pooled.v)
    if precision != "full" and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise NotImplementedError(f'`precision` must be "full" where gradients are needed, got "{precision}".')


def resolve_implementation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    pooled: PooledTokens | None = None,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
    precision: str = "full",
) -> str:
    """Return the implementation that `block_sparse_attention` uses for these arguments; never "auto".

    On CUDA "auto" picks "cute" where a card's report has found its kernels right, else the first of "triton", "flex"
    and "cpu" that supports the call, and logs once if it is neither of the first two. Elsewhere it picks "cpu", which
    needs no compiler and, as measured by `blade-bench attention`, is faster on the CPU than FlexAttention except for
    short, very sparse sequences; for 8-bit floats "naive", which it never picks otherwise.

    Raises:
        ValueError: unknown implementation.
        NotImplementedError: the requested implementation cannot compute this.
    """
    implementation = check_implementation(implementation, IMPLEMENTATIONS)
    if implementation == "naive" or (implementation == "cpu" and precision != "fp8"):
        return implementation
    if pooled is not None and len(pooled) == 0:  # a branch, which makes a fact of it where sizes are symbols
        pooled = None
    inputs = (q, k, v) if pooled is None else (q, k, v, pooled.k, pooled.v)
    kind = q.device.type
    call = _Call(
        device_type=kind,
        dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype,
        head_size=q.shape[-1],
        block_size=mask.block_size,
        needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
        return_lse=return_lse,
        pooled=pooled is not None,
        lengths=key_lengths is not None,
        precision=precision,
    )
    return _resolve(implementation, *call)


class _Call(NamedTuple):
    """What the choice of an implementation depends on."""

    device_type: str
    dtype: torch.dtype
    head_size: int
    block_size: tuple[int, int]
    needs_grad: bool
    return_lse: bool
    pooled: bool
    lengths: bool
    precision: str

    def problem(self, implementation: str) -> str | None:
        """Return why an implementation cannot compute this, or None if it can."""
        kind, dtype, size, blocks = self[:4]
        if implementation == "triton":
            return triton_attention.unsupported(kind, dtype, size, blocks, self.precision)
        if implementation != "cute" and self.precision == "fp8":
            return "weights in 8 bits are computed by 'triton' and 'naive' alone"
        if implementation == "flex":
            return flex.unsupported(kind, dtype, size, blocks, self.needs_grad, self.return_lse)
        if self.precision != "full":
            return f"the CuTe kernels compute in full precision, not {self.precision!r}"
        return cute.unsupported(kind, dtype, size, blocks, pooled=self.pooled, lengths=self.lengths)

    def is_for_cute(self) -> bool:
        """Return whether CuTe kernels can compute this, and a card's report has found them right."""
        return self.problem("cute") is None and cute.is_verified(
            *self[:4], lengths=self.lengths, needs_grad=self.needs_grad
        )


@constant_when_compiled  # looks for a compiler and may write to the log
def _resolve(implementation: str, *facts: Any) -> str:
    call = _Call(*facts)
    if implementation == "auto" and call.device_type != "cuda":
        return "naive" if call.precision == "fp8" else "cpu"
    if implementation != "auto":
        if (problem := call.problem(implementation)) is None:
            return implementation
        raise NotImplementedError(
            f"`implementation={implementation!r}` cannot compute this: {problem}. Use 'auto'"
            + (" or 'cpu'." if call.precision != "fp8" else ".")
        )
    if call.is_for_cute():
        return "cute"
    reasons = []
    for name in ("triton", "flex"):
        if (problem := call.problem(name)) is None:
            break
        reasons.append(problem)
    else:
        name = "cpu"
        if call.precision == "fp8":
            raise NotImplementedError(
                f"`precision='fp8'` cannot be computed here: {reasons[0]}. Use 'full' or 'int8'."
            )
    if name == "flex":
        _say_once(f"Block-sparse attention uses FlexAttention: {'; '.join(reasons)}.")
    elif name == "cpu":
        _say_once(
            "Block-sparse attention uses plain PyTorch (`cpu`), which is slow on "
            f"{call.device_type}: {'; '.join(reasons)}."
        )
    return name


@functools.cache
def _say_once(message: str) -> None:
    _logger.warning(message)


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, pooled: PooledTokens | None, key_lengths: Tensor | None
) -> None:
    """Raise ValueError if the arguments are inconsistent."""
    if q.ndim != 4 or not q.is_floating_point() or 0 in q.shape:
        raise ValueError(
            "`q` must be floating point of shape (batch, tokens, heads, head size), none of them 0, "
            f"got {q.dtype} of shape {tuple(q.shape)}."
        )
    batch, tokens, heads, size = q.shape
    if k.ndim != 4 or k.shape[:1] + k.shape[2:] != (batch, heads, size) or not k.shape[1]:
        raise ValueError(f"`k` must be ({batch}, tokens, {heads}, {size}) to match `q`, got {tuple(k.shape)}.")
    if v.shape != k.shape:
        raise ValueError(f"`v` must be {tuple(k.shape)} to match `k`, got {tuple(v.shape)}.")
    named = {"k": k, "v": v} if pooled is None else {"k": k, "v": v, "pooled.k": pooled.k, "pooled.v": pooled.v}
    for name, x in named.items():
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"`{name}` must be {q.dtype} on {q.device} as `q` is, got {x.dtype} on {x.device}.")

    query_block, key_block = mask.block_size
    blocks = (-(-tokens // query_block), -(-k.shape[1] // key_block))
    if mask.keep.shape[0] not in (1, batch) or mask.keep.shape[1] not in (1, heads) or mask.keep.shape[2:] != blocks:
        raise ValueError(
            f"`mask` must be ({batch} or 1, {heads} or 1, {blocks[0]}, {blocks[1]}) for {tokens} queries and "
            f"{k.shape[1]} keys in blocks of {query_block} and {key_block}, got {tuple(mask.keep.shape)}."
        )
    if mask.device != q.device:
        raise ValueError(f"`mask` must be on {q.device} as `q` is, got {mask.device}.")
    if pooled is not None and pooled.k.shape != (batch, len(pooled), heads, size):
        raise ValueError(
            f"`pooled` must hold keys of shape ({batch}, pooled tokens, {heads}, {size}) to match `q`, "
            f"got {tuple(pooled.k.shape)}."
        )
    if key_lengths is not None and (
        key_lengths.shape != (batch,) or key_lengths.is_floating_point() or key_lengths.dtype == torch.bool
    ):
        raise ValueError(
            f"`key_lengths` must be integers of shape ({batch},), "
            f"got {key_lengths.dtype} of shape {tuple(key_lengths.shape)}."
        )
