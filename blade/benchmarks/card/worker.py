"""Measuring process of `blade-bench gpu`: a crash ends one step, not the benchmark.

    python -m blade.benchmarks.card.worker DEVICE JOURNAL STEP ...

The journal has a line of JSON for every event: `machine`, then for every step `begin`, any number of `partial`, and
`end`, `not here`, `wrong`, `failed` or `crashed`.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from blade_kernels.crashes import DeviceCrashError, naming_crashes

from blade.benchmarks.attention import PACKAGES
from blade.benchmarks.candidates import recorded_packages
from blade.benchmarks.card.checks import WrongResultError
from blade.benchmarks.card.steps import Step, card_steps
from blade.common.errors import first_line
from blade.common.files import append_json_line
from blade.common.machine import describe_machine, describe_versions

CRASHED_EXIT_CODE = 3
"""Of a worker whose device computes nothing more."""


def work(device: torch.device, journal: Path, names: Sequence[str]) -> int:
    """Run steps of `card_steps` by name, and return an exit code."""
    steps = {step.name: step for step in card_steps(device)}
    versions = describe_versions((*PACKAGES, "diffusers", *recorded_packages()))
    append_json_line(journal, {"event": "machine", "machine": describe_machine(device), "versions": versions})
    for name in names:
        if not _run(steps[name], device, journal):
            return CRASHED_EXIT_CODE
    return 0


def _run(step: Step, device: torch.device, journal: Path) -> bool:
    """Run a step, and return whether others can follow."""

    def write(event: str, **values: Any) -> None:
        append_json_line(journal, {"event": event, "step": step.name, **values})

    write("begin")
    began, event, values = time.monotonic(), "end", dict[str, Any]()
    try:
        with naming_crashes(step.name, device):
            values["result"] = step.run(device, lambda result: write("partial", result=result))
    except DeviceCrashError as error:
        event, values = "crashed", {"reason": str(error)}
    except WrongResultError as error:
        event, values = "wrong", {"reason": str(error)}
    except (NotImplementedError, ImportError) as error:
        event, values = "not here", {"reason": first_line(error)}
    except Exception as error:  # whatever drivers, compilers and other packages raise; the next step may work
        event, values = "failed", {"reason": f"{type(error).__name__}: {first_line(error)}"}
    write(event, seconds=round(time.monotonic() - began, 2), **values)
    gc.collect()
    if device.type == "cuda" and event != "crashed":
        torch.cuda.empty_cache()
    return event != "crashed"


if __name__ == "__main__":
    sys.exit(work(torch.device(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
