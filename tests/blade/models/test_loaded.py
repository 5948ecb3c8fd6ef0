"""The facts about a loaded model are those that its parts say by themselves."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blade import BladeConfig
from blade.models import loaded as loaded_module
from blade.models.loaded import LoadedModel
from blade.models.loading import load_empty_model, load_model


@pytest.fixture(scope="module")
def model(saved_tiny_pipeline: Path) -> LoadedModel:
    return load_model(saved_tiny_pipeline)


def test_sizes(model: LoadedModel) -> None:
    latent = model.latent_size(64, 80, 9)
    assert latent == (3, 8, 10) and model.compression == (4, 8)
    assert model.token_grid(latent).video_tokens == 3 * 8 * 10
    assert model.empty_latent(latent).shape == (1, 4, 3, 8, 10)
    assert model.pipe.vae.decode(model.empty_latent(latent)).sample.shape == (1, 3, 9, 64, 80)
    model.check_size(64, 80, 9)
    with pytest.raises(ValueError, match=r"`width` must be a multiple of 16 .* got 70; the nearest is 64 or 80"):
        model.check_size(64, 70, 9)
    with pytest.raises(ValueError, match=r"`frames` must be 4n \+ 1 .* got 8; the nearest is 5 or 9"):
        model.check_size(64, 64, 8)


def test_presets(model: LoadedModel) -> None:
    assert model.preset_name == "shapes"
    assert model.preset == BladeConfig.from_preset("shapes")
    assert model.student_preset == BladeConfig.from_preset("shapes", "student")
    assert model.preset_of("few-step") == BladeConfig.from_preset("shapes", "few-step")


def test_a_family_without_students_has_no_preset_of_them(small_pipelines) -> None:
    model = LoadedModel(small_pipelines["LTXPipeline"]())
    assert model.preset_name == "ltx-video" and model.student_preset is None
    assert "num_frames" in model.parameters  # of the base, as the small one passes all on


def test_each_fact_is_worked_out_once(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    find_family = loaded_module.find_family
    monkeypatch.setattr(loaded_module, "find_family", lambda part: calls.append(part) or find_family(part))
    fresh = LoadedModel(model.pipe)
    for _ in range(3):
        assert fresh.family is model.family and fresh.preset == model.preset and fresh.size_multiples == (16, 16)
    assert len(calls) == 1


def test_a_replaced_transformer_is_seen(model: LoadedModel, saved_tiny_pipeline: Path) -> None:
    other = load_empty_model(saved_tiny_pipeline, dtype=torch.bfloat16)
    before, fresh = model.transformer, replace(model)
    try:
        fresh.pipe.transformer = other.transformer
        assert fresh.transformer is other.transformer
    finally:
        model.pipe.transformer = before
