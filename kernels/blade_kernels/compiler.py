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


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function run as plain Python; inside a graph it is a break."""
    marked: Callable[P, R] = torch.compiler.disable(function)
    return marked
