"""Estimate of a training's time and memory, from two updates of each kind."""

from __future__ import annotations

import math
import time

import torch

from blade.common.machine import GIB, describe_machine, describe_versions, peak_memory_gib
from blade.distillation.reports import PACKAGES, Estimate
from blade.distillation.roles import TRAINED
from blade.distillation.teacher_trajectories import POINTS_DTYPE, ExampleTrajectories
from blade.distillation.trainer import Trainer


def estimate(trainer: Trainer, prompts: int) -> Estimate:
    """Run two updates of each kind and measure the second.

    Args:
        trainer: a training that has not begun; it cannot be used afterwards.
        prompts: number of prompts; 0 with random weights.
    """
    device, config, generator = trainer.processes.device, trainer.config, trainer.config.generator
    seconds_trajectories = seconds_ode_update = gib_trajectories = 0.0
    if generator.ode_updates or generator.objective == "imitation":
        seconds_trajectories, gib_trajectories = _trajectories(trainer)
    if generator.ode_updates:
        seconds_ode_update = _second_update(trainer, 0)
    seconds_update = _second_update(trainer, generator.ode_updates)
    count = sum(parameter.numel() for role in TRAINED for parameter in trainer.roles.named_parameters(role).values())
    return Estimate(
        seconds_trajectories=seconds_trajectories,
        gib_trajectories=gib_trajectories,
        seconds_ode_update=seconds_ode_update,
        seconds_update=seconds_update,
        ode_updates=generator.ode_updates,
        updates=config.run.updates,
        peak_gib=peak_memory_gib(device),
        device=str(describe_machine(device)["device"]),
        versions=describe_versions(PACKAGES),
        trained_parameters=count,
        prompts=prompts,
    )


def _second_update(trainer: Trainer, number: int) -> float:
    """Run an update twice, and return the seconds of the second."""
    for _ in range(2):
        trainer.update = number
        seconds = trainer.train_update()["update_seconds"]
    return seconds


def _trajectories(trainer: Trainer) -> tuple[float, float]:
    """Estimate the seconds and GiB of all teacher trajectories, extrapolated from one of the student's steps."""
    run, device, count = trainer.config.run, trainer.processes.device, trainer.config.generator.trajectories
    times, rounds = trainer.trajectory_times(), math.ceil(count / (run.batch_size * trainer.processes.groups))
    conditions = trainer.embeddings.rows([0] * run.batch_size).on(device)
    noise = torch.zeros(run.batch_size, *conditions.latent_shape, device=device)
    for _ in range(2):
        began = time.perf_counter()
        with torch.no_grad():
            float(trainer.updates[0].teacher_trajectory(conditions, noise, times[:2]).sum())  # waits for the device
        seconds = time.perf_counter() - began
    trainer.trajectories = ExampleTrajectories(conditions.latent_shape)
    size = count * len(times) * math.prod(conditions.latent_shape) * POINTS_DTYPE.itemsize
    return seconds * (len(times) - 1) * rounds, size / GIB
