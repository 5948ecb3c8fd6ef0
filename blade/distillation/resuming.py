"""Resuming an interrupted run, and refusing to resume any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blade.distillation.config import DistillationConfig
from blade.distillation.parallel import Processes

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in a student's folder."""

FREE = (
    "output",
    "embeddings",
    "trajectories",
    "trackers",
    "trajectory.sampling_noise_kept",
    "validation",
    "run.updates",
    "run.checkpoint_every",
    "run.checkpoints_kept",
    "run.device",
    "run.parallel",
    "run.batch_size",
    "run.accumulation",
)
"""Settings that may change when a run is resumed; of the last two, the product must stay the same."""


def newest_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint in a student's folder, if there is one."""
    checkpoints = sorted((output / CHECKPOINTS).glob("update-*.pt"))
    return checkpoints[-1] if checkpoints else None


def flat(config: DistillationConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a configuration to names such as `run.updates`."""
    values = config if isinstance(config, Mapping) else config.to_dict()
    flattened: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flattened |= {f"{name}.{key}": item for key, item in flat(value).items()}
        else:
            flattened[name] = value
    return flattened


def check_resumable(
    saved: Mapping[str, Any], config: DistillationConfig, processes: Processes, path: Path | None
) -> None:
    """Refuse to resume with another configuration, naming the differences.

    Raises:
        ValueError: if the checkpoint was made with other settings than those in `FREE`.
    """
    before, now = flat(saved["config"]), flat(config)
    names = [name for name in now if not name.startswith(FREE) and before.get(name) != now[name]]
    differences = [f"`{name}` {before.get(name)} instead of {now[name]}" for name in names]
    run = config.run
    batch = run.batch_size * run.accumulation * processes.count
    if saved["batch_size"] != batch:
        differences.append(f"{saved['batch_size']} samples an update instead of {batch}")
    if config.optimizer.schedule != "constant" and before["run.updates"] != now["run.updates"]:
        differences.append(f"`run.updates` {before['run.updates']} instead of {now['run.updates']}, with a schedule")
    if differences:
        raise ValueError(f"The checkpoint {path} was made with {'; '.join(differences)}. Name another `output`.")
