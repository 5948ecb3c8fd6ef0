"""Parts of a student's folder, and the check of them and of the disk's room before a model is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blade.common.files import check_writable
from blade.common.leftovers import files_in
from blade.distillation.config import DistillationConfig, WeightsConfig
from blade.distillation.resuming import checkpoint_path, checkpoint_paths
from blade.distillation.roles import TRAINED
from blade.distillation.student_files import CARD_NAME, CONFIG_NAME
from blade.distillation.teacher_trajectories import INDEX_NAME, POINTS_DTYPE
from blade.generation.plan import resolve_without_weights
from blade.generation.request import GenerationRequest
from blade.models.loaded import LoadedModel
from blade.students.source import FULL_WEIGHT_NAME, TRANSFORMER_FOLDER, WEIGHT_NAME

VALIDATION, EMBEDDINGS, TRAJECTORIES, LOG_NAME = "validation", "embeddings", "trajectories", "log.jsonl"
"""Parts of a student's folder besides the student itself."""

STATES_BYTES = {"adamw": 8, "adamw-8bit": 2}
"""Bytes of an optimizer's states for each weight."""


def teacher_request(config: DistillationConfig, prompt: str, device: torch.device) -> GenerationRequest:
    """Return the request that the teacher answers, with unset values unset."""
    video = config.video
    return GenerationRequest(
        prompt=prompt,
        negative_prompt=config.generator.negative_prompt,
        model=config.model,
        revision=config.revision,
        attention="dense",
        height=video.height,
        width=video.width,
        frames=video.frames,
        guidance_scale=config.generator.guidance_scale,
        device=str(device),
    )


def check_output_files(
    config: DistillationConfig,
    output: Path,
    prompt: str,
    device: torch.device,
    resumed: tuple[Path, Mapping[str, Any]] | None,
) -> None:
    """Check that what a training will write can be written, and that there is room for it.

    Args:
        config: the configuration of the training.
        output: the student's folder.
        prompt: any prompt.
        device: the training's device.
        resumed: path and content of the checkpoint that it resumes from, if any.

    Raises:
        OutputError: if a file cannot be written, or the disk has too little room.
    """
    model, request = resolve_without_weights(teacher_request(config, prompt, device))
    done = 0 if resumed is None else int(resumed[1]["trainer"]["update"])
    weights = student_weights(model, config.weights)
    checkpoint = checkpoint_bytes(weights, config) if resumed is None else resumed[0].stat().st_size
    to_come = math.ceil((config.run.updates - done) / config.run.checkpoint_every)
    present = len(checkpoint_paths(output))
    # a new one is written before an old one is deleted
    needed = max(min(config.run.checkpoints_kept + 1, present + to_come) - present, 0) * checkpoint
    needed += 2 * weights if to_come > 0 else 0  # the student, of at least two bytes a weight
    weight_path = Path(TRANSFORMER_FOLDER) / FULL_WEIGHT_NAME if config.weights.full else Path(WEIGHT_NAME)
    paths = [output / name for name in (weight_path, CONFIG_NAME, CARD_NAME, LOG_NAME)]
    paths.append(checkpoint_path(output, config.run.updates))
    if config.embeddings is None:
        paths.append(output / EMBEDDINGS / INDEX_NAME)
    generator = config.generator
    if done < generator.ode_updates or generator.objective == "imitation":
        folder = output / TRAJECTORIES if config.trajectories is None else Path(config.trajectories).expanduser()
        points = generator.trajectories * (max(config.trajectory.steps) + 1)
        latent = model.empty_latent(model.latent_size(*request.size)).numel()
        there = sum(path.stat().st_size for path in files_in(folder, "*.safetensors"))
        missing = max(points * latent * POINTS_DTYPE.itemsize - there, 0)
        if config.trajectories is None:
            paths.append(folder / INDEX_NAME)
            needed += missing
        else:
            check_writable(folder / INDEX_NAME, needed=missing, purpose="the teacher's trajectories")
    check_writable(*paths, needed=needed, purpose="the training")


def student_weights(model: LoadedModel, config: WeightsConfig) -> int:
    """Return the number of a student's weights: of the transformer, or of the LoRA."""
    if config.full:
        return sum(parameter.numel() for parameter in model.transformer.parameters())
    return sum(
        config.rank * (module.in_features + module.out_features)
        for name, module in model.transformer.named_modules()
        if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in config.targets)
    )


def checkpoint_bytes(weights: int, config: DistillationConfig) -> int:
    """Return the bytes of a checkpoint: float32 weights and optimizer states of both roles, and an average if any.

    Args:
        weights: number of the student's weights.
        config: the configuration of the training.
    """
    averaged = 4 if config.weights.ema_decay else 0
    return weights * (len(TRAINED) * (4 + STATES_BYTES[config.optimizer.name]) + averaged)
