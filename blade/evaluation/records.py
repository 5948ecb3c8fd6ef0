"""The records of an evaluation's videos: JSON lines, of as many processes as there are shards, each resumable."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blade.attention.config import BladeConfig

if TYPE_CHECKING:
    from blade.evaluation.plan import EvaluationPlan

Record = dict[str, Any]
"""What was measured of one video, and everything needed to make it again: plain JSON values."""

Records = dict[tuple[str, str, int], Record]
"""Records by run, prompt and seed."""

ADVICE = "take another name or another folder."
"""What to do about records of something else."""


def read_records(plan: EvaluationPlan) -> Records:
    """The records of an evaluation's videos that exist, of all shards.

    Args:
        plan: The evaluation.

    Raises:
        ValueError: If a record is of other settings, another configuration or another model than the evaluation's.
    """
    wanted = {prompt.key for prompt in plan.evaluation.prompts}
    expected = {
        run.name: {
            **_settings(run.to_dict()),
            "fingerprint": plan.fingerprint,
            "student_fingerprint": plan.student_fingerprints.get(run.name),
            **plan.size,
        }
        for run in plan.evaluation.runs
    }
    records: Records = {}
    for path in sorted(plan.evaluation.folder.glob("records-*.jsonl")):
        for record in _read_lines(path):
            name, key = record["run"]["name"], (record["prompt"], record["seed"])
            if name not in expected or key not in wanted:
                continue
            found = record | _settings(record["run"])
            for field, value in expected[name].items():
                if found.get(field) != value:
                    different = f"`{field}`, {found.get(field)!r} instead of {value!r}"
                    raise ValueError(f"{path} holds run `{name}` with another {different}; {ADVICE}")
            if not _is_same(record["blade_config"], plan.requests[name].blade_config):
                raise ValueError(f"{path} holds run `{name}` with another `blade_config`; {ADVICE}")
            records.setdefault((name, *key), record)
    return records


def append_record(path: Path, record: Record) -> None:
    """Add a line to a file, after taking away what a killed process left of one."""
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _settings(run: dict[str, Any]) -> dict[str, Any]:
    """What is compared of a run's settings: not where configuration or student lie, which are compared themselves."""
    return {name: value for name, value in run.items() if name not in ("config", "student")}


def _is_same(recorded: dict[str, Any] | None, config: BladeConfig | None) -> bool:
    """Whether a recorded configuration is this one, fields that have come since at their defaults."""
    if recorded is None or config is None:
        return recorded is None and config is None
    return recorded == config.to_dict() or BladeConfig.from_dict(recorded) == config


def _read_lines(path: Path) -> list[Record]:
    """The complete lines of a file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
