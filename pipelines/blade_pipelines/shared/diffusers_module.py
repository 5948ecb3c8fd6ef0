"""Type of Diffusers' modules."""

from typing import Any

DiffusersModule = Any
"""A transformer of Diffusers, or a submodule of one.

`Any` rather than `nn.Module`, which types every attribute, even `config` or `heads`, as a tensor or a module.
"""
