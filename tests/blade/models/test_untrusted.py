"""Of folders by others no code runs, nothing is unpickled, and no file elsewhere is read."""

from __future__ import annotations

import ast
import io
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile_folders as hostile
import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

from blade import BladeConfig, load_student
from blade.models.loaded import LoadedModel
from blade.models.loading import load_empty_model, load_model
from blade.models.loras import load_loras
from blade.models.source import ModelError
from blade.models.untrusted import check_files, find_component_class, leads_out
from blade.students.scheduler import FewStepScheduler
from blade.students.source import student_settings

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file that must not appear, whatever is loaded; its folder is the current one, as that of a user."""
    path = tmp_path / hostile.MARKER
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield path
    for name in ("evil", "transformers_modules", "diffusers_modules"):
        sys.modules.pop(name, None)
    assert not path.exists(), "code of the folder has run"


def refused(load: Callable[[], object], problem: str) -> None:
    """Loading ends in one line that says what is wrong."""
    with pytest.raises(ValueError) as caught:
        load()
    message = str(caught.value)
    assert problem in message and "\n" not in message, message


@pytest.mark.parametrize("case", hostile.MODELS, ids=lambda case: case.name)
def test_a_hostile_model_is_refused(
    case, marker: Path, tiny_pipeline_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.name == "pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes among its files")
    monkeypatch.syspath_prepend(tiny_pipeline_copy)
    case.spoil(tiny_pipeline_copy, marker)
    refused(lambda: load_model(tiny_pipeline_copy), case.problem)
    assert not marker.exists()
    if "decoy" not in case.name:  # which has no weights to be read
        refused(lambda: load_empty_model(tiny_pipeline_copy), case.problem)


@pytest.fixture
def pipe(saved_tiny_pipeline: Path) -> WanPipeline:
    return load_model(saved_tiny_pipeline).pipe


@pytest.fixture
def student(pipe: WanPipeline, tmp_path: Path) -> Path:
    """The folder of a good student."""
    folder = tmp_path / "student"
    folder.mkdir()
    weight = pipe.transformer.blocks[0].attn1.to_q.weight
    lora = {"lora_A": torch.zeros(4, weight.shape[1]), "lora_B": torch.zeros(weight.shape[0], 4)}
    save_file(
        {f"transformer.blocks.0.attn1.to_q.{name}.weight": value for name, value in lora.items()},
        folder / "pytorch_lora_weights.safetensors",
    )
    BladeConfig(attention="dense", kind="student").save_pretrained(folder)
    FewStepScheduler.like(pipe.scheduler, [(999.0, 500.0)]).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def whole_student(pipe: WanPipeline, student: Path) -> Path:
    """The folder of a good student of whole weights."""
    (student / "pytorch_lora_weights.safetensors").unlink()
    pipe.transformer.save_pretrained(student / "transformer")
    return student


@pytest.mark.parametrize("case", hostile.STUDENTS, ids=lambda case: case.name)
def test_a_hostile_student_is_refused(case, marker: Path, pipe: WanPipeline, student: Path) -> None:
    case.spoil(student, marker)
    refused(lambda: load_student(pipe, student), case.problem)
    if "scheduler" in case.name:
        refused(lambda: student_settings(student), case.problem)


@pytest.mark.parametrize("case", hostile.WHOLE_STUDENTS, ids=lambda case: case.name)
def test_a_hostile_student_of_whole_weights_is_refused(
    case, marker: Path, pipe: WanPipeline, whole_student: Path
) -> None:
    before = pipe.transformer
    case.spoil(whole_student, marker)
    refused(lambda: load_student(pipe, whole_student), case.problem)
    assert pipe.transformer is before


def test_good_students_are_loaded(pipe: WanPipeline, whole_student: Path) -> None:
    assert load_student(pipe, whole_student).steps == 2


@pytest.mark.parametrize("name", hostile.LORAS)
@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_a_pickled_lora_is_refused(
    name: str, as_folder: bool, marker: Path, pipe: WanPipeline, tmp_path: Path
) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    hostile.write_bomb(folder / name, marker)
    source = folder if as_folder else folder / name
    refused(lambda: load_loras(LoadedModel(pipe), [str(source)]), "safetensors")


def test_a_harmless_pickled_lora_is_refused_as_well(pipe: WanPipeline, student: Path, tmp_path: Path) -> None:
    """Nobody can see from outside which is which."""
    from safetensors.torch import load_file

    for name in ("pytorch_lora_weights.bin", "style.pt"):
        torch.save(load_file(student / "pytorch_lora_weights.safetensors"), tmp_path / name)
        refused(lambda name=name: load_loras(LoadedModel(pipe), [str(tmp_path / name)]), "must be a safetensors file")
    refused(lambda: load_loras(LoadedModel(pipe), [str(tmp_path)]), "a pickle, which can run code")
    load_loras(LoadedModel(pipe), [str(student / "pytorch_lora_weights.safetensors")])


def test_a_named_pickle_of_a_student_is_refused(marker: Path, pipe: WanPipeline, student: Path) -> None:
    hostile.write_bomb(student / "other.bin", marker)
    refused(lambda: load_student(pipe, student, weight_name="other.bin"), hostile.PICKLE)


def test_a_hostile_base_of_a_distillation_is_refused(marker: Path, student: Path) -> None:
    from blade.distillation.config import WeightsConfig
    from blade.distillation.student_files import read_weights

    hostile.linked("pytorch_lora_weights.safetensors")(student, marker)
    refused(lambda: read_weights(student, WeightsConfig(rank=4)), "a link to")


def test_a_hostile_start_of_a_training_is_refused(marker: Path, tiny_pipeline_copy: Path, tmp_path: Path) -> None:
    from blade.moving_shapes.training.shapes_model import train_shapes_model

    hostile.pickled("vae", "diffusion_pytorch_model.bin")(tiny_pipeline_copy, marker)
    refused(
        lambda: train_shapes_model(tmp_path / "run", tmp_path / "out", start_from=tiny_pipeline_copy), hostile.PICKLE
    )


def test_a_hostile_checkpoint_is_refused(marker: Path, tmp_path: Path) -> None:
    import pickle

    from blade.common.training_log import load_checkpoint

    torch.save({"step": 1}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for name in good.namelist():
            content = pickle.dumps(hostile.Bomb(marker)) if name.endswith("data.pkl") else good.read(name)
            bad.writestr(name, content)
    assert load_checkpoint(tmp_path / "good.pt") == {"step": 1}
    with pytest.raises(ValueError, match=r"bad\.pt cannot be read"):
        load_checkpoint(tmp_path / "bad.pt")


def test_hostile_arrays_and_yaml_are_refused(marker: Path, tmp_path: Path) -> None:
    import numpy as np

    from blade.distillation.recipes import load_config
    from blade.profiling.record_prompts import dense_video

    array = io.BytesIO()
    np.save(array, np.array([hostile.Bomb(marker)], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "video-000.npz", "w") as archive:
        archive.writestr("frames.npy", array.getvalue())
    with pytest.raises(ValueError, match="allow_pickle=False"):
        dense_video(tmp_path, 0)
    (tmp_path / "recipe.yaml").write_text(f"output: !!python/object/apply:builtins.open ['{marker}', 'w']\n")
    refused(lambda: load_config(tmp_path / "recipe.yaml"), "could not determine a constructor")


def test_links_of_the_hubs_cache_are_followed(saved_tiny_pipeline: Path, tmp_path: Path) -> None:
    """There every file of a snapshot is a link to one of the repository's blobs."""
    repository = tmp_path / "models--owner--model"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(saved_tiny_pipeline.rglob("*"))):
        target = snapshot / path.relative_to(saved_tiny_pipeline)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, repository / "blobs" / str(number))
            target.symlink_to(Path("../" * len(target.relative_to(repository).parts[:-1])) / "blobs" / str(number))
    assert type(load_model(snapshot).pipe) is WanPipeline
    (snapshot / "vae" / "config.json").unlink()
    (snapshot / "vae" / "config.json").symlink_to(saved_tiny_pipeline / "vae" / "config.json")
    refused(lambda: load_model(snapshot), "a link to")


def test_a_linked_folder_is_itself(saved_tiny_pipeline: Path, tmp_path: Path) -> None:
    """Whoever names a link means where it leads."""
    (tmp_path / "link").symlink_to(saved_tiny_pipeline)
    assert type(load_model(tmp_path / "link").pipe) is WanPipeline


def test_places_of_its_author_that_are_not_here_are_no_reason(tiny_pipeline_copy: Path) -> None:
    """Published tokenizers hold such leftovers."""
    config = tiny_pipeline_copy / "tokenizer" / "tokenizer_config.json"
    hostile.change(config, tokenizer_file="/fsx/author/tokenizer.json", special_tokens_map_file=str(config))
    check_files(tiny_pipeline_copy, "tokenizer", "it")
    hostile.change(config, tokenizer_file=str(tiny_pipeline_copy / "model_index.json"))
    refused(lambda: check_files(tiny_pipeline_copy, "tokenizer", "it"), "a file outside of its folder")


def test_a_loop_of_links_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert not leads_out(tmp_path / "loop", tmp_path)
    check_files(tmp_path, "loop", "it")


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("diffusers", "WanTransformer3DModel"),
        ("diffusers", "UniPCMultistepScheduler"),
        ("diffusers", "ClassifierFreeGuidance"),
        ("transformers", "UMT5EncoderModel"),
        ("transformers", "T5TokenizerFast"),
        ("transformers", "CLIPImageProcessor"),
        ("transformers", "CLIPVisionModel"),
        ("transformers", "Qwen2_5_VLProcessor"),
        ("stable_diffusion", "StableDiffusionSafetyChecker"),
    ],
)
def test_components_of_published_models_are_found(library: str, name: str) -> None:
    assert find_component_class(library, name, "it") is not None


def test_a_class_that_needs_a_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    class Missing:
        _backends = ("sentencepiece",)

    monkeypatch.setattr(transformers, "MissingTokenizer", Missing, raising=False)
    with pytest.raises(ModelError, match="it needs MissingTokenizer, for which this must be installed: sentencepiece"):
        find_component_class("transformers", "MissingTokenizer", "it")


@pytest.fixture
def downloads(tiny_pipeline_copy: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is downloaded of a Hub id, `owner/model`, which is the copy of the tiny pipeline."""
    asked: list[str] = []

    def download(name: str, *_: object, **options: object) -> str:
        assert name == "owner/model" and options["revision"] == "main"
        asked.append("pipeline")
        assert options["use_safetensors"] is True and options["trust_remote_code"] is False
        return str(tiny_pipeline_copy)

    def download_file(name: str, file: str, **options: object) -> str:
        asked.append(file)
        return str(tiny_pipeline_copy / file)

    monkeypatch.setattr(
        "blade.models.loading.locate", lambda *_: ("owner/model", {"local_files_only": False, "revision": "main"})
    )
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download_file)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    return asked


def test_of_a_hub_id_the_index_is_checked_before_the_rest_is_downloaded(
    downloads: list[str], marker: Path, tiny_pipeline_copy: Path
) -> None:
    assert type(load_model("owner/model").pipe) is WanPipeline
    assert downloads == ["model_index.json", "pipeline"]
    hostile.index(_class_name=["evil", "EvilPipeline"])(tiny_pipeline_copy, marker)
    refused(lambda: load_model("owner/model"), hostile.PIPELINE)
    assert downloads[2:] == ["model_index.json"]


LOADERS = {
    "from_pretrained": {
        "blade/models/loading.py": 3,
        "blade/models/modular.py": 1,
        "blade/models/transformer_files.py": 1,
        "blade/students/source.py": 1,
    },
    "load_lora_weights": {"blade/models/loras.py": 1},
    "download": {"blade/models/loading.py": 1},
}
"""Calls that load what others wrote, by name and file: each follows the checks of `blade.models.untrusted`."""

OWN_FORMATS = ("BladeConfig", "blade.BladeConfig", "cls")
"""Classes of this project whose `from_pretrained` reads JSON alone."""


def _calls(path: Path) -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yield what a file's calls are made on, their names, and their constant arguments by keyword."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            constants = {word.arg: getattr(word.value, "value", None) for word in node.keywords if word.arg}
            yield ast.unparse(node.func.value), node.func.attr, constants


def test_nothing_is_loaded_elsewhere() -> None:
    found: dict[str, dict[str, int]] = {name: {} for name in LOADERS}
    for folder in ("blade", "kernels", "pipelines", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"^\s*(import|from) (pickle|cloudpickle|dill|joblib|marshal|shelve)\b", text, re.M), (
                name
            )
            for owner, call, words in _calls(path):
                if call in LOADERS and owner not in OWN_FORMATS:
                    found[call][name] = found[call].get(name, 0) + 1
                assert (owner, call) != ("torch", "load") or words.get("weights_only") is True, name
                assert (owner, call) != ("yaml", "load") and words.get("allow_pickle") is not True, name
                assert words.get("trust_remote_code") in (None, False), name
    assert found == LOADERS
