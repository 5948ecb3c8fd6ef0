"""Families are found without installed metadata, third parties' by entry point, and their data by name."""

import inspect
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models import transformers

from blade import BladeConfig
from blade.families.data import FamilyData
from blade.families.kinds import PRESET_KINDS
from blade.families.registry import (
    available_kind,
    benchmark_layers,
    example_model,
    find_family,
    model_families,
    preset_names,
    released_students,
    unsupported_classes,
)

ROOT = Path(__file__).resolve().parents[3]

FAMILY = '''
from blade.families.data import FamilyData
from blade_pipelines.ltx_video import LTXVideoFamily


class MyTransformer:
    """A transformer that no family of the project's own recognises."""


class MyFamily(LTXVideoFamily):
    name = "Mine (MyTransformer)"
    transformers = (MyTransformer,)
    data = FamilyData(
        presets={"training-free": {"mine": {"sparsity": 0.25}}}, example_model="me/mine", benchmark_layers={}
    )


FAMILIES = (MyFamily(),)
'''


def run_from_path(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code that finds the three packages by path alone: without site-packages' metadata of this project."""
    links = folder / "links"
    links.mkdir()
    for source in ("blade", "kernels/blade_kernels", "pipelines/blade_pipelines"):
        (links / Path(source).name).symlink_to(ROOT / source)
    hide = """
        import sys
        sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(links), str(folder)])}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(hide) + textwrap.dedent(code)],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_own_families_are_found_from_a_path(tmp_path: Path) -> None:
    done = run_from_path(
        tmp_path,
        """
        from importlib import metadata
        import blade, blade.families.registry as registry
        registry.entry_points = lambda group: metadata.EntryPoints()  # as if nothing were installed
        assert "links" in blade.__file__, blade.__file__
        print([type(family).__name__ for family in registry.model_families()])
        print(blade.BladeConfig.from_preset("shapes").asa.block_size)
        """,
    )
    assert done.returncode == 0, done.stderr
    names, block_size = done.stdout.splitlines()
    assert "WanFamily" in names and "HunyuanVideo15Family" in names
    assert block_size == "32"


@pytest.mark.slow
def test_a_third_party_is_found_by_its_entry_point(tmp_path: Path) -> None:
    (tmp_path / "my_family.py").write_text(FAMILY)
    metadata = tmp_path / "my_family-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-family\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[blade.families]\nmine = my_family:FAMILIES\nbroken = my_family:NOTHING\n"
    )
    done = run_from_path(
        tmp_path,
        """
        import warnings
        from my_family import MyTransformer
        from blade import BladeConfig
        from blade.families.registry import find_family
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            print(find_family(MyTransformer()).name)
        print([str(warning.message) for warning in caught if "model family" in str(warning.message)])
        print(BladeConfig.from_preset("mine").sparsity)
        """,
    )
    assert done.returncode == 0, done.stderr
    name, warned, sparsity = done.stdout.splitlines()
    assert name == "Mine (MyTransformer)" and sparsity == "0.25"
    assert "`broken` (my_family:NOTHING) cannot be loaded: AttributeError" in warned


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("kind", PRESET_KINDS)
def test_every_preset_is_a_configuration_of_its_kind(kind) -> None:
    for name in preset_names(kind):
        config = BladeConfig.from_preset(name, kind)
        assert config.kind == kind and config.attention == "asa" and 0 < config.sparsity < 1


def test_every_family_has_values_for_dense_few_step_students() -> None:
    assert preset_names("few-step") == preset_names("training-free")
    for name in preset_names("few-step"):
        config, ordinary = BladeConfig.from_preset(name, "few-step"), BladeConfig.from_preset(name)
        assert config == replace(ordinary, kind="few-step", sparsity=0.5, dense_steps=1), name
        assert isinstance(config.dense_steps, int), name
        assert [config.dense_step_count(steps) for steps in (1, 4, 8)] == [1, 1, 1], name
        assert (config.pooled_tokens, config.dense_layers, config.asa.rounding) == ("dropped", (0,), "spread"), name
        assert config.asa.pooled_window == config.asa.block_size, name
    assert BladeConfig.from_preset("wan").dense_step_count(8) == 2  # a fraction


def transformer_classes() -> dict[str, type[torch.nn.Module]]:
    """Return the transformers that Diffusers exports, by name."""
    named = {name: getattr(transformers, name) for name in dir(transformers)}
    return {name: kind for name, kind in named.items() if inspect.isclass(kind) and issubclass(kind, torch.nn.Module)}


def test_every_transformer_of_diffusers_is_supported_or_refused_by_name() -> None:
    """A class that a newer Diffusers adds must be put into a family, or into `unsupported.yaml`."""
    classes = transformer_classes()
    supported = {kind.__name__ for family in model_families() for kind in family.transformers}
    refused, others = unsupported_classes()
    assert set(classes) - supported - set(refused) - set(others) == set()
    assert supported.isdisjoint(refused) and supported.isdisjoint(others) and set(refused).isdisjoint(others)
    assert {name for name in classes if "3DModel" in name or "Video" in name} - supported - set(refused) == {
        "JoyImageEditPlusTransformer3DModel", "JoyImageEditTransformer3DModel",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SanaVideoTransformer3DModel", "is not supported: its self-attention is linear: .*It must be one of: .*Wan"),
        ("FluxTransformer2DModel", "makes no video: it makes images"),
        ("StableAudioDiTModel", "makes no video: it makes sound"),
        ("SomethingElse", "is of no model family that BLADE knows"),
    ],
)
def test_a_transformer_of_no_family_is_refused_with_the_reason(name, message) -> None:
    transformer = type(name, (torch.nn.Module,), {})()
    with pytest.raises(ValueError, match=rf"`{name}` {message}"):
        find_family(transformer)


def test_reasons_read_as_sentences() -> None:
    refused, _ = unsupported_classes()
    for name, reason in refused.items():
        assert re.fullmatch(r"[a-z][^\n]+[^.\s]", reason), name


def test_a_family_without_a_kind_of_preset_has_training_free_ones() -> None:
    assert available_kind("ltx-video", "few-step") == "few-step"
    assert available_kind("ltx-video", "student") == "training-free"


def test_data_is_found_by_name() -> None:
    assert {student.preset for student in released_students()} - {None} <= set(preset_names("student"))
    assert benchmark_layers()["wan-1.3b"].grid.sequence_length == 32760
    assert example_model().startswith("Wan-AI/")
    names = [family.name for family in model_families()]
    assert len(names) >= 5 and len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("example: x\n", "must hold fields of FamilyData, got 'example'"),
        ("presets: {trained: {}}\n", "`presets` of .* must be of the kinds training-free, few-step, student"),
        ("benchmark_layers: {a: {title: A, grid: {frames: 1}, heads: 2}}\n", "wrong or missing field"),
        ("protocols: {a: {model: a/b, height: 480}}\n", "wrong or missing field"),
        ("released_students: {a/b: [{preset: x, steps: [8]}]}\n", "wrong or missing field"),
    ],
)
def test_broken_data_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "family.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        FamilyData.from_yaml(tmp_path / "family.yaml")
