"""Roles on one transformer: whose gradients come out, whatever else ran between forward and backward."""

import pytest
import torch

from blade import BladeConfig
from blade.attention.apply import install_blade
from blade.attention.config import AdaptiveConfig
from blade.distillation.roles import FAKE, STUDENT, TEACHER, Lora, adapter_roles, separate_roles

CONFIG = BladeConfig(
    sparsity=0.6,
    pooled_tokens="all",
    kind="student",
    asa=AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=8),
)
LORA = Lora(rank=4, alpha=8)


def make_roles(transformer, *, sparse=(STUDENT,), checkpointing=False, seed=1):
    """Roles whose adapters do something."""
    roles = adapter_roles(transformer, LORA, sparse)
    generator = torch.Generator().manual_seed(seed)
    for role in (STUDENT, FAKE):
        for name, parameter in roles.named_parameters(role).items():
            if ".lora_B." in name:
                parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)
    if sparse:
        install_blade(transformer, CONFIG)
    if checkpointing:
        roles.networks[STUDENT].enable_gradient_checkpointing()
    return roles


def predict(roles, role, inputs):
    return roles.predict(role, inputs, torch.zeros(len(inputs["hidden_states"]), dtype=torch.int64))


def gradients(roles, role, inputs, *, detour, step=(3, None), backward=torch.Tensor.backward):
    """The gradients of a role, with other roles' passes between its forward and its backward pass or without."""
    with roles.acting(role, step):
        output = predict(roles, role, inputs)
        if detour:
            with torch.no_grad():
                for other, other_step in ((TEACHER, None), (FAKE, (5, None)), (STUDENT, (1, None))):
                    with roles.acting(other, other_step):
                        predict(roles, other, inputs)
        backward(output.square().mean())
    return {name: parameter.grad for name, parameter in roles.named_parameters(role).items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("role", [STUDENT, FAKE])
def test_a_detour_changes_no_gradient(make_wan, wan_inputs, role, checkpointing):
    inputs = wan_inputs(batch=2)
    straight = make_roles(make_wan())
    expected = gradients(straight, role, inputs, detour=False)
    roles = make_roles(make_wan(), checkpointing=checkpointing)
    found = gradients(roles, role, inputs, detour=True)
    assert found.keys() == expected.keys() and len(found) == 3 * 2 * 4 * 2
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
        assert gradient.abs().max() > 0, name
    other = FAKE if role == STUDENT else STUDENT
    assert all(parameter.grad is None for parameter in roles.named_parameters(other).values())
    frozen = [name for name, one in roles.transformer(role).named_parameters() if not one.requires_grad]
    assert len(frozen) > 50 and not any("lora" in name for name in frozen)


@pytest.mark.parametrize("ours", [True, False])
def test_a_backward_pass_in_another_role(make_wan, wan_inputs, ours):
    """With Diffusers' own gradient checkpointing, the gradients would be wrong, and nothing would say so."""
    inputs = wan_inputs(batch=2)
    roles = make_roles(make_wan(), checkpointing=ours)
    if not ours:
        roles.transformer(STUDENT).enable_gradient_checkpointing()
    with roles.acting(STUDENT, (3, None)):
        output = predict(roles, STUDENT, inputs)
    with roles.acting(FAKE, (5, None)):
        output.square().mean().backward()
    found = {role: [one.grad for one in roles.named_parameters(role).values()] for role in (STUDENT, FAKE)}
    assert all(gradient is None for gradient in found[FAKE])
    expected = gradients(make_roles(make_wan()), STUDENT, inputs, detour=False)
    assert all(torch.equal(*pair) for pair in zip(found[STUDENT], expected.values())) == ours


def test_each_role_is_what_it_says(make_wan, wan_inputs):
    inputs, bare = wan_inputs(batch=2), make_wan()
    with torch.no_grad():
        expected = bare(**inputs, return_dict=False)[0]
    roles = make_roles(make_wan())
    with torch.no_grad():
        outputs = {}
        for role in (TEACHER, STUDENT, FAKE):
            with roles.acting(role, (0, None)):
                outputs[role] = predict(roles, role, inputs)
    assert torch.equal(outputs[TEACHER], expected)
    assert not torch.allclose(outputs[STUDENT], expected, atol=1e-3)
    assert not torch.allclose(outputs[FAKE], outputs[STUDENT], atol=1e-3)


def test_sparsity_belongs_to_a_role(make_wan, wan_inputs):
    inputs = wan_inputs()
    roles = make_roles(make_wan())
    applied, seen = roles.networks[STUDENT].applied, {}
    for role in (STUDENT, FAKE, TEACHER):
        with torch.no_grad(), roles.acting(role, (2, None)):
            predict(roles, role, inputs)
            seen[role] = (any(layer.sparse for layer in applied.layers), int(applied.step))
    assert seen == {STUDENT: (True, 2), FAKE: (False, 0), TEACHER: (False, 0)}


def test_a_step_is_in_force_again_where_a_block_is_computed_again(make_wan, wan_inputs):
    """Probes differ from step to step, and so would the blocks that are kept."""
    inputs = wan_inputs()
    by_step = [gradients(make_roles(make_wan()), STUDENT, inputs, detour=False, step=(step, None)) for step in (3, 5)]
    name = "blocks.0.attn1.to_v.lora_B.weight"
    assert not torch.equal(by_step[0][name], by_step[1][name])


def test_roles_of_separate_networks(make_wan, wan_inputs):
    transformer, inputs = make_wan(), wan_inputs()
    roles = separate_roles(transformer, (STUDENT,))
    install_blade(transformer, CONFIG)
    assert len(roles.distinct()) == 3 and roles.transformer(STUDENT) is transformer
    found = gradients(roles, STUDENT, inputs, detour=True)
    assert all(gradient is not None for gradient in found.values())
    assert all(one.grad is None for role in (FAKE, TEACHER) for one in roles.transformer(role).parameters())
    assert not any(one.requires_grad for one in roles.transformer(TEACHER).parameters())


def test_one_copy_of_the_base_is_in_memory(make_wan):
    base = sum(one.numel() for one in make_wan().parameters())
    roles = make_roles(make_wan())
    lora = sum(one.numel() for one in roles.named_parameters(STUDENT).values())
    held = {id(one): one.numel() for role in (STUDENT, FAKE, TEACHER) for one in roles.transformer(role).parameters()}
    assert sum(held.values()) == base + 2 * lora


def test_targets_must_be_there(make_wan):
    with pytest.raises(ValueError, match=r"`targets` must be ends of layers' names, got .'nowhere'"):
        adapter_roles(make_wan(), Lora(targets=("nowhere",)), ())
