"""What a failed change did to a model or pipeline is undone."""

from collections import OrderedDict

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from torch import nn

from blade.common.rollback import unchanged_on_error


class Pipeline:
    """Parts, as a pipeline of Diffusers holds them."""

    def __init__(self):
        self.model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
        self.scheduler = object()
        self.settings = OrderedDict(scale=1)


def fingerprint(pipe):
    """Everything that `unchanged_on_error` puts back, by identity."""
    state = [list(vars(pipe).items()), list(pipe.settings.items())]
    for name, module in pipe.model.named_modules():
        state.append((name, id(module), module.training, sorted(vars(module))))
        state += [list(value.items()) for value in vars(module).values() if isinstance(value, dict)]
        if "_diffusers_hook" in vars(module):
            registry = module._diffusers_hook
            state += [
                list(registry.hooks.items()),
                list(registry._hook_order),
                [one.forward for one in registry._fn_refs],
            ]
    state.append([(id(parameter), parameter.requires_grad) for parameter in pipe.model.parameters()])
    return state


CHANGES = {
    "attribute": lambda pipe: setattr(pipe, "scheduler", object()),
    "new attribute": lambda pipe: setattr(pipe.model, "extra", 1),
    "lost attribute": lambda pipe: delattr(pipe, "scheduler"),
    "content": lambda pipe: pipe.settings.clear(),
    "module": lambda pipe: pipe.model[1].__setitem__(0, nn.Identity()),
    "model": lambda pipe: setattr(pipe, "model", nn.Identity()),
    "new module": lambda pipe: pipe.model[1].add_module("late", nn.Linear(2, 2)),
    "hook": lambda pipe: pipe.model[0].register_forward_hook(lambda *_: None),
    "hook before": lambda pipe: pipe.model.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
    "lost hook": lambda pipe: pipe.model[0]._forward_hooks.clear(),
    "hook of Diffusers": lambda pipe: HookRegistry.check_if_exists_or_initialize(pipe.model[0]).register_hook(
        DiffusersHook(), "new"
    ),
    "lost hook of Diffusers": lambda pipe: pipe.model[1]._diffusers_hook.remove_hook("below"),
    "hook of Accelerate": lambda pipe: add_hook_to_module(pipe.model, ModelHook()),
    "training": lambda pipe: pipe.model.eval(),
    "frozen": lambda pipe: pipe.model.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_undone_if_it_fails_and_stays_if_it_does_not(change):
    pipe = Pipeline()
    handle = pipe.model[0].register_forward_hook(lambda *_: None)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.model[1])
    for name in ("below", "above"):
        registry.register_hook(DiffusersHook(), name)
    inputs = torch.randn(1, 2)
    before, output = fingerprint(pipe), pipe.model(inputs)
    model = pipe.model
    with pytest.raises(KeyboardInterrupt), unchanged_on_error(pipe):
        change(pipe)
        raise KeyboardInterrupt
    assert fingerprint(pipe) == before and torch.equal(pipe.model(inputs), output)
    handle.remove()
    assert not model[0]._forward_hooks  # the handle refers to the same hooks
    with unchanged_on_error(pipe):
        change(pipe)
    assert fingerprint(pipe) != before
