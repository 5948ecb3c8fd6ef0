"""Student, fake score and teacher: three roles that one transformer plays.

The base is frozen. Student and fake score are LoRA adapters on it; the teacher is the base without an adapter. A role
is a context around a forward pass and its backward pass that sets the adapter, sparse or dense attention, and the
step. Switching never changes `requires_grad`, unlike PEFT's `set_adapter`, after which a backward pass would train
nothing; and gradient checkpointing recomputes every block in the role of its forward pass.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from blade.attention.applied import AppliedBlade, PassState, applied_to
from blade.families.protocol import Inputs, ModelFamily
from blade.families.transformers import Transformer
from blade.students.step_condition import StepCondition

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

STUDENT, FAKE, TEACHER = "student", "fake", "teacher"
ROLES = (STUDENT, FAKE, TEACHER)
TRAINED = (STUDENT, FAKE)
"""Roles with trained weights."""

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Layers with a LoRA, in all attention modules including cross-attention. Source: BLADE's release."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Size of the adapters."""

    rank: int = 64
    """Rank of the update."""
    alpha: int = 64
    """The update is scaled by `alpha / rank`."""
    targets: Sequence[str] = TARGETS
    """Names, or ends of names, of the layers."""


class Network:
    """A transformer and its current role: adapter, attention and step."""

    def __init__(self, transformer: Transformer) -> None:
        """Take a transformer, with or without BLADE, that has all its adapters.

        Args:
            transformer: the transformer.
        """
        self.transformer = transformer
        self.wrapped: Callable[..., Any] = transformer
        """The module for passes with gradient: the transformer, or the wrapper that synchronizes its gradients."""
        self.numbers: tuple[str, torch.Tensor] | None = None
        """Role, and indices (B,) of the trajectories or steps on which a forward pass is conditioned."""
        self._lora_layers: tuple[BaseTunerLayer, ...] = tuple(filter(_is_lora, transformer.modules()))
        self._adapter: str | None = None
        self._switch(None)

    @property
    def applied(self) -> AppliedBlade | None:
        """The BLADE that is applied to this transformer, if any."""
        return applied_to(self.transformer)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the blocks in the backward pass, each in its role."""
        self.transformer.enable_gradient_checkpointing(
            lambda block, *args: checkpoint(block, *args, use_reentrant=False, context_fn=self._contexts)
        )

    def current_condition(self) -> tuple[str, torch.Tensor] | None:
        """Return the role and indices that select the vectors of a `StepCondition`."""
        return self.numbers

    @contextmanager
    def acting(self, adapter: str | None, sparse: bool, step: tuple[int, int | None] | None) -> Iterator[None]:
        """Use an adapter inside a `with` block.

        Args:
            adapter: its name; None: the bare base.
            sparse: use BLADE's sparse attention.
            step: step and number of steps for BLADE; None: as BLADE determines them itself.
        """
        applied, previous = self.applied, self._adapter
        saved = None if applied is None else (applied.state, applied.paused, applied.steps.fixed)
        self._switch(adapter)
        if applied is not None:
            applied.paused, applied.steps.fixed = not sparse, step
        try:
            yield
        finally:
            self._switch(previous)
            if applied is not None and saved is not None:
                state, applied.paused, applied.steps.fixed = saved
                applied.put_back(state)

    def _switch(self, adapter: str | None) -> None:
        self._adapter = adapter
        for layer in self._lora_layers:
            # not `set_adapter`, which would freeze the other adapters
            layer._active_adapter = [] if adapter is None else [adapter]

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return the contexts of a block's forward pass and of its recomputation in the backward pass."""
        applied = self.applied
        return nullcontext(), self._as_before(self._adapter, None if applied is None else applied.state)

    @contextmanager
    def _as_before(self, adapter: str | None, state: PassState | None) -> Iterator[None]:
        applied, adapter_now = self.applied, self._adapter
        state_now = None if applied is None else applied.state
        self._switch(adapter)
        if applied is not None and state is not None:
            applied.put_back(state)
        try:
            yield
        finally:
            self._switch(adapter_now)
            if applied is not None and state_now is not None:
                applied.put_back(state_now)


class Roles:
    """The networks that play the roles."""

    def __init__(self, networks: dict[str, Network], sparse: Sequence[str], *, adapters: bool) -> None:
        """Take the networks.

        Args:
            networks: one for each of `ROLES`; the same one for all roles that differ by adapters only.
            sparse: the roles with sparse attention.
            adapters: if true, student and fake score are adapters named like their roles.
        """
        self.networks = networks
        self.sparse = frozenset(sparse)
        self.adapters = adapters

    def distinct(self) -> list[Network]:
        """Return every network once."""
        return list({id(network): network for network in self.networks.values()}.values())

    def transformer(self, role: str) -> Transformer:
        """Return the transformer that plays a role."""
        return self.networks[role].transformer

    @contextmanager
    def acting(self, role: str, step: tuple[int, int | None] | None = None) -> Iterator[None]:
        """Let a role's network act in it inside a `with` block.

        Args:
            role: one of `ROLES`.
            step: step and number of steps for BLADE; None: as BLADE determines them itself.
        """
        adapter = role if self.adapters and role in TRAINED else None
        with self.networks[role].acting(adapter, role in self.sparse, step):
            yield

    def add_step_conditions(self, family: ModelFamily, sizes: dict[str, int]) -> None:
        """Condition roles on the index of their trajectory or step.

        Args:
            family: the transformers' family.
            sizes: the number of trajectories or steps of each such role.
        """
        for network in self.distinct():
            network_sizes = {role: size for role, size in sizes.items() if self.networks[role] is network}
            if network_sizes:
                condition = StepCondition(family.time_embedding(network.transformer), network_sizes)
                condition.choose = network.current_condition

    def predict(self, role: str, inputs: Inputs, numbers: torch.Tensor) -> torch.Tensor:
        """Run the transformer of a role, which must be acting.

        Args:
            role: one of `ROLES`.
            inputs: arguments of the transformer.
            numbers: (B,), indices of trajectories or steps; see `add_step_conditions`.

        Returns:
            The prediction.
        """
        network = self.networks[role]
        module = network.wrapped if torch.is_grad_enabled() else network.transformer
        network.numbers = (role, numbers)
        prediction: torch.Tensor = module(**inputs, return_dict=False)[0]
        return prediction

    def named_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Return the trained weights of a role by name; student and fake score have the same names."""
        return trained_parameters(self.transformer(role), role if self.adapters else None)


def trained_parameters(transformer: nn.Module, adapter: str | None) -> dict[str, nn.Parameter]:
    """Return the trained parameters: an adapter's, without its name in theirs, or all."""
    named = dict(transformer.named_parameters())
    if adapter is None:
        return named
    return {name.replace(f".{adapter}", ""): weight for name, weight in named.items() if f".{adapter}" in name}


def adapter_roles(transformer: Transformer, lora: Lora, sparse: Sequence[str]) -> Roles:
    """Let one transformer play all roles: freeze it, and add two adapters, which are always float32.

    Args:
        transformer: the transformer.
        lora: size of the adapters.
        sparse: the roles with sparse attention.

    Raises:
        ValueError: if no layer matches `lora.targets`.
    """
    from peft import LoraConfig

    transformer.requires_grad_(False)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))
    for role in TRAINED:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")
                transformer.add_adapter(config, adapter_name=role)
        except ValueError as error:
            raise ValueError(f"`targets` must be ends of layers' names, got {list(lora.targets)}: {error}") from error
    for role in TRAINED:
        for parameter in trained_parameters(transformer, role).values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    network = Network(transformer)
    return Roles(dict.fromkeys(ROLES, network), sparse, adapters=True)


def separate_roles(transformer: Transformer, sparse: Sequence[str]) -> Roles:
    """Let a transformer be the student, and copies of it the fake score and the teacher.

    Args:
        transformer: the transformer, without BLADE, which cannot be copied.
        sparse: the roles with sparse attention.
    """
    networks = {TEACHER: Network(copy.deepcopy(transformer).requires_grad_(False))}
    networks[FAKE] = Network(copy.deepcopy(transformer).float().requires_grad_(True))
    networks[STUDENT] = Network(transformer.float().requires_grad_(True))
    return Roles(networks, sparse, adapters=False)


def _is_lora(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)
