"""What the kernels are held to: dense attention with one softmax, and errors bounded by the plain computation's."""

from dataclasses import dataclass

import pytest
import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import PooledTokens, pool_tokens


def dense_attention(q, k, v, mask, *, pooled=None, key_lengths=None, scale=None, dtype=torch.float64):
    """Attention with a mask over all pairs, in one precision throughout: output and log-sum-exp."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    queries, keys = q.shape[2], k.shape[2]
    seen = mask.keep.repeat_interleave(mask.block_size[0], 2).repeat_interleave(mask.block_size[1], 3)
    seen = seen[:, :, :queries, :keys].expand(*q.shape[:3], keys)
    if key_lengths is not None:
        present = torch.arange(keys) < key_lengths.unsqueeze(-1)
        seen = seen & present[:, None, None]
        k, v = (x.masked_fill(~present[:, None, :, None], 0.0) for x in (k, v))
    logits = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    if pooled is not None:
        pooled_k, pooled_v = (x.to(dtype).transpose(1, 2) for x in (pooled.k, pooled.v))
        seen = torch.ones(*mask.keep.shape[:3], len(pooled), dtype=torch.bool)
        if pooled.key_block is not None:
            seen = ~mask.keep[..., pooled.key_block.long()]
        seen = seen.repeat_interleave(mask.block_size[0], 2)[:, :, :queries].expand(*q.shape[:3], -1)
        more = q @ pooled_k.mT * scale + pooled.log_weight.to(dtype)
        logits = torch.cat((logits, more.masked_fill(~seen, -torch.inf)), -1)
        v = torch.cat((v, pooled_v), 2)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return (weights @ v).transpose(1, 2), lse.transpose(1, 2)


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
