"""Break the commands in the middle of their work, and count what is not mended by starting them again.

    python scripts/try_faults.py --kills 60 --full-disks 32 --pairs 20 --fuzzed 3000

Kills them at random times and inside writes, fills the disk, starts two on one folder, and damages the files that they
read. Afterwards nothing may be half-written, nothing left over, no traceback shown, nothing wrong accepted in silence,
and what comes out be that of a run which nothing happened to.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from fault_fuzz import damaged, describe, fault_of, readable_files
from fault_work import COMMANDS, PROMPTS, Ended, Work, contents, differing, end, half_written, leftovers

from blade.cli.command import run_script
from blade.common.tables import markdown_table

FAULTS = ("half-written file", "leftover", "traceback", "wrong end", "another result", "silent acceptance")
"""Faults of a command that was broken and started again, or of how a damaged file was read."""

CALLS = 12
"""Calls of `os.replace` and `os.fsync` among which a placed fault is drawn; commands that make fewer stay whole."""

REFUSALS = ("is in use by process", "is being made by process")


class Campaign:
    """Faults, and what was found of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.lock = folder, seed, threading.Lock()
        self.work = Work(folder)
        self.work.prompts.write_text(PROMPTS, encoding="utf-8")
        self.expected: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self.tried = Counter[str]()
        self.broken = Counter[str]()
        self.found = Counter[tuple[str, str]]()

    def run_whole(self, command: str) -> None:
        """Run a command once without a fault, for its time and its result."""
        output = self.folder / f"whole-{command}"
        began = time.monotonic()
        ended = end(self.work.start(command, output))
        self.seconds[command] = time.monotonic() - began
        if ended.code:
            raise RuntimeError(f"{command} fails without a fault: {ended.last_line}")
        self.expected[command] = contents(output)

    def chance(self, kind: str, number: int = 0) -> random.Random:
        """Return the random numbers of an attempt, the same whatever else is tried."""
        return random.Random(f"{self.seed} {kind} {number}")

    def count(self, counter: Counter[Any], key: Any, more: int = 1) -> None:
        """Add to a counter that other threads add to."""
        with self.lock:
            counter[key] += more

    def note(self, kind: str, fault: str, detail: str) -> None:
        """Count a fault."""
        self.count(self.found, (kind, fault))
        print(f"{kind}: {fault}: {detail}", flush=True)

    def check_said(self, kind: str, ended: Ended, codes: tuple[int, ...], *, says: tuple[str, ...] = ()) -> None:
        """Check how a command ended, and what it said."""
        if "Traceback" in ended.error:
            self.note(kind, "traceback", ended.error[-600:])
        elif ended.code not in codes or (says and not any(text in ended.last_line for text in says)):
            self.note(kind, "wrong end", f"exit code {ended.code}: {ended.last_line}")

    def check_mended(self, kind: str, command: str, output: Path) -> None:
        """Start a command again after a fault, and check what is there then."""
        if broken := half_written(output) if output.exists() else []:
            self.note(kind, "half-written file", f"{command}: {broken[0]}")
        ended = end(self.work.start(command, output))
        self.check_said(kind, ended, (0,))
        if left := leftovers(output):
            self.note(kind, "leftover", f"{command}: {left[0]}")
        if names := differing(contents(output), self.expected[command]):
            self.note(kind, "another result", f"{command}: {', '.join(names[:4])}")

    def kill(self, number: int) -> None:
        """Kill a command at a random time, or inside a write, once or twice."""
        command, chance = COMMANDS[number % len(COMMANDS)], self.chance("kill", number)
        output = self.folder / f"kill-{number}"
        self.count(self.tried, "kill")
        for _ in range(chance.choice((1, 1, 2))):
            if chance.random() < 0.5:
                function = chance.choice(("replace", "fsync"))
                ended = end(self.work.start(command, output, chance.randint(1, CALLS), function))
                self.check_said("kill", ended, (0, -signal.SIGKILL))
            else:
                process = self.work.start(command, output)
                sent = chance.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
                with_patience = chance.uniform(0, self.seconds[command])
                try:
                    process.wait(with_patience)
                except subprocess.TimeoutExpired:
                    process.send_signal(sent)
                ended = end(process)
                # before Python and PyTorch are up, a signal ends the process by itself
                self.check_said("kill", ended, (0, -sent, 128 + sent))
            self.count(self.broken, "kill", ended.code != 0)
        self.check_mended("kill", command, output)

    def fill_disk(self, number: int) -> None:
        """Let the disk be full from some write on."""
        command, chance = COMMANDS[number % len(COMMANDS)], self.chance("full disk", number)
        output = self.folder / f"full-{number}" / "out"
        output.parent.mkdir()
        self.count(self.tried, "full disk")
        with small_disk(output.parent, chance.choice((4, 8, 16, 32, 64))) as mounted:
            place = 0 if mounted else chance.randint(1, CALLS)
            ended = end(self.work.start(command, output, place, "fsync", "full"))
            self.count(self.broken, "full disk", ended.code != 0)
            says = ("No space left", "the disk of", "free on its disk") if ended.code else ()
            self.check_said("full disk", ended, (0, 1), says=says)
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=256m", str(output.parent)], check=True)
            self.check_mended("full disk", command, output)

    def pair(self, number: int) -> None:
        """Start a command twice on one folder: at a random time, or while the first holds a lock and stands still."""
        command, chance = COMMANDS[number % len(COMMANDS)], self.chance("pair", number)
        output = self.folder / f"pair-{number}"
        self.count(self.tried, "pair")
        first = self.work.start(command, output)
        stands_still = number % 2 == 0 and command != "list"  # two lists wait for each other's videos
        if stands_still:
            stop_holding_a_lock(first, output)
        else:
            time.sleep(chance.uniform(0, self.seconds[command] / 2))
        second = end(self.work.start(command, output))
        if stands_still:
            first.send_signal(signal.SIGCONT)
        both = [end(first), second]
        self.count(self.broken, "pair", any(ended.code for ended in both))
        if all(ended.code for ended in both):
            self.note("pair", "wrong end", f"{command}: neither works: {both[1].last_line}")
        for ended in both:
            self.check_said("pair", ended, (0, 1), says=REFUSALS if ended.code else ())
        self.check_mended("pair", command, output)

    def fuzz(self, count: int) -> None:
        """Damage files that commands read."""
        record = self.folder / "whole-generate" / "ball.json"
        files, chance = readable_files(self.folder / "fuzzed", record), self.chance("damaged file")
        for number in range(count):
            file = files[number % len(files)]
            content = damaged(file.path.read_bytes(), chance)
            self.count(self.tried, "damaged file")
            if found := fault_of(file, content):
                self.note("damaged file", found[0], f"{file.name}: {found[1]}, of {describe(content)}")


def stop_holding_a_lock(process: subprocess.Popen[str], output: Path) -> None:
    """Halt a process as soon as it holds a lock in its folder, or let it end."""
    while process.poll() is None and not any(output.glob(".blade-*.json")):
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[bool]:
    """Put a small disk into an empty folder, and yield whether this machine lets us."""
    line = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    is_root = sys.platform == "linux" and os.geteuid() == 0
    mounted = is_root and subprocess.run(line, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def main(
    kills: Annotated[int, typer.Option(help="Commands that are killed.")] = 6,
    full_disks: Annotated[int, typer.Option(help="Commands whose disk is full.")] = 4,
    pairs: Annotated[int, typer.Option(help="Pairs of commands on one folder.")] = 4,
    fuzzed: Annotated[int, typer.Option(help="Files that are damaged.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of times, places and damages.")] = 0,
    workers: Annotated[int, typer.Option(help="Attempts at a time.")] = 2,
) -> None:
    """Try the faults, and print a table; exit code 1 if anything is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), seed)
        counts = ((kills, campaign.kill), (full_disks, campaign.fill_disk), (pairs, campaign.pair))
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(campaign.run_whole, COMMANDS))
            for count, attempt in counts:
                list(pool.map(attempt, range(count)))
        campaign.fuzz(fuzzed)
    rows = [
        [kind, f"{tried}", f"{campaign.broken[kind]}", *(f"{campaign.found[kind, fault]}" for fault in FAULTS)]
        for kind, tried in campaign.tried.items()
    ]
    print("\n".join(markdown_table(["fault", "tried", "ended by it", *FAULTS], rows)))
    raise typer.Exit(1 if campaign.found else 0)


if __name__ == "__main__":
    run_script(main)
