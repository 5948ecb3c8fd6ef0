"""Compare what two revisions compute, bit for bit, as a guard for refactoring.

    python scripts/compare_revisions.py HEAD~3 HEAD
    python scripts/compare_revisions.py HEAD WORKTREE --only generate,families   # uncommitted changes included
    python scripts/compare_revisions.py v0.1.0 HEAD --keep runs --jobs 2

Each revision is checked out in a temporary folder and does the same work there, on the CPU with one thread:
`compare_revisions_work.py`, as it stands beside this file. Every line names a result that was compared; the exit code
is 0 only if all are the same and neither side lacks one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer

from blade.cli.command import run_script

ROOT = Path(__file__).resolve().parents[1]

WORK = Path(__file__).resolve().with_name("compare_revisions_work.py")

CASES = ("families", "generate", "profile", "evaluate", "distill")
"""Names of the cases, the quickest first."""

WORKING_TREE = ("WORKTREE", ".")
"""Revisions that mean the files as they are, uncommitted changes included."""

ERROR_LINES = 25
"""Lines of stderr that are shown of a case that failed."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}


class Side(NamedTuple):
    """One of the two revisions."""

    name: str
    """`old` or `new`."""
    tree: Path
    """Its files."""
    runs: Path
    """Folder of its results."""


def compare_arrays(old: Mapping[str, np.ndarray], new: Mapping[str, np.ndarray]) -> dict[str, str | None]:
    """Compare named arrays bit for bit: a NaN is the same only as a NaN of the same bits, and 0 is not -0.

    Returns:
        By name, how the two differ, or None where they are the same; the names of both sides, those of `old` first.
    """
    differences: dict[str, str | None] = {}
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in new:
            differences[name] = "missing in new"
        elif name not in old:
            differences[name] = "missing in old"
        else:
            differences[name] = _difference(old[name], new[name])
    return differences


def _difference(old: np.ndarray, new: np.ndarray) -> str | None:
    both_text = old.dtype.kind == new.dtype.kind == "U"  # whose type has the length of the longest
    if old.dtype != new.dtype and not both_text:
        return f"{new.dtype} instead of {old.dtype}"
    if old.shape != new.shape:
        return f"shape {new.shape} instead of {old.shape}"
    if both_text:
        differs = old != new
    elif old.tobytes() == new.tobytes():
        return None
    else:
        differs = _bytes(old) != _bytes(new)
    if not differs.any():
        return None
    count = f"{differs.reshape(max(old.size, 1), -1).any(1).sum()} of {old.size} values"
    if both_text:
        return f"{count}, such as {str(new[differs].flat[0])!r} instead of {str(old[differs].flat[0])!r}"
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(new.astype(np.float64) - old.astype(np.float64))
    largest = "nan" if np.isnan(distance).all() else f"{np.nanmax(distance):.3g}"
    return f"max abs difference {largest}, {count}"


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.frombuffer(array.tobytes(), np.uint8)


def compare_case(case: str, sides: Sequence[Side]) -> tuple[int, int]:
    """Print a line for each result of a case.

    Returns:
        How many results there are, and how many differ. A case without results counts as one that differs.
    """
    old, new = (dict(np.load(side.runs / f"{case}.npz", allow_pickle=False)) for side in sides)
    differences = compare_arrays(old, new)
    for name, difference in differences.items():
        print(f"same     {case}: {name}" if difference is None else f"DIFFERS  {case}: {name}: {difference}")
    if not differences:
        print(f"DIFFERS  {case}: no results")
        return 0, 1
    return len(differences), sum(difference is not None for difference in differences.values())


def run_case(case: str, sides: Sequence[Side], jobs: int) -> list[str]:
    """Do a case's work for both sides, `jobs` at a time.

    Returns:
        What to print about each side that failed.
    """
    failures = []
    for first in range(0, len(sides), jobs):
        together = sides[first : first + jobs]
        began = time.monotonic()
        with ExitStack() as stack:
            processes = [stack.enter_context(_started(case, side)) for side in together]
            codes = [process.wait() for process in processes]
        print(
            f"{case}: {' and '.join(side.name for side in together)} in {time.monotonic() - began:.0f} s", flush=True
        )
        failures += [_failure(case, side, code) for side, code in zip(together, codes) if code]
    return failures


@contextmanager
def _started(case: str, side: Side) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does a case's work for a side; it is killed if it is still running at the end."""
    folder = side.runs / case
    folder.mkdir(parents=True)
    packages = [side.tree, side.tree / "kernels", side.tree / "pipelines"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(map(str, packages))}
    environment.pop("TRITON_INTERPRET", None)
    # -P: the folder of the script is not searched for modules
    command = [sys.executable, "-P", str(WORK), case, str(side.runs / f"{case}.npz"), str(side.tree)]
    with _log(case, side, "stdout").open("wb") as out, _log(case, side, "stderr").open("wb") as err:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _log(case: str, side: Side, stream: str) -> Path:
    return side.runs / f"{case}.{stream}"


def _failure(case: str, side: Side, code: int) -> str:
    text = _log(case, side, "stderr").read_text(encoding="utf-8", errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    tail = "\n".join(f"    {line}" for line in lines[-ERROR_LINES:])
    return f"FAILED   {case}: {side.name} ended with {code}\n{tail}"


@contextmanager
def checked_out(revision: str, folder: Path) -> Iterator[Path]:
    """The files of a revision in a new folder, which is gone afterwards."""
    if revision in WORKING_TREE:
        _copy_working_tree(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)
        return
    try:
        _git("worktree", "add", "--quiet", "--detach", str(folder), _commit(revision))
        yield folder
    finally:
        subprocess.run(
            ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(folder)],
            capture_output=True,
            check=False,  # it was perhaps never added
        )


def _commit(revision: str) -> str:
    return _git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}").strip()


def _copy_working_tree(folder: Path) -> None:
    for name in _git("ls-files", "-co", "--exclude-standard", "-z").split("\0"):
        source, target = ROOT / name, folder / name
        if name and source.is_file():  # one that is deleted is listed too
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise typer.BadParameter(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _parse_cases(text: str | None) -> tuple[str, ...]:
    names = CASES if text is None else tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in CASES:
            raise typer.BadParameter(f"`--only` must name some of {', '.join(CASES)}, got {name!r}.")
    return names


def main(
    old: Annotated[str, typer.Argument(help="A revision, or WORKTREE or . for the files as they are.")],
    new: Annotated[str, typer.Argument(help="Another one, or the same.")],
    only: Annotated[str | None, typer.Option(help=f"Some of the cases {','.join(CASES)}.", show_default=False)] = None,
    jobs: Annotated[int, typer.Option(min=1, max=2, help="2: do the work of both revisions at the same time.")] = 1,
    keep: Annotated[
        Path | None, typer.Option(help="A new folder, in which results and logs stay.", show_default=False)
    ] = None,
) -> None:
    """Compare what two revisions compute, bit for bit."""
    cases = _parse_cases(only)
    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise typer.BadParameter(f"`--keep` must be a new or an empty folder, got {keep}.")
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-revisions-")))
        results = temporary / "runs" if keep is None else keep.resolve()
        sides = [
            Side(name, stack.enter_context(checked_out(revision, temporary / name)), results / name)
            for name, revision in (("old", old), ("new", new))
        ]
        failures = []
        compared = different = 0
        for case in cases:
            case_failures = run_case(case, sides, jobs)
            failures += case_failures
            for failure in case_failures:
                print(failure, file=sys.stderr, flush=True)
            if not case_failures:
                count, count_different = compare_case(case, sides)
                compared, different = compared + count, different + count_different
    print(f"{compared} results of {', '.join(cases)} compared: {different} differ; {len(failures)} runs failed")
    if different or failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_script(main)
