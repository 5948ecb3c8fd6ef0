"""Presets for CogVideoX transformers. Every function's docstring says where its values come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from blade.attention.config import BladeConfig
from blade_pipelines.presets.common import PUBLISHED, student, training_free


def cogvideox() -> BladeConfig:
    """Training-free values for any CogVideoX transformer on ordinary weights.

    Sources:
        sparsity 0.5: that of Wan's preset; no training-free figures for CogVideoX are published.
        dense_steps 0.25: Pyramid Sparse Attention (arXiv 2512.04025) keeps 12 to 15 of 50 steps dense.
        dense_layers (0,): this project's choice, as for Wan.
        block_size 128, token_order gilbert, probe_tokens 16, softmax_denominator: BLADE, arXiv 2508.10774.
        pooled_tokens none: untrained weights never saw pooled tokens.
    """
    return training_free(dense_steps=0.25)


def cogvideox_5b_student() -> BladeConfig:
    """Values of the paper's CogVideoX-5B student (ASA_GT, 480 x 720, 49 frames, 8 steps); trained weights only.

    Sources, BLADE, arXiv 2508.10774, paper or release:
        sparsity 0.82: as reported; a row keeps 12 blocks of video and the two that hold text, of 139, and 1/15 in
            pooled tokens (the release: `max_retain_ratio` 0.10, 13 blocks).
        pooled_tokens all, pooled_window 15: the release's `sample_gap`.
        dense_steps 0, dense_layers (): every layer and step is sparse in training and in use.
        block_size 128, token_order gilbert, probe_tokens 16 (the release takes 32), softmax_denominator: the paper.
        cumulative_mass 0.95, min_fraction 0.05: the release; the budget's cap is nearly always reached first.
    """
    return student(0.82, replace(PUBLISHED, cumulative_mass=0.95, min_fraction=0.05, pooled_window=15))


TRAINING_FREE: dict[str, Callable[[], BladeConfig]] = {
    "cogvideox": cogvideox,
    "cogvideox-5b": cogvideox,
    "cogvideox-1.5": cogvideox,
}
"""Presets for ordinary weights, by name."""

STUDENT: dict[str, Callable[[], BladeConfig]] = {"cogvideox-5b": cogvideox_5b_student}
"""Presets for weights that were trained with them, by name."""
