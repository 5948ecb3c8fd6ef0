"""Influence of each step's and layer's errors on the finished video, measured by making some of them sparse."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from blade.attention.config import BladeConfig
from blade.common.fields import check_type
from blade.common.files import write_files
from blade.common.reading import read_json
from blade.generation.request import ResolvedRequest
from blade.generation.run import Generation
from blade.models.loaded import LoadedModel
from blade.profiling.record_prompts import dense_video
from blade.profiling.search import Choice, PatternSearch
from blade.profiling.team import make_configured

STRETCHES = (0.0, 0.1, 0.2, 0.33, 0.5, 0.67, 0.83, 1.0)
"""Bounds of the stretches of steps as shares of a run; finer for the early steps, which matter most."""

BANDS = 8
"""Most bands of consecutive layers that are measured separately."""

STEPS_APART = 3
"""A band of layers is sparse in one step of this many, so that the video stays recognizable; in all of a short run."""

LEAST = 1e-8
"""Lower limit of a video's error, so that ratios stay finite."""


def measure_influences(
    model: LoadedModel,
    requests: Sequence[ResolvedRequest],
    search: PatternSearch,
    choice: Choice,
    folder: Path,
    on_run: Callable[[str], None] | None = None,
) -> np.ndarray:
    """Generate videos that use a choice of patterns in a few steps or layers only, and compare them with dense ones.

    An interrupted run resumes bit-exactly.

    Args:
        model: the model.
        requests: resolved requests for the first of the profile's prompts.
        search: the search that made the choice, with one group per step.
        choice: patterns of about the intended density, since influences may depend on the size of the errors.
        folder: the folder of the recordings, with the dense videos.
        on_run: called before each generation with a description of it.

    Returns:
        (steps, layers) float64, 1 on average: the increase of the finished video's squared error per squared error of
        a layer's output as a share of its energy. It is the product of a factor of the step and one of the layer,
        each the geometric mean over prompts, so that a prompt with an unstable video does not outweigh the others.
    """
    expected = search.head_errors(choice).sum(-1)  # (steps, layers)
    steps, layers = expected.shape
    spacing = STEPS_APART if steps >= 4 * STEPS_APART else 1
    runs = _Runs(model, requests, search, choice, folder, on_run)
    bands, stretches = _parts(layers, BANDS), _stretches(steps)
    masks = np.zeros((len(bands), *expected.shape), dtype=bool)
    for mask, (first, last) in zip(masks, bands):
        mask[::spacing, first:last] = True
    names = [f"layers {first} to {last - 1}" for first, last in bands]
    factors = _ratios(runs.errors(names, masks), expected, masks)
    by_layer = np.repeat(factors, [last - first for first, last in bands])
    expected = expected * by_layer
    masks = np.zeros((len(stretches), *expected.shape), dtype=bool)
    for mask, (first, last) in zip(masks, stretches):
        mask[first:last] = True
    names = [f"steps {first} to {last - 1}" for first, last in stretches]
    factors = _ratios(runs.errors(names, masks), expected, masks)
    middles = [(first + last - 1) / 2 for first, last in stretches]
    by_step = np.exp(np.interp(np.arange(steps), middles, np.log(factors)))
    influences: np.ndarray = by_step[:, None] * by_layer
    influences /= influences.mean()
    return influences


class _Runs:
    """Videos with a choice of patterns in some steps and layers, compared with the dense ones; each is made once."""

    def __init__(
        self,
        model: LoadedModel,
        requests: Sequence[ResolvedRequest],
        search: PatternSearch,
        choice: Choice,
        folder: Path,
        on_run: Callable[[str], None] | None,
    ) -> None:
        self.model, self.requests, self.search, self.choice, self.on_run = model, requests, search, choice, on_run
        self.recordings = folder
        chosen = hashlib.sha256(choice.candidates.astype(np.int32).tobytes()).hexdigest()[:12]
        self.folder = folder / f"influences-{chosen}"
        self.path = self.folder / "errors.json"
        self.known: dict[str, float] = {}
        if self.path.is_file():
            self.known = read_json(self.path, f"`{self.path}`")
            check_type(str(self.path), self.known, dict[str, float])

    def errors(self, names: Sequence[str], masks: np.ndarray) -> np.ndarray:
        """Return the squared errors of the videos as shares of their variances, geometric mean over prompts: (parts,).

        Args:
            names: descriptions of the parts.
            masks: (parts, steps, layers) bool, true where the choice is used; elsewhere all heads are full.
        """
        logs = [
            [np.log(self._error(number, request, name, sparse)) for name, sparse in zip(names, masks)]
            for number, request in enumerate(self.requests)
        ]
        means: np.ndarray = np.exp(np.mean(logs, axis=0))
        return means

    def _error(self, number: int, request: ResolvedRequest, name: str, sparse: np.ndarray) -> float:
        """Return the squared error of a prompt's video as a share of its variance."""
        key = f"prompt {number}, {name}"
        if key not in self.known:
            if self.on_run is not None:
                self.on_run(f"influence of {name} (prompt {number + 1}/{len(self.requests)})")
            partly = replace(self.choice, candidates=np.where(sparse[:, :, None], self.choice.candidates, 0))
            config = BladeConfig(attention="patterns", patterns=self.search.table(partly))
            video = generate_resumable(self.model, request, config, self.folder).video
            dense = torch.from_numpy(dense_video(self.recordings, number)).float() / 255
            self.known[key] = float((video - dense).square().mean() / dense.var().clamp(min=LEAST))
            write_files({self.path: json.dumps(self.known, indent=1).encode()})
        return max(self.known[key], LEAST)


def generate_resumable(model: LoadedModel, request: ResolvedRequest, config: BladeConfig, folder: Path) -> Generation:
    """Generate with a configuration, resuming an interrupted run bit-exactly; its saved passes are then deleted."""
    key = json.dumps([request.prompt, request.seed, config.to_dict()]).encode()
    passes = folder / hashlib.sha256(key).hexdigest()[:12]
    generation = make_configured(model, request, config, passes)
    shutil.rmtree(passes)
    return generation


def _ratios(errors: np.ndarray, expected: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return each part's error of the video per error of its own; the geometric mean of the others if it has none."""
    within = np.array([expected[mask].sum() for mask in masks])
    measurable = within > LEAST
    if not measurable.any():
        return np.ones(len(errors))
    ratios = errors / np.maximum(within, LEAST)
    filled: np.ndarray = np.where(measurable, ratios, np.exp(np.log(ratios[measurable]).mean()))
    return filled


def _stretches(steps: int) -> list[tuple[int, int]]:
    """Return the first step of each stretch and the one past its last; in a short run, each step is a stretch."""
    return list(pairwise(sorted({round(share * steps) for share in STRETCHES})))


def _parts(count: int, most: int) -> list[tuple[int, int]]:
    """Return the bounds of at most `most` parts of nearly equal size."""
    parts = min(count, most)
    return list(pairwise(part * count // parts for part in range(parts + 1)))
