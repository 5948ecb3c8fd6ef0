"""The selectors of adaptive attention: ways to score the key blocks of every query block, declared in one table.

A package can bring its own: a module that calls `register_selector`, or an entry point of the group `blade.selectors`,
named as the selector is and pointing at it, which is loaded where a name is not in the table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol

import numpy as np
import torch
from blade_kernels.block_selection import largest_key_offsets, mean_pooled_importance, sampled_importance
from torch import Tensor

from blade.common.checks import check_choice
from blade.common.declared import declare
from blade.common.errors import first_line
from blade.token_grid import TokenGrid

ENTRY_POINTS = "blade.selectors"
"""Group of the entry points of other packages' selectors."""

DEFAULT_SELECTOR = "sampled"
"""The paper's."""


class SelectorOptions(Protocol):
    """The options of `AdaptiveConfig` that a selector reads."""

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        ...

    @property
    def token_order(self) -> str:
        """Order in which tokens are cut into blocks."""
        ...

    @property
    def probe_tokens(self) -> int:
        """Tokens sampled in each block."""
        ...

    @property
    def probe_keys(self) -> str:
        """Choice of the keys among them."""
        ...

    @property
    def softmax_denominator(self) -> bool:
        """Score by a softmax with its denominator."""
        ...

    @property
    def statistic(self) -> str:
        """Statistic of the sampled weights."""
        ...


@dataclass(frozen=True, eq=False)
class SelectorContext:
    """A selector's view of one grid, worked out once for all layers and steps."""

    options: SelectorOptions
    """The options in force."""
    blocks: int
    """Blocks that the sequence is cut into."""
    prepared: Tensor | None
    """Result of `Selector.prepare`, on the device; None without one."""
    heads: Tensor | None = None
    """(heads,) int64, the numbers of the heads in hand, where other ranks have the others. None: all are."""
    head_count: int | None = None
    """With `heads`, the number of all heads of the layer."""


class Score(Protocol):
    """A function that scores key blocks."""

    def __call__(
        self, query: Tensor, key: Tensor, context: SelectorContext, drawn: Tensor, key_lengths: Tensor | None
    ) -> Tensor:
        """Score the key blocks of every query block.

        It runs in a layer, perhaps compiled, where nothing may wait for the device; all that differs from layer to
        layer or step to step is in tensors.

        Args:
            query: (B, S, H, D), in token order, after position embeddings.
            key: (B, S, H, D).
            context: its view of the grid.
            drawn: the numbers of `Selector.draw` for this layer and step; without one, an empty tensor.
            key_lengths: (B,) integers: the keys from there on, which are text, are absent. None: all are there.

        Returns:
            (B or 1, H or 1, blocks, blocks) float32, not negative; the largest scores are kept.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Selector:
    """A way to score the key blocks of every query block."""

    name: str
    """As it is written in options and files, in kebab-case."""
    description: str
    """The measure of a key block that it goes by, in one line, such as "chance alone"."""
    score: Score
    """Scores key blocks, in a layer."""
    draw: Callable[[np.random.Generator, int, SelectorOptions], np.ndarray] | None = None
    """Drawing of the random values of one layer and step, of a generator keyed by both, the number of heads, and the
    options; a row of the layer's table. None: nothing."""
    drawn_heads: int | None = None
    """Dimension of those values that counts heads. None: none does."""
    prepare: Callable[[TokenGrid, SelectorOptions], Tensor] | None = None
    """Preparation from the grid and the options alone. None: there is none."""
    operations: Callable[[int, int, int, SelectorOptions], float] | None = None
    """Counts the floating-point operations of the matrix products that score one layer in one pass, of its tokens, its
    heads, the size of a head, and the options. None: there are no such products."""
    scores_all_heads: bool = False
    """True if its scores are the same for all heads."""
    is_control: bool = False
    """True for a control that looks at neither queries nor keys, which others have to beat at the same density."""
    colour: str | None = None
    """Colour of its points in plots, such as "#7F7F7F". None: one that is free."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            raise ValueError(f"`name` must be in kebab-case, such as mean-pooled, got {self.name!r}.")

    def context(self, grid: TokenGrid, options: SelectorOptions, device: torch.device) -> SelectorContext:
        """Work out its view of a grid."""
        prepared = None if self.prepare is None else self.prepare(grid, options).to(device)
        return SelectorContext(options, -(-grid.sequence_length // options.block_size), prepared)

    def table(self, options: SelectorOptions, *, seed: int, layer: int, heads: int, steps: int) -> Tensor:
        """Draw the numbers of a layer: a row a step, which depends on seed, layer and step alone."""
        if self.draw is None:
            return torch.empty(steps, 0)
        generators = [np.random.default_rng([seed, layer, step]) for step in range(steps)]
        return torch.from_numpy(np.stack([self.draw(generator, heads, options) for generator in generators]))

    def of_heads(self, drawn: Tensor, heads: Tensor) -> Tensor:
        """Return the numbers drawn for some heads, (heads,) int64, out of those of a layer and step."""
        return drawn if self.drawn_heads is None else drawn.index_select(self.drawn_heads, heads)

    def count_operations(self, tokens: int, heads: int, head_dim: int, options: SelectorOptions) -> float:
        """Count the floating-point operations of scoring one layer in one pass. See `operations`."""
        return 0.0 if self.operations is None else self.operations(tokens, heads, head_dim, options)


def _draw_offsets(generator: np.random.Generator, heads: int, options: SelectorOptions) -> np.ndarray:
    """int16 (2, heads, probe tokens): distinct offsets in a query block and, drawn independently, in a key block."""
    shuffled = generator.random((2, heads, options.block_size)).argsort(-1)
    return shuffled[..., : options.probe_tokens].astype(np.int16)


def _score_sampled(
    query: Tensor, key: Tensor, context: SelectorContext, drawn: Tensor, key_lengths: Tensor | None
) -> Tensor:
    options = context.options
    query_offsets, key_offsets = drawn.unbind(0)
    if options.probe_keys == "half-largest":
        key_offsets = largest_key_offsets(
            key, key_offsets, options.probe_tokens // 2, options.block_size, key_lengths=key_lengths
        )
    return sampled_importance(
        query,
        key,
        query_offsets,
        key_offsets,
        (options.block_size, options.block_size),
        key_lengths=key_lengths,
        softmax_denominator=options.softmax_denominator,
        statistic=options.statistic,
    )


def _sampled_operations(tokens: int, heads: int, head_dim: int, options: SelectorOptions) -> float:
    probes = math.ceil(tokens / options.block_size) * options.probe_tokens
    return 2.0 * heads * head_dim * probes**2


def _score_mean_pooled(
    query: Tensor, key: Tensor, context: SelectorContext, drawn: Tensor, key_lengths: Tensor | None
) -> Tensor:
    size = context.options.block_size
    return mean_pooled_importance(query, key, (size, size), key_lengths=key_lengths)


def _mean_pooled_operations(tokens: int, heads: int, head_dim: int, options: SelectorOptions) -> float:
    return 2.0 * heads * head_dim * math.ceil(tokens / options.block_size) ** 2


def _draw_hash_key(generator: np.random.Generator, heads: int, options: SelectorOptions) -> np.ndarray:
    """int64 (1,): a key for `random_scores`."""
    return np.array([generator.integers(2**62)])


def _score_random(
    query: Tensor, key: Tensor, context: SelectorContext, drawn: Tensor, key_lengths: Tensor | None
) -> Tensor:
    scores = random_scores(drawn, (1, context.head_count or query.shape[2], context.blocks, context.blocks))
    return scores if context.heads is None else scores.index_select(1, context.heads)


def random_scores(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return float32 scores in [0, 1) that depend on a key on the device, by hashing their place.

    Args:
        key: (1,) int64.
        shape: shape of the scores.

    Source: the 64-bit finaliser of MurmurHash3.
    """
    bits = torch.arange(math.prod(shape), device=key.device) + key
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        bits = bits ^ ((bits >> 33) & 0x7FFFFFFF)  # a logical shift: the sign doesn't follow
        bits = bits * (multiplier - 2**64)
    return (((bits >> 40) & 0xFFFFFF).to(torch.float32) / 2**24).view(shape)


def block_nearness(grid: TokenGrid, options: SelectorOptions) -> Tensor:
    """Score blocks by how near their centres are in the video.

    Returns:
        (1, 1, blocks, blocks) float32 in (0, 1], 1 for the block itself; `1 / (1 + distance)` with the distance of
        centres in tokens along frames, rows and columns. Blocks of text alone stand at the origin: they are kept
        anyway.
    """
    blocks = -(-grid.sequence_length // options.block_size)
    block = torch.arange(grid.video_start, grid.video_stop) // options.block_size
    positions = grid.positions(options.token_order).to(torch.float32)
    counts = torch.zeros(blocks).index_add_(0, block, torch.ones(len(block)))
    centres = torch.zeros(blocks, 3).index_add_(0, block, positions) / counts.clamp(min=1).unsqueeze(-1)
    return (1 + torch.cdist(centres, centres)).reciprocal()[None, None]


def _score_local(
    query: Tensor, key: Tensor, context: SelectorContext, drawn: Tensor, key_lengths: Tensor | None
) -> Tensor:
    assert context.prepared is not None
    return context.prepared


SELECTORS: dict[str, Selector] = {
    selector.name: selector
    for selector in (
        Selector(
            name=DEFAULT_SELECTOR,
            description="the largest attention weight among sampled pairs of tokens (the paper's)",
            score=_score_sampled,
            draw=_draw_offsets,
            drawn_heads=1,
            operations=_sampled_operations,
        ),
        Selector(
            name="mean-pooled",
            description="the attention weight of the means of the blocks' queries and keys",
            score=_score_mean_pooled,
            operations=_mean_pooled_operations,
            colour="#CC79A7",
        ),
        Selector(
            name="random",
            description="chance alone",
            score=_score_random,
            draw=_draw_hash_key,
            is_control=True,
            colour="#7F7F7F",
        ),
        Selector(
            name="local",
            description="nearness in the video",
            score=_score_local,
            prepare=block_nearness,
            scores_all_heads=True,
            is_control=True,
            colour="#E69F00",
        ),
    )
}
"""The selectors by name, as options, files and reports have them; of other packages', those that were used."""


def register_selector(selector: Selector) -> Selector:
    """Declare a selector, and return it.

    Raises:
        ValueError: if there is a selector of this name.
    """
    return declare(SELECTORS, selector)


def selector_names() -> tuple[str, ...]:
    """Return the names of all selectors, those that installed packages bring included."""
    return tuple(dict.fromkeys((*SELECTORS, *(point.name for point in entry_points(group=ENTRY_POINTS)))))


def has_selector(name: str) -> bool:
    """Return whether there is a selector of this name, in the table or among other packages' entry points."""
    return name in SELECTORS or bool(entry_points(group=ENTRY_POINTS, name=name))


def find_selector(name: str) -> Selector:
    """Return a selector by its name; one that is not in the table is looked for among other packages' entry points.

    Raises:
        ValueError: if there is none of this name, or it cannot be loaded.
    """
    if not isinstance(name, str) or name not in SELECTORS:
        check_choice("selector", name, selector_names())
        _load_entry_point(name)
    return SELECTORS[name]


def _load_entry_point(name: str) -> None:
    (point, *_) = entry_points(group=ENTRY_POINTS, name=name)
    try:
        selector = point.load()
    except Exception as error:  # whatever a package does while it is imported
        raise ValueError(f"`selector` {name!r} cannot be loaded from {point.value}: {first_line(error)}.") from error
    if not isinstance(selector, Selector) or selector.name != name:
        raise ValueError(f"`selector` {name!r} must be a Selector of this name in {point.value}, got {selector!r}.")
    register_selector(selector)
