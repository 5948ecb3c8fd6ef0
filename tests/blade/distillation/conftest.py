"""A distillation of the tiny pipeline, small enough to be run many times."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = (
    "video.height=64",
    "video.width=64",
    "video.frames=9",
    "generator.guidance_scale=3",
    "generator.learning_rate=1e-2",
    "generator.ode_updates=0",
    "weights.saved_as=float32",
    "fake.learning_rate=2e-2",
    "weights.rank=4",
    "weights.alpha=4",
    "weights.targets=[to_q,to_k,to_v,to_out.0]",
    "attention.sparsity=0.6",
    "trajectory.steps=[2]",
    "optimizer.schedule=constant",
    "run.updates=3",
    "run.batch_size=2",
    "run.checkpoint_every=1",
    "run.device=cpu",
    "run.precision=fp32",
    "validation.every=0",
    # gradients near zero have no sign to speak of
    "optimizer.epsilon=1e-3",
)
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five prompts."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"a red ball moving {way}" for way in ("left", "right", "up", "down", "fast")))
    return path


@pytest.fixture(scope="session")
def small_settings(prompt_file):
    """Return a function that makes settings of a model for an output folder, with others over them."""

    def make(model: Path, output: Path, *others: str) -> list[str]:
        return [f"model={model}", f"prompts={prompt_file}", f"output={output}", *SETTINGS, *others]

    return make


@pytest.fixture
def settings(saved_tiny_pipeline, small_settings, tmp_path):
    """Return a function that makes settings for an output folder, with others over them."""

    def make(output: str, *others: str) -> list[str]:
        return small_settings(saved_tiny_pipeline, tmp_path / output, *others)

    return make


@pytest.fixture
def start():
    """Return a function that starts Python on one process or several, in this folder; what still runs is killed."""
    with starting() as run:
        yield run


@pytest.fixture(scope="module")
def start_for_module():
    """Return what `start` does, for fixtures of a module."""
    with starting() as run:
        yield run


@contextlib.contextmanager
def starting():
    """Yield a function that starts Python on one process or several; what still runs at the end is killed."""
    started = []

    def run(*arguments: str, processes: int = 1) -> subprocess.Popen[str]:
        # a port that is free: with one node, torchrun finds it itself
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        process = subprocess.Popen(
            [sys.executable, *(launch if processes > 1 else ()), *arguments],
            cwd=HERE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)
        return process

    try:
        yield run
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
