"""The table of models is what the families' data say, and those what Diffusers and the tests hold."""

from __future__ import annotations

import importlib.util
import inspect
import re
import warnings
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import diffusers
import pytest

from blade.families.registry import find_family, model_families, preset_names, supported_models

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "list_models.py"
NEWEST = tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 42)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("list_models", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pipelines_by_transformer() -> dict[str, set[str]]:
    """Names of Diffusers' pipelines by the class of transformer that they take."""
    taken = defaultdict(set)
    for name in dir(diffusers):
        if name.endswith("Pipeline"):
            with warnings.catch_warnings(action="ignore"):
                kind = getattr(diffusers, name)
                parameters = inspect.signature(kind.__init__).parameters
            for part in ("transformer", "transformer_2"):
                if part in parameters:
                    for word in re.findall(r"\w+", str(parameters[part].annotation)):
                        taken[word].add(name)
    return taken


def test_the_page_has_the_table_that_the_data_make(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.with_table(page) == page, "python scripts/list_models.py writes it anew"
    with pytest.raises(ValueError, match=r"the page must have the lines '<!-- begin"):
        script.with_table("a page")


def test_every_class_of_every_family_has_a_row() -> None:
    classes = {kind.__name__ for family in model_families() for kind in family.transformers}
    assert classes == set(supported_models())


@pytest.mark.skipif(not NEWEST, reason="older versions of Diffusers lack pipelines")
@pytest.mark.parametrize("name", supported_models())
def test_every_pipeline_that_takes_a_class_is_in_its_row(name: str) -> None:
    model = supported_models()[name]
    assert not set(model.pipelines) & set(model.refused)
    standard = {pipe for pipe in (*model.pipelines, *model.refused) if not pipe.endswith("ModularPipeline")}
    assert standard == pipelines_by_transformer()[name]


@pytest.mark.parametrize("name", supported_models())
def test_rows_name_presets_and_tests_that_there_are(name: str) -> None:
    model = supported_models()[name]
    assert model.presets and set(model.presets) <= set(preset_names())
    assert model.instances
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    for pipe in model.tested:
        assert any(re.search(rf"\b{pipe}\b", text) for text in texts)


def test_every_small_instance_is_in_the_row_of_its_class(family, request: pytest.FixtureRequest) -> None:
    name, transformer = request.node.callspec.params["family"], family.make()
    model = supported_models()[type(transformer).__name__]
    assert name in model.instances
    # the smallest ones of Wan's have the bundled model's
    assert find_family(transformer).preset_name(transformer) in (*model.presets, "shapes")
