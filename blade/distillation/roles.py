"""Student, fake score and teacher: three roles that one transformer plays.

The base is frozen. Student and fake score are LoRA adapters on it, the teacher is the base without any. A role is a
context around the forward pass and its backward pass: which adapter acts, whether attention is sparse, and as which
step. Switching never touches `requires_grad`, as PEFT's `set_adapter` would, after which a backward pass trains
nothing; and what gradient checkpointing computes again, it computes in the role of the first time.
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
from blade.students.step_condition import StepCondition

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from peft.tuners.tuners_utils import BaseTunerLayer

STUDENT, FAKE, TEACHER = "student", "fake", "teacher"
ROLES = (STUDENT, FAKE, TEACHER)
TRAINED = (STUDENT, FAKE)
"""Roles with weights of their own."""

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
"""Layers that a LoRA is put on. Source: BLADE's release: of all attention modules, cross-attention too."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Size of the adapters."""

    rank: int = 64
    alpha: int = 64
    """The update is scaled by `alpha / rank`."""
    targets: Sequence[str] = TARGETS
    """Names, or ends of names, of the layers."""


class Network:
    """A transformer, and what it is at the moment."""

    def __init__(self, transformer: ModelMixin) -> None:
        """Take a transformer, with BLADE applied or not, and with all adapters that it will have.

        Args:
            transformer: it.
        """
        self.transformer = transformer
        self.wrapped: Callable[..., Any] = transformer
        """What passes with gradient go through: the transformer, or what stands around it to share gradients."""
        self.numbers: tuple[str, torch.Tensor] | None = None
        """Role and numbers, (B,), of the trajectories or steps that a forward pass is told of."""
        self._lora_layers: tuple[BaseTunerLayer, ...] = tuple(filter(_is_lora, transformer.modules()))
        self._adapter: str | None = None
        self._switch(None)

    @property
    def applied(self) -> AppliedBlade | None:
        """BLADE on this transformer."""
        return applied_to(self.transformer)

    def enable_gradient_checkpointing(self) -> None:
        """Compute the blocks again in the backward pass, each in its role."""
        self.transformer.enable_gradient_checkpointing(
            lambda block, *args: checkpoint(block, *args, use_reentrant=False, context_fn=self._contexts)
        )

    def current_condition(self) -> tuple[str, torch.Tensor] | None:
        """Which vectors of a `StepCondition` are in force."""
        return self.numbers

    @contextmanager
    def acting(self, adapter: str | None, sparse: bool, step: tuple[int, int | None] | None) -> Iterator[None]:
        """Act with an adapter.

        Args:
            adapter: its name; None: the bare base.
            sparse: whether BLADE is in force.
            step: step and number of steps that BLADE takes the pass for; None: what it finds out by itself.
        """
        applied, before = self.applied, self._adapter
        now = None if applied is None else (applied.state, applied.paused, applied.steps.fixed)
        self._switch(adapter)
        if applied is not None:
            applied.paused, applied.steps.fixed = not sparse, step
        try:
            yield
        finally:
            self._switch(before)
            if applied is not None and now is not None:
                state, applied.paused, applied.steps.fixed = now
                applied.put_back(state)

    def _switch(self, adapter: str | None) -> None:
        self._adapter = adapter
        for layer in self._lora_layers:
            # not `set_adapter`, which would freeze the other adapters
            layer._active_adapter = [] if adapter is None else [adapter]

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Around a block's forward pass, and around the one that the backward pass computes again."""
        applied = self.applied
        return nullcontext(), self._as_before(self._adapter, None if applied is None else applied.state)

    @contextmanager
    def _as_before(self, adapter: str | None, state: PassState | None) -> Iterator[None]:
        applied, now = self.applied, self._adapter
        state_now = None if applied is None else applied.state
        self._switch(adapter)
        if applied is not None and state is not None:
            applied.put_back(state)
        try:
            yield
        finally:
            self._switch(now)
            if applied is not None and state_now is not None:
                applied.put_back(state_now)


class Roles:
    """Who plays which role."""

    def __init__(self, networks: dict[str, Network], sparse: Sequence[str], *, adapters: bool) -> None:
        """Take the networks.

        Args:
            networks: one for each of `ROLES`; the same one several times where adapters make the difference.
            sparse: the roles whose attention is sparse.
            adapters: whether student and fake score are adapters of their names.
        """
        self.networks = networks
        self.sparse = frozenset(sparse)
        self.adapters = adapters

    def distinct(self) -> list[Network]:
        """Every network once."""
        return list({id(network): network for network in self.networks.values()}.values())

    def transformer(self, role: str) -> ModelMixin:
        """The transformer that plays a role."""
        return self.networks[role].transformer

    @contextmanager
    def acting(self, role: str, step: tuple[int, int | None] | None = None) -> Iterator[None]:
        """Let its network play a role.

        Args:
            role: one of `ROLES`.
            step: step and number of steps for BLADE; None: the pipeline's.
        """
        adapter = role if self.adapters and role in TRAINED else None
        with self.networks[role].acting(adapter, role in self.sparse, step):
            yield

    def tell_numbers(self, family: ModelFamily, sizes: dict[str, int]) -> None:
        """Tell roles which trajectory, or which step, they are on.

        Args:
            family: the transformers'.
            sizes: how many there are for each of those roles.
        """
        for network in self.distinct():
            own = {role: size for role, size in sizes.items() if self.networks[role] is network}
            if own:
                condition = StepCondition(family.time_embedding(network.transformer), own)
                condition.choose = network.current_condition

    def predict(self, role: str, inputs: Inputs, numbers: torch.Tensor) -> torch.Tensor:
        """Run the transformer of a role, which must be acting.

        Args:
            role: one of `ROLES`.
            inputs: arguments of the transformer.
            numbers: (B,), see `tell_numbers`.

        Returns:
            What it predicts.
        """
        network = self.networks[role]
        module = network.wrapped if torch.is_grad_enabled() else network.transformer
        network.numbers = (role, numbers)
        prediction: torch.Tensor = module(**inputs, return_dict=False)[0]
        return prediction

    def named_parameters(self, role: str) -> dict[str, nn.Parameter]:
        """Return the weights that are trained of a role, by name; names of student and fake score are the same."""
        return trained_parameters(self.transformer(role), role if self.adapters else None)


def trained_parameters(transformer: nn.Module, adapter: str | None) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained: an adapter's, its name cut out of theirs, or all."""
    named = dict(transformer.named_parameters())
    if adapter is None:
        return named
    return {name.replace(f".{adapter}", ""): one for name, one in named.items() if f".{adapter}" in name}


def adapter_roles(transformer: ModelMixin, lora: Lora, sparse: Sequence[str]) -> Roles:
    """Let one transformer play all roles: it is frozen, and two adapters are put on it, float32 whatever it is in.

    Args:
        transformer: of Diffusers.
        lora: size of the adapters.
        sparse: see `Roles`.

    Raises:
        ValueError: if no layer has a name of `lora.targets`.
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


def separate_roles(transformer: ModelMixin, sparse: Sequence[str]) -> Roles:
    """Let a transformer be the student, and copies of it, made here, fake score and teacher.

    Args:
        transformer: of Diffusers, without BLADE, which does not survive being copied.
        sparse: see `Roles`.
    """
    networks = {TEACHER: Network(copy.deepcopy(transformer).requires_grad_(False))}
    networks[FAKE] = Network(copy.deepcopy(transformer).float().requires_grad_(True))
    networks[STUDENT] = Network(transformer.float().requires_grad_(True))
    return Roles(networks, sparse, adapters=False)


def _is_lora(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)
