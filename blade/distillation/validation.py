"""Videos of a student during training, for inspection, with scores for the bundled model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blade.common.files import write_files
from blade.common.names import file_name
from blade.common.reading import read_json
from blade.distillation.parallel import Processes
from blade.distillation.roles import STUDENT
from blade.distillation.trainer import Trainer
from blade.generation.request import ResolvedRequest
from blade.generation.run import run_request
from blade.media.video import encode_mp4
from blade.models.source import BUNDLED
from blade.students.scheduler import FewStepScheduler


def validate(
    trainer: Trainer,
    sampler: FewStepScheduler,
    request: ResolvedRequest,
    prompts: Sequence[str],
    folder: Path,
    processes: Processes,
) -> dict[str, float]:
    """Generate the student's videos of some prompts, each with its own seed, at each of its numbers of steps.

    Args:
        trainer: the training.
        sampler: the finished student's sampler.
        request: a resolved request for everything but prompt, seed and steps.
        prompts: the prompts.
        folder: the folder of the videos.
        processes: the processes that share the work.

    Returns:
        Means by name, for the bundled model: `score_N`, the share of videos with all attributes right at N steps, and
        `realism_error_N`; empty for other models.
    """
    pipe, roles = trainer.model.pipe, trainer.roles
    scheduler = pipe.scheduler
    pipe.scheduler = FewStepScheduler.from_config(sampler.config)
    trainer.use_averaged()
    try:
        # the same number for each group, since with sharded weights all must take part in every forward pass
        for first in range(0, len(prompts), processes.groups):
            number = (first + processes.group) % len(prompts)
            for steps in trainer.config.trajectory.steps:
                sampled = replace(
                    request, prompt=prompts[number], seed=number, steps=steps, guidance_scale=1.0, flow_shift=None
                )
                with torch.no_grad(), roles.acting(STUDENT):
                    roles.networks[STUDENT].numbers = (STUDENT, torch.tensor([trainer.trajectory_number(steps)]))
                    made = run_request(trainer.model, sampled, attention=nullcontext())
                if not processes.is_first_of_group:
                    continue
                stem = f"{file_name(sampled.prompt)}-{number}-steps-{steps}"
                record = {"prompt": sampled.prompt, "seed": number, "steps": steps, **_scores(sampled, made.video)}
                write_files(
                    {
                        folder / f"{stem}.mp4": encode_mp4(made.video, sampled.fps, made.sound),
                        folder / f"{stem}.json": (json.dumps(record, indent=2) + "\n").encode(),
                    }
                )
    finally:
        trainer.restore_weights()
        pipe.scheduler = scheduler
    processes.wait()
    return means(folder)


def _scores(request: ResolvedRequest, video: torch.Tensor) -> dict[str, Any]:
    """Score a video of the bundled model by the rules of the moving-shapes world; empty for other models."""
    if request.model != BUNDLED:
        return {}
    from blade.moving_shapes.realism import realism_error
    from blade.moving_shapes.scoring import score

    prompt = request.prompt
    try:
        return {"score": float(score(video, prompt).all_attributes), "realism_error": realism_error(video, prompt)}
    except ValueError:  # the prompt is not a caption of its grammar
        return {}


def means(folder: Path) -> dict[str, float]:
    """Average the scores over the videos of a folder; see `validate`."""
    records = [read_json(path, f"`{path}`") for path in sorted(folder.glob("*.json"))]
    averages = {}
    for steps in sorted({record["steps"] for record in records}):
        for name in ("score", "realism_error"):
            values = [record[name] for record in records if record["steps"] == steps and name in record]
            if values:
                averages[f"{name}_{steps}"] = sum(values) / len(values)
    return averages
