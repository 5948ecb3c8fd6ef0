"""Evaluations of the tiny pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from blade.attention.config import BladeConfig
from blade.attention.pattern_table import uniform_table
from blade.attention.patterns import HeadPattern
from blade.evaluation.plan import Evaluation
from blade.evaluation.prompts import held_out_prompts
from blade.evaluation.runs import RunSettings

DENSE = RunSettings(name="dense", steps=2, guidance=1.0)
SPARSE = RunSettings(name="asa", steps=2, guidance=1.0, attention="asa", sparsity=0.5, dense_steps=1, dense_layers=())


@pytest.fixture
def evaluation(saved_tiny_pipeline: Path, tmp_path: Path) -> Evaluation:
    """Two captions of moving shapes, dense and sparse."""
    return Evaluation(
        runs=(SPARSE, DENSE),
        prompts=held_out_prompts(1, 1),
        folder=tmp_path / "evaluation",
        model=str(saved_tiny_pipeline),
        of_shapes=True,
        height=64,
        width=64,
        frames=9,
        device="cpu",
    )


@pytest.fixture
def patterns_folder(tmp_path: Path) -> Path:
    """A saved configuration of head patterns for the tiny pipeline: two layers of two heads."""
    table = uniform_table(HeadPattern(kind="diagonal", frames=0.5), 2, 2, block_size=32)
    BladeConfig(attention="patterns", patterns=table).save_pretrained(tmp_path / "patterns")
    return tmp_path / "patterns"
