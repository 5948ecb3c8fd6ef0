"""Fused normalisation and rotary embedding: semantics, accepted arguments and choice of the implementation."""

from __future__ import annotations

from torch import Tensor

from blade_kernels.implementations import choose_implementation
from blade_kernels.qk_norm_rope import operator
from blade_kernels.qk_norm_rope.cpu import cpu_norm_rope
from blade_kernels.qk_norm_rope.naive import NORMS, naive_norm_rope


def qk_norm_rope(
    x: Tensor,
    *,
    norm: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rope_start: int = 0,
    places: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Normalise queries or keys, rotate them by their positions and, optionally, reorder the tokens of each head.

    Computed in float32 or wider and rounded once. Differentiable in `x`, `weight` and `bias`.

    Args:
        x: (B, S, H, D) projected queries or keys, with any strides.
        norm: "none"; "rms-all-heads", the root mean square over all heads of a token (Wan); "rms", over each head
            (HunyuanVideo); or "layer", mean and variance over each head (CogVideoX).
        weight: (H * D,) for "rms-all-heads", else (D,). None means ones.
        bias: like `weight`, for "layer" only. None means zeros.
        eps: added to the mean square, or to the variance.
        cos: cosines of the rotation of adjacent pairs of channels, each repeated for both: (tokens, D) or
            (1, tokens, 1, D). None: no rotation.
        sin: sines, likewise.
        rope_start: first token to rotate; there are as many as positions in `cos`. Text is not rotated.
        places: (H or 1, S) integers, the position of each token in the output of each head: a permutation. None keeps
            the order.
        implementation: "triton"; "cpu", plain PyTorch on any device; "naive", the specification; "auto" picks Triton
            on CUDA where possible, else "cpu". "reference" is an alias of "cpu".

    Returns:
        (B, S, H, D), contiguous, in the dtype of `x`.

    Raises:
        ValueError: inconsistent shapes, or an unknown norm or implementation.
        NotImplementedError: the requested implementation cannot compute this.
    """
    _check(x, norm, weight, bias, cos, sin, rope_start, places)
    chosen = choose_implementation(implementation, x.device, operator.unsupported(x))
    cos, sin = (None if table is None else table.reshape(-1, x.shape[-1]) for table in (cos, sin))
    if chosen == "triton":
        out: Tensor = operator.triton_norm_rope(x, weight, bias, cos, sin, places, norm, eps, rope_start)
        return out
    if chosen == "naive":
        return naive_norm_rope(x, weight, bias, cos, sin, places, norm, eps, rope_start)
    return cpu_norm_rope(x, weight, bias, cos, sin, places, norm, eps, rope_start)


def _check(
    x: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    rope_start: int,
    places: Tensor | None,
) -> None:
    """Raise ValueError if the arguments are inconsistent."""
    if x.ndim != 4 or not x.is_floating_point() or 0 in x.shape:
        raise ValueError(
            "`x` must be floating point of shape (batch, tokens, heads, head size), none of them 0, "
            f"got {x.dtype} of shape {tuple(x.shape)}."
        )
    _, tokens, heads, size = x.shape
    if norm not in NORMS:
        raise ValueError(f"`norm` must be one of {', '.join(NORMS)}, got {norm!r}.")
    width = heads * size if norm == "rms-all-heads" else size
    for name, vector, allowed in (("weight", weight, norm != "none"), ("bias", bias, norm == "layer")):
        if vector is not None and not allowed:
            raise ValueError(f"`{name}` must be None with the norm {norm!r}.")
        if vector is not None and vector.shape != (width,):
            raise ValueError(
                f"`{name}` must be of shape ({width},) with the norm {norm!r}, got {tuple(vector.shape)}."
            )
    if (cos is None) != (sin is None):
        raise ValueError("`cos` and `sin` must be given together.")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is None:
            continue
        positions = table.shape[1 if table.ndim == 4 else 0]
        if size % 2 or tuple(table.shape) not in ((positions, size), (1, positions, 1, size)):
            raise ValueError(
                f"`{name}` must be of shape (tokens, {size}) or (1, tokens, 1, {size}) with an even head size, "
                f"got {tuple(table.shape)}."
            )
        if not 0 <= rope_start <= tokens - positions:
            raise ValueError(
                f"`rope_start` must leave room for {positions} positions among {tokens} tokens, got {rope_start}."
            )
    if places is not None and (
        places.ndim != 2
        or places.shape[0] not in (1, heads)
        or places.shape[1] != tokens
        or places.is_floating_point()
    ):
        raise ValueError(
            f"`places` must be integers of shape ({heads} or 1, {tokens}), "
            f"got {places.dtype} of shape {tuple(places.shape)}."
        )
