"""A protocol as options of an evaluation: its prompts, seeds, runs and generation, where nothing else is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blade.evaluation.prompts import EvaluationPrompt, parse_seeds, prompts_with_seeds
from blade.evaluation.runs import RunSettings, parse_run
from blade.families.data import ComparisonProtocol
from blade.generation.prompts import read_prompts

GENERATION = ("model", "height", "width", "frames", "dtype", "vae_tiling")
"""Fields of an evaluation for which a protocol has values."""

SETTLED = ("steps", "guidance", "student", "lora")
"""Fields of a run that a protocol settles for all runs, so that each sparse one has its dense reference."""


def protocol_generation(protocol: ComparisonProtocol) -> dict[str, Any]:
    """Return a protocol's values for fields of an evaluation."""
    return {name: getattr(protocol, name) for name in GENERATION}


def protocol_prompts(
    protocol: ComparisonProtocol, file: Path | None, seeds: str | None = None
) -> tuple[EvaluationPrompt, ...]:
    """Return a protocol's prompts with its seeds.

    Args:
        protocol: The protocol.
        file: The file that its prompts are selected from, or the selection itself; all prompts of any other file.
        seeds: Other seeds, such as "0"; None takes the protocol's.

    Raises:
        ValueError: If there is no file, or the seeds are not right.
    """
    suite = protocol.prompts
    if file is None:
        raise ValueError(
            f"`prompts` must be given with `protocol` {protocol.name}, which takes {suite.name}; the file "
            f"({suite.license}) comes with: curl -LO {suite.address}"
        )
    texts = read_prompts(file)
    selected = suite.select(texts)
    return prompts_with_seeds(
        texts if selected is None else selected, parse_seeds(protocol.seeds if seeds is None else seeds)
    )


def protocol_runs(
    protocol: ComparisonProtocol,
    descriptions: Sequence[str],
    *,
    steps: int | None = None,
    guidance: float | None = None,
) -> tuple[RunSettings, ...]:
    """Return the runs of a protocol: a dense one, and every sparse one with each setting of dense steps.

    Args:
        protocol: The protocol.
        descriptions: Runs as `parse_run` takes them. One that names its dense steps stays as it is; one that names
            no dense layers has the protocol's.
        steps: Other denoising steps; None takes the protocol's.
        guidance: Another guidance scale; None takes the protocol's.

    Raises:
        ValueError: If a description is not right, or names what the protocol settles for all runs.
    """
    settled: dict[str, Any] = {
        "steps": protocol.steps if steps is None else steps,
        "guidance": protocol.guidance_scale if guidance is None else guidance,
    }
    runs: list[RunSettings] = []
    for run in map(parse_run, descriptions):
        for name in SETTLED:
            if getattr(run, name) is not None:
                raise ValueError(
                    f"`run` must not name `{name}` with `protocol` {protocol.name}, got {getattr(run, name)!r} in "
                    f"{run.name}; `--steps` and `--guidance-scale` change all runs."
                )
        run = replace(run, **settled)
        runs += [run] if run.is_dense else _with_dense_steps(protocol, run)
    if not any(run.is_dense for run in runs):
        runs.insert(0, RunSettings(name="dense", **settled))
    return tuple(runs)


def _with_dense_steps(protocol: ComparisonProtocol, run: RunSettings) -> list[RunSettings]:
    """Return a sparse run with each of a protocol's settings of dense steps, unless it has one of its own."""
    if run.dense_layers is None:
        run = replace(run, dense_layers=protocol.dense_layers)
    if run.dense_steps is not None:
        return [run]
    return [
        replace(run, name=f"{run.name}-dense-{100 * share:g}", dense_steps=share) for share in protocol.dense_steps
    ]
