"""Options declared once: fields of dataclasses that carry their help, their choices and what they do.

A group of options is a dataclass; its fields are made by `option`, and the docstring under each is its help. Imports
nothing heavy, so that a command's help does not wait for PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from typing import Any, ClassVar, TypeVar, get_type_hints

from blade.common.documented import field_docstrings
from blade.common.fields import check_types


def option(
    default: Any = None,
    *,
    help: str | None = None,
    flag: str | None = None,
    old_flags: Sequence[str] = (),
    choices: Sequence[str] = (),
    settled_by_student: bool = False,
    of_student: bool = False,
    of_model: bool = False,
    prepare: str | None = None,
) -> Any:
    """Declare an option: a field of a group, whose docstring is its help.

    Args:
        default: the value where it is not given.
        help: its help, where there is no docstring: in a group that is made of a table.
        flag: its name on the command line; None takes the field's.
        old_flags: former names, which the command line still accepts.
        choices: the values that there are, for checks and completion.
        settled_by_student: whether it says how a model itself is sampled, which a student has settled.
        of_student: whether it belongs to a student, and is forgotten with it.
        of_model: whether it makes sense for some models only, and is forgotten with the model.
        prepare: "module:function" that is called with the loaded model and the value, where there is one, once the
            model is loaded; in the order of the fields.
    """
    metadata = {
        "help": help,
        "flag": flag,
        "old_flags": tuple(old_flags),
        "choices": tuple(choices),
        "settled_by_student": settled_by_student,
        "of_student": of_student,
        "of_model": of_model,
        "prepare": prepare,
    }
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class OptionGroup:
    """Options that belong together."""

    title: ClassVar[str] = ""
    """Heading in a command's help."""

    def __post_init__(self) -> None:
        self.check()
        check_types(self)

    def check(self) -> None:
        """Raise a `ValueError` for a value that makes no sense by itself or beside the others of the group."""


Group = TypeVar("Group", bound=OptionGroup)


def option_names(*groups: type[OptionGroup], **metadata: bool) -> tuple[str, ...]:
    """Return the names of the options of groups.

    Args:
        groups: the groups.
        metadata: what else must hold, such as `of_student=True`.
    """
    return tuple(
        item.name
        for group in groups
        for item in fields(group)
        if all(item.metadata.get(name) == value for name, value in metadata.items())
    )


def read_group(group: type[Group], given: Mapping[str, Any]) -> Group:
    """Make a group of those of the given options that are its own.

    Args:
        group: the group.
        given: values by the names of options, of other groups too.
    """
    return group(**{name: given[name] for name in option_names(group) if name in given})


def option_help(group: type[OptionGroup]) -> dict[str, str]:
    """Return the help of every option of a group, its docstring, in one line."""
    given = {item.name: item.metadata.get("help") for item in fields(group)}
    if all(given.values()):
        return {name: str(text) for name, text in given.items()}
    return {name: " ".join(text.split()) for name, text in field_docstrings(group).items()}


def option_types(group: type[OptionGroup]) -> dict[str, Any]:
    """Return the type of every option of a group."""
    hints = get_type_hints(group)
    return {item.name: hints[item.name] for item in fields(group)}


def prepare_options(model: Any, group: OptionGroup) -> None:
    """Call what the given options of a group do to a loaded model, in the order of the fields.

    Args:
        model: the loaded model.
        group: the options, or a request.
    """
    for item in fields(group):
        value, prepare = getattr(group, item.name), item.metadata.get("prepare")
        if prepare is None or value is None or value is False:
            continue
        module, _, name = prepare.partition(":")
        function = getattr(import_module(module), name)
        function(model) if value is True else function(model, value)


def option_choices(group: type[OptionGroup], name: str) -> tuple[str, ...]:
    """Return the values that an option may have; none: any."""
    return next(item.metadata["choices"] for item in fields(group) if item.name == name)
