"""Command lines made from groups of options: flags, types, help, headings and completion are read off their fields."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import typer

from blade.common.options import OptionGroup, option_help, option_types

PLACED = "placed"
"""Name of the argument of a command that is given without a name."""

FIRST_TITLE = "Most used"
"""Heading of the options that stand first."""


def make_command(
    run: Callable[[dict[str, Any]], None],
    groups: Sequence[type[OptionGroup]],
    *,
    names: Sequence[str] | None = None,
    first: Sequence[str] = (),
    by_place: str | None = None,
) -> Callable[..., None]:
    """Return a function that Typer makes a command of.

    Args:
        run: called with the options that were given, by the names of their fields. Its docstring is the command's
            help.
        groups: the groups, in the order of the help.
        names: the options that the command has, out of those of the groups; None: all.
        first: options that stand first in the help, whatever their group.
        by_place: an option that can be given without its name too.

    Returns:
        A function of keyword arguments, all of them optional, so that what is needed is checked in one place.
    """
    parameters = {}
    for group in groups:
        helps, hints = option_help(group), option_types(group)
        for item in fields(group):
            if names is not None and item.name not in names:
                continue
            title = FIRST_TITLE if item.name in first else group.title
            parameters[item.name] = _parameter(item, hints[item.name], helps[item.name], title)

    def command(**values: Any) -> None:
        placed = values.pop(PLACED, None)
        given = {name: value for name, value in values.items() if value is not defaults[name] and value != []}
        if placed is not None and by_place is not None:
            if by_place in given:
                raise ValueError(f"`{by_place}` must be given once, got {placed!r} and {given[by_place]!r}.")
            given[by_place] = placed
        run({name: value.expanduser() if isinstance(value, Path) else value for name, value in given.items()})

    defaults = {name: parameter.default for name, parameter in parameters.items()}
    ordered = [*(parameters.pop(name) for name in first), *parameters.values()]
    if by_place is not None:
        text = f"The same as --{by_place}."
        place = typer.Argument(metavar=f"[{by_place.upper()}]", help=text, show_default=False)
        ordered.insert(0, _keyword(PLACED, Annotated[str | None, place], None))
    command.__doc__ = run.__doc__
    command.__name__ = run.__name__
    command.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    return command


def _parameter(item: Any, hint: Any, text: str, title: str) -> inspect.Parameter:
    """Return the keyword argument of an option."""
    kind = _command_type(hint)
    names = (item.metadata.get("flag") or item.name.replace("_", "-"), *item.metadata.get("old_flags", ()))
    choices = item.metadata.get("choices") or ()
    settings: dict[str, Any] = {"help": text, "show_default": False, "rich_help_panel": title}
    if choices:
        settings["autocompletion"] = lambda incomplete: [name for name in choices if name.startswith(incomplete)]
    is_flag = kind is bool and item.default is False
    default = False if is_flag else None
    annotation: Any = Annotated[
        kind if is_flag else kind | None, typer.Option(*(f"--{name}" for name in names), **settings)
    ]
    return _keyword(item.name, annotation, default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _command_type(hint: Any) -> Any:
    """Return the type that the command line reads for an option: the widest of those that it may have."""
    arguments = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if any(get_origin(argument) is tuple and get_args(argument)[:1] == (str,) for argument in arguments):
        return list[str]
    for kind in (bool, Path, float, int):
        if kind in arguments:
            return kind
    return str
