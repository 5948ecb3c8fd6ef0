"""Docstrings of fields, in the help of the classes that users make."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

import blade
from blade.attention.config import BladeConfig, ConfigFields
from blade.common.documented import documented, field_docstrings

CONFIGURATIONS = [getattr(blade, name) for name in blade.__all__]
CONFIGURATIONS = [kind for kind in CONFIGURATIONS if inspect.isclass(kind) and is_dataclass(kind)]


@pytest.mark.parametrize("kind", CONFIGURATIONS, ids=lambda kind: kind.__name__)
def test_help_explains_every_field(kind: type) -> None:
    described = pydoc.plain(pydoc.render_doc(kind)).partition("Methods defined here")[0]
    for item in fields(kind):
        assert f"{item.name}: " in described.partition(kind.__doc__.splitlines()[0])[2], item.name


def test_field_docstrings_are_those_under_the_fields() -> None:
    texts = field_docstrings(BladeConfig)
    assert set(texts) == {item.name for item in fields(BladeConfig)}
    assert texts["strict"].startswith("Raise where a layer that should be sparse")


def test_a_class_without_its_source_stays_as_it_is() -> None:
    made = type("Made", (), {"__doc__": "Made at run time.", "__module__": "nowhere"})
    assert documented(made) is made and made.__doc__ == "Made at run time."


def test_the_types_of_a_configuration_are_those_of_its_fields() -> None:
    assert set(get_type_hints(ConfigFields)) == {item.name for item in fields(BladeConfig)}


@pytest.mark.slow
def test_a_users_configuration_passes_mypy(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(
        "from blade import BladeConfig\n"
        'config = BladeConfig(dense_layers="0-1", sparsity=0.6)\n'
        "layers: tuple[int, ...] = config.dense_layers\n"
        'BladeConfig(pooled_tokens="dropt")\n'
        "BladeConfig(sparsty=0.5)\n"
    )
    options = ["--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(program)], capture_output=True, text=True, check=False
    )
    errors = [line for line in done.stdout.splitlines() if "program.py" in line and "error" in line]
    assert [int(line.split(":")[1]) for line in errors] == [4, 5], done.stdout + done.stderr
