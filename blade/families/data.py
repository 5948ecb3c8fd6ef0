"""The data of a model family: presets, released students, sizes, protocols; a YAML file beside its adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from blade.families.kinds import PRESET_KINDS, PresetKind
from blade.token_grid import TokenGrid


@dataclass(frozen=True, kw_only=True)
class ReleasedStudent:
    """A published student that is no folder of this project, and what it needs beside its weights."""

    source: str
    """Hub id."""
    about: str
    """Title for lists."""
    evidence: str
    """Source of steps, times and guidance."""
    fits: Mapping[str, Any] = field(default_factory=dict)
    """Values of the configuration of the transformers that it is for, their class as `class` and their number as
    `transformers`; of a list, one."""
    preset: str | None = None
    """Name of the student preset of its attention, which its model's preset has too; None: it was trained dense."""
    folder_word: str | None = None
    """A word of the subfolder that holds it, where its files are not known."""
    files: tuple[str, ...] = ()
    """Paths of its files in the repository, one for each transformer."""
    steps: tuple[int, ...] = ()
    """Numbers of steps that it was trained for."""
    guidance_scale: float = 1.0
    """Weight of guidance that it was trained for: 1 is none."""
    scheduler: str = ""
    """Class of its sampler: of Diffusers, or `FewStepScheduler`."""
    scheduler_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the sampler over the configuration of the model's own scheduler; of a `FewStepScheduler` its `times`,
    the `flow_shift` that they are to get, and `noise_kept`."""
    refused: str | None = None
    """Reason why it cannot be used, with the remedy; a clause."""

    def suits(self, facts: Mapping[str, Any], preset: str) -> bool:
        """Return whether it is for a model.

        Args:
            facts: the configuration of the model's first transformer, with `class` and `transformers`.
            preset: name of the model's preset.
        """
        if self.preset is not None and self.preset != preset:
            return False
        wanted = {name: value if isinstance(value, list) else [value] for name, value in self.fits.items()}
        return all(facts.get(name) in values for name, values in wanted.items())


@dataclass(frozen=True, kw_only=True)
class BenchmarkLayer:
    """The size of a self-attention layer of a published model, for benchmarks."""

    title: str
    """The model and its resolution."""
    grid: TokenGrid
    """Tokens of one video."""
    heads: int
    """Attention heads."""
    head_dim: int = 128
    """Numbers in one head of one token."""
    reference: bool = False
    """True for the one size that cards are measured at first, and tuned for."""


@dataclass(frozen=True, kw_only=True)
class PromptSuite:
    """A selection of a published file's prompts. The prompts themselves are not part of BLADE."""

    name: str
    """Name of the selection, for messages."""
    license: str
    """Licence of the file."""
    address: str
    """Address of the file at a fixed commit: one prompt a line."""
    every: int
    """Every n-th prompt is taken, from the first."""
    count: int
    """Prompts taken."""
    sha256: str
    """SHA-256 of the selected prompts, joined by newlines."""

    def select(self, texts: Sequence[str]) -> tuple[str, ...] | None:
        """Return the selection out of the prompts of the file, or of the selection itself; None of any others.

        Args:
            texts: prompts, each once.
        """
        for selected in (tuple(texts[:: self.every][: self.count]), tuple(texts)):
            if hashlib.sha256("\n".join(selected).encode()).hexdigest() == self.sha256:
                return selected
        return None


VBENCH = PromptSuite(
    name="20 prompts of VBench (every 47th of all_dimension.txt)",
    license="Apache-2.0",
    address="https://raw.githubusercontent.com/Vchitect/VBench/45e79ec14e69a2187202c675d2dbce1a71843d53/prompts/"
    "all_dimension.txt",
    every=47,  # 944 different prompts // 20, so that they are spread over the whole file
    count=20,
    sha256="e236fa0716e548038e641ba03d6da40a5a3deb18837733063119aa8b6d187185",
)
"""Prompts that most comparisons of sparse attention draw from. Source: VBench, arXiv 2311.17982."""


@dataclass(frozen=True, kw_only=True)
class ComparisonProtocol:
    """How sparse attention is compared with dense on one model, so that figures of different cards go together.

    The defaults are what publications agree on, or are nearest to: 50 steps, bfloat16, no dense layers, and 0, 20 and
    30 % of the steps dense at the start, on which similarity to dense depends more than on the method. Source: the
    evaluations of Sparse VideoGen 2 (arXiv 2505.18875; 30 %), SVOO (2603.18636; 20 %) and AdaSpa (2502.21079; 20 %).
    """

    name: str
    """Value of `blade-evaluate --protocol`."""
    model: str
    """Hub id."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    frames: int
    """Number of frames."""
    guidance_scale: float
    """Official guidance scale."""
    steps: int = 50
    """Denoising steps."""
    dtype: str = "bfloat16"
    """Dtype of the transformer and the text encoder."""
    vae_tiling: bool = False
    """Decode in tiles, where a whole video does not fit a card."""
    seeds: str = "0-4"
    """Seeds of the noise, each with every prompt."""
    dense_steps: tuple[float, ...] = (0, 0.2, 0.3)
    """Settings of dense steps from the start, as fractions of all steps; a sparse run for each."""
    dense_layers: tuple[int, ...] = ()
    """Layers that stay dense in sparse runs."""
    prompts: PromptSuite = VBENCH
    """Prompts."""


@dataclass(frozen=True, kw_only=True)
class SupportedModel:
    """A transformer class that a family supports, as the table of models shows it."""

    title: str
    """The models that are of this class."""
    tasks: str
    """Inputs that videos are made from."""
    pipelines: tuple[str, ...]
    """Pipeline classes of Diffusers that work."""
    tested: tuple[str, ...]
    """Those of `pipelines` of which the tests make whole small ones, with a video."""
    instances: tuple[str, ...]
    """Names of its small instances in the tests that all families pass."""
    presets: tuple[str, ...]
    """Presets that suit one or the other checkpoint."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Pipeline classes that take this transformer and do not work with BLADE, with the reason."""
    limits: str = ""
    """Limits: features that do not work, or differently than one would expect."""

    def __post_init__(self) -> None:
        for name in ("pipelines", "tested", "instances", "presets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not set(self.tested) <= set(self.pipelines):
            raise ValueError(f"`tested` must be of the pipelines {self.pipelines}, got {self.tested}.")


@dataclass(frozen=True, kw_only=True)
class FamilyData:
    """Everything about a model family that is data."""

    example_model: str | None = None
    """Hub id of a published pipeline, named in messages."""
    models: Mapping[str, SupportedModel] = field(default_factory=dict)
    """By transformer class, the rows of the table of models."""
    presets: Mapping[PresetKind, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """By kind and name, the values of a `BladeConfig` as plain JSON values."""
    released_students: tuple[ReleasedStudent, ...] = ()
    """Published students."""
    benchmark_layers: Mapping[str, BenchmarkLayer] = field(default_factory=dict)
    """Sizes by name."""
    protocols: Mapping[str, ComparisonProtocol] = field(default_factory=dict)
    """Protocols of comparisons by name."""
    configurations: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """By Hub id, what the configuration files of a published pipeline say: `model_index` and each part's."""
    magnitude_ratios: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """By preset, the ratios of magnitudes that MagCache skips by, one for each step of a run."""
    ddim_scheduler: str | None = None
    """Diffusers' deterministic sampler of this family's v-prediction models."""

    @classmethod
    def from_yaml(cls, path: str | Path) -> FamilyData:
        """Read a family's data.

        Args:
            path: a YAML file with the fields of this class. `presets` holds one mapping of names for each kind,
                `released_students` a list for each Hub id, `models` a mapping of transformer classes to the fields of
                `SupportedModel`, `benchmark_layers` a mapping of names whose `grid` has the
                fields of `TokenGrid`, `protocols` a mapping of names to the other fields of `ComparisonProtocol`. Keys
                that begin with a dot are ignored, so that they can hold shared values.

        Raises:
            ValueError: if the file has a field that does not exist, or lacks one that must be there.
        """
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        values = {name: value for name, value in values.items() if not name.startswith(".")}
        unknown = sorted(set(values) - {item.name for item in fields(cls)})
        if unknown:
            raise ValueError(f"`{path}` must hold fields of FamilyData, got {unknown[0]!r}.")
        presets = values.get("presets", {})
        if not set(presets) <= set(PRESET_KINDS):
            raise ValueError(
                f"`presets` of {path} must be of the kinds {', '.join(PRESET_KINDS)}, got {list(presets)}."
            )
        try:
            students = tuple(
                _released_student(source, student)
                for source, listed in values.pop("released_students", {}).items()
                for student in listed
            )
            models = {name: SupportedModel(**model) for name, model in values.pop("models", {}).items()}
            layers = {
                name: BenchmarkLayer(**{**layer, "grid": TokenGrid(**layer["grid"])})
                for name, layer in values.pop("benchmark_layers", {}).items()
            }
            protocols = {
                name: ComparisonProtocol(name=name, **settings)
                for name, settings in values.pop("protocols", {}).items()
            }
        except (TypeError, KeyError) as error:
            raise ValueError(f"`{path}` has an entry with a wrong or missing field: {error}.") from error
        return cls(models=models, released_students=students, benchmark_layers=layers, protocols=protocols, **values)


def _released_student(source: str, values: Mapping[str, Any]) -> ReleasedStudent:
    """Return the student of one entry, whose `scheduler` holds a `class` and options."""
    options = dict(values.get("scheduler", {}))
    settings = {**values, "scheduler": options.pop("class") if options else "", "scheduler_options": options}
    settings |= {name: tuple(values.get(name, ())) for name in ("steps", "files")}
    if not settings["scheduler"] and "refused" not in values:
        raise KeyError("scheduler")
    return ReleasedStudent(source=source, **settings)
