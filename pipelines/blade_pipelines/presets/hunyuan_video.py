"""Presets for HunyuanVideo transformers. Every function's docstring says where its values come from."""

from __future__ import annotations

from collections.abc import Callable

from blade.attention.config import BladeConfig
from blade_pipelines.presets.common import training_free


def hunyuan_video() -> BladeConfig:
    """Training-free values for any HunyuanVideo transformer on ordinary weights.

    Sources:
        sparsity 0.5, dense_steps 0.2: those of Wan's preset; no figures of ASA on HunyuanVideo are published.
        dense_layers (0,): this project's choice, as for Wan.
        block_size 128, token_order gilbert, probe_tokens 16, softmax_denominator: BLADE, arXiv 2508.10774.
        pooled_tokens none: untrained weights never saw pooled tokens.
    """
    return training_free()


TRAINING_FREE: dict[str, Callable[[], BladeConfig]] = {"hunyuan-video": hunyuan_video}
"""Presets for ordinary weights, by name."""
