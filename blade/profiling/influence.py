"""How much errors of each step and layer matter to the finished video: some are made sparse, and videos compared."""

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

from blade.attention.apply import use_blade
from blade.attention.config import BladeConfig
from blade.common.files import write_files
from blade.generation.request import ResolvedRequest
from blade.generation.run import Generation, run_request
from blade.models.loaded import LoadedModel
from blade.profiling.record_prompts import dense_video
from blade.profiling.recording import kept_passes
from blade.profiling.search import Choice, PatternSearch

STRETCHES = (0.0, 0.1, 0.2, 0.33, 0.5, 0.67, 0.83, 1.0)
"""Bounds of the stretches as shares of a run; the early steps, which decide most, in finer ones."""

BANDS = 8
"""Most bands of consecutive layers that are made sparse by themselves."""

STEPS_APART = 3
"""Of a band of layers, one step in so many is made sparse, so that the video stays the same one. In short runs all."""

LEAST = 1e-8
"""Error of a video below which it counts as this, so that ratios stay finite."""


def measure_influences(
    model: LoadedModel,
    requests: Sequence[ResolvedRequest],
    search: PatternSearch,
    choice: Choice,
    folder: Path,
    on_run: Callable[[str], None] | None = None,
) -> np.ndarray:
    """Generate videos with a choice of patterns in force at a few steps or layers, and compare them with dense ones.

    What is stopped goes on where it was.

    Args:
        model: the model.
        requests: for the first of the profile's prompts, resolved.
        search: what the choice was made by, a group for every step.
        choice: patterns of about the density in mind, since a small error need not matter as a share of a large one.
        folder: of the recordings, with the dense videos.
        on_run: called before each generation with what is done.

    Returns:
        (steps, layers) float64, 1 on average: how much a squared error of a layer's output, as a share of its energy,
        adds to the squared error of the finished video; a product of a factor of the step and one of the layer, each
        the geometric mean over prompts, so that one whose video is easily another does not outweigh the others.
    """
    expected = search.head_errors(choice).sum(-1)  # (steps, layers)
    steps, layers = expected.shape
    apart = STEPS_APART if steps >= 4 * STEPS_APART else 1
    runs = _Runs(model, requests, search, choice, folder, on_run)
    bands, stretches = _parts(layers, BANDS), _stretches(steps)
    places = np.zeros((len(bands), *expected.shape), dtype=bool)
    for place, (first, last) in zip(places, bands):
        place[::apart, first:last] = True
    names = [f"layers {first} to {last - 1}" for first, last in bands]
    factors = _ratios(runs.errors(names, places), expected, places)
    by_layer = np.repeat(factors, [last - first for first, last in bands])
    expected = expected * by_layer
    places = np.zeros((len(stretches), *expected.shape), dtype=bool)
    for place, (first, last) in zip(places, stretches):
        place[first:last] = True
    names = [f"steps {first} to {last - 1}" for first, last in stretches]
    factors = _ratios(runs.errors(names, places), expected, places)
    middles = [(first + last - 1) / 2 for first, last in stretches]
    by_step = np.exp(np.interp(np.arange(steps), middles, np.log(factors)))
    influences: np.ndarray = by_step[:, None] * by_layer
    influences /= influences.mean()
    return influences


class _Runs:
    """Videos with a choice in force at some places, compared with the dense ones; each is made once."""

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
        self.known: dict[str, float] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def errors(self, names: Sequence[str], places: np.ndarray) -> np.ndarray:
        """Squared errors of the videos as shares of their variances, the geometric mean over prompts, (parts,).

        Args:
            names: of the parts, in words.
            places: (parts, steps, layers) bool, where the choice is in force; elsewhere all heads are full.
        """
        logs = [
            [np.log(self._error(number, request, name, sparse)) for name, sparse in zip(names, places)]
            for number, request in enumerate(self.requests)
        ]
        means: np.ndarray = np.exp(np.mean(logs, axis=0))
        return means

    def _error(self, number: int, request: ResolvedRequest, name: str, sparse: np.ndarray) -> float:
        """Squared error of a prompt's video as a share of its variance."""
        key = f"prompt {number}, {name}"
        if key not in self.known:
            if self.on_run is not None:
                self.on_run(f"influence of {name} (prompt {number + 1}/{len(self.requests)})")
            partly = replace(self.choice, candidates=np.where(sparse[:, :, None], self.choice.candidates, 0))
            config = BladeConfig(attention="patterns", patterns=self.search.table(partly))
            video = generate_kept(self.model, request, config, self.folder).video
            dense = torch.from_numpy(dense_video(self.recordings, number)).float() / 255
            self.known[key] = float((video - dense).square().mean() / dense.var().clamp(min=LEAST))
            write_files({self.path: json.dumps(self.known, indent=1).encode()})
        return max(self.known[key], LEAST)


def generate_kept(model: LoadedModel, request: ResolvedRequest, config: BladeConfig, folder: Path) -> Generation:
    """Generate with a configuration; if that was stopped before, from where it was. Nothing stays in the folder."""
    whole = json.dumps([request.prompt, request.seed, config.to_dict()]).encode()
    passes = folder / hashlib.sha256(whole).hexdigest()[:12]
    with use_blade(model.pipe, config):
        generation = run_request(model, request, attention=kept_passes(model.transformer, passes))
    shutil.rmtree(passes)
    return generation


def _ratios(errors: np.ndarray, expected: np.ndarray, places: np.ndarray) -> np.ndarray:
    """What parts add to the video's error for their own; those that have none get the geometric mean of the others."""
    within = np.array([expected[place].sum() for place in places])
    known = within > LEAST
    if not known.any():
        return np.ones(len(errors))
    ratios = errors / np.maximum(within, LEAST)
    filled: np.ndarray = np.where(known, ratios, np.exp(np.log(ratios[known]).mean()))
    return filled


def _stretches(steps: int) -> list[tuple[int, int]]:
    """First step of each stretch and the one past its last; of short runs, every step is one."""
    return list(pairwise(sorted({round(share * steps) for share in STRETCHES})))


def _parts(count: int, most: int) -> list[tuple[int, int]]:
    """Bounds of at most so many parts, as equal as can be."""
    parts = min(count, most)
    return list(pairwise(part * count // parts for part in range(parts + 1)))
