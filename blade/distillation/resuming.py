"""Resuming an interrupted run, and refusing to resume any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blade.common.leftovers import remove
from blade.common.terminal import logger
from blade.common.training_log import load_checkpoint
from blade.distillation.config import DistillationConfig
from blade.distillation.parallel import Processes

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in a student's folder."""

CONTENT = ("trainer", "hours", "config", "batch_size")
"""What a checkpoint holds at least."""

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
    "run.sequence_parallel",
    "run.batch_size",
    "run.accumulation",
)
"""Settings that may change when a run is resumed; of the last two, the product must stay the same."""


def checkpoint_path(output: Path, update: int) -> Path:
    """Return the path of the checkpoint after so many updates, in a student's folder."""
    return output / CHECKPOINTS / f"update-{update:06d}.pt"


def checkpoint_paths(output: Path) -> list[Path]:
    """Return the paths of the checkpoints in a student's folder, oldest first."""
    return sorted((output / CHECKPOINTS).glob("update-*.pt"), key=_updates)


def _updates(checkpoint: Path) -> int:
    """Return the number of updates in a checkpoint's name."""
    digits = checkpoint.stem.removeprefix("update-")
    return int(digits) if digits.isdecimal() else -1


def newest_checkpoint(output: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint in a student's folder that can be read, and its content; None if there is none.

    A newer one that cannot be read, since it is truncated for example, is passed over with a warning.

    Raises:
        ValueError: if there are checkpoints, and none can be read.
    """
    problem = None
    for path in reversed(checkpoint_paths(output)):
        try:
            content = load_checkpoint(path)
        except ValueError as error:
            problem = error
        else:
            missing = [name for name in CONTENT if content is not None and name not in content]
            if content is not None and not missing:
                return path, content
            problem = ValueError(f"the checkpoint {path} lacks {missing[0] if missing else 'its file'}")
        logger.warning(f"{problem}; it is passed over for the one before")
    if problem is not None:
        raise ValueError(f"{problem}, and no other can be; delete {output / CHECKPOINTS} to begin anew.")
    return None


def remove_checkpoints(output: Path, update: int, kept: int) -> None:
    """Delete checkpoints after one was written: old ones, and newer ones, which were passed over.

    Args:
        output: the student's folder.
        update: number of the one that was written.
        kept: how many stay.
    """
    paths = checkpoint_paths(output)
    valid = [path for path in paths if _updates(path) <= update]
    for path in paths:
        if path not in valid[-kept:]:
            remove(path)


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
    batch = run.batch_size * run.accumulation * processes.groups
    if saved["batch_size"] != batch:
        differences.append(f"{saved['batch_size']} samples an update instead of {batch}")
    if config.optimizer.schedule != "constant" and before["run.updates"] != now["run.updates"]:
        differences.append(f"`run.updates` {before['run.updates']} instead of {now['run.updates']}, with a schedule")
    if differences:
        raise ValueError(f"The checkpoint {path} was made with {'; '.join(differences)}. Name another `output`.")
