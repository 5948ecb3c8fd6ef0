"""Random draws, keyed by their purpose.

A draw therefore depends neither on how a batch is distributed over processes nor on earlier draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blade.common.training_log import numpy_rng, torch_rng

START, ROLLOUT, STEPS, SAMPLE, FRESH_NOISE, NOISE, COUNT, ORDER = range(8)
"""Streams: the initial noise of a rollout, the fresh noise of its steps, the steps that an update trains, the time of
a sample, the fresh noise of its step, the noise added to it, the number of steps, and the order of prompts."""


class Draws:
    """The random draws of one part of one update."""

    def __init__(self, seed: int, update: int, number: int) -> None:
        """Set the key.

        Args:
            seed: seed of the training.
            update: index of the generator's update.
            number: index of the part of the update.
        """
        self._key = (seed, update, number)

    def noise(self, stream: int, samples: Sequence[int], shape: Sequence[int], *key: int) -> torch.Tensor:
        """Draw standard normal noise, (samples, *shape) float32 on the CPU; a sample's noise is the same in any batch.

        Args:
            stream: the purpose.
            samples: indices in the whole batch of all processes.
            shape: shape of one sample.
            key: further numbers that the noise depends on.
        """
        generators = [torch_rng(*self._key, stream, *key, sample) for sample in samples]
        return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])

    def shares(self, stream: int, samples: Sequence[int]) -> list[float]:
        """Draw a number in [0, 1) for each sample."""
        return [float(numpy_rng(*self._key, stream, sample).random()) for sample in samples]

    def integer(self, stream: int, below: int) -> int:
        """Draw an integer that all samples share."""
        return int(numpy_rng(*self._key, stream).integers(below))

    def steps(self, samples: Sequence[int], count: int, *, together: bool) -> list[int]:
        """Draw the step of each sample: the steps in turn, beginning with a random one.

        Args:
            samples: indices in the whole batch.
            count: number of steps.
            together: draw the same step for all samples.
        """
        first = self.integer(STEPS, count)
        return [first if together else (first + sample) % count for sample in samples]


def prompt_numbers(seed: int, first: int, count: int, prompts: int) -> list[int]:
    """Return the prompts of samples in training order: every prompt once per epoch, shuffled anew in each epoch.

    Args:
        seed: seed of the training.
        first: index of the first sample since the beginning of training.
        count: number of samples.
        prompts: length of the list of prompts.
    """
    numbers = []
    for sample in range(first, first + count):
        epoch, index = divmod(sample, prompts)
        numbers.append(int(numpy_rng(seed, ORDER, epoch).permutation(prompts)[index]))
    return numbers
