"""What CONTRIBUTING.md names is there, and hooks and workflow run the repository's own tools."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def table_rows() -> dict[str, list[str]]:
    """Return the cells of the table "I want to change" by what is changed."""
    text = (
        (ROOT / "CONTRIBUTING.md")
        .read_text(encoding="utf-8")
        .partition("## I want to change")[2]
        .partition("\n## ")[0]
    )
    rows = [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in rows[2:]}


def test_the_table_has_a_row_for_every_kind_of_change() -> None:
    rows = table_rows()
    kinds = "family", "selector", "pattern", "measure", "option", "launch", "loss", "preset", "recipe", "documentation"
    assert len(rows) == len(kinds)
    for kind in kinds:
        assert [name for name in rows if kind in name], kind


def test_what_the_table_names_exists() -> None:
    for name, (files, tests) in table_rows().items():
        paths = re.findall(r"`([^` ]+)`", files)
        assert paths, name
        assert re.findall(r"`(tests/[^`]+)`", tests), name
        for path in [*paths, *re.findall(r"`([^` ]+)`", tests)]:
            assert (ROOT / path).exists(), f"{name}: {path}"


def test_every_command_that_is_named_is_a_target_of_make() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"(?:`|^)make ([a-z-]+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {"test", "docs", "wheel"} <= set(named) <= set(targets)


def test_hooks_run_tools_that_are_there() -> None:
    """Nothing is fetched: every hook is local, and runs a tool that the extra `dev` brings."""
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert repository["repo"] == "local"
    assert {hook["language"] for hook in repository["hooks"]} == {"system", "pygrep"}
    tools = {hook["entry"].split()[0] for hook in repository["hooks"] if hook["language"] == "system"}
    assert tools == {".venv/bin/ruff", ".venv/bin/mypy", ".venv/bin/python"}


def test_the_workflow_runs_what_continuous_integration_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yaml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["ci"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert {step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step} == {
        "actions/checkout",
        "actions/setup-python",
    }
