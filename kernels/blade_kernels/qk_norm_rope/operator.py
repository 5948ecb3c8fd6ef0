"""The fused kernel as an operator that PyTorch can compile and differentiate."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from blade_kernels.qk_norm_rope.naive import NORMS
from blade_kernels.triton_support import missing_triton, on_device

WIDEST = 16384
"""Channels of one token, with its heads rounded up to a power of two, that one program can hold."""
_BACKWARD_PROGRAMS = 512  # each sums the gradients of weight and bias over its tokens


def unsupported(x: Tensor) -> str | None:
    """Return why the Triton kernel cannot process these queries or keys, or None if it can."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernel computes bfloat16, float16 and float32, not {x.dtype}"
    size = x.shape[-1]
    if size & (size - 1) or size < 2:
        return f"the Triton kernel needs a head size that is a power of two, got {size}"
    if _heads(x) * size > WIDEST:
        return f"the Triton kernel takes at most {WIDEST} numbers of one token, got {_heads(x) * size}"
    return missing_triton(x.device)


def norm_rope_warps(heads: int, head_size: int, *, backward: bool) -> int:
    """Return the warps of a program that keep a token in registers; `heads` is a power of two."""
    return max(1, min(16, heads * head_size // (512 if backward else 1024)))


class Arguments(NamedTuple):
    """Arguments of the operator."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    places: Tensor | None
    norm: str
    eps: float
    rope_start: int


_SCHEMA = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? cos, Tensor? sin, Tensor? places, str norm, float eps, "
    "int rope_start"
)


def _forward(*arguments: Any) -> Tensor:
    from blade_kernels.qk_norm_rope.triton_kernels import norm_rope_kernel

    inputs = _with_rows(Arguments(*arguments))
    x = inputs.x
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    with on_device(x):
        norm_rope_kernel[(x.shape[1], x.shape[0])](
            x=x, bias=_present(inputs.bias, x), out=out, **_kernel_arguments(inputs),
            num_warps=norm_rope_warps(_heads(x), x.shape[3], backward=False),
        )  # fmt: skip
    return out


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; empty tensors for weight and bias that are None."""
    from blade_kernels.qk_norm_rope.triton_kernels import norm_rope_backward_kernel

    *values, grad_out = arguments
    inputs = _with_rows(Arguments(*values))
    x, weight, bias = inputs[:3]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    programs = min(_BACKWARD_PROGRAMS, x.shape[0] * x.shape[1])
    parts = {
        name: x.new_empty((programs, _heads(x), x.shape[3]) if vector is not None else 0, dtype=torch.float32)
        for name, vector in (("grad_weight", weight), ("grad_bias", bias))
    }
    with on_device(x):
        norm_rope_backward_kernel[(programs,)](
            x=x, grad_out=grad_out.contiguous(), grad_x=grad_x, B=x.shape[0], **parts,
            num_warps=norm_rope_warps(_heads(x), x.shape[3], backward=True),
            **_kernel_arguments(inputs),
        )  # fmt: skip
    sums = []
    for part, vector in zip(parts.values(), (weight, bias)):
        if vector is not None:
            part = part.sum(0)[: x.shape[2]]
            part = (part.flatten() if inputs.norm == "rms-all-heads" else part.sum(0)).to(vector.dtype)
        sums.append(part)
    return grad_x, sums[0], sums[1]


def _with_rows(inputs: Arguments) -> Arguments:
    """Return the inputs with contiguous heads."""
    return inputs if inputs.x.stride(-1) == 1 else inputs._replace(x=inputs.x.contiguous())


def _kernel_arguments(inputs: Arguments) -> dict[str, Any]:
    """Return the arguments shared by both kernels."""
    x, weight, bias, cos, sin, places, norm, eps, rope_start = inputs
    _, tokens, heads, size = x.shape
    return {
        "weight": _present(weight, x),
        "cos": _present(cos, x),
        "sin": _present(sin, x),
        "places": _present(places, x),
        "S": tokens,
        "H": heads,
        "eps": eps,
        "rope_start": rope_start,
        "rope_stop": rope_start + (0 if cos is None else len(cos)),
        "x_batch": x.stride(0),
        "x_token": x.stride(1),
        "x_head": x.stride(2),
        "places_head": 0 if places is None or len(places) == 1 else tokens,
        "HEADS": _heads(x),
        "D": size,
        "NORM": NORMS.index(norm),
        "WEIGHT": weight is not None,
        "BIAS": bias is not None,
        "ROPE": cos is not None,
        "PLACES": places is not None,
    }


def _present(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return a tensor to pass to the kernel, which never reads one that is not given: any stand-in will do."""
    return stand_in if tensor is None else tensor.contiguous()


def _heads(x: Tensor) -> int:
    """Return the number of heads rounded up to a power of two."""
    return 1 << (x.shape[2] - 1).bit_length()


triton_norm_rope = torch.library.custom_op(
    "blade::qk_norm_rope", _forward, mutates_args=(), schema=f"({_SCHEMA}) -> Tensor"
)
_triton_norm_rope_backward = torch.library.custom_op(
    "blade::qk_norm_rope_backward",
    _backward,
    mutates_args=(),
    schema=f"({_SCHEMA}, Tensor grad_out) -> (Tensor, Tensor, Tensor)",
)


@triton_norm_rope.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@_triton_norm_rope_backward.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    empty = x.new_empty(0, dtype=torch.float32)
    return x.new_empty(x.shape), *(empty if vector is None else torch.empty_like(vector) for vector in (weight, bias))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.norm, ctx.eps, ctx.rope_start = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    _, weight, bias, *_ = tensors = ctx.saved_tensors
    grads = _triton_norm_rope_backward(*tensors, ctx.norm, ctx.eps, ctx.rope_start, grad_out)
    named = (None if vector is None else grad for vector, grad in zip((weight, bias), grads[1:], strict=True))
    return grads[0], *named, None, None, None, None, None, None


triton_norm_rope.register_autograd(_differentiate, setup_context=_save)
