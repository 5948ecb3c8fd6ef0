"""From a prompt to files: defaults, repeatability, the record, and what a run says of itself."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.profiler import ProfilerActivity, profile

from blade.attention.config import AdaptiveConfig, BladeConfig
from blade.cli.generate import main
from blade.common.options import option_names
from blade.generation.api import generate
from blade.generation.options import GROUPS
from blade.generation.outputs import GenerationReport, describe_score, generate_files
from blade.generation.plan import plan_run
from blade.generation.record import read_request
from blade.generation.request import GenerationRequest, check_known, lost_student
from blade.generation.resolve import resolve_request
from blade.generation.run import run_request
from blade.media.video import read_mp4
from blade.metrics.similarity import MAX_PSNR
from blade.models.loaded import LoadedModel
from blade.models.loading import load_model
from blade.models.source import bundled_model_path
from blade.moving_shapes.bundled import check_prompt, prompt_warning

PROMPT = "a red ball moving right"
TINY = {"height": 64, "width": 64, "frames": 9, "steps": 2, "device": "cpu"}
SPARSE = {"sparsity": 0.5, "dense_steps": 1, "dense_layers": ()}


def tiny_request(model: Path, **changes) -> GenerationRequest:
    return GenerationRequest(**{"prompt": PROMPT, "model": str(model), **TINY, **changes})


@pytest.fixture(scope="module")
def pipe(saved_tiny_pipeline: Path):
    pipe = load_model(saved_tiny_pipeline).pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def report(saved_tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> GenerationReport:
    """A sparse video, compared with dense."""
    output = tmp_path_factory.mktemp("report") / "video.mp4"
    return generate_files(tiny_request(saved_tiny_pipeline, seed=3, **SPARSE), output, compare=True)


def test_a_dense_video_is_the_pipelines_own(pipe, saved_tiny_pipeline: Path) -> None:
    request = resolve_request(tiny_request(saved_tiny_pipeline, attention="dense", seed=5), LoadedModel(pipe))
    expected = pipe(
        prompt=PROMPT,
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).frames[0]
    made = run_request(LoadedModel(pipe), request)
    assert torch.equal(made.video, expected)
    assert made.run_density == 1 and made.layer_density is None


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_decoding_by_onednn_gives_what_diffusers_does(pipe, saved_tiny_pipeline: Path) -> None:
    plain = AutoencoderKLWan.from_pretrained(saved_tiny_pipeline / "vae")
    latent = torch.randn(1, plain.config.z_dim, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        decoded = pipe.vae.decode(latent).sample
    assert "aten::slow_conv3d_forward" not in {event.name for event in recorded.events()}
    with torch.no_grad():
        torch.testing.assert_close(decoded, plain.decode(latent).sample)


def _later(call: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """Let a call begin later."""

    def later(*args: Any, **options: Any) -> Any:
        time.sleep(seconds)
        return call(*args, **options)

    return later


def test_what_a_run_cost_adds_up(pipe, saved_tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = resolve_request(tiny_request(saved_tiny_pipeline, **SPARSE), LoadedModel(pipe))
    for part, name, seconds in (
        (pipe, "encode_prompt", 0.4),
        (pipe.scheduler, "step", 0.2),
        (pipe.vae, "decode", 0.4),
    ):
        monkeypatch.setattr(part, name, _later(getattr(part, name), seconds))
    start = time.perf_counter()
    made = run_request(LoadedModel(pipe), request)
    elapsed = time.perf_counter() - start
    stages = (made.seconds_text, made.seconds_denoising, made.seconds_decoding)
    assert all(seconds > 0.4 for seconds in stages)
    assert 0.5 * elapsed < sum(stages) <= elapsed
    # one of two steps is sparse, in both layers, and a row keeps 2 or 3 of 6 blocks and a token of each other one
    assert 0.45 < made.layer_density <= 0.5
    assert made.run_density == pytest.approx((1 + made.layer_density) / 2)


def test_attention_changes_the_video_and_is_taken_off_afterwards(pipe, saved_tiny_pipeline: Path) -> None:
    request = resolve_request(tiny_request(saved_tiny_pipeline, **SPARSE), LoadedModel(pipe))
    dense_before = run_request(LoadedModel(pipe), request.dense()).video
    sparse = run_request(LoadedModel(pipe), request).video
    dense_after = run_request(LoadedModel(pipe), request.dense()).video
    assert torch.equal(dense_before, dense_after)
    assert not torch.equal(dense_before, sparse)


def test_a_resolved_request_leaves_nothing_to_defaults(pipe, saved_tiny_pipeline: Path) -> None:
    resolved = resolve_request(tiny_request(saved_tiny_pipeline), LoadedModel(pipe))
    may_be_none = {"negative_prompt", "config", "preset", "revision", "quantize"}
    may_be_none |= {*option_names(*GROUPS, of_student=True), *option_names(*GROUPS, of_model=True)}
    assert {name for name, value in vars(resolved).items() if value is None} <= may_be_none
    assert resolved.blade_config == BladeConfig.from_preset("shapes")
    assert (resolved.guidance_scale, resolved.fps, resolved.dtype) == (5.0, 16, "float32")  # 5.0 is WanPipeline's


def test_a_pipelines_own_defaults_fill_what_is_not_given(pipe, saved_tiny_pipeline: Path) -> None:
    resolved = resolve_request(GenerationRequest(prompt=PROMPT, model=str(saved_tiny_pipeline)), LoadedModel(pipe))
    assert (resolved.height, resolved.width, resolved.frames, resolved.steps) == (480, 832, 81, 50)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("asa", "dropped", 0.4)),
        ({"attention": "asa"}, ("asa", "dropped", 0.4)),
        ({"attention": "asa-gt"}, ("asa", "all", 0.4)),
        ({"sparsity": 0.8}, ("asa", "dropped", 0.8)),
    ],
)
def test_options_stand_over_the_configuration(given: dict, expected: tuple) -> None:
    config = BladeConfig(sparsity=0.4, pooled_tokens="dropped", asa=AdaptiveConfig(block_size=32, pooled_window=16))
    made = GenerationRequest(prompt=PROMPT, blade_config=config, **given).sparse_config(lambda: config)
    assert made is not None
    assert (made.attention, made.pooled_tokens, made.sparsity) == expected
    assert made.asa == config.asa


def test_dense_is_no_configuration() -> None:
    dense = BladeConfig(attention="dense")
    assert GenerationRequest(prompt=PROMPT, attention="dense").sparse_config(BladeConfig) is None
    assert GenerationRequest(prompt=PROMPT).sparse_config(lambda: dense) is None


def test_files_hold_the_video_and_its_record(report: GenerationReport) -> None:
    folder = report.video_path.parent
    assert sorted(item.name for item in folder.iterdir()) == ["video-compare.mp4", "video.json", "video.mp4"]
    seen = read_mp4(report.video_path)
    assert seen.shape == report.generation.video.shape == (9, 3, 64, 64)
    assert (seen - report.generation.video).abs().mean() < 0.03
    assert json.loads(report.record_path.read_text()) == report.record


def test_the_record_is_flat_and_says_what_it_cost(report: GenerationReport, saved_tiny_pipeline: Path) -> None:
    record = report.record
    flat = {"prompt": PROMPT, "model": str(saved_tiny_pipeline), "steps": 2, "seed": 3, "attention": "asa", **SPARSE}
    assert {name: record[name] for name in flat} == {**flat, "dense_layers": []}
    assert record["versions"]["torch"] and record["versions"]["diffusers"] and record["machine"]["threads"] >= 1
    assert record["layer_density"] == report.generation.layer_density
    assert record["run_density"] == report.generation.run_density
    assert min(record[name] for name in record if name.startswith("seconds")) > 0
    assert 0.01 < record["peak_memory_gib"] < 64


def test_a_comparison_shows_and_measures_both(report: GenerationReport) -> None:
    assert report.comparison_path is not None
    both = read_mp4(report.comparison_path)
    assert both.shape[-1] == 2 * 64 * (288 // 64)
    # the random weights are nearly indifferent to attention, but the videos are not the same
    assert 5 < report.record["psnr"] < MAX_PSNR
    assert 0 < report.record["ssim"] < 1
    for text in (str(report.comparison_path), "PSNR", "SSIM"):
        assert text in str(report)


def test_the_record_makes_the_same_video_again(
    report: GenerationReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "again.mp4"
    with pytest.raises(SystemExit) as exit:
        main(["--from-json", str(report.record_path), "--output", str(output)])
    assert exit.value.code == 0
    assert torch.equal(read_mp4(output), read_mp4(report.video_path))
    printed = capsys.readouterr().out
    densities = [f"{name.replace('_', ' ')} {report.record[name]:.3f}" for name in ("layer_density", "run_density")]
    assert all(text in printed for text in densities) and str(output) in printed


def test_a_record_of_an_earlier_version_names_cpu_as_reference(report: GenerationReport, tmp_path: Path) -> None:
    path = tmp_path / "earlier.json"
    config = {**report.record["blade_config"], "implementation": "reference"}
    path.write_text(json.dumps({**report.record, "blade_config": config}))
    recorded = read_request(path).blade_config
    assert recorded is not None and recorded.implementation == "cpu"


def test_options_change_a_recorded_request(report: GenerationReport, tmp_path: Path) -> None:
    path = report.record_path
    recorded = read_request(path)
    assert recorded.blade_config is not None and recorded.blade_config.sparsity == 0.5
    assert read_request(path, {"seed": 9}).seed == 9
    assert read_request(path, {"sparsity": 0.8}).sparse_config(BladeConfig).sparsity == 0.8
    assert read_request(path, {"attention": "dense"}).sparse_config(BladeConfig) is None
    assert read_request(path, {"attention": "asa-gt"}).sparse_config(BladeConfig).pooled_tokens == "all"
    assert read_request(path, {"model": "other/model"}).blade_config is None
    # what is written flat counts, so that a record can be edited by hand
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps({**report.record, "sparsity": 0.7}))
    assert read_request(edited).sparse_config(BladeConfig).sparsity == 0.7


def test_a_saved_configuration_is_taken(saved_tiny_pipeline: Path, tmp_path: Path) -> None:
    config = BladeConfig(sparsity=0.3, dense_layers=(1,), asa=AdaptiveConfig(block_size=16, pooled_window=16))
    config.save_pretrained(tmp_path / "config")
    request = tiny_request(saved_tiny_pipeline, config=str(tmp_path / "config"), dense_steps=1)
    record = generate_files(request, tmp_path / "video.mp4").record
    assert BladeConfig.from_dict(record["blade_config"]) == BladeConfig(
        sparsity=0.3, dense_layers=(1,), dense_steps=1, asa=config.asa
    )


@pytest.mark.slow
def test_everything_works_without_a_compiler(saved_tiny_pipeline: Path, tmp_path: Path) -> None:
    program = "from blade.cli.generate import main; main()"
    size = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    output = tmp_path / "video.mp4"
    options = ["--prompt", PROMPT, "--model", str(saved_tiny_pipeline), "--dtype", "bfloat16", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-c", program, *options, *size],
        env={**os.environ, "CC": "/nowhere/cc", "CXX": "/nowhere/c++"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "layer density 0.273" in done.stdout  # the preset asks for 0.3; a row keeps whole blocks
    assert read_mp4(output).shape == (9, 3, 64, 64)
    assert sum("/nowhere" in line for line in done.stderr.splitlines()) <= 1


def test_a_video_from_the_hub_is_recorded_with_its_commit(
    saved_tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the local cache, as where the Hub cannot be reached."""
    repository, commit = tmp_path / "cache" / "models--somebody--tiny", "0123456789" * 4
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(saved_tiny_pipeline, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(repository.parent))

    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    request = GenerationRequest(prompt=PROMPT, model="somebody/tiny", **TINY)
    record = generate_files(request, tmp_path / "video.mp4").record
    assert (record["model"], record["revision"]) == ("somebody/tiny", commit)
    again = read_request(tmp_path / "video.json")
    assert again.revision == commit
    assert read_request(tmp_path / "video.json", {"model": "other/model"}).revision is None
    generate_files(again, tmp_path / "again.mp4")
    assert torch.equal(read_mp4(tmp_path / "again.mp4"), read_mp4(tmp_path / "video.mp4"))


def test_words_that_the_bundled_model_does_not_know_are_named() -> None:
    assert prompt_warning(PROMPT) is None
    warning = prompt_warning("a red cat dancing right", negative_prompt="blurry")
    assert warning is not None
    for text in ('"cat", "dancing", "blurry"', "purple", "triangle", "checkered", "--model Wan-AI/"):
        assert text in warning
    assert "not in this order" in (prompt_warning("ball red a moving right") or "")


@pytest.mark.parametrize(
    ("prompt", "suggested"),
    [
        ("a red ball going right", '"going" (did you mean moving?)'),
        ("a red ball moving rigth", '"rigth" (did you mean right?)'),
        ("a Purpel ball moving up", '"purpel" (did you mean purple?)'),
        ("a red ball moving right with a hat", '"with", "hat".'),
    ],
)
def test_words_that_are_near_known_ones_are_suggested(prompt: str, suggested: str) -> None:
    check_prompt(prompt)
    assert suggested in (prompt_warning(prompt) or "")


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a cat walks on the grass", 'It does not know "cat", "walks", "on", "the", "grass".'),
        ("a red bal moving right", 'It does not know "bal" (did you mean ball?).'),
        ("a red moving right", 'got "a red moving right". It knows sentences'),
        ("!", 'got "!". It knows sentences'),
    ],
)
def test_a_prompt_without_a_shape_is_refused_before_the_bundled_model_is_loaded(
    prompt: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loading in ("prepare.load_model", "plan.load_empty_model"):
        monkeypatch.setattr(f"blade.generation.{loading}", lambda *given, **options: pytest.fail("loaded"))
    request = GenerationRequest(prompt=prompt)
    ways = (lambda: generate_files(request, tmp_path / "x.mp4"), lambda: plan_run(request), lambda: generate(prompt))
    for make in ways:
        with pytest.raises(ValueError, match=r"`prompt` must name a shape .*: ball, square, triangle;") as caught:
            make()
        assert named in str(caught.value) and "--model Wan-AI/" in str(caught.value)
    check_known(GenerationRequest(prompt=prompt, model="me/other"))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"guidance_scale": 5.0},
            "^`guidance_scale` rules out .* takes 60 forward passes, with it 8. .*--student shapes-8",
        ),
        ({"guidance_scale": 1.0, "steps": 4}, "takes 4 forward passes, with it 4. .*--student shapes-4-steps"),
        ({"steps": 12}, "^`steps` 12 rules out .* 24 forward passes, with it 8. To keep it, leave that out.$"),
        ({"sparsity": 0.5, "dense_steps": 0}, "^`sparsity` and `dense_steps` rule out .* leave those out, or name it"),
        ({"student": None, "guidance_scale": 5.0}, None),
        ({"model": "me/other", "guidance_scale": 5.0}, None),
        ({"steps": 4, "seed": 3}, None),
    ],
)
def test_what_the_student_is_lost_to_is_told_before_the_model_runs(
    given: dict, told: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    notice = lost_student(given)
    assert (notice is None) == (told is None)
    if told is None or "student" in given:
        return
    assert re.search(told, notice)

    def stop(*given: object, **options: object) -> None:
        raise ValueError("here the model would run")

    monkeypatch.setattr("blade.generation.outputs.generate_files", stop)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    with pytest.raises(SystemExit):
        main(["--prompt", PROMPT, *options])
    shown = capsys.readouterr().err
    assert 0 <= shown.index(notice) < shown.index("here the model would run")


def test_scores_are_told_for_each_object() -> None:
    one = {"objects": [{"colour": True, "shape": False}], "count": True, "background": None}
    assert describe_score(one) == "colour right, shape wrong; count right"
    two = {"objects": [{"colour": True}, {"colour": False}], "count": False, "background": True}
    assert describe_score(two) == "object 1: colour right; object 2: colour wrong; count wrong; background right"


def test_the_bundled_model_is_an_ordinary_pipeline_and_all_assets_have_at_most_60_megabytes() -> None:
    from diffusers import WanPipeline

    assert type(WanPipeline.from_pretrained(bundled_model_path())) is WanPipeline
    sizes = [path.stat().st_size for path in bundled_model_path().parent.rglob("*") if path.is_file()]
    assert sum(sizes) <= 60_000_000
    assert 0 < max(sizes) <= 15_000_000


@pytest.mark.slow
def test_the_bundled_model_shows_what_was_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    request = GenerationRequest(prompt=PROMPT, steps=8, device="cpu")
    with caplog.at_level(logging.WARNING, logger="blade"):
        report = generate_files(request, tmp_path / "video.mp4")
    assert report.record["model"] == "bundled"
    assert report.record["score"]["objects"] == [{"colour": True, "shape": True, "direction": True}]
    assert "scorer      colour right, shape right, direction right; count right" in str(report)
    assert "does not know" not in caplog.text


def test_a_configuration_with_patterns_is_recorded_counted_and_made_again(tmp_path, saved_tiny_pipeline):
    from blade.attention.pattern_table import mixed_table
    from blade.attention.patterns import HeadPattern
    from blade.generation.plan import plan_run

    pipe = load_model(saved_tiny_pipeline).pipe
    layers, heads = len(pipe.transformer.blocks), pipe.transformer.config.num_attention_heads
    table = mixed_table(
        [HeadPattern(kind="diagonal", frames=0.5), HeadPattern(kind="full")], layers, heads, block_size=8
    )
    BladeConfig(attention="patterns", patterns=table, dense_layers=(0,)).save_pretrained(tmp_path / "config")
    options = {"prompt": "x", "model": str(saved_tiny_pipeline), "config": str(tmp_path / "config"), "steps": 2}
    options |= {"height": 32, "width": 32, "frames": 5, "guidance_scale": 1.0, "device": "cpu"}
    report = generate_files(GenerationRequest(**options), tmp_path / "video.mp4")
    again = read_request(report.record_path)
    assert again.attention == "patterns" and again.blade_config.patterns == table
    planned = plan_run(GenerationRequest(**options)).cost
    made = json.loads(report.record_path.read_text())
    assert planned.density == pytest.approx(made["layer_density"], abs=1e-6) and 0 < planned.density < 1
    assert "patterns; layer density" in str(report)
    with pytest.raises(ValueError, match='`attention` must not be "patterns" without'):
        plan_run(GenerationRequest(**{**options, "config": None, "attention": "patterns"}))
