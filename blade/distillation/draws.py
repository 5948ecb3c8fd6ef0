"""What is drawn by chance, keyed by what it is for.

So it depends neither on how a batch is shared out nor on what was drawn before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blade.common.training_log import numpy_rng, torch_rng

START, ROLLOUT, STEPS, SAMPLE, FRESH_NOISE, NOISE, COUNT, ORDER = range(8)
"""Streams: the noise that a run begins with, the fresh noise of its steps, which steps an update takes, the time of a
sample, the fresh noise of its step, the noise that is added to it, the number of steps, and the order of prompts."""


class Draws:
    """Chance for one update of one kind."""

    def __init__(self, seed: int, update: int, number: int) -> None:
        """Take the key.

        Args:
            seed: of the training.
            update: number of the generator's update.
            number: of the part of it.
        """
        self._key = (seed, update, number)

    def noise(self, stream: int, samples: Sequence[int], shape: Sequence[int], *key: int) -> torch.Tensor:
        """Standard normal noise, (samples, *shape) float32 on the CPU: a sample's is the same in every batch.

        Args:
            stream: what it is for.
            samples: places in the whole batch of all processes.
            shape: of one sample.
            key: what else it depends on.
        """
        generators = [torch_rng(*self._key, stream, *key, sample) for sample in samples]
        return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])

    def shares(self, stream: int, samples: Sequence[int]) -> list[float]:
        """A number in [0, 1) for each sample."""
        return [float(numpy_rng(*self._key, stream, sample).random()) for sample in samples]

    def integer(self, stream: int, below: int) -> int:
        """A whole number that all samples share."""
        return int(numpy_rng(*self._key, stream).integers(below))

    def steps(self, samples: Sequence[int], count: int, *, together: bool) -> list[int]:
        """Which step each sample takes: all of them equally often, from a place that is drawn.

        Args:
            samples: places in the whole batch.
            count: number of steps.
            together: the same step for all samples.
        """
        first = self.integer(STEPS, count)
        return [first if together else (first + sample) % count for sample in samples]


def prompt_numbers(seed: int, first: int, count: int, prompts: int) -> list[int]:
    """The prompts of samples in the order of training: every prompt once an epoch, each epoch in an order of its own.

    Args:
        seed: of the training.
        first: number of the first sample, from the beginning of training.
        count: how many samples.
        prompts: length of the list.
    """
    numbers = []
    for sample in range(first, first + count):
        epoch, place = divmod(sample, prompts)
        numbers.append(int(numpy_rng(seed, ORDER, epoch).permutation(prompts)[place]))
    return numbers
