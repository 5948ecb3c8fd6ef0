"""What `blade-evaluate --shapes` compares: settings of a run, and the fixed list of held-out prompts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from blade.config import BladeConfig, parse_dense_layers, parse_dense_steps
from blade.generation_request import BUNDLED_DEFAULTS
from blade.moving_shapes.captions import sample_caption

ATTENTION: dict[str, dict[str, Any]] = {
    "dense": {},
    "asa": {"selector": "sampled", "pooled_tokens": "none"},
    "asa-gt": {"selector": "sampled", "pooled_tokens": "all"},
    "asa-dropped": {"selector": "sampled", "pooled_tokens": "dropped"},
    "mean-pooled": {"selector": "mean-pooled", "pooled_tokens": "none"},
    "random": {"selector": "random", "pooled_tokens": "none"},
    "local": {"selector": "local", "pooled_tokens": "none"},
}
"""Kinds of attention by name: how key blocks are selected, and which pooled tokens stand beside them."""

PROMPT_SEED = 20250
"""Seed of the fixed list of prompts."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """One way to generate the same videos."""

    name: str
    """What it is called in tables: letters, digits, dots, underscores and hyphens."""
    steps: int = 30
    """Denoising steps."""
    guidance: float = BUNDLED_DEFAULTS["guidance_scale"]
    """Guidance scale; at most 1: no guidance."""
    attention: str = "dense"
    """A name of `ATTENTION`."""
    sparsity: float | None = None
    """Requested sparsity in [0, 1); None takes the preset's."""
    dense_steps: int | float | None = None
    """A count, or a fraction below 1; None takes the preset's."""
    dense_layers: tuple[int, ...] | None = None
    """Layers that stay dense; None takes the preset's."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"`name` must be of letters, digits, dots, underscores and hyphens, got {self.name!r}.")
        if self.attention not in ATTENTION:
            raise ValueError(f"`attention` must be one of {', '.join(ATTENTION)}, got {self.attention!r}.")
        if self.steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {self.steps}.")
        if not self.guidance >= 0:
            raise ValueError(f"`guidance` must be at least 0, got {self.guidance}.")
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
        return self.is_dense and (self.steps, self.guidance) == (other.steps, other.guidance)

    def blade_config(self, preset: BladeConfig) -> BladeConfig | None:
        """The configuration to apply, None for dense.

        Args:
            preset: What to start from.
        """
        if self.is_dense:
            return None
        kind = ATTENTION[self.attention]
        details = replace(preset.asa, selector=kind["selector"])
        return replace(preset, attention="asa", pooled_tokens=kind["pooled_tokens"], asa=details, **self._given())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        values["dense_layers"] = None if self.dense_layers is None else list(self.dense_layers)
        return values

    def _given(self) -> dict[str, Any]:
        names = ("sparsity", "dense_steps", "dense_layers")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def parse_run(text: str) -> RunSettings:
    """Read `NAME=KEY=VALUE,KEY=VALUE,...`, such as `asa-70=steps=30,guidance=4,attention=asa,sparsity=0.7`.

    The keys are the fields of `RunSettings`; several dense layers are joined by `+`, as in `dense_layers=0-1+5`.

    Raises:
        ValueError: If the text does not read like that, or a value is out of range.
    """
    readers: dict[str, Callable[[str], Any]] = {
        "steps": int,
        "guidance": float,
        "attention": str,
        "sparsity": float,
        "dense_steps": lambda value: parse_dense_steps(float(value)),
        "dense_layers": lambda value: parse_dense_layers(value.replace("+", ",")),
    }
    name, _, rest = text.partition("=")
    values: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if key not in readers or not equals:
            raise ValueError(
                f"`run` must be NAME=KEY=VALUE,... with keys {', '.join(readers)}, got {part!r} in {text!r}."
            )
        try:
            values[key] = readers[key](value)
        except ValueError as error:
            raise ValueError(f"`run` {text!r}: `{key}` cannot be {value!r}: {error}") from error
    return RunSettings(name=name, **values)


@dataclass(frozen=True, kw_only=True)
class ShapesPrompt:
    """One prompt of the fixed list."""

    text: str
    objects: int
    """1 or 2."""
    seed: int
    """Seed of the noise: its place in the list of its kind, so that none is chosen."""

    @property
    def key(self) -> tuple[int, int]:
        """What it is known by: objects and seed."""
        return (self.objects, self.seed)


def held_out_prompts(single: int = 64, two: int = 64) -> tuple[ShapesPrompt, ...]:
    """The first prompts of the fixed lists, of combinations that no training caption names.

    Args:
        single: How many with one object.
        two: How many with two objects.

    Raises:
        ValueError: If a number is negative, or there is no prompt.
    """
    if min(single, two) < 0 or single + two == 0:
        raise ValueError(f"`single` and `two` must be at least 0 and not both 0, got {single} and {two}.")
    prompts = []
    for objects, count in ((1, single), (2, two)):
        rng = np.random.default_rng([PROMPT_SEED, objects])
        for seed in range(count):
            caption = sample_caption(rng, objects=objects, held_out=True)
            prompts.append(ShapesPrompt(text=str(caption), objects=objects, seed=seed))
    return tuple(prompts)
