"""Where the guided teacher goes from noise, at the student's times: what ODE initialization and imitation learn from.

Each trajectory is a file of its own, so that stopped work goes on, several processes share it out, and several runs
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
from blade.distillation.conditioning import PROMPTS_KEY, ExampleConditions, PromptEmbeddings, check_index
from blade.distillation.draws import START, Draws
from blade.distillation.parallel import Processes

INDEX_NAME = "trajectories.json"
"""What all trajectories share."""

POINTS = "points"
"""Name of the tensor in a file."""

KEPT_DTYPE = torch.float16
"""Type that points are kept in."""

NOISE_SEED = 0
"""Of the noise that trajectories begin with, whatever the training's seed, so that trainings can share them."""


class TeacherTrajectories:
    """A folder with a trajectory for each of the first prompts."""

    def __init__(self, folder: Path, prompts: Sequence[str], count: int) -> None:
        """Take the folder; nothing needs to be in it yet.

        Args:
            folder: the folder.
            prompts: all prompts; they are used again from the first if there are fewer than trajectories.
            count: number of trajectories.
        """
        self.folder, self.count = folder, count
        self._prompts = prompts

    def __len__(self) -> int:
        return self.count

    def prompt_numbers(self, numbers: Sequence[int]) -> list[int]:
        """Which prompts trajectories show."""
        return [number % len(self._prompts) for number in numbers]

    def points(self, numbers: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        """One point of each trajectory, (B, ...) float32, on the CPU.

        Args:
            numbers: of the trajectories.
            places: of the points on their way.
        """
        found = []
        for number, place in zip(numbers, places, strict=True):
            with safe_open(self._path(number), framework="pt") as file:
                found.append(file.get_slice(POINTS)[place : place + 1])
        return torch.cat(found).float()

    def make(
        self,
        run: Callable[[Any, torch.Tensor], torch.Tensor],
        embeddings: PromptEmbeddings | ExampleConditions,
        facts: Mapping[str, Any],
        processes: Processes,
        batch_size: int,
        on_progress: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Make the trajectories that are missing.

        Args:
            run: takes the conditions of prompts and noise (B, ...) to the points (B, times, ...) of trajectories.
            embeddings: of the prompts.
            facts: what the trajectories depend on besides.
            processes: who share the work.
            batch_size: trajectories at a time of each process.
            on_progress: told how far it is.

        Raises:
            ValueError: if the folder has trajectories that were made otherwise.
        """
        check_index(self.folder / INDEX_NAME, facts, "trajectories", {"teacher": "another teacher"})
        # in fixed batches, since the size of a batch changes how its values are rounded
        batches = [
            range(first, first + batch_size)[: self.count - first] for first in range(0, self.count, batch_size)
        ]
        missing = [batch for batch in batches if not all(map(self._is_there, batch))]
        processes.wait()  # until all have looked
        if processes.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_files({self.folder / INDEX_NAME: (json.dumps(dict(facts), indent=2) + "\n").encode()})
        processes.wait()
        for first in range(0, len(missing), processes.count):
            own = missing[first + processes.index :][:1]
            # all take part in each forward pass where weights are shared out
            (numbers,) = own or missing[:1]
            conditions = embeddings.rows(self.prompt_numbers(numbers)).on(processes.device)
            noise = Draws(NOISE_SEED, 0, 0).noise(START, numbers, conditions.latent_shape).to(processes.device)
            with torch.no_grad():
                points = run(conditions, noise).to("cpu", KEPT_DTYPE)
            for number, one in zip(numbers if own else (), points):
                data = save({POINTS: one.contiguous()}, metadata={PROMPTS_KEY: self._prompt(number)})
                write_files({self._path(number): data})
            done = sum(map(len, missing[: first + processes.count]))
            on_progress(f"{done}/{sum(map(len, missing))} trajectories of the teacher")
        processes.wait()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _prompt(self, number: int) -> str:
        return self._prompts[self.prompt_numbers([number])[0]]

    def _is_there(self, number: int) -> bool:
        """Whether a trajectory is there, and of this prompt."""
        path = self._path(number)
        if not path.exists():
            return False
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get(PROMPTS_KEY) == self._prompt(number))


class ExampleTrajectories:
    """Trajectories of nothing in particular, all zeros, to measure what an update takes."""

    def __init__(self, latent_shape: Sequence[int]) -> None:
        """Take the shape of one latent."""
        self._shape = tuple(latent_shape)

    def __len__(self) -> int:
        return 1

    def prompt_numbers(self, numbers: Sequence[int]) -> list[int]:
        """Which prompts they show: the first."""
        return [0] * len(numbers)

    def points(self, numbers: Sequence[int], places: Sequence[int]) -> torch.Tensor:
        """As many as there are numbers."""
        return torch.zeros(len(numbers), *self._shape)
