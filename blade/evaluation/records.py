"""Records of an evaluation's videos, as JSON lines in one file per shard, each of which can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blade.common.checks import shortened
from blade.common.fields import check_type
from blade.common.files import read_json_lines
from blade.generation.record import is_same_config
from blade.metrics.measures import Measure
from blade.metrics.registry import measures

if TYPE_CHECKING:
    from blade.evaluation.plan import EvaluationPlan

Record = dict[str, Any]
"""Measurements of one video, and everything needed to reproduce it, as plain JSON values."""

FIELDS: dict[str, Any] = {
    "run": Mapping[str, Any],
    "prompt": str,
    "seed": int,
    "blade_config": Mapping[str, Any] | None,
    "machine": Mapping[str, Any] | None,
    "versions": Mapping[str, Any] | None,
    "dtype": str | None,
    "dense_kernel": str | None,
    "layer_density": float | None,
    "run_density": float | None,
    "seconds": float | None,
    "seconds_denoising": float | None,
}
"""Types of a record's fields, beside those of measures; some are missing in records of earlier versions."""

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
            "lora_fingerprint": plan.lora_fingerprints.get(run.name),
            **plan.size,
        }
        for run in plan.evaluation.runs
    }
    records: Records = {}
    for path in sorted(plan.evaluation.folder.glob("records-*.jsonl")):
        for number, record in enumerate(read_json_lines(path), start=1):
            check_record(record, f"line {number} of {path}")
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


def check_record(record: Record, where: str) -> None:
    """Refuse a record whose values have other types than reports take.

    Raises:
        ValueError: if one has; `where` begins the message.
    """
    try:
        for name, hint in FIELDS.items():
            check_type(name, record.get(name), hint)
        check_type("run.name", record["run"].get("name"), str)
        for measure in measures().values():
            _check_measured(measure, record)
    except ValueError as error:
        raise ValueError(f"{where} is no record of a video: {error}") from None


def _check_measured(measure: Measure, record: Record) -> None:
    """Refuse a value that a measure cannot read."""
    value, by_frame = record.get(measure.record_key), f"{measure.name}_by_frame"
    try:
        if value is not None and measure.per == "video":
            measure.read(value)
    except Exception:  # whatever reading a value of another shape raises
        wanted = f"`{measure.record_key}` must be a value of {measure.heading}"
        raise ValueError(f"{wanted}, got {shortened(value)}.") from None
    if measure.by_frame is not None:
        check_type(by_frame, record.get(by_frame), list[float] | None)


def _settings(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run's settings without the paths of its files, whose contents are compared instead."""
    return {name: value for name, value in run.items() if name not in ("config", "student", "lora")}
