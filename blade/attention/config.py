"""BladeConfig, the configuration of BLADE's attention: validated, to JSON and back."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from blade_kernels.implementations import current_name

from blade.attention.pattern_table import TABLE_NAME, PatternTable
from blade.attention.selectors import DEFAULT_SELECTOR, find_selector
from blade.common.checks import (
    MOST_BLOCK_TOKENS,
    MOST_LAYERS,
    MOST_STEPS,
    check_integer,
    check_number,
    is_number,
    parse_ranges,
    shortened,
)
from blade.common.documented import documented
from blade.common.fields import check_types
from blade.common.files import write_files
from blade.common.reading import read_json
from blade.common.representation import repr_changes
from blade.families.kinds import PresetKind
from blade.token_grid import canonical_order

CONFIG_NAME = "blade_config.json"
"""File name of a saved configuration."""


@documented
@dataclass(frozen=True, kw_only=True, repr=False)
class AdaptiveConfig:
    """Details of adaptive block-sparse attention (ASA). Source: BLADE, arXiv 2508.10774, section on ASA."""

    block_size: int = 64
    """Tokens in a query block and in a key block (paper: 128)."""

    token_order: str = "gilbert"
    """Order in which video tokens are cut into blocks: `raster`, `token-major`, `gilbert`, `bricks(t,h,w)` or another
    of `blade.token_grid.TOKEN_ORDERS`."""

    selector: str = DEFAULT_SELECTOR
    """Score of a key block for a query block: the largest attention weight among sampled token pairs (`sampled`, the
    paper's), the attention weight of block means (`mean-pooled`), nothing but chance (`random`), nearness in the video
    (`local`), or another of `blade.attention.selectors.SELECTORS`."""

    probe_tokens: int = 16
    """Tokens sampled in each block by the `sampled` selector (paper: 16; both released variants: 32)."""

    probe_keys: Literal["drawn", "half-largest"] = "drawn"
    """Keys of a block that `sampled` looks at: all drawn by lot (the paper's), or half of them those furthest from the
    mean of all keys, so that keys of large norm, which many queries attend to, are not missed."""

    softmax_denominator: bool = True
    """Score `sampled` by a softmax with its denominator (the paper's); if false, by each weight relative to the
    largest of its row (as released)."""

    statistic: Literal["max", "mean", "rms", "residual"] = "max"
    """Statistic by which `sampled` scores a block: the largest weight (`max`, the paper's); of the weights that
    sampled queries give to the whole block, the mean or the root mean square (`rms`); or the root mean square of what
    the mean of the block's keys gets wrong (`residual`), for blocks that are pooled where they are dropped."""

    value_weighting: bool = False
    """Multiply a block's scores by how far its values are from the mean of all, as a root mean square."""

    budget: Literal["row", "layer"] = "row"
    """What the budget is for: each row of each head (`row`, the paper's), or the rows of all heads of a layer together
    (`layer`), so that those which lose more keep more."""

    rounding: Literal["floor", "spread"] = "floor"
    """Use of a budget that is no whole number of blocks in a row: leave the rest (`floor`), or give some rows one
    block more (`spread`), so that the budget is met on average."""

    reselect_every: int = 1
    """Steps for which a choice of blocks is kept: 1, choose at every step; 2, at every other one. Not in compiled
    layers, in training or with patterns, which choose at every step. It takes a byte for each pair of blocks of each
    head, layer and pass of a step."""

    cumulative_mass: float | None = None
    """Stop keeping blocks of a row once they hold this share of its score, in (0, 1]; the block that crosses it is
    kept. None: always keep as many as the budget allows. The paper's 0.95 hardly ever stops before its cap."""

    min_fraction: float = 0.0
    """Smallest share of a row's blocks that `cumulative_mass` may leave, in [0, 1] (paper: 0.05)."""

    pooled_window: int = 32
    """Consecutive video tokens averaged into one pooled token (paper: 30 for Wan, 15 for CogVideoX). With
    `pooled_tokens="dropped"` it must divide `block_size`."""

    def __post_init__(self) -> None:
        for name in ("block_size", "probe_tokens", "pooled_window"):
            check_integer(name, getattr(self, name), least=1, most=MOST_BLOCK_TOKENS)
        if self.cumulative_mass is not None:
            check_number("cumulative_mass", self.cumulative_mass, "None or in (0, 1]", lambda x: 0 < x <= 1)
        check_integer("reselect_every", self.reselect_every, least=1, most=MOST_STEPS)
        check_number("min_fraction", self.min_fraction, "in [0, 1]", lambda x: 0 <= x <= 1)
        check_types(self)
        if self.probe_tokens > self.block_size:
            raise ValueError(
                f"`probe_tokens` must be at most `block_size`, which is {self.block_size}, got {self.probe_tokens}."
            )
        object.__setattr__(self, "token_order", canonical_order(self.token_order))
        find_selector(self.selector)
        if self.cumulative_mass is not None and self.budget == "layer":
            raise ValueError(f'`cumulative_mass` must be None where `budget` is "layer", got {self.cumulative_mass}.')

    def __repr__(self) -> str:
        """Return what differs from the default."""
        return repr_changes(self)


class ConfigChanges(TypedDict, total=False):
    """Fields of a `BladeConfig` that a call changes, in all types in which they can be given."""

    attention: Literal["dense", "asa", "asa-gt", "patterns"]
    sparsity: float
    pooled_tokens: Literal["none", "all", "dropped"]
    dense_steps: int | float
    dense_layers: str | int | Iterable[int]
    implementation: str
    precision: Literal["full", "int8", "fp8"]
    strict: bool
    seed: int
    asa: AdaptiveConfig
    patterns: PatternTable | None
    adapt_patterns: bool


class ConfigFields(ConfigChanges, total=False):
    """All fields of a `BladeConfig`."""

    kind: PresetKind


@documented
@dataclass(frozen=True, kw_only=True, repr=False)
class BladeConfig:
    """Configuration of a video transformer's sparse self-attention."""

    attention: Literal["dense", "asa", "asa-gt", "patterns"] = "asa"
    """The method: `dense`, `asa` (adaptive block-sparse attention), `asa-gt`, which is short for `asa` with
    `pooled_tokens="all"` and is stored as such, or `patterns` (every head has a pattern found beforehand)."""

    sparsity: float = 0.5
    """Share of all query-key pairs that a sparse layer leaves out, in [0, 1). This is the one budget: pooled tokens
    and forced text blocks are paid from it. At 0 every block is kept and nothing is pooled."""

    pooled_tokens: Literal["none", "all", "dropped"] = "none"
    """Mean-pooled keys and values that stand beside the kept blocks: none, one for every window of the video, or only
    those of the blocks that a row dropped (so that nothing counts twice)."""

    dense_steps: int | float = 0
    """Denoising steps that stay dense: a count from the start of the scheduler's schedule, or a fraction of it, below
    1, rounded up. A run that begins later has fewer of them, or none: of 8 steps, video to video at strength 0.5 takes
    those from the fifth on, so that none is dense with `dense_steps=2`."""

    dense_layers: tuple[int, ...] = ()
    """Layers that stay dense. Also accepts a string such as "0-1,39"."""

    implementation: str = "auto"
    """Implementation of the block-sparse attention: see `blade.block_sparse_attention`. `reference`, the name of `cpu`
    in earlier versions, is stored as `cpu`."""

    precision: Literal["full", "int8", "fp8"] = "full"
    """Type in which sparse layers multiply queries and keys: their own, or 8-bit integers as in SageAttention
    (arXiv 2410.02367), for running alone, not for training. Faster only with the Triton kernels."""

    strict: bool = False
    """Raise where a layer that should be sparse has to stay dense, instead of logging why."""

    seed: int = 0
    """Seed of the probe offsets and of the `random` selector, together with layer and step."""

    kind: PresetKind = "training-free"
    """Weights that the values are for: ordinary ones, few-step students that were trained dense, or only those that
    were trained with them."""

    asa: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    """Details of the adaptive method. With `patterns`, its block size and token order are the table's."""

    patterns: PatternTable | None = None
    """With `attention="patterns"`, the heads' patterns."""

    adapt_patterns: bool = False
    """Use a table of patterns for runs of another length or size than it was found for, as far as it applies."""

    if TYPE_CHECKING:  # which knows no field that is given as a string and holds numbers

        def __init__(self, **values: Unpack[ConfigFields]) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "dense_steps", parse_dense_steps(self.dense_steps))
        object.__setattr__(self, "dense_layers", parse_dense_layers(self.dense_layers))
        check_number("sparsity", self.sparsity, "in [0, 1)", lambda x: 0 <= x < 1)
        check_integer("seed", self.seed, least=0)
        check_types(self)
        if not self.implementation:
            raise ValueError(f'`implementation` must be a name such as "auto", got {self.implementation!r}.')
        object.__setattr__(self, "implementation", current_name(self.implementation))
        if (self.attention == "patterns") != isinstance(self.patterns, PatternTable):
            raise ValueError(
                '`patterns` must be a PatternTable with `attention="patterns"`, and None otherwise, got '
                f"{type(self.patterns).__name__} with {self.attention!r}."
            )
        if self.patterns is not None:
            if self.pooled_tokens != "none":
                raise ValueError(f'`pooled_tokens` must be "none" with patterns, got {self.pooled_tokens!r}.')
            size, order = self.patterns.block_size, self.patterns.token_order
            probe = min(self.asa.probe_tokens, size)
            details = replace(self.asa, block_size=size, token_order=order, probe_tokens=probe)
            object.__setattr__(self, "asa", details)
        if self.attention == "asa-gt":
            if self.pooled_tokens == "dropped":
                raise ValueError(
                    '`attention="asa-gt"` means `pooled_tokens="all"`; for pooled tokens of dropped blocks take '
                    '`attention="asa", pooled_tokens="dropped"`.'
                )
            object.__setattr__(self, "attention", "asa")
            object.__setattr__(self, "pooled_tokens", "all")
        if self.pooled_tokens == "dropped" and self.asa.block_size % self.asa.pooled_window:
            raise ValueError(
                '`pooled_window` must divide `block_size` where `pooled_tokens="dropped"`, got '
                f"{self.asa.pooled_window} and {self.asa.block_size}."
            )

    def __repr__(self) -> str:
        """Return what differs from the default."""
        return repr_changes(self)

    def dense_step_count(self, total_steps: int) -> int:
        """Return how many steps from the start stay dense in a schedule of `total_steps` steps."""
        if isinstance(self.dense_steps, int):
            return min(self.dense_steps, total_steps)
        # rounding first keeps 0.2 * 30 = 6.000000000000001 from becoming 7
        return math.ceil(round(self.dense_steps * total_steps, 6))

    @classmethod
    def from_preset(cls, name: str, kind: PresetKind = "training-free") -> BladeConfig:
        """Return a named preset.

        Args:
            name: a model, such as "wan2.1-t2v-1.3b".
            kind: `training-free` values work on ordinary weights; `few-step` values are for students of few steps that
                were trained dense; `student` values work only on weights that were trained with them.

        Raises:
            ValueError: if there is no such preset; the message lists those that exist.
        """
        from blade.families.registry import preset_values

        return cls.from_dict(preset_values(name, kind))

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values."""
        values = asdict(replace(self, attention="dense", patterns=None) if self.patterns else self)
        values["attention"] = self.attention
        values["dense_layers"] = list(self.dense_layers)
        values["patterns"] = None if self.patterns is None else self.patterns.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BladeConfig:
        """Make a configuration from `to_dict`'s values. Unknown keys, of a later version, draw a warning."""
        known = _known(cls, values, "")
        if "asa" in known:
            known["asa"] = AdaptiveConfig(**_known(AdaptiveConfig, known["asa"], "asa."))
        if known.get("patterns") is not None:
            known["patterns"] = PatternTable.from_dict(known["patterns"])
        return cls(**known)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write `blade_config.json`, and `pattern_table.json` beside it, into a directory, made if missing.

        Returns:
            The path of `blade_config.json`.

        Raises:
            OutputError: if one cannot be written; both are then as they were before.
        """
        path = Path(directory) / CONFIG_NAME
        values, contents = self.to_dict(), {}
        if self.patterns is not None:
            contents[path.with_name(TABLE_NAME)] = self.patterns.to_bytes()
            values["patterns"] = TABLE_NAME
        write_files({**contents, path: (json.dumps(values, indent=2) + "\n").encode()})
        return path

    @classmethod
    def from_pretrained(
        cls,
        directory_or_id: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> BladeConfig:
        """Read a configuration that `save_pretrained` or `push_to_hub` wrote.

        Args:
            directory_or_id: a directory, a `blade_config.json` file, or a Hugging Face Hub id.
            subfolder: folder of the directory or repository that holds the file.
            revision: branch, tag or commit on the Hub.
            token: access token for the Hub; by default the one that is logged in.

        Raises:
            ValueError: if the directory holds no `blade_config.json`, or it isn't one.
        """
        local = Path(directory_or_id).expanduser()

        def find(name: str) -> Path:
            if local.is_file():
                return local if name == CONFIG_NAME else local.with_name(name)
            if local.is_dir():
                return local / (subfolder or "") / name
            from huggingface_hub import hf_hub_download

            options = {"subfolder": subfolder, "revision": revision, "token": token}
            return Path(hf_hub_download(str(directory_or_id), name, **options))

        path = find(CONFIG_NAME)
        if local.is_dir() and not path.is_file():
            raise ValueError(f"`{path.parent}` holds no {CONFIG_NAME}.")
        values = read_json(path, f"`{path}`")
        if isinstance(values.get("patterns"), str):
            values["patterns"] = PatternTable.load(find(TABLE_NAME)).to_dict()
        return cls.from_dict(values)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload BLADE configuration",
    ) -> str:
        """Upload the configuration to a Hugging Face Hub repository, made if missing, and return the commit's URL."""
        # not by a mixin: huggingface_hub's sets an attribute of the instance, which is frozen, and Diffusers' uploads
        # a model card of its own along with it
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
        return str(commit.commit_url)


def parse_dense_steps(value: int | float) -> int | float:
    """Return `dense_steps` as an integer count, or as a float fraction below 1.

    Raises:
        ValueError: if it is negative, or above 1 and no whole number.
    """
    if not is_number(value) or value < 0 or (value > 1 and value != int(value)):
        raise ValueError(f"`dense_steps` must be a count of steps or a fraction in [0, 1), got {shortened(value)}.")
    if value > MOST_STEPS:
        raise ValueError(f"`dense_steps` must be at most {MOST_STEPS:,}, got {shortened(value)}.")
    return value if 0 < value < 1 else int(value)


def parse_dense_layers(value: str | int | Iterable[int]) -> tuple[int, ...]:
    """Return `dense_layers` as ascending layer numbers.

    Args:
        value: layer numbers, or a string of numbers and ranges (both ends included) such as "0-1,39".

    Raises:
        ValueError: if something in it is no layer number.
    """
    wanted = f'layer numbers from 0 to {MOST_LAYERS - 1:,}, or a string such as "0-1,39"'
    problem = f"`dense_layers` must be {wanted}, got {shortened(value)}."
    layers: set[int] = set()
    if isinstance(value, str):
        for layer_range in parse_ranges(value, problem):
            if layer_range.stop > MOST_LAYERS:
                raise ValueError(problem)
            layers.update(layer_range)
        return tuple(sorted(layers))
    values = [value] if isinstance(value, int) else value
    if not isinstance(values, Iterable):
        raise ValueError(problem)
    for layer in values:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < MOST_LAYERS:
            raise ValueError(problem)
        layers.add(layer)
    return tuple(sorted(layers))


def _known(cls: type, values: Any, prefix: str) -> dict[str, Any]:
    """Return the fields of a class that a JSON object holds, with a warning of others."""
    if not isinstance(values, Mapping):
        name = prefix.rstrip(".") or "blade_config"
        raise ValueError(f"`{name}` must be a JSON object, got {shortened(values)}.")
    names = {item.name for item in fields(cls)}
    unknown = sorted(str(name) for name in set(values) - names)
    if unknown:
        listed = ", ".join(f"`{prefix}{name}`" for name in unknown)
        warnings.warn(f"Ignored unknown keys of a BLADE configuration: {listed}.", UserWarning, stacklevel=3)
    return {name: value for name, value in values.items() if name in names}
