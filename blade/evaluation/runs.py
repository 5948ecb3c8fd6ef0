"""The runs that an evaluation compares: ways to generate the same videos."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from blade.attention.config import BladeConfig, parse_dense_layers, parse_dense_steps
from blade.generation.request import read_config
from blade.students.source import student_settings

ATTENTION: dict[str, dict[str, Any]] = {
    "dense": {},
    "preset": {},
    "asa": {"selector": "sampled", "pooled_tokens": "none"},
    "asa-gt": {"selector": "sampled", "pooled_tokens": "all"},
    "asa-dropped": {"selector": "sampled", "pooled_tokens": "dropped"},
    "mean-pooled": {"selector": "mean-pooled", "pooled_tokens": "none"},
    "random": {"selector": "random", "pooled_tokens": "none"},
    "local": {"selector": "local", "pooled_tokens": "none"},
}
"""Kinds of attention by name: none, the model's training-free preset, and changes to it, namely how key blocks are
selected and which pooled tokens stand beside them."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One way to generate the same videos."""

    name: str
    """What it is called in tables and files: letters, digits, dots, underscores and hyphens."""
    steps: int | None = None
    """Denoising steps; None takes the model's default."""
    guidance: float | None = None
    """Guidance scale, at most 1: no guidance; None takes the model's default."""
    attention: str | None = None
    """A name of `ATTENTION`; None is what `config` says, and "dense" without it."""
    config: str | None = None
    """A folder, file or Hub id that holds a BLADE configuration."""
    student: str | None = None
    """A folder or Hub id of a few-step student; steps, guidance and attention are its own where none are given."""
    noise_kept: float | None = None
    """Share of the noise that the student's steps keep; None takes its own."""
    sparsity: float | None = None
    """Requested sparsity in [0, 1); None takes the configuration's."""
    dense_steps: int | float | None = None
    """A count, or a fraction below 1; None takes the configuration's."""
    dense_layers: tuple[int, ...] | None = None
    """Layers that stay dense; None takes the configuration's."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"`name` must be of letters, digits, dots, underscores and hyphens, got {self.name!r}.")
        if self.attention is None and self.config is None and self.student is None:
            object.__setattr__(self, "attention", "dense")
        if self.attention is not None and self.config is not None:
            raise ValueError(f"`attention` must not be given with `config`, got {self.attention!r}.")
        if self.attention is not None and self.attention not in ATTENTION:
            raise ValueError(f"`attention` must be one of {', '.join(ATTENTION)}, got {self.attention!r}.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}.")
        if self.guidance is not None and not self.guidance >= 0:
            raise ValueError(f"`guidance` must be at least 0, got {self.guidance}.")
        if self.noise_kept is not None and self.student is None:
            raise ValueError("`noise_kept` must not be given without `student`.")
        given = self._given()
        if self.is_dense and given:
            raise ValueError(f'`{next(iter(given))}` must not be given where `attention` is "dense".')
        BladeConfig(**given)

    @property
    def is_dense(self) -> bool:
        """Whether every layer is dense in every step."""
        return self.attention == "dense"

    def is_reference_of(self, other: RunSettings) -> bool:
        """Whether this is `other` with dense attention."""
        own, its = ((run.steps, run.guidance, run.student, run.noise_kept) for run in (self, other))
        return self.is_dense and own == its

    def blade_config(self, preset: Callable[[], BladeConfig]) -> BladeConfig | None:
        """The configuration to apply, None for dense.

        Args:
            preset: The model's training-free preset, asked for where it is needed.

        Raises:
            ValueError: If `config` names none, or its values do not go together with the run's.
        """
        if self.attention == "dense":
            return None
        if self.config is not None:
            config = read_config(self.config)
        elif self.attention is None:
            assert self.student is not None
            config = student_settings(self.student).config or BladeConfig(attention="dense")
        else:
            assert self.attention is not None
            config, kind = preset(), ATTENTION[self.attention]
            if kind:
                details = replace(config.asa, selector=kind["selector"])
                config = replace(config, attention="asa", pooled_tokens=kind["pooled_tokens"], asa=details)
        config = replace(config, **self._given())
        return None if config.attention == "dense" else config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        values["dense_layers"] = None if self.dense_layers is None else list(self.dense_layers)
        return values

    def _given(self) -> dict[str, Any]:
        names = ("sparsity", "dense_steps", "dense_layers")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


READERS: dict[str, Callable[[str], Any]] = {
    "steps": int,
    "guidance": float,
    "attention": str,
    "config": str,
    "student": str,
    "noise_kept": float,
    "sparsity": float,
    "dense_steps": lambda value: parse_dense_steps(float(value)),
    "dense_layers": lambda value: () if value == "none" else parse_dense_layers(value.replace("+", ",")),
}
"""Keys of a run's description, and what reads their values."""


def parse_run(text: str, *, steps: int | None = None, guidance: float | None = None) -> RunSettings:
    """Read a run's description: `NAME=WHAT`, `NAME=WHAT,KEY=VALUE,...` or `NAME=KEY=VALUE,...`.

    WHAT is a name of `ATTENTION`, or a folder or Hub id with a BLADE configuration. Where a run is called as its
    attention, the name is enough. The keys are the fields of `RunSettings`; several dense layers are joined by `+`,
    and `none` are none. Examples: `dense`, `found=profiles/wan`,
    `asa-70=asa,steps=30,sparsity=0.7,dense_layers=0-1+5`.

    Args:
        text: The description.
        steps: Steps where it names none.
        guidance: Guidance scale where it names none.

    Raises:
        ValueError: If the text does not read like that, or a value is out of range.
    """
    name, equals, rest = text.partition("=")
    if not equals and name in ATTENTION:
        rest = name
    first, *others = rest.split(",")
    if first and "=" not in first:
        first = f"attention={first}" if first in ATTENTION else f"config={first}"
    values: dict[str, Any] = {"steps": steps, "guidance": guidance}
    seen = set[str]()
    for part in (first, *others):
        key, equals, value = part.partition("=")
        if key not in READERS or not equals or not value:
            raise ValueError(
                f"`run` must be NAME=dense, NAME=preset, NAME=DIR, NAME=student=DIR or NAME=KEY=VALUE,... with keys "
                f"{', '.join(READERS)}, got {part!r} in {text!r}."
            )
        if key in seen:
            raise ValueError(f"`run` must give `{key}` once, got {text!r}.")
        seen.add(key)
        try:
            values[key] = READERS[key](value)
        except ValueError as error:
            raise ValueError(f"`run` {text!r}: `{key}` cannot be {value!r}: {error}") from error
    return RunSettings(name=name, **values)
