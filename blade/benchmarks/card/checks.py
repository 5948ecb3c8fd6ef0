"""Correctness checks of the kernels on a device, against the specification in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_selection import (
    STATISTICS,
    largest_key_offsets,
    sampled_importance,
    select_blocks,
    value_spread,
)
from blade_kernels.block_sparse import PooledTokens, block_sparse_attention, pool_tokens
from blade_kernels.block_sparse.cute import only_library
from blade_kernels.block_sparse.cute_libraries import missing_library
from blade_kernels.block_sparse.cute_table import Kernel
from blade_kernels.block_sparse.naive import dense_attention
from blade_kernels.qk_norm_rope import NORMS, qk_norm_rope
from torch import Tensor

FACTOR = 2.0
"""Times the error of the plain computation in the same precision that a kernel's may be."""

LARGEST_ERROR = 0.01
"""Largest difference of the kernels in 8 bits from the specification, as inputs and outputs are bfloat16."""

POOLED = ("none", "all", "dropped")
"""Pooled tokens that share the softmax."""


class WrongResultError(Exception):
    """A kernel computes something else than the specification."""


def check_attention(implementation: str, device: torch.device, *, small: bool = False) -> dict[str, float]:
    """Check block-sparse attention: output, log-sum-exp and gradients, with each kind of pooled tokens.

    Rows and a head that keep nothing, a short last block, and keys that a batch item lacks are among the cases; the
    second has more pairs of blocks than the compiler leaves strides alone.

    Args:
        implementation: of `block_sparse_attention`.
        device: where.
        small: leave out the larger case.

    Returns:
        By case and result, the error relative to that of the plain computation in the same precision, 1 if as large.

    Raises:
        WrongResultError: if one is above `FACTOR`.
        NotImplementedError: if the implementation cannot compute this here.
    """
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    block = 128 if implementation == "flex" else 64
    cases = {kind: (5 * block - 12, kind) for kind in POOLED}
    if not small:
        cases["many blocks"] = (37 * block - 50, "none")
    errors: dict[str, float] = {}
    for name, (tokens, kind) in cases.items():
        inputs = _Inputs(tokens, block, kind, device, half)
        results = inputs.results(lambda *given: _attend(implementation, *given), half)
        plain = inputs.results(dense_attention, half)
        exact = inputs.results(dense_attention, torch.float64)
        for what, *values in zip(("output", "log-sum-exp", "dq", "dk", "dv"), results, plain, exact, strict=True):
            errors[f"{name}, {what}"] = _relative_error(*values)
    _refuse(errors, f"`{implementation}`")
    return errors


def _attend(implementation: str, q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    mask, pooled, lengths, scale = given
    out, lse = block_sparse_attention(
        q, k, v, mask, pooled=pooled, key_lengths=lengths, scale=scale, return_lse=True, implementation=implementation
    )
    return out, lse


def check_cute(kernel: Kernel, device: torch.device) -> dict[str, float]:
    """Check one CuTe kernel, alone and with the pooled tokens of dropped blocks.

    Args:
        kernel: of the device's architecture.
        device: where.

    Returns:
        As `check_attention`: for a forward kernel of output and log-sum-exp, for a backward one of the gradients.

    Raises:
        WrongResultError: if one is above `FACTOR`.
        NotImplementedError: if its library is not installed.
    """
    if problem := missing_library(kernel.row.library):
        raise NotImplementedError(problem)
    dtype = kernel.row.dtypes[0]
    names = ("output", "log-sum-exp", "dq", "dk", "dv")
    checked = slice(0, 2) if kernel.row.direction == "forward" else slice(2, 5)
    errors: dict[str, float] = {}
    for kind in ("none", "dropped"):
        inputs = _Inputs(
            5 * kernel.block_size[0] - 12, kernel.block_size, kind, device, dtype,
            head_size=kernel.head_size, with_lengths=kernel.row.lengths != "none", through_lse=False,
        )  # fmt: skip
        with only_library(kernel.row.library):
            results = inputs.results(lambda *given: _attend("cute", *given), dtype)
        plain = inputs.results(dense_attention, dtype)
        exact = inputs.results(dense_attention, torch.float64)
        for what, *values in list(zip(names, results, plain, exact, strict=True))[checked]:
            errors[f"{kind}, {what}"] = _relative_error(*values)
    _refuse(errors, f"`{kernel}`")
    return errors


def check_eight_bits(precision: str, device: torch.device) -> dict[str, float]:
    """Check block-sparse attention in 8 bits, with each kind of pooled tokens.

    Args:
        precision: "int8" or "fp8".
        device: where.

    Returns:
        By case, the difference of the output from the specification's in 8 bits: root mean square, relative.

    Raises:
        WrongResultError: if one is above `LARGEST_ERROR`.
        NotImplementedError: if the kernel cannot run here.
    """
    if precision == "fp8" and device.type != "cuda":
        raise NotImplementedError("the specification alone has 8-bit floats here")
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    implementation, errors = "triton" if device.type == "cuda" else "cpu", dict[str, float]()
    for kind in POOLED:
        inputs = _Inputs(5 * 64 - 12, 64, kind, device, half)
        q, k, v = inputs.tensors
        pooled = pool_tokens(k, v, 64, block_size=64 if kind == "dropped" else None) if kind != "none" else None
        result, right = (
            block_sparse_attention(
                q,
                k,
                v,
                inputs.mask,
                pooled=pooled,
                key_lengths=inputs.lengths,
                implementation=name,
                precision=precision,
            ).double()
            for name in (implementation, "naive")
        )
        errors[kind] = float((result - right).norm() / right.norm())
        if not errors[kind] <= LARGEST_ERROR:
            raise WrongResultError(f"`{precision}` with pooled tokens {kind} differs by {errors[kind]:.2g}")
    return errors


class _Inputs:
    """Random inputs of one case; rows of the first head and all of the last one of the second item keep nothing."""

    def __init__(
        self,
        tokens: int,
        block: int | tuple[int, int],
        pooled: str,
        device: torch.device,
        dtype: torch.dtype,
        *,
        head_size: int = 64,
        with_lengths: bool = True,
        through_lse: bool = True,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        query_block, self.block = (block, block) if isinstance(block, int) else block
        self.pooled, self.device, self.through_lse = pooled, device, through_lse
        drawn = torch.randn(4, 2, tokens, 3, head_size, generator=generator).to(dtype).to(device)
        self.tensors, self.gradient = drawn[:3], drawn[3]
        keep = torch.rand(2, 3, -(-tokens // query_block), -(-tokens // self.block), generator=generator) < 0.4
        keep[0, 0, 1] = keep[1, 2] = False
        self.mask = BlockMask.from_dense(keep.to(device), (query_block, self.block))
        self.lengths = torch.tensor([tokens, tokens - self.block - 5], device=device) if with_lengths else None

    def results(self, attend: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Tensor]:
        """Return the output, the log-sum-exp, and the gradients of queries, keys and values."""
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in self.tensors)
        pooled: PooledTokens | None = None
        if self.pooled != "none":
            block_size = self.block if self.pooled == "dropped" else None
            pooled = pool_tokens(k, v, self.block, block_size=block_size)
        out, lse = attend(q, k, v, self.mask, pooled, self.lengths, 0.2)
        seen = lse.isfinite()
        loss = (out.double() * self.gradient.double()).sum()
        if self.through_lse:
            loss = loss + lse[seen].double().sin().sum()
        return [out.detach(), lse.detach()[seen], *torch.autograd.grad(loss, (q, k, v))]


def check_selection(device: torch.device) -> dict[str, float]:
    """Check the choice of blocks: the spread of values, the keys to sample, scores by every statistic, and blocks.

    Returns:
        By statistic, the largest difference of scores relative to the largest score; and likewise of `spread`.

    Raises:
        WrongResultError: if scores differ by more than 1e-3, or keys or blocks at all.
        NotImplementedError: if the kernels cannot run here.
    """
    implementation = "triton" if device.type == "cuda" else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 1000, 3, 64, generator=generator).to(device) for _ in range(2))
    offsets = torch.arange(0, 64, 8, device=device).expand(3, -1)
    errors: dict[str, float] = {}
    spread, expected_spread = (value_spread(k, 64, implementation=name) for name in (implementation, "naive"))
    errors["spread"] = float((spread - expected_spread).abs().max() / expected_spread.max())
    if not errors["spread"] <= 1e-3:
        raise WrongResultError(f"the spread of values differs by {errors['spread']:.2g} of the largest")
    keys, expected_keys = (
        largest_key_offsets(k, offsets, 4, implementation=name) for name in (implementation, "naive")
    )
    if not torch.equal(keys, expected_keys):
        raise WrongResultError("the keys to sample are other ones")
    for statistic in STATISTICS:
        scores, expected_scores = (
            sampled_importance(q, k, offsets, offsets, (64, 64), statistic=statistic, implementation=name)
            for name in (implementation, "naive")
        )
        errors[statistic] = float((scores - expected_scores).abs().max() / expected_scores.abs().max())
        if not errors[statistic] <= 1e-3:
            raise WrongResultError(f"scores by `{statistic}` differ by {errors[statistic]:.2g} of the largest")
        for budget in ("row", "layer"):
            options: dict[str, Any] = {"max_blocks": 4, "extra_blocks": 3, "budget": budget}
            kept, expected = (
                select_blocks(expected_scores, (64, 64), implementation=name, **options)
                for name in (implementation, "naive")
            )
            kept.check_values()
            if not torch.equal(kept.keep, expected.keep):
                raise WrongResultError(f"blocks by `{statistic}` of a budget by {budget} are other ones")
    return errors


def check_norm_rope(device: torch.device) -> dict[str, float]:
    """Check the norms and the rotation of queries and keys.

    Returns:
        By norm, the error relative to that of the specification in the same precision, 1 if as large.

    Raises:
        WrongResultError: if one is above `FACTOR`.
        NotImplementedError: if the kernel cannot run here.
    """
    implementation = "triton" if device.type == "cuda" else "cpu"
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 300, 3, 64, generator=generator).to(device)
    angles = torch.randn(300, 32, generator=generator).repeat_interleave(2, -1).to(device)
    errors = {}
    for norm in NORMS:
        result, plain, exact = (
            qk_norm_rope(
                x.to(dtype), norm=norm, cos=angles.cos().to(dtype), sin=angles.sin().to(dtype), implementation=name
            )
            for name, dtype in ((implementation, half), ("naive", half), ("naive", torch.float64))
        )
        errors[norm] = _relative_error(result, plain, exact)
    _refuse(errors, "`qk_norm_rope`")
    return errors


def _relative_error(result: Tensor, plain: Tensor, exact: Tensor) -> float:
    """Return the error of a result as a multiple of the plain computation's, which counts as one rounding at least."""
    if not bool(result.isfinite().all()):
        return float("inf")
    error, bound = ((x.double() - exact.double()).square().mean().sqrt() for x in (result, plain))
    rounding = torch.finfo(torch.float32).eps * exact.double().square().mean().sqrt()
    return float(error / torch.maximum(bound, rounding))


def _refuse(errors: dict[str, float], what: str) -> None:
    wrong = {name: error for name, error in errors.items() if not error <= FACTOR}
    if wrong:
        name, error = max(wrong.items(), key=lambda item: item[1])
        raise WrongResultError(f"{what} is wrong: {name} errs {error:.3g} times as much as the plain computation")
