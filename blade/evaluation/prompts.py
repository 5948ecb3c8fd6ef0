"""Prompts of an evaluation, each with the seed of its noise: a fixed list of captions, or any text with any seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blade.common.checks import parse_ranges
from blade.common.names import file_name
from blade.generation.options import MAXIMUM_SEED
from blade.moving_shapes.captions import sample_caption

PROMPT_SEED = 20250
"""Seed of the fixed list of captions."""

GROUPS = {"single": "single-object prompts", "two": "two-object prompts", "all": "all prompts"}
"""Groups of prompts that are reported together, with their headings."""

MOST_SEEDS = 10_000
"""Most seeds that a range may name; more are taken for a mistake."""

STEM_BYTES = 60
"""Most bytes of a prompt in the names of its files."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPrompt:
    """One video that every run generates."""

    text: str
    seed: int
    """Seed of the noise."""
    group: str = "all"
    """A name of `GROUPS`."""

    @property
    def key(self) -> tuple[str, int]:
        """Text and seed, which identify it."""
        return (self.text, self.seed)

    @property
    def stem(self) -> str:
        """Name of its files, without suffix; unique for text and seed."""
        return f"{file_name(self.text, limit=STEM_BYTES)}-{self.seed}"


def is_in(prompt: EvaluationPrompt, group: str) -> bool:
    """Return whether a prompt is reported in a group; all are in `all`."""
    return group in ("all", prompt.group)


def groups_of(prompts: Sequence[EvaluationPrompt]) -> tuple[str, ...]:
    """Return the groups that prompts are reported in: their own, and `all` if there are several."""
    present = {prompt.group for prompt in prompts}
    return tuple(group for group in GROUPS if group in present or (group == "all" and len(present) > 1))


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read seeds such as "0-3,7".

    Returns:
        The seeds, ascending, each once.

    Raises:
        ValueError: If the text has another form, names no seed, or a seed is too large.
    """
    problem = f'`seeds` must be numbers from 0 to 2**63 - 1, or ranges of them, such as "0-3,7", got {text!r}.'
    ranges = parse_ranges(text, problem)
    if not ranges or any(seeds.stop - 1 > MAXIMUM_SEED for seeds in ranges):
        raise ValueError(problem)
    if sum(seeds.stop - seeds.start for seeds in ranges) > MOST_SEEDS:
        raise ValueError(f"`seeds` must be at most {MOST_SEEDS:,}, got {text!r}.")
    return tuple(sorted({seed for seeds in ranges for seed in seeds}))


def prompts_with_seeds(texts: Sequence[str], seeds: Sequence[int]) -> tuple[EvaluationPrompt, ...]:
    """Return every prompt with every seed, prompt by prompt."""
    return tuple(EvaluationPrompt(text=text, seed=seed) for text in texts for seed in seeds)


def held_out_prompts(single: int = 64, two: int = 64, repeats: int = 1) -> tuple[EvaluationPrompt, ...]:
    """Return the first captions of the fixed lists, whose combinations occur in no training caption.

    The seed of each is its index in the list of its kind, so that no seed is hand-picked; repeats continue from there.

    Args:
        single: The number of captions with one object.
        two: The number of captions with two objects.
        repeats: The number of videos of each.

    Raises:
        ValueError: If a number is negative, or there would be no prompts.
    """
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, got {repeats}.")
    if min(single, two) < 0 or single + two == 0:
        raise ValueError(f"`single` and `two` must be at least 0 and not both 0, got {single} and {two}.")
    prompts = []
    for group, objects, count in (("single", 1, single), ("two", 2, two)):
        rng = np.random.default_rng([PROMPT_SEED, objects])
        captions = [str(sample_caption(rng, objects=objects, held_out=True)) for _ in range(count)]
        for repeat in range(repeats):
            for index, caption in enumerate(captions):
                prompts.append(EvaluationPrompt(text=caption, seed=repeat * count + index, group=group))
    return tuple(prompts)
