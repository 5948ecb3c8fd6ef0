"""The type of Diffusers' modules."""

from typing import Any

DiffusersModule = Any
"""A transformer of Diffusers, or a module of one.

Not `nn.Module`: by its annotations every attribute, `config` and `heads` among them, is a tensor or a module.
"""
