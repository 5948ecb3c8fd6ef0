"""What the Makefile does on a fresh machine, and what a wheel will hold."""

from __future__ import annotations

import email
import email.policy
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"blade", "blade_kernels", "blade_pipelines"}


def dry_run(folder: Path, *arguments: str) -> list[str]:
    """Return what make would run."""
    command = ["make", "--dry-run", "--no-print-directory", *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the files that the Makefile looks at."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("target", ["generate", "test"])
def test_torch_is_installed_first(checkout: Path, target: str) -> None:
    installs = [line for line in dry_run(checkout, target) if "pip install" in line]
    assert len(installs) == 2
    assert installs[0].endswith('"torch==2.13.0"')
    assert "-e" in installs[1].split() and "--upgrade" not in installs[1]


@pytest.mark.parametrize("target", ["generate", "test"])
def test_nothing_is_installed_twice(checkout: Path, target: str) -> None:
    (checkout / ".venv").mkdir()
    for stamp in (".torch-installed", ".installed", ".installed-dev"):
        (checkout / ".venv" / stamp).touch()
    assert not [line for line in dry_run(checkout, target) if "pip install" in line or "-m venv" in line]
    later = (checkout / "pyproject.toml").stat().st_mtime + 60
    os.utime(checkout / "pyproject.toml", (later, later))
    (install,) = [line for line in dry_run(checkout, target) if "pip install" in line]
    assert "torch==" not in install


@pytest.mark.parametrize("prompt", ['it\'s "red"', "costs $5 or $(more)", "`ls`; #1 & -x \\"])
def test_a_prompt_reaches_the_command_as_it_is(checkout: Path, prompt: str) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    for stamp in (".torch-installed", ".installed"):
        (checkout / ".venv" / stamp).touch()
    command = checkout / ".venv" / "bin" / "blade-generate"
    command.write_text(f"#!{sys.executable}\nimport sys; print(sys.argv[1:])\n")
    command.chmod(0o755)
    done = subprocess.run(
        ["make", "--no-print-directory", "generate", f"PROMPT={prompt}", "ARGS=--seed 3"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str([f"--prompt={prompt}", "--seed", "3"])


def test_an_old_python_is_refused_in_words(checkout: Path) -> None:
    python = checkout / "old-python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "generate", f"PYTHON={python}"], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stdout
    assert not (checkout / ".venv").exists()


def test_continuous_integration_runs_the_quick_tests_then_the_slow_ones() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("make test\nmake docs wheel\nexec make test-slow")


def test_no_dependency_brings_another_torch() -> None:
    """Packages that pin a version of PyTorch would replace the one that was installed first.

    One measure needs such a package: it has an extra by itself, which nothing else brings.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = dict(project["optional-dependencies"])
    assert extras.pop("lpips") == ["lpips>=0.1.4"]
    required = [*project["dependencies"], *(line for lines in extras.values() for line in lines)]
    assert not [line for line in required if line.startswith("blade-video[") and "lpips" in line]
    names = {line.split("[")[0].split(">")[0].split("=")[0].strip() for line in required}
    assert not names & {"torchvision", "torchaudio", "lpips", "xformers"}
    assert [line for line in required if line.startswith("torch>")] == ["torch>=2.11"]


def test_a_wheel_will_hold_every_data_file() -> None:
    program = (
        "from setuptools import Distribution\n"
        "distribution = Distribution({'long_description': 'setup.py has it'}); distribution.parse_config_files()\n"
        "build = distribution.get_command_obj('build_py'); build.ensure_finalized()\n"
        "print(*(f'{folder}/{name}' for _, folder, _, names in build.data_files for name in names), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    held = {(ROOT / line).resolve() for line in done.stdout.splitlines() if (ROOT / line).is_file()}
    folders = (ROOT / "blade", ROOT / "kernels" / "blade_kernels", ROOT / "pipelines" / "blade_pipelines")
    data = {
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and not path.name.endswith(".tmp")
    }
    assert data and data <= held, f"not in the wheel: {sorted(map(str, data - held))}"


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source distribution, and with the wheel that was built from it; weights are left out."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.egg-info")
    for folder in ("blade", "kernels", "pipelines", "scripts", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in (
        "pyproject.toml",
        "setup.py",
        "MANIFEST.in",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
    ):
        shutil.copy(ROOT / name, source)
    output = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", output, source]
    build = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    return output


@pytest.fixture(scope="module")
def wheel(distribution: Path) -> Iterator[zipfile.ZipFile]:
    """The wheel."""
    (path,) = distribution.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.mark.slow
def test_an_index_takes_them(distribution: Path) -> None:
    files = sorted(distribution.iterdir())
    assert len(files) == 2
    command = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_a_wheel_holds_exactly_the_three_packages(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        f"{folder.name}/{path.relative_to(folder).as_posix()}"
        for folder in (ROOT / "blade", ROOT / "kernels" / "blade_kernels", ROOT / "pipelines" / "blade_pipelines")
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".safetensors", ".tmp")
    }
    assert names == expected
    (top_level,) = [name for name in wheel.namelist() if name.endswith("top_level.txt")]
    assert set(wheel.read(top_level).decode().split()) == PACKAGES
    assert {f"{package}/py.typed" for package in PACKAGES} <= names


@pytest.mark.slow
def test_a_source_distribution_holds_what_a_wheel_is_made_of(distribution: Path) -> None:
    (path,) = distribution.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "pyproject.toml", "setup.py"} <= names
    assert not [name for name in names if name.startswith(("tests", "docs", "examples"))]


@pytest.mark.slow
def test_links_of_the_description_lead_somewhere(wheel: zipfile.ZipFile) -> None:
    (metadata,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    message = email.message_from_bytes(wheel.read(metadata), policy=email.policy.default)
    assert message["Description-Content-Type"] == "text/markdown"
    (address,) = [url.partition(", ")[2] for url in message.get_all("Project-URL") if url.startswith("Repository, ")]
    links = re.findall(r"\]\(([^)\s]+)", message.get_payload())
    own = [link.removeprefix(address) for link in links if link.startswith(address)]
    assert own and all(link.startswith("https://") for link in links)
    for link in own:
        path, _, _ = link.partition("#")
        assert (ROOT / re.sub("^/(blob|raw)/HEAD/", "", path)).exists(), link
    assert [link for link in own if link.startswith("/raw/")] == [link for link in own if link.endswith(".png")]


def test_relative_links_are_rewritten_but_in_code() -> None:
    links = runpy.run_path(str(ROOT / "scripts" / "repository_links.py"))
    text = """[a](docs/a.md#part), ![b](docs/b.png), [c](https://example.org/c), [wrapped
over lines](LICENSE), [d](#below), [![e](e.svg)](e.md)

```python
table["key"](argument)
```

[f](f.md)
"""
    rewritten = links["rewrite_links"](text, lambda target: f"<{target}>")
    assert (
        rewritten
        == """[a](<docs/a.md#part>), ![b](<docs/b.png>), [c](https://example.org/c), [wrapped
over lines](<LICENSE>), [d](<#below>), [![e](<e.svg>)](<e.md>)

```python
table["key"](argument)
```

[f](<f.md>)
"""
    )
    address = links["repository_address"]()
    assert links["absolute_link"]("docs/a.md#part") == f"{address}/blob/HEAD/docs/a.md#part"
    assert links["absolute_link"]("docs/b.png") == f"{address}/raw/HEAD/docs/b.png"
