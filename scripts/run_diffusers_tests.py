"""Run Diffusers' own tests with BLADE applied to their transformers, and compare with the same tests without it.

    python scripts/run_diffusers_tests.py PATH_TO_DIFFUSERS

The folder is a checkout of Diffusers' repository, of which the tests are taken; what they test is the installed
Diffusers. Three runs: without BLADE, with it at a sparsity of 0, where every output of a transformer must be bitwise
the same, and at 0.5, where every test that passes without BLADE must pass. The Hub's tiny random models, which many
tests load, have stand-ins. What is known to fail is in `diffusers_known.yaml`, with the reason.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from blade.cli.command import run_script
from blade.common.reading import read_json
from blade.common.tables import check_table, markdown_table, write_table

PLAIN, DENSE, SPARSE = "none", "0", "0.5"
"""The runs, by `--blade-sparsity`."""

GROUPS = ("models", "lora", "hooks", "pipelines", "modular_pipelines", "single_file")
"""Folders of the tests that a row of the table is made of."""

HERE = Path(__file__).resolve().parent

Tests = dict[str, dict[str, Any]]
"""Records of every test, by its id."""


@dataclass(frozen=True)
class Known:
    """Tests that are known to fail with BLADE."""

    tests: str
    """A regular expression that their ids match somewhere."""
    reason: str
    """Why, in a sentence."""


@dataclass
class Row:
    """Counts of a group of tests, and its failures with BLADE."""

    group: str
    counts: Counter[str] = field(default_factory=Counter)
    known: list[tuple[str, str, str]] = field(default_factory=list)
    """Test, sparsity and reason."""
    unexpected: list[tuple[str, str, str]] = field(default_factory=list)
    """Test, sparsity and what it says."""


def main(
    folder: Annotated[Path, typer.Argument(help="A checkout of Diffusers' repository.")],
    output: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("outputs/diffusers-tests"),
    group: Annotated[list[str] | None, typer.Option(help="Only these folders of tests; repeatable.")] = None,
    keyword: Annotated[str, typer.Option(help="Only tests that match this, as `pytest -k`.")] = "",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Take runs that are in the folder already.")] = False,
) -> None:
    """Run Diffusers' own tests with BLADE and without, and print the table; 1 if a test fails that is not known to."""
    tests = folder / "tests"
    if not (tests / "conftest.py").is_file():
        raise ValueError(
            f"`folder` must be a checkout of Diffusers' repository, with tests/conftest.py, got {folder}."
        )
    groups = tuple(group or GROUPS)
    unknown = [name for name in groups if name not in GROUPS]
    if unknown:
        raise ValueError(f"`group` must be one of {', '.join(GROUPS)}, got {unknown[0]!r}.")
    check_table(output, "diffusers-tests")
    versions = {"installed": version("diffusers"), "tests": _version(folder)}
    print(f"Diffusers {versions['installed']} is installed; the tests are of {versions['tests']}.", flush=True)
    stand_ins = _write_stand_ins(output / "hub")
    known = [Known(**item) for item in yaml.safe_load((HERE / "diffusers_known.yaml").read_text(encoding="utf-8"))]
    rows = []
    for name in groups:
        files = _files(tests / name)
        if files:
            runs = {
                sparsity: _run(folder, files, sparsity, output, name, keyword, workers, resume)
                for sparsity in (PLAIN, DENSE, SPARSE)
            }
            rows.append(compare(name, runs, known))
    _write(output, rows, versions, stand_ins, workers)
    raise SystemExit(int(any(row.unexpected for row in rows)))


def compare(group: str, runs: dict[str, Tests], known: list[Known]) -> Row:
    """Compare the runs of a group of tests.

    A test counts where it passes without BLADE. It fails with BLADE where it does not pass, or, at a sparsity of 0,
    where an output of a transformer differs in a bit.
    """
    row = Row(group)
    plain, dense, sparse = runs[PLAIN], runs[DENSE], runs[SPARSE]
    for test, before in plain.items():
        row.counts[before["outcome"]] += 1
        if before["outcome"] != "passed":
            continue
        row.counts["outputs"] += len(before["digests"])
        row.counts["running"] += bool(before["digests"])
        for sparsity, tests in ((DENSE, dense), (SPARSE, sparse)):
            after = tests.get(test, {"outcome": "failed", "reason": "it did not run", "digests": []})
            problem = None
            if after["outcome"] != "passed":
                problem = f"{after['outcome']}: {after.get('reason', '')}"
            elif sparsity == DENSE and after["digests"] != before["digests"]:
                problem = "outputs of a transformer differ"
            if problem is None:
                row.counts[f"passed at {sparsity}"] += 1
                row.counts["sparse"] += sparsity == SPARSE and after["sparse_passes"] > 0
                continue
            reason = next((item.reason for item in known if re.search(item.tests, test)), None)
            (row.unexpected if reason is None else row.known).append((test, sparsity, reason or problem))
    return row


def _files(folder: Path) -> list[Path]:
    """Return the files of tests that name a transformer of BLADE's families."""
    from diffusers_plugin import supported_classes

    names = re.compile("|".join(rf"\b{kind.__name__}\b" for kind in supported_classes()))
    files = sorted(folder.rglob("test_*.py"))
    return [path for path in files if names.search(path.read_text(encoding="utf-8"))]


def _run(
    folder: Path, files: list[Path], sparsity: str, output: Path, group: str, keyword: str, workers: int, resume: bool
) -> Tests:
    record = (output / f"{group}-{sparsity}.json").resolve()
    if resume and record.is_file():
        return dict(read_json(record, f"`resume` {record}"))
    print(f"{group}: {len(files)} files, " + ("without BLADE" if sparsity == PLAIN else f"at {sparsity}"), flush=True)
    record.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_CACHE": str((output / "hub").resolve()),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    arguments = [
        *("-q", "-p", "diffusers_plugin", "-p", "no:cacheprovider", "-n", str(workers), "--dist", "worksteal"),
        *("--disable-warnings", "--tb=no", "--blade-sparsity", sparsity, "--blade-record", str(record)),
        *(("-k", keyword) if keyword else ()),
    ]
    paths = [str(path.relative_to(folder)) for path in files]
    subprocess.run([sys.executable, "-m", "pytest", *arguments, *paths], cwd=folder, env=environment, check=False)
    if not record.is_file():
        raise RuntimeError(f"the tests of {group} did not run")
    return dict(read_json(record, f"the record {record}"))


def _write_stand_ins(cache: Path) -> list[str]:
    from diffusers_stand_ins import write_stand_ins

    return write_stand_ins(cache)


def _version(folder: Path) -> str:
    """Return the version that a checkout says it is of."""
    text = (folder / "setup.py").read_text(encoding="utf-8") if (folder / "setup.py").is_file() else ""
    match = re.search(r"""^\s*version\s*=\s*["']([^"']+)["']""", text, re.MULTILINE)
    return match.group(1) if match else "an unknown version"


def _write(output: Path, rows: list[Row], versions: dict[str, str], stand_ins: list[str], workers: int) -> None:
    headings = [
        "tests", "pass without BLADE", "pass at 0, bitwise", "pass at 0.5", "run a transformer",
        "with sparse layers at 0.5", "known to fail", "fail", "outputs compared", "skipped", "fail without BLADE",
    ]  # fmt: skip
    table = [
        [
            row.group,
            *(
                str(row.counts[name])
                for name in ("passed", f"passed at {DENSE}", f"passed at {SPARSE}", "running", "sparse")
            ),
            *(str(len({test for test, _, _ in failures})) for failures in (row.known, row.unexpected)),
            *(str(row.counts[name]) for name in ("outputs", "skipped", "failed")),
        ]
        for row in rows
    ]
    lines = markdown_table(headings, table)
    for title, name in (("Known to fail", "known"), ("Failures", "unexpected")):
        failures = [failure for row in rows for failure in getattr(row, name)]
        if failures:
            lines += ["", f"{title}:", "", *markdown_table(["test", "at", "why"], [list(item) for item in failures])]
    note = (
        f"Tests of Diffusers {versions['tests']} against the installed {versions['installed']}. Skipped tests need an "
        "accelerator or a package that is not installed. Those that fail without BLADE expect files of the Hub, whose "
        f"tiny random models have stand-ins here ({', '.join(stand_ins)}), or another version."
    )
    values = {
        "versions": versions,
        "groups": {row.group: {**row.counts, "known": row.known, "unexpected": row.unexpected} for row in rows},
        "command": f"python scripts/run_diffusers_tests.py PATH_TO_DIFFUSERS --workers {workers}",
    }
    write_table(output, "diffusers-tests", title="Diffusers' own tests", note=note, lines=lines, values=values)
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main)
