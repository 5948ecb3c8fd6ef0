"""What fused normalisation and rotary embedding means, what it accepts, and which implementation computes it."""

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
    """Normalise queries or keys, rotate them by their positions, and put every head's tokens in an order of its own.

    Computed in float32 at the least, and rounded once. Differentiable in `x`, `weight` and `bias`.

    Args:
        x: (B, S, H, D) queries or keys as projected, by any strides.
        norm: "none"; "rms-all-heads", the root mean square over all heads of a token (Wan); "rms", over each head
            (HunyuanVideo); or "layer", mean and variance over each head (CogVideoX).
        weight: (H * D,) for "rms-all-heads", else (D,). None: ones.
        bias: as `weight`, for "layer" alone. None: zeros.
        eps: added to the mean square, or to the variance.
        cos: cosines of the rotation of neighbouring pairs of channels, each given twice: (tokens, D), or
            (1, tokens, 1, D). None: no rotation.
        sin: the sines, likewise.
        rope_start: the first token that is rotated; as many follow as there are positions. Text is not rotated.
        places: (H or 1, S) integers: for every head the place in the output of each token; a permutation. None: as
            it is.
        implementation: "triton"; "cpu", plain PyTorch, also on CUDA; "naive", the specification; "auto" takes Triton
            on CUDA, where it can, and otherwise "cpu". "reference" still means "cpu".

    Returns:
        (B, S, H, D), contiguous, in the type of `x`.

    Raises:
        ValueError: shapes that do not fit together, or an unknown norm or implementation.
        NotImplementedError: the implementation that was asked for can not compute this.
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
    """Raise ValueError where the arguments do not fit together."""
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
