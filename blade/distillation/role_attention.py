"""Attention of the roles' networks: sparsity of the current update, and the split of sequences among processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from blade.attention.apply import install_blade
from blade.attention.config import BladeConfig
from blade.distillation.config import AttentionConfig
from blade.distillation.parallel import Processes
from blade.distillation.roles import STUDENT, Network, Roles
from blade.models.parallel import join_transformer, split_transformer

WARMUP_STAGES = 8
"""Number of sparsity levels in a warm-up."""


class RoleAttention:
    """BLADE on the networks of all roles that need it."""

    def __init__(
        self, roles: Roles, attention: BladeConfig | None, config: AttentionConfig, pipe: Any, processes: Processes
    ) -> None:
        """Take what stays the same from update to update.

        Args:
            roles: the roles.
            attention: attention of the sparse roles; None: all roles are dense.
            config: the settings of the warm-up.
            pipe: the pipeline of the student's transformer, which counts its steps in validation.
            processes: the processes that may share a sample.
        """
        self._roles, self._attention, self._warmup = roles, attention, config.warmup_updates
        self._pipe, self._processes = pipe, processes

    def install(self, update: int) -> float:
        """Apply the attention of an update, and return its sparsity; all processes must call it."""
        attention, sparsity = self._attention, 0.0
        if attention is not None:
            sparsity = attention.sparsity
            if update < self._warmup:
                sparsity *= (1 + update * WARMUP_STAGES // self._warmup) / (WARMUP_STAGES + 1)
            attention = replace(attention, sparsity=sparsity)
        sparse = [self._roles.networks[role] for role in self._roles.sparse]
        for network in self._roles.distinct():
            if network in sparse and attention is not None:
                self._apply(network, attention)
            elif self._processes.group_size > 1:  # BLADE splits dense attention too
                self._apply(network, BladeConfig(attention="dense"))
        return sparsity

    def _apply(self, network: Network, attention: BladeConfig) -> None:
        applied, transformer, splits = network.applied, network.transformer, self._processes.group_size > 1
        if applied is not None and applied.config == attention:
            return
        if applied is not None and splits:
            join_transformer(transformer)
        install_blade(self._pipe if network is self._roles.networks[STUDENT] else transformer, attention)
        if splits:
            split_transformer(transformer, self._processes.mesh)
