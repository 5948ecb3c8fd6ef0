"""Recipes: configurations of distillations, read from YAML and `key=value`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

from blade.common.checks import is_integer, meant, shortened
from blade.common.errors import first_line
from blade.common.fields import check_type, has_type
from blade.distillation.config import DistillationConfig

RECIPES = "recipes"
"""Folder of the package with the recipes."""

MOST_RECIPE_BYTES = 2**20
"""Bytes of the largest recipe that is read."""

MOST_LEVELS = 20
"""Most levels of lists and mappings in each other in a recipe; its fields have three."""

FIELD = re.compile(r"\$\{[\w.\[\]-]+\}")
"""A value that is another field's."""


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes that ship with the package."""
    folder = files("blade") / RECIPES
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def load_config(source: str | Path | None = None, overrides: Sequence[str] = ()) -> DistillationConfig:
    """Read a configuration.

    Args:
        source: a YAML file, or the name of a recipe; None: the defaults.
        overrides: `key=value`, such as `trajectory.steps=[4,8]`, which override the file.

    Raises:
        ValueError: if the file does not exist, or a key or a value is invalid. A value may name another field, as in
            `${video.frames}`, but no resolver: what it reads, such as an environment variable, would go into the
            student's files.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        given = [] if source is None else [OmegaConf.create(_read_recipe(_find(source)))]
        for override in overrides:
            if "=" not in override:
                raise ValueError(f"Overrides of the configuration must be `key=value`, got {override!r}.")
        given.append(OmegaConf.from_dotlist(list(overrides)))
        for layer in given:
            values = OmegaConf.to_container(layer, resolve=False)
            _check_sections(values)
            _check_interpolations(values)
            _check_given(DistillationConfig, values)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DistillationConfig), *given))
    except (OmegaConfBaseException, YAMLError, OSError, TypeError, AssertionError, OverflowError) as error:
        reason = getattr(error, "problem", None) or first_line(error)  # YAML says first in what it is
        key = getattr(error, "full_key", None)
        subject = f"`{key}`" if key else f"the configuration {source}"
        raise ValueError(f"{subject} is not right: {reason}") from error
    assert isinstance(config, DistillationConfig)
    return config


def _read_recipe(path: Path) -> Any:
    """Read a YAML file of few levels, without the aliases by which a short one stands for a huge one."""
    import yaml

    with path.open("rb") as file:
        text = file.read(MOST_RECIPE_BYTES + 1)
    if len(text) > MOST_RECIPE_BYTES:
        raise ValueError(f"the configuration {path} must have at most {MOST_RECIPE_BYTES:,} bytes.")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_LEVELS or isinstance(event, yaml.AliasEvent):
            what = "aliases" if depth <= MOST_LEVELS else f"more than {MOST_LEVELS} levels"
            raise ValueError(
                f"the configuration {path} must have no {what}, got some in line {event.start_mark.line + 1}."
            )
    return text.decode()


def _check_sections(values: Any) -> None:
    """Refuse what is no mapping of fields, and a section that is none."""
    if not isinstance(values, Mapping):
        raise ValueError(f"`config` must hold a mapping of fields, got {shortened(values)}.")
    for item in fields(DistillationConfig):
        section = values.get(item.name, {})
        if is_dataclass(item.default_factory) and not isinstance(section, Mapping | str):
            raise ValueError(f"`{item.name}` must be a mapping of fields, got {shortened(section)}.")


def _check_given(cls: Any, values: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse values of another type than their field's, some of which OmegaConf converts: `false` to a file's name.

    Integers count as text, as in `attention.dense_layers=7`.
    """
    for name, hint in get_type_hints(cls).items():
        value = values.get(name)
        if is_dataclass(hint) and isinstance(value, Mapping):
            _check_given(hint, value, f"{prefix}{name}.")
        elif value is not None and "${" not in str(value) and not is_dataclass(hint):
            text = is_integer(value) and has_type("", hint)
            check_type(f"{prefix}{name}", str(value) if text else value, hint)


def _check_interpolations(value: Any, name: str = "the configuration") -> None:
    """Refuse every `${...}` in a value, and in what it holds, that does more than name another field."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_interpolations(item, str(key) if name == "the configuration" else f"{name}.{key}")
    elif isinstance(value, list):
        for item in value:
            _check_interpolations(item, name)
    elif value == "???":  # which would leave the default
        raise ValueError(f"`{name}` must have a value, got '???'.")
    elif isinstance(value, str) and "${" in FIELD.sub("", value):
        raise ValueError(f"`{name}` must name nothing but fields, as ${{video.frames}} does, got {value!r}.")


def _find(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if str(source) in recipe_names():
        return Path(str(files("blade") / RECIPES / f"{source}.yaml"))
    names = recipe_names()
    raise ValueError(
        f"The configuration must be a YAML file, or one of the recipes {', '.join(names)}, got {source}"
        f"{meant(str(source), names)}"
    )
