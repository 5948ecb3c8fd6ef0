"""Registration of a forward and a backward function as an operator that PyTorch can compile and differentiate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse.pooled import PooledTokens


class Arguments(NamedTuple):
    """The arguments of `block_sparse_attention`, flattened to types that an operator accepts."""

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    counts: Tensor
    indices: Tensor
    order: Tensor | None
    block_size: list[int]
    pooled_k: Tensor
    """(B, P, H, D); P = 0 without pooled tokens, likewise in `pooled_v` and `log_weight`."""
    pooled_v: Tensor
    log_weight: Tensor
    pooled_block: Tensor | None
    key_lengths: Tensor | None
    scale: float

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: BlockMask,
        pooled: PooledTokens | None,
        key_lengths: Tensor | None,
        scale: float,
    ) -> Arguments:
        """Flatten the arguments."""
        if pooled is None:
            empty = k.detach()[:, :0]  # detached, so that no gradient of k is computed for it
            pooled = PooledTokens(empty, empty, k.new_empty(0, dtype=torch.float32))
        return cls(
            q, k, v, mask.keep, mask.counts, mask.indices, mask.order, list(mask.block_size),
            pooled.k, pooled.v, pooled.log_weight, pooled.key_block, key_lengths, scale,
        )  # fmt: skip

    @property
    def mask(self) -> BlockMask:
        """The mask, reassembled."""
        return BlockMask(self.keep, self.counts, self.indices, (self.block_size[0], self.block_size[1]), self.order)

    @property
    def pooled(self) -> PooledTokens:
        """The pooled tokens, reassembled."""
        return PooledTokens(self.pooled_k, self.pooled_v, self.log_weight, self.pooled_block)


Forward = Callable[[Arguments], tuple[Tensor, Tensor]]
Backward = Callable[[Arguments, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor keep, Tensor counts, Tensor indices, Tensor? order, int[] block_size, "
    "Tensor pooled_k, Tensor pooled_v, Tensor log_weight, Tensor? pooled_block, Tensor? key_lengths, float scale"
)
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_DIFFERENTIABLE = ("q", "k", "v", "pooled_k", "pooled_v")
_BLOCK_SIZE = Arguments._fields.index("block_size")


def register_forward(name: str, forward: Callable[[Arguments], tuple[Tensor, Tensor]]) -> Any:
    """Register an operator `blade::NAME` without gradients; see `register`."""

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        return forward(Arguments(*arguments))

    def shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
        q = Arguments(*arguments).q
        return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))

    operator: Any = torch.library.custom_op(
        f"blade::{name}", run, mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor)"
    )
    operator.register_fake(shapes)
    return operator


def register(name: str, forward: Forward, backward: Backward) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register `blade::name` and `blade::name_backward`, opaque to the compiler.

    Args:
        name: name of the operator.
        forward: returns the output, (B, S, H, D) in the dtype of q, and the log-sum-exp, (B, S, H) in float32 or
            wider, both contiguous.
        backward: takes the arguments, output, log-sum-exp and the gradients of both, the last None if there is none;
            returns contiguous gradients of q, k, v and of the pooled keys and values.

    Returns:
        The operator, which takes the fields of `Arguments` as positional arguments.
    """
    count = len(Arguments._fields)
    forward_op = register_forward(name, forward)
    operator: Callable[..., tuple[Tensor, Tensor]] = forward_op

    def run_backward(*arguments: Any) -> tuple[Tensor, ...]:
        return backward(Arguments(*arguments[:count]), *arguments[count:])

    backward_op = torch.library.custom_op(
        f"blade::{name}_backward",
        run_backward,
        mutates_args=(),
        schema=f"({_INPUTS}, Tensor out, Tensor lse, Tensor grad_out, Tensor? grad_lse) -> {_GRADIENTS}",
    )

    def backward_shapes(*arguments: Any) -> tuple[Tensor, ...]:
        inputs = Arguments(*arguments[:count])
        return tuple(getattr(inputs, name).new_empty(getattr(inputs, name).shape) for name in _DIFFERENTIABLE)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale = inputs
        ctx.block_size = tensors.pop(_BLOCK_SIZE)
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        tensors.insert(_BLOCK_SIZE, ctx.block_size)
        grads = backward_op(*tensors, ctx.scale, out, lse, grad_out, grad_lse)
        by_name = dict(zip(_DIFFERENTIABLE, grads, strict=True))
        return tuple(by_name.get(name) for name in Arguments._fields)

    backward_op.register_fake(backward_shapes)
    forward_op.register_autograd(differentiate, setup_context=save)
    return operator
