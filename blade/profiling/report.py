"""Report of a table of head patterns and its measurements, as one self-contained HTML file.

jinja2 fills in the text. Arrays go into a block of JSON, as base64 of their bytes, and the file's script draws them.
"""

from __future__ import annotations

import base64
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blade.attention.patterns import KINDS
from blade.common.checks import check_choice, check_integer, check_number
from blade.common.files import write_files

TEMPLATE = "report.html.jinja"
"""The template, in this file's folder like its style sheet and scripts."""

SCRIPTS = ("report_charts.js", "report.js")
"""The scripts, in the order in which they run."""

MOST_BYTES = 8 * 2**20
"""Most bytes of all arrays together, before base64 adds a third; maps of larger models are made coarser."""

MOST_DEPENDENT = 8
"""Number of heads listed as the most dependent on the prompt."""

VERIFIED_NAMES = {
    "density": "Measured density",
    "error": "Measured error",
    "psnr_db": "PSNR to dense",
    "ssim": "SSIM to dense",
}
"""Headings of the measurements made with the table in use."""

_TYPES = {"whole numbers": np.integer, "uint8": np.uint8, "float32": np.floating}
"""NumPy types accepted for each kind of array."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A pattern that heads can be assigned."""

    name: str
    """Short description, such as `diagonal, 1.5 frames`."""
    kind: str
    """One of `blade.attention.patterns.KINDS`."""
    density: float
    """Share of all query-key pairs that it computes, from 0 to 1; the mean for `asa`."""
    cost: float
    """Time that it takes, as a share of the full pattern's."""

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_number("density", self.density, "from 0 to 1", lambda x: 0 <= x <= 1)
        check_number("cost", self.cost, "at least 0", lambda x: 0 <= x < math.inf)


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportData:
    """Everything that the report shows. Layers, heads and steps count from 0.

    Raises:
        ValueError: naming the field whose shape, type or values do not fit the others.
    """

    title: str
    """Heading."""
    command: str
    """The command that made the table."""
    date: str
    """Date of the search."""
    model: str
    """Name of the model."""
    machine: Mapping[str, str]
    """Description of the machine: property -> value."""
    versions: Mapping[str, str]
    """Versions: package -> version."""
    video: str
    """Size of the videos, such as `33 frames of 96x96`."""
    grid: str
    """Size of their token grid, such as `9 x 12 x 12 tokens`."""
    block_size: int
    """Tokens in a query block and in a key block."""
    token_order: str
    """Token order in which the model's blocks are cut."""
    steps: int
    """Steps of a run."""
    group_starts: tuple[int, ...]
    """First step of each group of steps that shares an assignment, ascending from 0."""
    prompts: tuple[str, ...]
    """Prompts of the measured generations."""
    branches: int
    """Passes of the model in a step, such as 2 with classifier-free guidance."""
    budget: str
    """Limit of the search in words, such as `target density 0.35`."""
    notes: tuple[str, ...]
    """Sentences below the summary."""
    candidates: tuple[Candidate, ...]
    """The patterns that heads can be assigned."""
    assignment: np.ndarray
    """(groups, layers, heads) integers, indices into `candidates`."""
    head_error: np.ndarray
    """(groups, layers, heads) float32, squared error of the layer's output that the chosen pattern causes, as a share
    of the mean energy of the layer's heads."""
    explained: np.ndarray
    """(kinds, layers, steps) float32, share of attention weight that the best pattern of each kind captures at about
    the usual density. NaN: not measured."""
    explained_kinds: tuple[str, ...]
    """The kinds of `explained`."""
    maps: np.ndarray
    """(parts, layers, heads, cells, cells) uint8, attention weight averaged over patches of queries (rows) and keys
    (columns) in raster order; a row of zeros: none of these queries was sampled. Its square root, 255 at each map's
    maximum. Part p covers the steps from p * steps / parts on."""
    masks: np.ndarray
    """(candidates, cells, cells) uint8, share of the pairs of a patch that each candidate keeps, 255 for all."""
    stripes: np.ndarray | None
    """(groups, layers, heads, cells) uint8, share of the keys in each column of patches that the head keeps, 255 for
    all. It replaces the mask of heads whose candidate is `vertical`. None: all have the candidate's mask."""
    curve: np.ndarray
    """(points, 2) float32, ascending densities and the relative error of the best assignment at each."""
    published_curve: np.ndarray | None
    """(points, 2) float32, the same for the published rule. None: not computed."""
    chosen: tuple[float, float]
    """Density and predicted relative error of this table."""
    verified: Mapping[str, float] | None
    """Measurements with the table in use: `density`, `error`, `psnr_db` and `ssim` (to dense attention), or others.
    None: nothing was measured."""
    recall: np.ndarray | None
    """(layers, steps, 2) float32, attention weight in the blocks that ASA chooses, and in the same number of best
    blocks. None: not measured."""
    prompt_disagreement: np.ndarray
    """(layers, heads) float32, share of the prompts for which another pattern of no higher cost does better."""
    prompt_regret: np.ndarray
    """(layers, heads) float32, share of the error that a choice per prompt would save."""
    orders: tuple[str, ...]
    """Token orders."""
    order_densities: tuple[tuple[str, tuple[float, ...]], ...]
    """Name of each pattern and its density in each of `orders`."""

    def __post_init__(self) -> None:
        check_integer("block_size", self.block_size, 1)
        check_integer("steps", self.steps, 1)
        check_integer("branches", self.branches, 1)
        starts = self.group_starts
        if not starts or starts[0] != 0 or list(starts) != sorted(set(starts)) or starts[-1] >= self.steps:
            raise ValueError(f"`group_starts` must be rising steps from 0 below {self.steps}, got {starts}.")
        groups, kinds = len(starts), len(self.explained_kinds)
        for kind in self.explained_kinds:
            check_choice("explained_kinds", kind, KINDS)
        self._check("assignment", "whole numbers", (groups, None, None))
        layers, heads = self.assignment.shape[1:]
        if self.assignment.min() < 0 or self.assignment.max() >= len(self.candidates):
            raise ValueError(
                f"`assignment` must be of the {len(self.candidates)} candidates, from 0, got "
                f"{self.assignment.min()} to {self.assignment.max()}."
            )
        self._check("maps", "uint8", (None, layers, heads, None, None))
        cells = self.maps.shape[-1]
        self._check("maps", "uint8", (None, layers, heads, cells, cells))
        self._check("masks", "uint8", (len(self.candidates), cells, cells))
        self._check("stripes", "uint8", (groups, layers, heads, cells), optional=True)
        self._check("explained", "float32", (kinds, layers, self.steps))
        self._check("recall", "float32", (layers, self.steps, 2), optional=True)
        self._check("head_error", "float32", (groups, layers, heads), finite=True)
        self._check("prompt_disagreement", "float32", (layers, heads), finite=True)
        self._check("prompt_regret", "float32", (layers, heads), finite=True)
        self._check("curve", "float32", (None, 2), finite=True)
        self._check("published_curve", "float32", (None, 2), finite=True, optional=True)
        if len(self.chosen) != 2 or not all(map(math.isfinite, self.chosen)):
            raise ValueError(f"`chosen` must be a density and an error, got {self.chosen}.")
        for pattern, densities in self.order_densities:
            if len(densities) != len(self.orders):
                raise ValueError(
                    f"`order_densities` must have {len(self.orders)} densities a pattern, one an order, got "
                    f"{len(densities)} for {pattern!r}."
                )

    def _check(
        self, name: str, numbers: str, shape: tuple[int | None, ...], *, finite: bool = False, optional: bool = False
    ) -> None:
        """Check an array's shape, in which None allows any size, and its type; make floating-point arrays float32."""
        value = getattr(self, name)
        if value is None and optional:
            return
        array = np.asarray(value)
        if array.ndim != len(shape) or any(
            size == 0 if expected is None else size != expected for size, expected in zip(array.shape, shape)
        ):
            expected_shape = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"`{name}` must have the shape ({expected_shape}), got {array.shape}.")
        if not np.issubdtype(array.dtype, _TYPES[numbers]):
            raise ValueError(f"`{name}` must hold {numbers}, got {array.dtype}.")
        if finite and not np.isfinite(array).all():
            raise ValueError(f"`{name}` must be finite, got {array[~np.isfinite(array)][0]} in it.")
        object.__setattr__(self, name, array.astype(np.float32) if numbers == "float32" else array)

    def candidate_shares(self) -> np.ndarray:
        """Return the share of all heads, layers and steps that each candidate has: (candidates,) float64."""
        lengths = np.diff((*self.group_starts, self.steps))
        numbers = np.arange(len(self.candidates))[:, None, None, None]
        shares: np.ndarray = (self.assignment == numbers).mean((2, 3)) @ lengths / self.steps
        return shares

    def kind_shares(self) -> dict[str, float]:
        """Return the share of all heads, layers and steps that each kind of pattern has, in the order of `KINDS`."""
        shares = dict.fromkeys(KINDS, 0.0)
        for candidate, share in zip(self.candidates, self.candidate_shares()):
            shares[candidate.kind] += float(share)
        return {kind: share for kind, share in shares.items() if share}

    def cost(self) -> float:
        """Return attention's time by the candidates' costs, as a share of the full pattern's."""
        return float(self.candidate_shares() @ [candidate.cost for candidate in self.candidates])


def render_report(data: ReportData) -> str:
    """Render the report as one HTML file, which works when opened from disk, without a network.

    Args:
        data: the contents.

    Returns:
        The file's text.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    return environment.get_template(TEMPLATE).render(
        data=data,
        shares=data.kind_shares(),
        candidate_shares=list(zip(data.candidates, data.candidate_shares().tolist())),
        verified=[(VERIFIED_NAMES.get(name, name), _verified(name, x)) for name, x in (data.verified or {}).items()],
        most_dependent=_most_dependent(data),
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        scripts=[Markup((folder / name).read_text(encoding="utf-8")) for name in SCRIPTS],
        json=Markup(_json(_drawn(data))),
    )


def write_report(data: ReportData, path: Path) -> None:
    """Write the report to a file atomically.

    Args:
        data: the contents.
        path: the file.

    Raises:
        OutputError: if it cannot be written.
    """
    write_files({path: render_report(data).encode("utf-8")})


def _drawn(data: ReportData) -> dict[str, Any]:
    """Return the data that the script draws."""
    maps, masks, stripes = _fitting(data)
    drawn_stripes = None if stripes is None else stripes[_striped(data)]
    arrays = {
        "assignment": data.assignment.astype("<u2"),
        "head_error": data.head_error,
        "explained": data.explained,
        "maps": maps,
        "masks": masks,
        "stripes": drawn_stripes,
        "curve": data.curve,
        "published_curve": data.published_curve,
        "recall": data.recall,
        "prompt_disagreement": data.prompt_disagreement,
        "prompt_regret": data.prompt_regret,
    }
    return {
        "steps": data.steps,
        "group_starts": data.group_starts,
        "kinds": KINDS,
        "candidates": [
            {
                "name": candidate.name,
                "kind": candidate.kind,
                "density": candidate.density,
                "cost": candidate.cost,
            }
            for candidate in data.candidates
        ],
        "explained_kinds": data.explained_kinds,
        "chosen": data.chosen,
        "verified": {name: value for name, value in (data.verified or {}).items() if math.isfinite(value)},
        "arrays": {name: None if array is None else _encoded(array) for name, array in arrays.items()},
    }


def _encoded(array: np.ndarray) -> dict[str, Any]:
    little = array.astype(array.dtype.newbyteorder("<"), order="C")
    return {
        "type": array.dtype.name,
        "shape": array.shape,
        "data": base64.b64encode(little.tobytes()).decode("ascii"),
    }


def _json(values: Mapping[str, Any]) -> str:
    """Return JSON that is safe inside an HTML element: no text in it ends the element or begins another one."""
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _striped(data: ReportData) -> np.ndarray:
    """Return the heads whose mask is their own stripes: (groups, layers, heads) bool."""
    striped: np.ndarray = np.array([candidate.kind == "vertical" for candidate in data.candidates])[data.assignment]
    return striped


def _fitting(data: ReportData) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return maps, masks and stripes, coarsened until all arrays together fit into `MOST_BYTES`."""
    striped = 0 if data.stripes is None else int(_striped(data).sum())
    fixed = sum(
        array.nbytes
        for array in (data.assignment.astype("<u2"), data.head_error, data.explained, data.recall)
        if array is not None
    )
    for factor in itertools.count(1):
        cells = math.ceil(data.maps.shape[-1] / factor)
        pictures = math.prod(data.maps.shape[:3]) + len(data.masks)
        if cells == 1 or fixed + pictures * cells**2 + striped * cells <= MOST_BYTES:
            break
    if factor == 1:
        return data.maps, data.masks, data.stripes
    maps = np.stack([np.stack([_coarser_map(layer, factor) for layer in part]) for part in data.maps])
    masks = _averaged(_averaged(data.masks, factor, -1), factor, -2)
    stripes = None if data.stripes is None else _averaged(data.stripes, factor, -1)
    return maps, _rounded(masks), None if stripes is None else _rounded(stripes)


def _coarser_map(layer: np.ndarray, factor: int) -> np.ndarray:
    """Coarsen the maps of a layer's heads: average the weights, whose square roots the maps hold."""
    weights = _averaged(_averaged(np.square(layer, dtype=np.float32), factor, -1), factor, -2)
    strongest = weights.max((-2, -1), keepdims=True)
    return _rounded(255 * np.sqrt(weights / np.where(strongest > 0, strongest, 1)))


def _averaged(array: np.ndarray, factor: int, axis: int) -> np.ndarray:
    """Average groups of `factor` neighbours; the last group may be smaller."""
    starts = np.arange(0, array.shape[axis], factor)
    sums = np.add.reduceat(array.astype(np.float32), starts, axis)
    counts = np.diff((*starts, array.shape[axis]))
    return np.moveaxis(np.moveaxis(sums, axis, -1) / counts, -1, axis)


def _rounded(array: np.ndarray) -> np.ndarray:
    rounded: np.ndarray = np.rint(array).astype(np.uint8)
    return rounded


def _most_dependent(data: ReportData) -> list[dict[str, Any]]:
    """Return the heads that would gain from a choice per prompt, largest gain first, at most `MOST_DEPENDENT`."""
    heads = data.prompt_regret.shape[1]
    dependent = []
    for number in np.argsort(-data.prompt_regret, axis=None, kind="stable")[:MOST_DEPENDENT]:
        layer, head = divmod(int(number), heads)
        if data.prompt_regret[layer, head] > 0:
            dependent.append(
                {
                    "layer": layer,
                    "head": head,
                    "regret": float(data.prompt_regret[layer, head]),
                    "disagreement": float(data.prompt_disagreement[layer, head]),
                }
            )
    return dependent


def _percent(share: float) -> str:
    """Format a share with at least two digits, such as 0.4 %, 35 % or 100 %."""
    share = 100 * share
    return f"{share:.2g} %" if abs(share) < 10 else f"{share:.0f} %"


def _verified(name: str, value: float) -> str:
    """Format a measurement made with the table in use."""
    if name == "error":
        return _percent(value)
    return f"{value:.1f} dB" if name.endswith("_db") else f"{value:.3g}"
