"""Embeddings are made once, of the right encoders, and can be gone on with."""

import pytest
import torch
from safetensors import safe_open

from blade.distillation import conditioning
from blade.distillation.conditioning import PromptEmbeddings, capture, encode_prompts, encoder_fingerprint
from blade.generation.request import GenerationRequest
from blade.generation.resolve import resolve_request
from blade.models.loaded import LoadedModel
from blade.models.loading import load_model

PROMPTS = ["a red ball moving right", "a blue square moving up", "a green triangle moving left", "a ball", "a square"]


@pytest.fixture
def pipe(saved_tiny_pipeline):
    pipe = load_model(saved_tiny_pipeline).pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def request_(pipe):
    request = GenerationRequest(
        prompt="x", model="other", height=64, width=64, frames=9, steps=3, guidance_scale=3.0, attention="dense",
        negative_prompt="a white ball",
    )  # fmt: skip
    return resolve_request(request, LoadedModel(pipe))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(conditioning, "SHARD_PROMPTS", 2)


@torch.no_grad()
def expected(pipe, prompt):
    return pipe.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)[0]


def test_they_are_what_the_pipeline_encodes(pipe, request_, tmp_path):
    encode_prompts(LoadedModel(pipe), request_, PROMPTS, tmp_path)
    embeddings = PromptEmbeddings(tmp_path, PROMPTS)
    rows = embeddings.rows([4, 0])
    for row, prompt in zip(rows.prompts["encoder_hidden_states"], (PROMPTS[4], PROMPTS[0])):
        assert torch.equal(row[None], expected(pipe, prompt))
    assert torch.equal(embeddings.negative().prompts["encoder_hidden_states"], expected(pipe, "a white ball"))
    assert rows.latent_shape == (4, 3, 8, 8)
    with safe_open(tmp_path / "00000.safetensors", framework="pt") as file:
        assert file.get_tensor("0.encoder_hidden_states").shape[0] < 20  # what is padding is not kept


def test_an_empty_negative_prompt(pipe, request_):
    found = capture(LoadedModel(pipe), request_, "")
    assert torch.equal(found.prompts["encoder_hidden_states"], expected(pipe, ""))


def test_what_is_there_is_not_made_again(pipe, request_, tmp_path, monkeypatch):
    seen = []
    plain = conditioning.capture

    def counted(model, request, prompt):
        seen.append(prompt)
        return plain(model, request, prompt)

    monkeypatch.setattr(conditioning, "capture", counted)
    encode_prompts(LoadedModel(pipe), request_, PROMPTS[:3], tmp_path)
    assert len(seen) == 1 + 3 + 1  # for the shapes, the prompts, and what guidance leads away from
    seen.clear()
    encode_prompts(LoadedModel(pipe), request_, PROMPTS[:3], tmp_path)
    assert seen == []
    encode_prompts(LoadedModel(pipe), request_, PROMPTS, tmp_path)
    assert seen == PROMPTS[2:]  # the shard that has grown, and the new one
    seen.clear()
    (tmp_path / "00001.safetensors").unlink()  # as after a kill
    encode_prompts(LoadedModel(pipe), request_, PROMPTS, tmp_path)
    assert seen == PROMPTS[2:4]


def test_processes_share_the_shards(pipe, request_, tmp_path):
    for number in range(2):
        encode_prompts(LoadedModel(pipe), request_, PROMPTS, tmp_path, share=(number, 2))
    assert len(PromptEmbeddings(tmp_path, PROMPTS).rows(range(5)).prompts["encoder_hidden_states"]) == 5


def test_other_text_encoders_are_refused(pipe, request_, tmp_path):
    encode_prompts(LoadedModel(pipe), request_, PROMPTS, tmp_path)
    before = encoder_fingerprint(pipe)
    next(pipe.text_encoder.parameters()).data.add_(0.1)
    assert encoder_fingerprint(pipe) != before
    with pytest.raises(ValueError, match=r"`embeddings` .* are of other text encoders .*name another folder"):
        encode_prompts(LoadedModel(pipe), request_, PROMPTS, tmp_path)


def test_another_size_is_refused(pipe, request_, tmp_path):
    from dataclasses import replace

    encode_prompts(LoadedModel(pipe), request_, PROMPTS, tmp_path)
    with pytest.raises(ValueError, match="are of videos of another size"):
        encode_prompts(LoadedModel(pipe), replace(request_, frames=5), PROMPTS, tmp_path)
