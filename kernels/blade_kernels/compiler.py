"""Typed decorators of PyTorch's compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def constant_when_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Make the compiler call a function once, while tracing, and treat the result as a constant."""
    marked: Callable[P, R] = torch.compiler.assume_constant_result(function)
    return marked
