"""The table of published students in the guide is that of the data."""

from __future__ import annotations

import re
from pathlib import Path

from blade.families.data import ReleasedStudent
from blade.families.registry import released_students

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "guide.md"


def row(student: ReleasedStudent) -> str:
    """Return a student's line of the table."""
    if student.refused is not None:
        return f"| `{student.source}` | {student.about} | refused | {student.refused} |"
    options = student.scheduler_options
    if "times" in options:
        sampling = f"at {', '.join(f'{time:g}' for time in options['times'])}"
        sampling += f", shift {options['flow_shift']:g}" if "flow_shift" in options else ""
        sampling += ", noise renewed" if options.get("noise_kept") == 0 else ""
    else:
        sampling = student.scheduler
        shift = options.get("flow_shift", options.get("shift"))
        sampling += "" if shift is None else f", shift {shift:g}"
    sampling += f"; guidance {student.guidance_scale:g}"
    steps = " or ".join(map(str, student.steps))
    return f"| `{student.source}` | {student.about} | {steps} | {sampling} |"


def test_the_guides_table_of_students_is_the_datas() -> None:
    section = GUIDE.read_text(encoding="utf-8").partition("## Few-step students that exist")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if re.match(r"\| `", line)]
    assert rows == [row(student) for student in sorted(released_students(), key=lambda one: one.refused is not None)]
