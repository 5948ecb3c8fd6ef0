"""Docstrings of fields: read from a class's source, and shown by `help`."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import TypeVar

Class = TypeVar("Class", bound=type)


def field_docstrings(cls: type) -> dict[str, str]:
    """Return the docstrings under the fields of a class's own, by field.

    Raises:
        OSError: if the class's source is not there.
        TypeError: if it has none.
    """
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    return {
        item.target.id: inspect.cleandoc(str(ast.literal_eval(following.value)))
        for item, following in zip(tree.body, tree.body[1:])
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and isinstance(following, ast.Expr)
    }


def documented(cls: Class) -> Class:
    """Add the docstrings under a dataclass's fields to its own, where `help` shows them; a decorator."""
    try:
        texts = field_docstrings(cls)
    except (OSError, TypeError):  # a package without sources
        return cls
    lines = [f"{name}: {' '.join(text.split())}" for name, text in texts.items()]
    wrapped = [
        textwrap.fill(line, width=100, initial_indent=" " * 4, subsequent_indent=" " * 8, break_on_hyphens=False)
        for line in lines
    ]
    cls.__doc__ = "\n".join([f"{inspect.cleandoc(cls.__doc__ or '')}\n", "Args:", *wrapped])
    return cls
