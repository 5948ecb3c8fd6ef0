"""Records of an evaluation's videos, as JSON lines in one file per shard, each of which can be resumed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade.common.files import read_json_lines
from blade.generation.record import is_same_config

if TYPE_CHECKING:
    from blade.evaluation.plan import EvaluationPlan

Record = dict[str, Any]
"""Measurements of one video, and everything needed to reproduce it, as plain JSON values."""

Records = dict[tuple[str, str, int], Record]
"""Records by run, prompt and seed."""

ADVICE = "take another name or another folder."
"""Advice in the errors about records made with other settings."""


def read_records(plan: EvaluationPlan) -> Records:
    """Read the existing records of an evaluation's videos, from all shards.

    Args:
        plan: The evaluation.

    Raises:
        ValueError: If a record was made with other settings, another configuration or another model.
    """
    prompt_keys = {prompt.key for prompt in plan.evaluation.prompts}
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
        for record in read_json_lines(path):
            name, key = record["run"]["name"], (record["prompt"], record["seed"])
            if name not in expected or key not in prompt_keys:
                continue
            recorded = record | _settings(record["run"])
            for field, value in expected[name].items():
                if recorded.get(field) != value:
                    different = f"`{field}`, {recorded.get(field)!r} instead of {value!r}"
                    raise ValueError(f"{path} holds run `{name}` with another {different}; {ADVICE}")
            if not is_same_config(record["blade_config"], plan.requests[name].blade_config):
                raise ValueError(f"{path} holds run `{name}` with another `blade_config`; {ADVICE}")
            records.setdefault((name, *key), record)
    return records


def _settings(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings without the paths of configuration and student, whose contents are compared instead."""
    return {name: value for name, value in run.items() if name not in ("config", "student")}
