"""Presets for Wan transformers. Every function's docstring says where its values come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from blade.attention.config import BladeConfig
from blade_pipelines.presets.common import PUBLISHED, student, training_free


def wan() -> BladeConfig:
    """Training-free values for any Wan transformer on ordinary weights.

    Sources:
        sparsity 0.5: at 0.5, training-free ASA keeps 22.2 dB to dense on Wan2.1-1.3B, at 0.75 only 19.6 dB
            (BLADE, arXiv 2508.10774, table 3).
        dense_steps 0.2: the first steps fix the layout; table 3 keeps the first 2 of 8, Pyramid Sparse Attention
            (arXiv 2512.04025) the first quarter.
        dense_layers (0,): this project's choice; attention of the first layer is nearly flat, with no blocks to drop.
        block_size 128, token_order gilbert, probe_tokens 16, softmax_denominator: BLADE, as published.
        pooled_tokens none: untrained weights never saw pooled tokens.
    """
    return training_free()


def wan_shapes() -> BladeConfig:
    """Training-free values for the bundled moving-shapes model: 3 heads, 9 x 12 x 12 = 1,296 video tokens.

    Sources:
        block_size 32: cuts 1,296 tokens into 41 blocks, so that a sparsity of 0.9 still leaves 4.
        probe_tokens 16: half a block; a smaller share of so small a block would be mostly chance.
        All else: as `wan`.
    """
    return training_free(replace(PUBLISHED, block_size=32, pooled_window=16))


def wan_2_1_t2v_1_3b_student() -> BladeConfig:
    """Values of the paper's Wan2.1-T2V-1.3B student (ASA_GT, 480 x 832, 81 frames, 8 steps); trained weights only.

    Sources, BLADE, arXiv 2508.10774, paper or release:
        sparsity 0.798: 43 of 256 blocks (`max_retain_ratio` 0.17) and 1/30 in pooled tokens.
        pooled_tokens all, pooled_window 30: the release's `sample_gap`.
        dense_steps 0, dense_layers (): every layer and step is sparse in training and in use.
        block_size 128, token_order gilbert, probe_tokens 16 (the release takes 32), softmax_denominator: the paper.
        cumulative_mass 0.95, min_fraction 0.05: the release; the budget's cap is nearly always reached first.
    """
    return student(0.798, replace(PUBLISHED, cumulative_mass=0.95, min_fraction=0.05, pooled_window=30))


def wan_student() -> BladeConfig:
    """Values for a student of any other Wan transformer: those of the paper's; trained weights only."""
    return wan_2_1_t2v_1_3b_student()


def wan_shapes_student() -> BladeConfig:
    """Values for a student of the bundled moving-shapes model (ASA_GT); trained weights only.

    Sources:
        sparsity 0.8: as in the paper.
        block_size 16, probe_tokens 8: 81 blocks, nearer to the paper's 256 than the 41 that `wan_shapes` cuts.
        pooled_window 72: makes 18 pooled tokens of 1,296, and leaves 15 whole blocks at 0.8; 30, the paper's, would
            leave 13.
        All else: as the paper's student, without the rule of cumulative mass, which its cap makes inert.
    """
    return student(0.8, replace(PUBLISHED, block_size=16, probe_tokens=8, pooled_window=72))


TRAINING_FREE: dict[str, Callable[[], BladeConfig]] = {
    "wan": wan,
    "wan2.1-t2v-1.3b": wan,
    "shapes": wan_shapes,
}
"""Presets for ordinary weights, by name."""

STUDENT: dict[str, Callable[[], BladeConfig]] = {
    "wan": wan_student,
    "wan2.1-t2v-1.3b": wan_2_1_t2v_1_3b_student,
    "shapes": wan_shapes_student,
}
"""Presets for weights that were trained with them, by name."""
