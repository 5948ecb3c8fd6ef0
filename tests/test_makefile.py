"""The Makefile's variables."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def run_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Let make print what it would do."""
    return subprocess.run(
        ["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("target", ["generate", "test", "docs"])
def test_a_misspelled_variable_is_refused(target: str) -> None:
    done = run_make(target, "PROMT=a blue ball moving left")
    assert done.returncode != 0 and "unknown variable PROMT" in done.stderr and "PROMPT" in done.stderr


def test_diffusers_own_tests_need_their_folder() -> None:
    done = run_make("test-diffusers")
    assert done.returncode != 0 and "make test-diffusers DIFFUSERS=" in done.stderr
    done = run_make("test-diffusers", "DIFFUSERS=some where")
    assert done.returncode == 0 and 'run_diffusers_tests.py "some where"' in done.stdout


def test_variables_that_there_are_keep_working() -> None:
    done = run_make("generate", "PROMPT=a=b c PROMT=d", "ARGS=--seed 3", "PYTHON=python3")
    assert done.returncode == 0, done.stderr
    assert "--seed 3" in done.stdout
