"""Weights of attention branches that BLADE does not compute, and what may be done without them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ForeignBranch:
    """A branch beside the attention of a published model, which other software computes."""

    pattern: str
    """Regular expression of the names of its modules."""
    title: str
    """Description."""
    remedy: str
    """Remedy; a clause."""


FOREIGN_BRANCHES = (
    ForeignBranch(
        r"(^|[._])to_gate_compress(\.weight|\.bias)?$",
        "the gate of Video Sparse Attention's second softmax, over pooled tiles, which is no sum over dropped blocks",
        "take weights that were trained without it, with full attention, or run these with FastVideo",
    ),
    ForeignBranch(
        r"(^|[._])proj_l(\.weight|\.bias)?$",
        "the projection of Sparse-Linear Attention's linear branch",
        "take a LoRA or weights that were trained without it, with full attention, or run these with TurboDiffusion",
    ),
)
"""Known ones. Sources: `video_sparse_attn` of FastVideo (arXiv 2505.13389), where a gated softmax over the means of
all tiles is added to a softmax over the kept ones; `SLA/core.py` of TurboDiffusion (arXiv 2509.24006)."""


@dataclass(frozen=True)
class BranchProblem:
    """Reason why a module of a file is not loaded."""

    changes: bool
    """True if the branch changes the output, so that the rest must not be used without it."""
    reason: str
    """A clause."""


def is_branch(key: str) -> bool:
    """Return whether a key of a file is of a known branch."""
    return any(re.search(branch.pattern.removesuffix("$"), key) for branch in FOREIGN_BRANCHES)


def branch_problem(name: str, parts: Mapping[str, torch.Tensor]) -> BranchProblem | None:
    """Return what to say of a module that no transformer of Diffusers has, or None if it is of no known branch.

    Args:
        name: the module's name, without prefixes.
        parts: its tensors; those on the meta device count as not zero.
    """
    branch = next((branch for branch in FOREIGN_BRANCHES if re.search(branch.pattern, name)), None)
    if branch is None:
        return None
    if _is_zero(parts):
        return BranchProblem(False, f"{branch.title}; it is zero, so that nothing is lost")
    return BranchProblem(True, f"{branch.title}; {branch.remedy}")


def _is_zero(parts: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a module's weights are zero: of a pair, either matrix."""
    zero = {kind: not tensor.is_meta and not bool(tensor.any()) for kind, tensor in parts.items()}
    pair = [kind for kind in ("down", "up") if kind in zero]
    others = [kind for kind in zero if kind not in ("down", "up", "alpha")]
    return (not pair or any(zero[kind] for kind in pair)) and all(zero[kind] for kind in others)
