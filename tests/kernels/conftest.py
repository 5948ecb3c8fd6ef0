"""Oracle of the kernel tests: the naive implementation, with errors bounded by those of the plain computation."""

from dataclasses import dataclass, replace

import pytest
import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import PooledTokens, naive, pool_tokens


def dense_attention(q, k, v, mask, *, pooled=None, key_lengths=None, scale=None, dtype=torch.float64):
    """The naive attention in one precision throughout: output and log-sum-exp."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.to(dtype) for x in (q, k, v))
    if pooled is not None:
        pooled = replace(pooled, k=pooled.k.to(dtype), v=pooled.v.to(dtype))
    return naive.dense_attention(q, k, v, mask, pooled, key_lengths, scale)


def assert_as_good_as(actual, exact, plain, factor=2.0):
    """The error of `actual` is at most `factor` times that of the plain computation in the same precision."""
    assert torch.equal(actual.isfinite(), exact.isfinite())
    finite = exact.isfinite()
    actual, exact, plain = (x.detach()[finite].double() for x in (actual, exact, plain))
    error, bound = (actual - exact).square().mean().sqrt(), (plain - exact).square().mean().sqrt()
    rounding = torch.finfo(torch.float32).eps * exact.square().mean().sqrt()
    assert error <= factor * bound + rounding, f"error {error:.3g}, plain computation {bound:.3g}"


@dataclass
class Case:
    """Inputs of an attention call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: BlockMask
    key_lengths: torch.Tensor | None
    window: int | None
    block_size: int | None

    def pooled(self) -> PooledTokens | None:
        """The pooled tokens, computed anew so that gradients pass through the pooling."""
        if self.window is None:
            return None
        return pool_tokens(self.k, self.v, self.window, start=min(3, self.k.shape[1]), block_size=self.block_size)


def make_case(
    tokens,
    *,
    keys=None,
    batch=2,
    heads=2,
    size=8,
    block_size=(16, 8),
    density=0.4,
    shared=(False, False),
    pooled=None,
    lengths=False,
    dtype=torch.float64,
    grad=False,
    seed=0,
):
    """Random inputs; about `density` of the blocks are kept, and the first row of the first head keeps none."""
    generator = torch.Generator().manual_seed(seed)
    keys = tokens if keys is None else keys

    def draw(count):
        return torch.randn(batch, count, heads, size, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = (draw(count).requires_grad_(grad) for count in (tokens, keys, keys))
    blocks = (-(-tokens // block_size[0]), -(-keys // block_size[1]))
    shape = (1 if shared[0] else batch, 1 if shared[1] else heads, *blocks)
    keep = torch.rand(shape, generator=generator) < density
    if density < 1:
        keep[0, 0, 0] = False
    return Case(
        q,
        k,
        v,
        BlockMask.from_dense(keep, block_size),
        torch.tensor([max(keys - 5, 0), keys // 2][:batch]) if lengths else None,
        None if pooled is None else 5,
        block_size[1] if pooled == "dropped" else None,
    )


@pytest.fixture(scope="session")
def dense():
    """`dense_attention`."""
    return dense_attention


@pytest.fixture(scope="session")
def case():
    """`make_case`."""
    return make_case


@pytest.fixture(scope="session")
def as_good_as():
    """`assert_as_good_as`."""
    return assert_as_good_as
