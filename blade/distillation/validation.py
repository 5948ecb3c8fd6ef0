"""Videos of a student on the way, for the eye, and of the bundled model with scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blade.common.files import write_files
from blade.distillation.parallel import Processes
from blade.distillation.roles import STUDENT
from blade.distillation.trainer import Trainer
from blade.generation.prompts import file_stem
from blade.generation.request import ResolvedRequest
from blade.generation.run import run_request
from blade.media.video import encode_mp4
from blade.models.source import BUNDLED
from blade.students.scheduler import FewStepScheduler

SCORES_NAME = "scores.json"


def validate(
    trainer: Trainer,
    sampler: FewStepScheduler,
    request: ResolvedRequest,
    prompts: Sequence[str],
    folder: Path,
    processes: Processes,
) -> dict[str, float]:
    """Make the student's videos of some prompts, each with a seed of its own, at every number of its steps.

    Args:
        trainer: the training.
        sampler: the finished student's.
        request: a resolved request, for all but prompt, seed and steps.
        prompts: what they show.
        folder: where they go.
        processes: who share them out.

    Returns:
        Means by name, of the bundled model: `score_N`, the share with all attributes right at N steps, and
        `realism_error_N`; otherwise nothing.
    """
    pipe, roles = trainer.model.pipe, trainer.roles
    scheduler = pipe.scheduler
    pipe.scheduler = FewStepScheduler.from_config(sampler.config)
    folder.mkdir(parents=True, exist_ok=True)
    trainer.use_averaged()
    try:
        # as many for each process, since all take part in each forward pass where weights are shared out
        for number in range(0, len(prompts), processes.count):
            place = (number + processes.index) % len(prompts)
            for steps in trainer.config.trajectory.steps:
                own = replace(request, prompt=prompts[place], seed=place, steps=steps, guidance_scale=1.0)
                own = replace(own, flow_shift=None)
                with torch.no_grad(), roles.acting(STUDENT):
                    roles.networks[STUDENT].numbers = (STUDENT, torch.tensor([trainer.number_of(steps)]))
                    video = run_request(trainer.model, own, attention=nullcontext()).video
                stem = f"{file_stem(own.prompt)[:60]}-{place}-steps-{steps}"
                record = {"prompt": own.prompt, "seed": place, "steps": steps, **_scores(own, video)}
                assert own.fps is not None
                write_files(
                    {
                        folder / f"{stem}.mp4": encode_mp4(video, own.fps),
                        folder / f"{stem}.json": (json.dumps(record, indent=2) + "\n").encode(),
                    }
                )
    finally:
        trainer.use_own()
        pipe.scheduler = scheduler
    processes.wait()
    return means(folder)


def _scores(request: ResolvedRequest, video: torch.Tensor) -> dict[str, Any]:
    """What the moving-shapes world says of a video of the bundled model."""
    if request.model != BUNDLED:
        return {}
    from blade.moving_shapes.realism import realism_error
    from blade.moving_shapes.scoring import score

    prompt = request.prompt
    try:
        return {"score": float(score(video, prompt).all_attributes), "realism_error": realism_error(video, prompt)}
    except ValueError:  # no sentence of its grammar
        return {}


def means(folder: Path) -> dict[str, float]:
    """The means over the videos of a folder; see `validate`."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    found = {}
    for steps in sorted({record["steps"] for record in records}):
        for name in ("score", "realism_error"):
            values = [record[name] for record in records if record["steps"] == steps and name in record]
            if values:
                found[f"{name}_{steps}"] = sum(values) / len(values)
    return found
