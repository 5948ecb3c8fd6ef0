"""Fused normalisation and rotary position embedding of queries or keys."""

from blade_kernels.qk_norm_rope.api import qk_norm_rope
from blade_kernels.qk_norm_rope.naive import NORMS

__all__ = ["NORMS", "qk_norm_rope"]
