"""Benchmark of a card: steps in another process, until all are done or the time is over."""

from __future__ import annotations

import datetime
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from blade.benchmarks.card.steps import Step, card_steps
from blade.common.files import read_json_lines

POLL_SECONDS = 0.2

LAST = ("end", "not here", "wrong", "failed", "crashed")
"""Events after which a step is over; see `blade.benchmarks.card.worker`."""


@dataclass(frozen=True, kw_only=True)
class CardBenchmark:
    """Options of the benchmark of a card."""

    minutes: float = 4.0
    """Time in which to measure; what has begun then is ended, and what it has found so far is kept."""
    device: str = "cuda"
    """The card; on a CPU all is measured in small."""

    def __post_init__(self) -> None:
        if not 0 < self.minutes < 1440:
            raise ValueError(f"`minutes` must be above 0 and below 1,440, got {self.minutes:g}.")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"`device` must exist, got {self.device!r} and no CUDA device is available.")


class Worker(Protocol):
    """A process that measures."""

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""

    def kill(self) -> None:
        """End it at once."""

    def wait(self) -> int:
        """Wait for its end."""


def start_worker(device: str, journal: Path, names: Sequence[str], errors: Path) -> Worker:
    """Start a process that runs steps; what it says on standard error goes to a file."""
    line = [sys.executable, "-m", "blade.benchmarks.card.worker", device, str(journal), *names]
    with errors.open("wb") as file:
        return subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def run_card_benchmark(
    settings: CardBenchmark,
    *,
    command: str | None = None,
    on_step: Callable[[str], None] = lambda text: None,
    on_report: Callable[[dict[str, Any]], None] = lambda report: None,
    start: Callable[[str, Path, Sequence[str], Path], Worker] = start_worker,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Measure a card, best first: correctness, attention, whole videos, an update of a distillation, tuning.

    Steps run in another process. Where one crashes it, or hangs, the next is run in a new one.

    Args:
        settings: the options.
        command: the command line to record.
        on_step: called with what is being measured.
        on_report: called with the report so far after every step, so that stopping loses nothing.
        start: starts a worker; see `start_worker`.
        clock: seconds that pass.
        pause: waits for seconds.

    Returns:
        Plain JSON values: `date`, `command`, `settings`, `machine`, `versions`, `minutes` that it took, and `steps`,
        each with `name`, `part`, `state`, and as they apply `seconds`, `reason` and `result`. States: `done`; `not
        here`, with what it lacks; `wrong`, for another result than the specification's; `failed`; `crashed`, with the
        process or the card; `hung`; `out of time`, perhaps with a part of the result; and `not begun`.

    Raises:
        RuntimeError: if the process cannot begin with any step.
    """
    began, steps = clock(), card_steps(torch.device(settings.device))
    deadline = began + 60 * settings.minutes
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "settings": asdict(settings),
        "machine": None,
        "versions": None,
        "minutes": 0.0,
        "steps": [{"name": step.name, "part": step.part, "state": "not begun"} for step in steps],
    }
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(steps, report, Path(folder), began, on_step, on_report)
        while run.remaining and clock() < deadline:
            worker = start(settings.device, run.new_journal(), run.remaining, run.errors)
            try:
                ended_by = run.watch(worker, deadline, clock, pause)
            finally:
                if worker.poll() is None:
                    worker.kill()
                    worker.wait()
            run.close(ended_by, worker.wait(), clock())
            on_report(report)
    return report


class _Run:
    """Steps that are left, and what the workers say of them."""

    def __init__(
        self,
        steps: Sequence[Step],
        report: dict[str, Any],
        folder: Path,
        began: float,
        on_step: Callable[[str], None],
        on_report: Callable[[dict[str, Any]], None],
    ) -> None:
        self.began = began
        self.limits = {step.name: step.limit for step in steps}
        self.remaining = [step.name for step in steps]
        self.report, self.entries = report, {entry["name"]: entry for entry in report["steps"]}
        self.folder, self.errors, self.journal = folder, folder / "errors.txt", folder / "0.jsonl"
        self.on_step, self.on_report = on_step, on_report
        self.current: str | None = None
        self.journals = self.lines = 0
        self.begun_at = 0.0

    def new_journal(self) -> Path:
        """Return the file that the next worker writes."""
        self.journals, self.lines, self.current = self.journals + 1, 0, None
        self.journal = self.folder / f"{self.journals}.jsonl"
        return self.journal

    def watch(
        self, worker: Worker, deadline: float, clock: Callable[[], float], pause: Callable[[float], None]
    ) -> str:
        """Read what a worker says until it ends, and return why: `itself`, `hung` or `out of time`."""
        while worker.poll() is None:
            self.read(clock())
            if clock() >= deadline:
                return "out of time"
            if self.current is not None and clock() - self.begun_at > self.limits[self.current]:
                return "hung"
            pause(POLL_SECONDS)
        return "itself"

    def read(self, now: float) -> None:
        """Take in the new lines of the journal."""
        self.report["minutes"] = round((now - self.began) / 60, 2)
        lines = read_json_lines(self.journal)
        for line in lines[self.lines :]:
            self._take(line, now)
        self.lines = len(lines)

    def _take(self, line: dict[str, Any], now: float) -> None:
        event, name = line["event"], line.get("step")
        if event == "machine":
            self.report |= {"machine": line["machine"], "versions": line["versions"]}
            return
        assert name is not None
        entry = self.entries[name]
        if event == "begin":
            self.remaining.remove(name)
            self.current, self.begun_at = name, now
            self.on_step(name)
        elif event == "partial":
            entry["result"] = line["result"]
        elif event in LAST:
            entry |= {key: line[key] for key in ("seconds", "reason", "result") if key in line}
            entry["state"] = "done" if event == "end" else event
            self.current = None
            self.on_report(self.report)

    def close(self, ended_by: str, code: int, now: float) -> None:
        """Take in a worker's last words, and note how the step ended in which it was."""
        self.read(now)
        if self.current is not None:
            entry = self.entries[self.current]
            entry["state"] = "crashed" if ended_by == "itself" else ended_by
            entry["reason"] = {
                "itself": f"the process ended with exit code {code}: {self._last_error()}",
                "hung": f"it took more than {self.limits[self.current]:g} s",
                "out of time": "the time was over",
            }[ended_by]
        elif ended_by == "itself" and self.lines <= 1 and self.remaining:
            raise RuntimeError(f"the process that measures ended with exit code {code}: {self._last_error()}")

    def _last_error(self) -> str:
        text = self.errors.read_text(encoding="utf-8", errors="replace").strip() if self.errors.exists() else ""
        return text.rpartition("\n")[2] or "nothing was said"
