"""The functions of the public surface explain themselves by an example that works."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import pytest

import blade
from blade.models.loading import load_model

FUNCTIONS = [getattr(blade, name) for name in blade.__all__ if inspect.isfunction(getattr(blade, name))]

UPLOADS = ("push_student",)
"""Functions whose example needs an account."""


def example_of(function: Any) -> str:
    """Return the code of a function's example."""
    (code,) = re.findall(r"Example:\n\s+```python\n(.*?)\n\s+```", inspect.getdoc(function) or "", re.DOTALL)
    return textwrap.dedent(code)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_example_of_a_function_works(function: Any) -> None:
    code = compile(example_of(function), function.__name__, "exec")
    assert f"{function.__name__}(" in example_of(function)
    if function.__name__ not in UPLOADS:
        pipe = load_model().pipe if "pipe" in code.co_names else None
        exec(code, {"pipe": pipe})
