"""A plugin of pytest that applies BLADE to the transformers of Diffusers' own tests, and records what they compute.

`scripts/run_diffusers_tests.py` runs it. BLADE is applied where a transformer is made, or loaded, so that everything a
test does afterwards (LoRA, caches, offloading, saving) finds it there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers  # noqa: F401  # the installed one, before the tests put a source folder on the path
import numpy as np
import pytest
import torch
from diffusers import ModelMixin
from torch import nn

from blade import BladeConfig, apply_blade
from blade.attention.applied import applied_to
from blade.attention.config import AdaptiveConfig
from blade.families.registry import model_families

SMALL = AdaptiveConfig(block_size=2, probe_tokens=1, pooled_window=2)
"""Blocks for transformers of some dozen tokens, as the tests have them."""

RECORD = "blade"
"""Name of a test's property with what was recorded."""


class Recorder:
    """Outputs of the transformers of the running test."""

    def __init__(self, sparsity: float | None) -> None:
        self.sparsity = sparsity
        self.loading = 0
        self.begin()

    def begin(self) -> None:
        """Forget the last test."""
        self.digests: list[str] = []
        self.sparse_passes = 0

    def apply(self, transformer: nn.Module) -> None:
        """Apply BLADE, at every step and in every layer."""
        if self.sparsity is None or self.loading or applied_to(transformer) is not None:
            return
        apply_blade(transformer, BladeConfig(sparsity=self.sparsity, asa=SMALL), dense_steps=0, dense_layers=())

    def watch(self, transformer: nn.Module, args: Any, output: Any) -> None:
        """Record an output, as a forward hook."""
        if type(transformer) not in supported_classes():
            return
        digest = hashlib.sha256()
        for tensor in _tensors(output):
            digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        self.digests.append(digest.hexdigest()[:16])
        applied = applied_to(transformer)
        self.sparse_passes += applied is not None and any(layer.sparse for layer in applied.layers)


@functools.cache
def supported_classes() -> tuple[type[nn.Module], ...]:
    """Return the transformer classes of all families."""
    return tuple(dict.fromkeys(kind for family in model_families() for kind in getattr(family, "transformers", ())))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of a run."""
    parser.addoption("--blade-sparsity", default="none", help="sparsity of every layer, or none: without BLADE")
    parser.addoption("--blade-record", type=Path, help="JSON file for what each test computed")


def pytest_configure(config: pytest.Config) -> None:
    """Wrap the classes, and prepare the record."""
    text = config.getoption("--blade-sparsity")
    recorder = Recorder(None if text == "none" else float(text))
    config.stash[RECORDER] = recorder
    for kind in supported_classes():
        _apply_when_made(kind, recorder)
    _apply_when_loaded(recorder)
    torch.nn.modules.module.register_module_forward_hook(recorder.watch)
    path = config.getoption("--blade-record")
    if path is not None and not hasattr(config, "workerinput"):  # not a process of pytest-xdist
        config.pluginmanager.register(Results(path), "blade-results")


RECORDER = pytest.StashKey[Recorder]()


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let a test draw the same random numbers in every run, and record what it computes."""
    recorder = request.config.stash[RECORDER]
    recorder.begin()
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # which the tests draw from
    random.seed(0)
    yield
    record = {"digests": recorder.digests, "sparse_passes": recorder.sparse_passes}
    request.node.user_properties.append((RECORD, record))


class Results:
    """The outcomes of all tests, written at the end of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a phase of a test in; the worst one is its outcome."""
        test = self.tests.setdefault(report.nodeid, {"outcome": "passed", "digests": [], "sparse_passes": 0})
        if report.skipped or report.failed:
            test["outcome"] = "skipped" if report.skipped else "failed"
            test["reason"] = _last_line(report)
        if report.when == "teardown":
            test |= dict(report.user_properties).get(RECORD, {})

    def pytest_sessionfinish(self) -> None:
        """Write the record."""
        from blade.common.files import write_files

        write_files({self.path: (json.dumps(self.tests, indent=1) + "\n").encode()})


def _apply_when_made(kind: Any, recorder: Recorder) -> None:
    made: Callable[..., None] = kind.__init__

    @functools.wraps(made)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        if type(self) is kind:
            recorder.apply(self)

    kind.__init__ = init


def _apply_when_loaded(recorder: Recorder) -> None:
    load = ModelMixin.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        recorder.loading += 1  # weights come after the module was made
        try:
            loaded = load(cls, *args, **kwargs)
        finally:
            recorder.loading -= 1
        if type(loaded) in supported_classes():
            recorder.apply(loaded)
        return loaded

    ModelMixin.from_pretrained = classmethod(from_pretrained)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _last_line(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):  # a skipped test: file, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(report.longrepr if crash is None else crash.message).strip().splitlines()[0]
