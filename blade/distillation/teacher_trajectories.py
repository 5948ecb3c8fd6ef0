"""Trajectories of the guided teacher at the student's times, for ODE initialization and imitation.

Each trajectory is a file of its own, so that interrupted work resumes, several processes share it, and several runs
can use one folder.

Source: ODE initialization, CausVid, arXiv 2412.07772.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from blade.common.files import write_files
from blade.distillation.conditioning import ExampleConditions, PromptEmbeddings, check_index
from blade.distillation.draws import START, Draws
from blade.distillation.parallel import Processes
from blade.distillation.prompt_files import PROMPTS_KEY, written_prompts

INDEX_NAME = "trajectories.json"
"""File of the settings that all trajectories share."""

POINTS = "points"
"""Name of the tensor in a file."""

POINTS_DTYPE = torch.float16
"""Type of the saved points."""

NOISE_SEED = 0
"""Seed of the trajectories' noise, independent of the training's seed, so that trainings can share them."""


class TeacherTrajectories:
    """A folder with a trajectory for each of the first prompts."""

    def __init__(self, folder: Path, prompts: Sequence[str], count: int) -> None:
        """Take the folder, which may still be empty.

        Args:
            folder: the folder.
            prompts: all prompts; they repeat if there are fewer than trajectories.
            count: number of trajectories.
        """
        self.folder, self.count = folder, count
        self._prompts = prompts

    def __len__(self) -> int:
        return self.count

    def prompt_numbers(self, numbers: Sequence[int]) -> list[int]:
        """Return the indices of the trajectories' prompts."""
        return [number % len(self._prompts) for number in numbers]

    def points(self, numbers: Sequence[int], indices: Sequence[int]) -> torch.Tensor:
        """Read one point of each trajectory: (B, ...) float32, on the CPU.

        Args:
            numbers: indices of the trajectories.
            indices: indices of the points in them.
        """
        points = []
        for number, index in zip(numbers, indices, strict=True):
            with safe_open(self._path(number), framework="pt") as file:
                points.append(file.get_slice(POINTS)[index : index + 1])
        return torch.cat(points).float()

    def make(
        self,
        run: Callable[[Any, torch.Tensor], torch.Tensor],
        embeddings: PromptEmbeddings | ExampleConditions,
        facts: Mapping[str, Any],
        processes: Processes,
        batch_size: int,
        on_progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Make the missing trajectories.

        Args:
            run: maps the conditions of prompts and noise (B, ...) to the points (B, times, ...) of trajectories.
            embeddings: embeddings of the prompts.
            facts: the settings that the trajectories depend on.
            processes: the processes that share the work.
            batch_size: number of trajectories that a process, or a group of processes, makes at a time.
            on_progress: called with the progress as text.

        Raises:
            ValueError: if the folder has trajectories that were made with other settings.
        """
        check_index(self.folder / INDEX_NAME, facts, "trajectories", {"teacher": "another teacher"})
        # in fixed batches, since the batch size affects rounding
        batches = [
            range(first, first + batch_size)[: self.count - first] for first in range(0, self.count, batch_size)
        ]
        missing = [batch for batch in batches if not all(map(self._exists, batch))]
        processes.wait()  # until all have seen which are missing
        if processes.is_first:
            write_files({self.folder / INDEX_NAME: (json.dumps(dict(facts), indent=2) + "\n").encode()})
        processes.wait()
        for first in range(0, len(missing), processes.groups):
            assigned = missing[first + processes.group :][:1]
            # with sharded weights all processes must take part in every forward pass
            (numbers,) = assigned or missing[:1]
            conditions = embeddings.rows(self.prompt_numbers(numbers)).on(processes.device)
            noise = Draws(NOISE_SEED, 0, 0).noise(START, numbers, conditions.latent_shape).to(processes.device)
            with torch.no_grad():
                batch_points = run(conditions, noise).to("cpu", POINTS_DTYPE)
            for number, points in zip(numbers if assigned and processes.is_first_of_group else (), batch_points):
                data = save({POINTS: points.contiguous()}, metadata={PROMPTS_KEY: self._prompt(number)})
                write_files({self._path(number): data})
            done = sum(map(len, missing[: first + processes.groups]))
            on_progress(f"{done}/{sum(map(len, missing))} trajectories of the teacher")
        processes.wait()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _prompt(self, number: int) -> str:
        return self._prompts[self.prompt_numbers([number])[0]]

    def _exists(self, number: int) -> bool:
        """Return whether a trajectory exists and is of its prompt."""
        return written_prompts(self._path(number)) == self._prompt(number)


class ExampleTrajectories:
    """Placeholder trajectories, all zeros, for measuring the cost of an update."""

    def __init__(self, latent_shape: Sequence[int]) -> None:
        """Take the shape of one latent."""
        self._shape = tuple(latent_shape)

    def __len__(self) -> int:
        return 1

    def prompt_numbers(self, numbers: Sequence[int]) -> list[int]:
        """Return the index of the first prompt for each."""
        return [0] * len(numbers)

    def points(self, numbers: Sequence[int], indices: Sequence[int]) -> torch.Tensor:
        """Return one point per number."""
        return torch.zeros(len(numbers), *self._shape)
