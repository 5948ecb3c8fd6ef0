"""The scripts of `examples/` run with the bundled model, and make a shorter video than they do by themselves."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blade import BladeConfig
from blade.attention.selectors import SELECTORS
from blade.media.video import read_mp4

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
FRAMES = 9


@pytest.fixture
def run_example(tmp_path: Path, monkeypatch, capsys) -> Callable[..., str]:
    """Return a function that runs an example in an empty folder, and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str:
        (path,) = [example for example in EXAMPLES if example.stem == name]
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for settings in (getattr(module, constant, {}) for constant in ("SIZE", "SETTINGS")):
            for frames in {"frames", "num_frames"} & set(settings):
                settings[frames] = FRAMES
        module.main(*arguments)
        return capsys.readouterr().out

    return run


@pytest.fixture
def selectors() -> Iterator[None]:
    """Take away the selectors that a test has registered."""
    before = dict(SELECTORS)
    yield
    SELECTORS.clear()
    SELECTORS.update(before)


def density_of(kind: str, shown: str) -> float:
    """Return the density of a kind in a summary that was printed."""
    (density,) = re.findall(rf"{kind} density (\d\.\d{{4}})", shown)
    return float(density)


def test_there_are_five_short_ones() -> None:
    assert len(EXAMPLES) == 5
    for path in EXAMPLES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 40, path.name
        assert "# For a real model: " in text, path.name


def test_generate(run_example, tmp_path: Path) -> None:
    shown = run_example("generate")
    assert read_mp4(tmp_path / "outputs" / "generate.mp4").shape == (FRAMES, 3, 96, 96)
    assert "outputs/generate.mp4: run density 0.2" in shown
    assert density_of("layer", shown) == pytest.approx(0.2, abs=0.01)


@pytest.mark.slow
def test_sparse_pipeline(run_example, tmp_path: Path) -> None:
    shown = run_example("sparse_pipeline")
    assert read_mp4(tmp_path / "outputs" / "sparse.mp4").shape == (FRAMES, 3, 96, 96)
    assert density_of("layer", shown) == pytest.approx(0.4, abs=0.05)
    assert density_of("run", shown) > 0.45 and "dense layer 0" in shown


def test_student(run_example, tmp_path: Path) -> None:
    shown = run_example("student")
    assert read_mp4(tmp_path / "outputs" / "student.mp4").shape == (FRAMES, 3, 96, 96)
    assert "student shapes-4-steps: 4 steps, guidance 1, asa at sparsity 0.8" in shown
    assert density_of("run", shown) == pytest.approx(0.2, abs=0.01)


@pytest.mark.slow
def test_patterns(run_example, tmp_path: Path) -> None:
    shown = run_example("patterns", "bundled", "found")
    assert BladeConfig.from_pretrained("found").patterns.steps is not None
    (density,) = re.findall(r"^density +(0\.\d+)", shown, re.MULTILINE)
    assert 0.4 < float(density) <= 0.5
    assert density_of("run", shown) == pytest.approx(float(density), abs=2e-3)


@pytest.mark.slow
def test_own_selector(run_example, selectors) -> None:
    found = dict(re.findall(r"^(\w+) +PSNR to dense ([\d.]+) dB$", run_example("own_selector"), re.MULTILINE))
    assert list(found) == ["cosine", "sampled", "random"]
    assert float(found["sampled"]) > float(found["random"]) > 5
    assert 5 < float(found["cosine"]) < 100
