"""Queries, keys and values to compare selectors on: captured from the bundled model, and synthetic heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from blade.models.loading import load_model
from blade.token_grid import TokenGrid


@dataclass(eq=False)
class Heads:
    """Heads of one layer, in blocks, with their attention at some rows of blocks."""

    q: Tensor
    """(H, S, D), scaled by nothing."""
    k: Tensor
    """(H, S, D)."""
    v: Tensor
    """(H, S, D)."""
    block: int
    """Tokens in a block, of queries and keys alike."""
    rows: Tensor
    """Query blocks at which outputs are compared."""

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.q.shape[1]

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.tokens // self.block)

    @property
    def size(self) -> int:
        """Size of a head."""
        return self.q.shape[2]

    @cached_property
    def sizes(self) -> Tensor:
        """(blocks,) tokens in each block."""
        return torch.bincount(self.block_of, minlength=self.blocks)

    @cached_property
    def block_of(self) -> Tensor:
        """(S,) the block of each token."""
        return torch.arange(self.tokens) // self.block

    @cached_property
    def compared(self) -> Tensor:
        """The tokens whose outputs are compared."""
        return torch.isin(self.block_of, self.rows).nonzero().flatten()

    def means(self, x: Tensor) -> Tensor:
        """Average (H, S, D) over the blocks: (H, blocks, D)."""
        sums = x.new_zeros(x.shape[0], self.blocks, x.shape[2]).index_add_(1, self.block_of, x)
        return sums / self.sizes.unsqueeze(-1)

    @cached_property
    def logits(self) -> Tensor:
        """(H, compared, S) logits."""
        return self.q[:, self.compared] @ self.k.mT / math.sqrt(self.size)

    @cached_property
    def weights(self) -> Tensor:
        """(H, compared, S) attention weights."""
        return self.logits.softmax(-1)

    @cached_property
    def output(self) -> Tensor:
        """(H, compared, D) exact output."""
        return self.weights @ self.v

    @cached_property
    def pooled_logits(self) -> Tensor:
        """(H, compared, blocks) logits of the blocks' mean keys, with the logarithms of their sizes."""
        return self.q[:, self.compared] @ self.means(self.k).mT / math.sqrt(self.size) + self.sizes.log()

    @cached_property
    def mean_values(self) -> Tensor:
        """(H, blocks, D)."""
        return self.means(self.v)

    def block_sums(self, x: Tensor) -> Tensor:
        """Sum (H, n, S) over the key blocks: (H, n, blocks)."""
        return x.new_zeros(*x.shape[:2], self.blocks).index_add_(2, self.block_of, x)

    @cached_property
    def logit_variances(self) -> Tensor:
        """(H, compared, blocks) variance of each query's logits in a block."""
        means = self.block_sums(self.logits) / self.sizes
        return (self.block_sums(self.logits.square()) / self.sizes - means.square()).clamp(min=0)

    def attend(self, keep: Tensor, pooled: bool, *, second_order: bool = False) -> Tensor:
        """Attend to what is kept.

        Args:
            keep: (H, compared, S) bool.
            pooled: put the means of the blocks that are dropped whole beside it.
            second_order: add half the variance of a query's logits in a block to the logit of its mean, which makes
                the block's mass right to second order; exactly, as no kernel would.

        Returns:
            (H, compared, D).
        """
        logits, values = self.logits.masked_fill(~keep, -torch.inf), self.v
        if pooled:
            dropped = self.block_sums(keep.float()) == 0
            pooled_logits = self.pooled_logits + (self.logit_variances / 2 if second_order else 0)
            logits = torch.cat([logits, pooled_logits.masked_fill(~dropped, -torch.inf)], -1)
            values = torch.cat([values, self.mean_values], 1)
        return logits.softmax(-1) @ values

    def density(self, keep: Tensor, pooled: bool) -> float:
        """Return the share of the compared rows' pairs that `attend` computes."""
        pairs = keep.sum()
        if pooled:
            pairs = pairs + (self.block_sums(keep.float()) == 0).sum()
        return float(pairs / keep.numel())

    def errors(self, output: Tensor) -> Tensor:
        """Return the relative error of each head's output: (H,)."""
        difference = (output - self.output).square().sum((1, 2))
        return (difference / self.output.square().sum((1, 2))).sqrt()


class _Capture(TorchFunctionMode):
    """Collects what self-attention gets in some steps of a generation."""

    def __init__(self, tokens: int, steps: Sequence[int]) -> None:
        """Collect from calls with so many queries and keys, in these steps."""
        super().__init__()
        self.tokens, self.steps, self.step = tokens, set(steps), 0
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if function is scaled_dot_product_attention and self.step in self.steps:
            names = ("query", "key", "value")
            query, key, value = (*arguments[:3], *(options[name] for name in names[len(arguments) :]))
            if query.shape[2] == key.shape[2] == self.tokens:
                self.found.append((query[0].clone(), key[0].clone(), value[0].clone()))
        return function(*arguments, **options)


def captured_heads(
    prompts: Sequence[str], *, block: int, token_order: str, steps: int = 30, at: Sequence[int] = (12, 26)
) -> list[Heads]:
    """Capture the layers of the bundled model, but the first, in dense generations with guidance.

    Args:
        prompts: captions, one video each.
        block: tokens in a block.
        token_order: order in which tokens are cut into blocks.
        steps: denoising steps.
        at: steps at which to capture, from 0; of the pass with the prompt.
    """
    model = load_model()
    grid = TokenGrid(9, 12, 12)
    order, layers = grid.order(token_order), len(model.transformer.blocks)
    model.pipe.set_progress_bar_config(disable=True)
    heads = []
    for seed, prompt in enumerate(prompts):
        capture = _Capture(grid.video_tokens, at)

        def count(pipe: Any, step: int, time: Any, tensors: Any, capture: _Capture = capture) -> Any:
            capture.step = step + 1
            return tensors

        with capture:
            model.pipe(
                prompt, height=96, width=96, num_frames=33, num_inference_steps=steps, guidance_scale=2.0,
                generator=torch.Generator().manual_seed(seed), output_type="latent", callback_on_step_end=count,
            )  # fmt: skip
        passes = len(capture.found) // (layers * len(at))
        for number, tensors in enumerate(capture.found):
            if number % layers and number // layers % passes == 0:
                q, k, v = (x.index_select(1, order) for x in tensors)
                heads.append(Heads(q, k, v, block, torch.arange(-(-grid.video_tokens // block))))
    return heads


SYNTHETIC: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {}
"""Kinds of synthetic heads: the keys, given the queries (S, D), for attention of that kind."""


def _kind(make: Callable[[Tensor, torch.Generator], Tensor]) -> Callable[[Tensor, torch.Generator], Tensor]:
    SYNTHETIC[make.__name__] = make
    return make


@_kind
def local(q: Tensor, generator: torch.Generator) -> Tensor:
    """Neighbours in the sequence have like queries and keys."""
    return 1.5 * q + 0.5 * torch.randn(q.shape, generator=generator)


@_kind
def segment(q: Tensor, generator: torch.Generator) -> Tensor:
    """Eight kinds of content, spread over the sequence in runs of 256 tokens, attend to their own kind."""
    kinds = torch.randn(8, q.shape[1], generator=generator)
    runs = torch.randint(8, (-(-len(q) // 256),), generator=generator).repeat_interleave(256)[: len(q)]
    q += 1.5 * kinds[runs]
    return 0.7 * kinds[runs] + 0.7 * torch.randn(q.shape, generator=generator)


@_kind
def sink(q: Tensor, generator: torch.Generator) -> Tensor:
    """Sixteen keys that all queries attend to, beside the neighbours."""
    keys = local(q, generator)
    direction = torch.nn.functional.normalize(torch.randn(q.shape[1], generator=generator), dim=0)
    q += 6 * direction
    keys[torch.randperm(len(q), generator=generator)[:16]] += 12 * direction
    return keys


@_kind
def heavy_tailed(q: Tensor, generator: torch.Generator) -> Tensor:
    """Keys whose norms vary widely: divided by the root of a chi-squared number of 4 degrees of freedom."""
    chi = torch.randn(len(q), 4, generator=generator).square().mean(-1, keepdim=True)
    return (0.2 * q + 0.6 * torch.randn(q.shape, generator=generator)) / chi.sqrt()


def synthetic_heads(kind: str, *, tokens: int = 8192, size: int = 64, block: int = 64, seed: int = 0) -> Heads:
    """Make one synthetic head, compared at an eighth of its rows of blocks.

    Args:
        kind: one of `SYNTHETIC`.
        tokens: length of the sequence.
        size: size of the head.
        block: tokens in a block.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    q, v = (_smooth(torch.randn(tokens, size, generator=generator)) for _ in range(2))
    k = SYNTHETIC[kind](q, generator)
    v = v + 0.5 * torch.randn(tokens, size, generator=generator)
    rows = torch.arange(3, -(-tokens // block), 8)
    return Heads(q[None], k[None], v[None], block, rows)


def _smooth(x: Tensor, width: int = 96) -> Tensor:
    """Correlate (S, D) along the sequence, with unit variance."""
    kernel = torch.hann_window(width, periodic=False)
    kernel = kernel / kernel.norm()
    padded = torch.nn.functional.pad(x.T.unsqueeze(1), (width // 2, width - 1 - width // 2))
    return torch.nn.functional.conv1d(padded, kernel[None, None]).squeeze(1).T
