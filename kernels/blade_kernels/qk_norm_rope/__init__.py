"""Normalisation and rotary position embedding of queries or keys, in one pass over them."""

from blade_kernels.qk_norm_rope.api import qk_norm_rope
from blade_kernels.qk_norm_rope.naive import NORMS

__all__ = ["NORMS", "qk_norm_rope"]
