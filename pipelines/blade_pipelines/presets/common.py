"""What presets have in common."""

from __future__ import annotations

from blade.attention.config import AdaptiveConfig, BladeConfig

PUBLISHED = AdaptiveConfig(
    block_size=128, token_order="gilbert", selector="sampled", probe_tokens=16, softmax_denominator=True
)
"""Details of ASA as published. Source: BLADE, arXiv 2508.10774."""


def training_free(details: AdaptiveConfig = PUBLISHED, *, dense_steps: float = 0.2) -> BladeConfig:
    """Moderate values for ordinary weights: half of the pairs, the first steps and layer dense, no pooled tokens."""
    return BladeConfig(
        attention="asa",
        sparsity=0.5,
        pooled_tokens="none",
        dense_steps=dense_steps,
        dense_layers=(0,),
        kind="training-free",
        asa=details,
    )


def student(sparsity: float, details: AdaptiveConfig) -> BladeConfig:
    """Values for weights that were trained with them: every layer and step sparse, all pooled tokens."""
    return BladeConfig(
        attention="asa",
        sparsity=sparsity,
        pooled_tokens="all",
        dense_steps=0,
        dense_layers=(),
        kind="student",
        asa=details,
    )
