"""All or nothing: a change of a pipeline or model that fails leaves its structure as it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

CONTAINERS = (dict, OrderedDict, list, set)
"""Types of attributes whose contents are put back; theirs alone, since others may refuse to be changed."""


@contextmanager
def unchanged_on_error(*parts: Any) -> Iterator[None]:
    """Put pipelines and models back as they were if the block fails.

    Put back are attributes, submodules, adapters, hooks of PyTorch, Accelerate and Diffusers, and which weights are
    trained; not the values of weights that the block changes in place.

    Args:
        parts: pipelines and models.
    """
    saved = [_Saved(owner) for owner in _owners(parts)]
    parameters = {id(one): one for module in _modules(parts) for one in module.parameters(recurse=False)}
    trained = [(parameter, parameter.requires_grad) for parameter in parameters.values()]
    try:
        yield
    except BaseException:
        for one in saved:
            one.put_back()
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


class _Saved:
    """Attributes of an object, and the contents of those that are containers."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.attributes = dict(vars(owner))
        values = (value for value in self.attributes.values() if type(value) in CONTAINERS)
        self.contents = [(value, value.copy()) for value in values]

    def put_back(self) -> None:
        """Put attributes and contents back, in the same containers: handles of hooks refer to them."""
        attributes = vars(self.owner)
        attributes.clear()
        attributes.update(self.attributes)
        for container, content in self.contents:
            container.clear()
            if isinstance(container, list):
                container.extend(content)
            else:
                container.update(content)


def _modules(parts: tuple[Any, ...]) -> list[nn.Module]:
    """Return all modules in pipelines and models, each once."""
    tops = [top for part in parts for top in ([part] if isinstance(part, nn.Module) else vars(part).values())]
    modules = (module for top in tops if isinstance(top, nn.Module) for module in top.modules())
    return list({id(module): module for module in modules}.values())


def _owners(parts: tuple[Any, ...]) -> list[Any]:
    """Return all objects whose attributes make up the structure of pipelines and models."""
    modules = _modules(parts)
    registries = [vars(module)["_diffusers_hook"] for module in modules if "_diffusers_hook" in vars(module)]
    hooks = [hook for registry in registries for hook in (*registry.hooks.values(), *registry._fn_refs)]
    pipelines = [part for part in parts if not isinstance(part, nn.Module)]
    return [*pipelines, *modules, *registries, *hooks]
