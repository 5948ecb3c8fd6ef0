"""Runs with a tiny decoder: its frames, its record, and what is refused before a model is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from taehv_weights import base_weights, decode_plainly

from blade.cli.generate import main
from blade.generation import prepare
from blade.generation.inputs import input_paths
from blade.generation.outputs import generate_files
from blade.generation.plan import plan_run
from blade.generation.prepare import prepare_model
from blade.generation.record import changed_fields, read_request
from blade.generation.request import GenerationRequest
from blade.generation.run import call_arguments, run_request
from blade.media.video import encode_mp4
from blade.models.acceleration import compile_blocks
from blade.models.source import ModelError

TINY = {"height": 64, "width": 64, "frames": 9, "steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A decoder of the tiny pipeline's four channels, which no published one has."""
    return base_weights(4)


@pytest.fixture(scope="module")
def weights_path(weights, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "own.safetensors"
    save_file(weights, path)
    return str(path)


def tiny(model: Path, **changes) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "a red ball moving right", "model": str(model), **TINY, **changes})


@pytest.fixture
def request_of(saved_tiny_pipeline: Path, weights_path: str):
    given = {"model": saved_tiny_pipeline, "decoder": "tiny", "decoder_weights": weights_path}
    return lambda **changes: tiny(**{**given, **changes})


def test_it_decodes_the_latents_of_the_run(request_of, weights) -> None:
    model, request = prepare_model(request_of())
    model.pipe.set_progress_bar_config(disable=True)
    made = run_request(model, request)
    assert made.video.shape == (9, 3, 64, 64) and made.seconds_decoding > 0
    model.pipe.vae.decode = None  # is not called
    again = run_request(model, request).video
    assert torch.equal(made.video, again)
    dense = replace(request.dense(), seed=1)
    video = run_request(model, dense).video
    latents = model.pipe(**call_arguments(model, dense)).frames[0]
    torch.testing.assert_close(video.double(), decode_plainly(weights, latents), rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="`decoder` must be the one that the model was loaded with, got 'full'"):
        run_request(model, replace(request, decoder="full", decoder_weights=None))


def test_it_is_recorded_and_made_again(request_of, weights_path: str, saved_tiny_pipeline, tmp_path: Path) -> None:
    report = generate_files(request_of(), tmp_path / "video.mp4")
    record = json.loads(report.record_path.read_text())
    assert record["decoder"] == "tiny" and record["decoder_weights"] == weights_path
    again = read_request(report.record_path)
    assert (again.decoder, again.decoder_weights) == ("tiny", weights_path)
    assert input_paths(again)[Path(weights_path)] == "decoder_weights"
    full = read_request(report.record_path, {"decoder": "full"})
    assert (full.decoder, full.decoder_weights) == ("full", None)
    other = read_request(report.record_path, {"model": "bundled"})
    assert (other.decoder, other.decoder_weights) == ("full", None)
    old = {name: value for name, value in record.items() if not name.startswith("decoder")}
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    assert read_request(path).decoder == "full"
    _, resolved = prepare_model(tiny(saved_tiny_pipeline))
    old["inputs"] = resolved.input_state
    assert changed_fields(old, resolved) == []
    assert changed_fields(record, resolved) == ["decoder", "decoder_weights", "inputs"]


def test_an_image_and_a_video_are_still_encoded_by_the_vae(
    request_of, saved_tiny_pipeline, saved_tiny_ti2v, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64), (230, 40, 40)).save(tmp_path / "red.png")
    (tmp_path / "before.mp4").write_bytes(encode_mp4(torch.rand(9, 3, 64, 64), 16))
    for changes in (
        {"model": str(saved_tiny_ti2v), "image": str(tmp_path / "red.png")},
        {"video": str(tmp_path / "before.mp4"), "strength": 1.0},
    ):
        model, request = prepare_model(request_of(**changes))
        model.pipe.set_progress_bar_config(disable=True)
        assert run_request(model, request).video.shape == (9, 3, 64, 64)


def test_a_plan_counts_it(request_of, saved_tiny_pipeline: Path) -> None:
    full, small = plan_run(tiny(saved_tiny_pipeline)), plan_run(request_of())
    assert small.weights_gib["tiny decoder"] == pytest.approx(4 * 9.83e6 / 2**30, rel=0.02)
    assert small.decoding_flops != full.decoding_flops > 0 and small.cost == full.cost
    assert plan_run(request_of(frames=33)).activations_gib["decoding"] == small.activations_gib["decoding"]
    assert plan_run(request_of(frames=33)).decoding_flops == pytest.approx(3 * small.decoding_flops, rel=1e-6)


def test_its_blocks_are_compiled(request_of, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    model, _ = prepare_model(request_of())
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    compile_blocks(model)
    assert compiled.count("MemoryBlock") == 9 and "WanDecoder3d" not in compiled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_weights": None}, '`decoder_weights` must be given with `decoder` "tiny"'),
        ({"decoder_weights": ""}, '`decoder_weights` must be given with `decoder` "tiny"'),
        ({"decoder": "full"}, '`decoder_weights` must not be given without `decoder` "tiny"'),
        ({"decoder": "small"}, "`decoder` must be"),
        ({"decoder_weights": 3}, "`decoder_weights` must be"),
    ],
)
def test_contradictions_are_named(request_of, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request_of(**changes)


def test_what_does_not_fit_is_refused_before_the_model_is_loaded(
    request_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(prepare, "load_model", None)
    save_file(base_weights(16), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="must fit the latents of this model, 4 channels, 8 x 8 pixels"):
        prepare_model(request_of(decoder_weights=str(tmp_path / "other.safetensors")))
    with pytest.raises(ModelError, match=r"there is no file nothing\.pth"):
        prepare_model(request_of(decoder_weights="nothing.pth"))
    with pytest.raises(SystemExit) as ended:
        main(
            ["a red ball moving right", "--decoder", "tiny", "--decoder-weights", str(tmp_path / "other.safetensors")]
        )
    assert ended.value.code == 2
    assert "32 channels, 8 x 8 pixels and 4 frames each, got a decoder of 16" in " ".join(
        capsys.readouterr().err.split()
    )
