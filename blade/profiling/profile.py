"""What was measured of a model's attention, over all prompts, guidance branches, steps, layers and heads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blade.attention.config import BladeConfig
from blade.attention.patterns import HeadPattern
from blade.common.files import replaced_whole
from blade.profiling.recording import read_pass
from blade.token_grid import TokenGrid, canonical_order

PROFILE_NAME = "attention_profile.safetensors"
"""File name of a saved profile."""

MAP_PARTS = 4
"""Parts of a run of which attention maps are kept."""


@dataclass(frozen=True, kw_only=True)
class ProfileSource:
    """What a profile was made of. Plain values, but for the candidates."""

    model: str
    """The model's name."""
    prompts: tuple[str, ...]
    """Of the generations that were looked into."""
    seeds: tuple[int, ...]
    """Seed of each."""
    steps: int
    """Denoising steps."""
    guidance_scale: float
    """At most 1: one branch."""
    video: tuple[int, int, int]
    """Frames, height and width, in pixels."""
    grid: TokenGrid
    """The tokens."""
    block_size: int
    """Tokens in a block."""
    token_order: str
    """Order in which the model's tokens are cut into blocks."""
    candidates: tuple[HeadPattern, ...]
    """The patterns, `full` first, `skip` second."""
    densities: tuple[float, ...]
    """Share of all pairs that each computes."""
    adaptive: tuple[BladeConfig, ...]
    """Adaptive methods that were measured beside them."""
    adaptive_densities: tuple[float, ...]
    """Planned share of all pairs that each computes."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["grid"] = asdict(self.grid)
        values["candidates"] = [pattern.to_dict() for pattern in self.candidates]
        values["adaptive"] = [config.to_dict() for config in self.adaptive]
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ProfileSource:
        """Take what `to_dict` gave."""
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        known["grid"] = TokenGrid(**known["grid"])
        known["token_order"] = canonical_order(known["token_order"])
        known["candidates"] = tuple(HeadPattern.from_dict(pattern) for pattern in known["candidates"])
        known["adaptive"] = tuple(BladeConfig.from_dict(config) for config in known["adaptive"])
        return cls(**known)


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionProfile:
    """What was measured. `measured` counts the candidates and then the adaptive methods; arrays are float32."""

    source: ProfileSource
    """What of."""
    error: np.ndarray
    """(samples, steps, layers, measured, heads), squared error of the layer's output by the head, mean over queries
    and channels. The samples are the guidance branches of the first prompt, then those of the second, and so on."""
    energy: np.ndarray
    """(samples, steps, layers, heads), the error of the skipped head."""
    head_error: np.ndarray
    """(steps, layers, measured, heads), of the head's output before the projection, mean over samples too."""
    mass: np.ndarray
    """(steps, layers, measured, heads), share of attention weight in the kept blocks."""
    best_mass: np.ndarray
    """(steps, layers, measured, heads), share that as many blocks in every row could have held at the most."""
    columns: np.ndarray
    """(steps, layers, heads, blocks), attention weight that key blocks receive."""
    maps: np.ndarray
    """(parts, layers, heads, cells, cells), attention weight of patches of the map, rows sum to 1, in the model's own
    order; parts of the run from its start."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.error.shape[2])

    @property
    def heads(self) -> int:
        """Heads of a layer."""
        return int(self.error.shape[4])

    def save(self, path: Path) -> None:
        """Write the profile to a file; one that was there is replaced as a whole."""
        names = [item.name for item in fields(self) if item.name != "source"]
        tensors = {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in names}
        with replaced_whole(path) as temporary:
            save_file(tensors, temporary, metadata={"source": json.dumps(self.source.to_dict())})

    @classmethod
    def load(cls, path: Path) -> AttentionProfile:
        """Read a file that `save` wrote.

        Raises:
            ValueError: if it is not there, or not such a file.
        """
        try:
            with safe_open(str(path), "np") as file:
                source = json.loads((file.metadata() or {})["source"])
                arrays = {item.name: file.get_tensor(item.name) for item in fields(cls) if item.name != "source"}
                return cls(source=ProfileSource.from_dict(source), **arrays)
        except Exception as problem:  # safetensors' errors, and whatever a file of something else lacks
            raise ValueError(f"`{path}` cannot be read as an attention profile: {problem}") from None


def aggregate_passes(folder: Path, path: Path, steps: int) -> None:
    """Sum up the passes of one generation that `recorded` kept, and write that to a file.

    Args:
        folder: of the passes.
        path: the file.
        steps: of the generation.

    Raises:
        ValueError: if steps are missing.
    """
    found: dict[tuple[int, int], dict[str, torch.Tensor]] = {}  # by branch and step
    maps: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    count = [0] * steps
    for file in sorted(folder.glob("pass-*.safetensors")):
        one = read_pass(file)
        branch, part = count[one.step], one.step * MAP_PARTS // steps
        count[one.step] += 1
        layers = [one.layers[layer] for layer in sorted(one.layers)]
        queries = layers[0].queries
        stacked = {
            name: torch.stack([getattr(layer, name) for layer in layers]).float() / queries
            for name in ("output_error", "head_error", "mass", "best_mass", "energy")
        }
        stacked["columns"] = torch.stack([one.columns[layer] for layer in sorted(one.columns)]).float()
        found[branch, one.step] = stacked
        own_maps = torch.stack([layer.block_map for layer in layers]).float()
        own_rows = torch.stack([layer.rows for layer in layers]).float()
        if maps is None or rows is None:
            maps, rows = (torch.zeros(MAP_PARTS, *x.shape) for x in (own_maps, own_rows))
        maps[part] += own_maps
        rows[part] += own_rows
    branches = max(count)
    if min(count) != branches or maps is None or rows is None:
        raise ValueError(f"`{folder}` must hold as many passes of each of {steps} steps, got {count}.")
    tensors = {}
    for name in found[0, 0]:
        by_branch = [[found[branch, step][name] for step in range(steps)] for branch in range(branches)]
        tensors[name] = torch.stack([torch.stack(by_step) for by_step in by_branch])
    tensors |= {"maps": maps, "map_rows": rows}
    with replaced_whole(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def make_profile(source: ProfileSource, paths: Sequence[Path]) -> AttentionProfile:
    """Put together what `aggregate_passes` wrote of all prompts."""
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
