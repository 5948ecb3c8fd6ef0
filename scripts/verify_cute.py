"""Write which CuTe kernels are verified: those that every report of a card that checked them found right.

    python scripts/verify_cute.py

Reads the reports of `blade-bench gpu` in docs/results/cards/, and writes the file of the package by which
`implementation="auto"` takes these kernels.
"""

from __future__ import annotations

import json
from pathlib import Path

from blade.benchmarks.card.steps import CUTE_STEP
from blade.cli.command import run_script
from blade.common.files import write_files

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "docs" / "results" / "cards"
VERIFIED = ROOT / "kernels" / "blade_kernels" / "block_sparse" / "cute_verified.json"


def verified(folder: Path) -> list[str]:
    """Return the names of the kernels that are right by the reports in a folder, and wrong by none."""
    states: dict[str, set[str]] = {}
    for path in sorted(folder.glob("*.json")):
        for step in json.loads(path.read_text(encoding="utf-8"))["steps"]:
            if step["name"].startswith(CUTE_STEP) and step["state"] not in ("not begun", "out of time", "not here"):
                states.setdefault(step["name"].removeprefix(CUTE_STEP), set()).add(step["state"])
    return sorted(name for name, seen in states.items() if seen == {"done"})


def main() -> None:
    """Write the file."""
    names = verified(REPORTS)
    write_files({VERIFIED: (json.dumps({"kernels": names}, indent=2) + "\n").encode()})
    print(f"{len(names)} verified: {', '.join(names) or 'none'}")


if __name__ == "__main__":
    run_script(main)
