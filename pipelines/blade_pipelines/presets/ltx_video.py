"""Presets for LTX-Video transformers. Every function's docstring says where its values come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from blade.attention.config import BladeConfig
from blade_pipelines.presets.common import PUBLISHED, training_free


def ltx_video() -> BladeConfig:
    """Training-free values for any LTX-Video transformer on ordinary weights.

    Sources:
        sparsity 0.5, dense_steps 0.2, dense_layers (0,): those of Wan's preset; no figures of ASA on LTX-Video are
            published.
        block_size 64: its tokens stand for 32 x 32 pixels and 8 frames, so that sequences are short.
        token_order gilbert, probe_tokens 16, softmax_denominator: BLADE, arXiv 2508.10774.
        pooled_tokens none: untrained weights never saw pooled tokens.
    """
    return training_free(replace(PUBLISHED, block_size=64))


TRAINING_FREE: dict[str, Callable[[], BladeConfig]] = {"ltx-video": ltx_video}
"""Presets for ordinary weights, by name."""
