"""Normalisation and rotary position embedding of queries or keys, in one pass over them."""

from blade_kernels.qk_norm_rope.api import NORMS, qk_norm_rope

__all__ = ["NORMS", "qk_norm_rope"]
