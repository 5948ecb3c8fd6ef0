"""Attention profiles: measurements over all prompts, guidance branches, steps, layers and heads of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blade.attention.config import BladeConfig
from blade.attention.patterns import HeadPattern
from blade.common.fields import check_type, check_types, read_fields
from blade.common.files import replaced_whole
from blade.common.reading import parse_json
from blade.profiling.recording import read_pass
from blade.token_grid import TokenGrid, canonical_order

PROFILE_NAME = "attention_profile.safetensors"
"""File name of a saved profile."""

MAP_PARTS = 4
"""Number of equal parts of a run, each with its own attention maps."""


@dataclass(frozen=True, kw_only=True)
class ProfileSource:
    """The origin of a profile: model, prompts, sampling and candidates."""

    model: str
    """The model's name."""
    prompts: tuple[str, ...]
    """Prompts of the recorded generations."""
    seeds: tuple[int, ...]
    """Seed of each."""
    steps: int
    """Denoising steps."""
    guidance_scale: float
    """Guidance scale; at most 1 means a single branch."""
    video: tuple[int, int, int]
    """Frames, height and width, in pixels."""
    grid: TokenGrid
    """The tokens."""
    block_size: int
    """Tokens in a block."""
    token_order: str
    """Token order in which the model's blocks are cut."""
    candidates: tuple[HeadPattern, ...]
    """The patterns, `full` first, `skip` second."""
    densities: tuple[float, ...]
    """Share of all pairs that each computes."""
    adaptive: tuple[BladeConfig, ...]
    """Adaptive methods that were measured too."""
    adaptive_densities: tuple[float, ...]
    """Planned share of all pairs that each computes."""

    def __post_init__(self) -> None:
        check_types(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["grid"] = self.grid.to_dict()
        values["candidates"] = [pattern.to_dict() for pattern in self.candidates]
        values["adaptive"] = [config.to_dict() for config in self.adaptive]
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProfileSource:
        """Make a source from the result of `to_dict`."""
        read = read_fields(cls, values, "source")
        decoded: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in read.items()
        }
        for name in ("candidates", "adaptive"):
            check_type(name, decoded[name], tuple[Any, ...])
        decoded["grid"] = TokenGrid(**read_fields(TokenGrid, decoded["grid"], "grid"))
        decoded["token_order"] = canonical_order(decoded["token_order"])
        decoded["candidates"] = tuple(HeadPattern.from_dict(pattern) for pattern in decoded["candidates"])
        decoded["adaptive"] = tuple(BladeConfig.from_dict(config) for config in decoded["adaptive"])
        return cls(**decoded)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionProfile:
    """The measurements of a model's attention, as float32 arrays.

    The axis `measured` counts the candidates and then the adaptive methods.
    """

    source: ProfileSource
    """Origin of the measurements."""
    error: np.ndarray
    """(samples, steps, layers, measured, heads), squared error of the layer's output due to the head, mean over
    queries and channels. The samples are the guidance branches of the first prompt, then those of the second, and so
    on."""
    energy: np.ndarray
    """(samples, steps, layers, heads), error of skipping the head."""
    head_error: np.ndarray
    """(steps, layers, measured, heads), error of the head's output before the projection, mean over samples too."""
    mass: np.ndarray
    """(steps, layers, measured, heads), share of attention weight in the kept blocks."""
    best_mass: np.ndarray
    """(steps, layers, measured, heads), largest share that equally many blocks per row could hold."""
    columns: np.ndarray
    """(steps, layers, heads, blocks), attention weight that key blocks receive."""
    maps: np.ndarray
    """(parts, layers, heads, cells, cells), attention weight by patches in the model's own order, rows sum to 1; parts
    of the run from its start."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.error.shape[2])

    @property
    def heads(self) -> int:
        """Heads of a layer."""
        return int(self.error.shape[4])

    def save(self, path: Path) -> None:
        """Write the profile to a file; an existing file is replaced atomically."""
        names = [item.name for item in fields(self) if item.name != "source"]
        tensors = {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in names}
        with replaced_whole(path) as temporary:
            save_file(tensors, temporary, metadata={"source": json.dumps(self.source.to_dict())})

    @classmethod
    def load(cls, path: Path) -> AttentionProfile:
        """Read a file that `save` wrote.

        Raises:
            ValueError: if the file is missing or is not a profile.
        """
        try:
            with safe_open(str(path), "np") as file:
                source = parse_json((file.metadata() or {})["source"], "`source`")
                arrays = {item.name: file.get_tensor(item.name) for item in fields(cls) if item.name != "source"}
                return cls(source=ProfileSource.from_dict(source), **arrays)
        except Exception as problem:  # safetensors' errors, and any key that another kind of file lacks
            raise ValueError(f"`{path}` cannot be read as an attention profile: {problem}") from None


def aggregate_passes(folder: Path, path: Path, steps: int) -> None:
    """Sum the passes of one generation that `recorded` saved, and write the sums to a file.

    Args:
        folder: the folder of the passes.
        path: the file.
        steps: the generation's number of steps.

    Raises:
        ValueError: if steps are missing.
    """
    passes: dict[tuple[int, int], dict[str, torch.Tensor]] = {}  # by branch and step
    maps: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    count = [0] * steps
    for file in sorted(folder.glob("pass-*.safetensors")):
        recorded = read_pass(file)
        branch, part = count[recorded.step], recorded.step * MAP_PARTS // steps
        count[recorded.step] += 1
        layers = [recorded.layers[layer] for layer in sorted(recorded.layers)]
        queries = layers[0].queries
        stacked = {
            name: torch.stack([getattr(layer, name) for layer in layers]).float() / queries
            for name in ("output_error", "head_error", "mass", "best_mass", "energy")
        }
        stacked["columns"] = torch.stack([recorded.columns[layer] for layer in sorted(recorded.columns)]).float()
        passes[branch, recorded.step] = stacked
        pass_maps = torch.stack([layer.block_map for layer in layers]).float()
        pass_rows = torch.stack([layer.rows for layer in layers]).float()
        if maps is None or rows is None:
            maps, rows = (torch.zeros(MAP_PARTS, *x.shape) for x in (pass_maps, pass_rows))
        maps[part] += pass_maps
        rows[part] += pass_rows
    branches = max(count)
    if min(count) != branches or maps is None or rows is None:
        raise ValueError(f"`{folder}` must hold the same number of passes of each of {steps} steps, got {count}.")
    tensors = {}
    for name in passes[0, 0]:
        by_branch = [[passes[branch, step][name] for step in range(steps)] for branch in range(branches)]
        tensors[name] = torch.stack([torch.stack(by_step) for by_step in by_branch])
    tensors |= {"maps": maps, "map_rows": rows}
    with replaced_whole(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def make_profile(source: ProfileSource, paths: Sequence[Path]) -> AttentionProfile:
    """Combine the files that `aggregate_passes` wrote for all prompts."""
    runs = [load_file(path) for path in paths]

    def mean(name: str) -> np.ndarray:
        return torch.stack([run[name].mean(0) for run in runs]).mean(0).numpy()

    maps, rows = sum(run["maps"] for run in runs), sum(run["map_rows"] for run in runs)
    assert isinstance(maps, torch.Tensor) and isinstance(rows, torch.Tensor)
    return AttentionProfile(
        source=source,
        error=torch.cat([run["output_error"] for run in runs]).numpy(),
        energy=torch.cat([run["energy"] for run in runs]).numpy(),
        maps=(maps / rows[:, :, None, :, None].clamp(min=1)).numpy(),
        **{name: mean(name) for name in ("head_error", "mass", "best_mass", "columns")},
    )
