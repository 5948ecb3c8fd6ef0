"""Options of the training of the shapes model for a given time."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from blade.models.source import bundled_model_path
from blade.moving_shapes.training.components import LARGER_SIZE, TransformerSize

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_shapes.py"


@pytest.fixture
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("train_shapes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple:
    """Return what the training is called with."""
    calls: list[tuple] = []
    monkeypatch.setattr(script, "train_for", lambda *arguments: calls.append(arguments))
    app = typer.Typer()
    app.command()(script.main)
    result = CliRunner().invoke(app, ["run", "output", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    (call,) = calls
    return call


def test_a_cpu_gets_a_small_batch_of_the_larger_size(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, output, config, start_from, device, prompts = run(script, monkeypatch, "--minutes", "1")
    assert (folder, output, start_from) == (Path("run"), Path("output"), bundled_model_path())
    assert (config.minutes, config.size, config.batch_size) == (1, LARGER_SIZE, 4)
    assert not config.compile and not config.autocast
    assert (device.type, prompts) == ("cpu", 1)


def test_options_reach_the_training(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--size", "2x1x64", "--batch-size", "3", "--prompts", "0", "--compile", "--autocast", "--seed", "5"]
    _, _, config, start_from, _, prompts = run(script, monkeypatch, "--minutes", "0.5", "--start-from", "x", *options)
    assert config.size == TransformerSize(layers=2, heads=1, ffn_dim=64)
    assert (config.batch_size, config.seed, config.compile, config.autocast) == (3, 5, True, True)
    assert (start_from, prompts) == (Path("x"), 0)


def test_a_missing_gpu_is_named(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match='`device` is "cuda", but PyTorch finds no CUDA device here'):
        run(script, monkeypatch, "--minutes", "1", "--device", "cuda")
