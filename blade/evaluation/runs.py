"""The runs that an evaluation compares: different ways to generate the same videos."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from blade.attention.config import BladeConfig, parse_dense_layers, parse_dense_steps
from blade.attention.selectors import DEFAULT_SELECTOR, find_selector, has_selector, selector_names
from blade.common.checks import MOST_STEPS, check_choice, check_integer, check_number, meant
from blade.common.names import is_portable
from blade.families.kinds import PRESET_KINDS, PresetKind
from blade.generation.request import read_config
from blade.models.choices import parse_lora
from blade.students.source import student_settings

NAME_BYTES = 100
"""Most bytes of a run's name, which is that of its folders."""

POOLED_TOKENS: dict[str, Literal["none", "all", "dropped"]] = {
    "asa": "none",
    "asa-gt": "all",
    "asa-dropped": "dropped",
}
"""Pooled tokens in addition to the kept blocks, by kind of attention with the paper's selector."""

PAPER_SCORES: dict[str, Any] = {
    "statistic": "max", "probe_keys": "drawn", "value_weighting": False, "budget": "row",
}  # fmt: skip
"""The paper's values of the fields of `AdaptiveConfig` that the presets have others of, whatever is pooled."""

ATTENTION = ("dense", "preset", *POOLED_TOKENS)
"""Kinds of attention, in addition to those named like a selector: dense, the model's preset, and the preset with the
paper's selector and other pooled tokens."""


def attention_kinds() -> tuple[str, ...]:
    """Return all kinds of attention; a selector's name means ASA with that selector, without pooled tokens."""
    return tuple(dict.fromkeys((*ATTENTION, *(name for name in selector_names() if name != DEFAULT_SELECTOR))))


def is_attention_kind(name: str) -> bool:
    """Return whether a name is one of `attention_kinds`."""
    return name in ATTENTION or (name != DEFAULT_SELECTOR and has_selector(name))


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One way to generate the same videos."""

    name: str
    """Name in tables and folders: letters, digits, dots, underscores and hyphens."""
    steps: int | None = None
    """Denoising steps; None takes the model's default."""
    guidance: float | None = None
    """Guidance scale, where at most 1 means no guidance; None takes the model's default."""
    attention: str | None = None
    """One of `attention_kinds`; None takes "preset" with `preset`, that of `config`, of `student`, or of `selector`,
    and otherwise "dense"."""
    preset: PresetKind | None = None
    """Kind of the model's preset; None takes `few-step` with a student that brings no sparse attention, and otherwise
    `training-free`."""
    config: str | None = None
    """A folder, file or Hub id that holds a BLADE configuration."""
    student: str | None = None
    """A folder or Hub id of a few-step student, whose steps, guidance and attention are the defaults."""
    noise_kept: float | None = None
    """Share of the noise that the student's steps keep; None takes the student's value."""
    lora: str | None = None
    """A LoRA: a source, or FIRST:SECOND for two transformers, with =STRENGTH or =STRENGTH:STRENGTH, or without."""
    selector: str | None = None
    """A name of `blade.attention.selectors.SELECTORS`, which scores key blocks; None takes the configuration's. By
    itself or with "asa", it becomes the kind of attention of that name."""
    sparsity: float | None = None
    """Requested sparsity in [0, 1); None takes the configuration's."""
    dense_steps: int | float | None = None
    """Number of dense steps, or a fraction below 1; None takes the configuration's."""
    dense_layers: tuple[int, ...] | None = None
    """Layers that stay dense; None takes the configuration's."""
    precision: Literal["full", "int8", "fp8"] | None = None
    """Type in which queries and keys are multiplied; None takes the configuration's."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"`name` must be of letters, digits, dots, underscores and hyphens, got {self.name!r}.")
        if not is_portable(self.name) or len(self.name.encode()) > NAME_BYTES:
            raise ValueError(
                f"`name` must be a folder's name on every system, of at most {NAME_BYTES} bytes, got {self.name!r}."
            )
        self._name_preset()
        if self.attention is None and self.config is None and self.student is None:
            object.__setattr__(self, "attention", "dense" if self.selector is None else "asa")
        if self.attention is not None and self.config is not None:
            raise ValueError(f"`attention` must not be given with `config`, got {self.attention!r}.")
        if self.attention is not None and not is_attention_kind(self.attention):
            check_choice("attention", self.attention, attention_kinds())
        self._name_selector()
        if self.steps is not None:
            check_integer("steps", self.steps, least=1, most=MOST_STEPS)
        if self.guidance is not None:
            check_number("guidance", self.guidance, "at least 0", lambda x: x >= 0)
        if self.noise_kept is not None and self.student is None:
            raise ValueError("`noise_kept` must not be given without `student`.")
        if self.lora is not None:
            parse_lora(self.lora)
        changes = self._changes()
        if self.is_dense and changes:
            raise ValueError(f'`{next(iter(changes))}` must not be given where `attention` is "dense".')
        BladeConfig(**{name: value for name, value in changes.items() if name != "selector"})

    def _name_preset(self) -> None:
        """Check the kind of preset, and let it become the attention where there is no other."""
        if self.preset is None:
            return
        check_choice("preset", self.preset, PRESET_KINDS)
        if self.config is not None or self.is_dense:
            other = "`config`" if self.config is not None else '`attention` "dense"'
            raise ValueError(f"`preset` must not be given with {other}, got {self.preset!r}.")
        if self.attention is None:
            object.__setattr__(self, "attention", "preset")

    def _name_selector(self) -> None:
        """Check the selector, and let a selector by itself become the kind of attention of that name."""
        if self.selector is None:
            return
        find_selector(self.selector)
        if self.attention is not None and self.attention not in ATTENTION:
            raise ValueError(f"`selector` must not be given where `attention` is one, got {self.attention!r}.")
        if self.attention == "asa" and self.selector not in ATTENTION:
            object.__setattr__(self, "attention", "asa" if self.selector == DEFAULT_SELECTOR else self.selector)
            object.__setattr__(self, "selector", None)

    @property
    def is_dense(self) -> bool:
        """True if every layer is dense in every step."""
        return self.attention == "dense"

    def is_reference_of(self, other: RunSettings) -> bool:
        """Return whether this is `other` with dense attention."""
        settings, other_settings = (
            (run.steps, run.guidance, run.student, run.noise_kept, run.lora) for run in (self, other)
        )
        return self.is_dense and settings == other_settings

    def blade_config(self, preset: Callable[[], BladeConfig]) -> BladeConfig | None:
        """Return the configuration to apply; None for dense attention.

        Args:
            preset: Returns the model's preset; called only if it is needed.

        Raises:
            ValueError: If `config` names no configuration, or its values contradict the run's.
        """
        if self.attention == "dense":
            return None
        if self.config is not None:
            config = read_config(self.config)
        elif self.attention is None:
            assert self.student is not None
            config = student_settings(self.student).config or BladeConfig(attention="dense")
        else:
            config = preset()
            if self.attention != "preset":
                selector = DEFAULT_SELECTOR if self.attention in POOLED_TOKENS else self.attention
                pooled_tokens = POOLED_TOKENS.get(self.attention, "none")
                details = replace(config.asa, selector=selector, **PAPER_SCORES)
                config = replace(config, attention="asa", pooled_tokens=pooled_tokens, asa=details)
        changes = self._changes()
        if "selector" in changes:
            changes["asa"] = replace(config.asa, selector=changes.pop("selector"))
        config = replace(config, **changes)
        return None if config.attention == "dense" else config

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = asdict(self)
        values["dense_layers"] = None if self.dense_layers is None else list(self.dense_layers)
        return values

    def _changes(self) -> dict[str, Any]:
        """Return the changes to the configuration that the run asks for."""
        names = ("selector", "sparsity", "dense_steps", "dense_layers", "precision")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


READERS: dict[str, Callable[[str], Any]] = {
    "steps": int,
    "guidance": float,
    "attention": str,
    "preset": str,
    "config": str,
    "student": str,
    "noise_kept": float,
    "lora": str,
    "selector": str,
    "sparsity": float,
    "dense_steps": lambda value: parse_dense_steps(float(value)),
    "precision": str,
    "dense_layers": lambda value: () if value == "none" else parse_dense_layers(value.replace("+", ",")),
}
"""Parsers of the values in a run's description, by key."""


def parse_run(text: str, *, steps: int | None = None, guidance: float | None = None) -> RunSettings:
    """Read a run's description: `NAME=WHAT`, `NAME=WHAT,KEY=VALUE,...` or `NAME=KEY=VALUE,...`.

    WHAT is one of `attention_kinds`, or a folder or Hub id with a BLADE configuration. A run named like its attention
    needs only the name. The keys are the fields of `RunSettings`; several dense layers are joined by `+`, and `none`
    means no dense layers. Examples: `dense`, `found=profiles/wan`,
    `asa-70=asa,steps=30,sparsity=0.7,dense_layers=0-1+5`, `near=selector=local`.

    Args:
        text: The description.
        steps: Steps if the description names none.
        guidance: Guidance scale if the description names none.

    Raises:
        ValueError: If the text has another form, or a value is out of range.
    """
    name, equals, description = text.partition("=")
    if not equals and is_attention_kind(name):
        description = name
    first, *others = description.split(",")
    is_path = first.partition("=")[0] not in READERS and Path(first).expanduser().exists()
    if first and ("=" not in first or is_path):
        first = f"attention={first}" if is_attention_kind(first) else f"config={first}"
    values: dict[str, Any] = {"steps": steps, "guidance": guidance}
    keys = set[str]()
    for part in (first, *others):
        key, equals, value = part.partition("=")
        if key not in READERS or not equals or not value:
            raise ValueError(
                f"`run` must be NAME=dense, NAME=preset, NAME=DIR, NAME=student=DIR or NAME=KEY=VALUE,... with keys "
                f"{', '.join(READERS)}, got {part!r} in {text!r}"
                f"{meant(key, READERS) if equals else '.'}"
            )
        if key in keys:
            raise ValueError(f"`run` must give `{key}` once, got {text!r}.")
        keys.add(key)
        try:
            values[key] = READERS[key](value)
        except ValueError as error:
            raise ValueError(f"`run` {text!r}: `{key}` cannot be {value!r}: {error}") from error
    return RunSettings(name=name, **values)


def selector_notes(configs: Iterable[dict[str, Any] | None]) -> list[str]:
    """Return a paragraph that explains the selectors of configurations; none if only the paper's is used.

    Args:
        configs: Configurations of the report's runs as plain JSON values; None for dense runs.
    """
    names = {config["asa"]["selector"]: None for config in configs if config is not None}
    descriptions = [_selector_words(name) for name in names if name != DEFAULT_SELECTOR]
    return [f"Key blocks are scored: {'; '.join(descriptions)}."] if descriptions else []


def _selector_words(name: str) -> str:
    selector = find_selector(name)
    control = " (a control, which looks at neither queries nor keys)" if selector.is_control else ""
    return f"{name} by {selector.description}{control}"
