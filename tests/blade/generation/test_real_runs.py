"""What a real run asks for beside a prompt: images, videos, LoRAs, offloading, fewer bits, caches, lists."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from blade_kernels.crashes import DeviceCrashError
from diffusers import WanPipeline
from PIL import Image
from safetensors.torch import save_file

from blade.attention.apply import use_blade
from blade.attention.config import AdaptiveConfig, BladeConfig
from blade.cli.generate import main
from blade.generation import outputs, team
from blade.generation.outputs import FinishedVideo, generate_files, generate_list
from blade.generation.plan import plan_run, resolve_without_weights
from blade.generation.prepare import prepare_model
from blade.generation.prompts import read_prompts
from blade.generation.record import read_request
from blade.generation.request import GenerationRequest
from blade.generation.resolve import resolve_request
from blade.generation.run import call_arguments, run_request
from blade.media.video import encode_mp4, read_mp4
from blade.models.acceleration import (
    advise,
    choose_offload,
    compile_blocks,
    place,
)
from blade.models.choices import parse_cache
from blade.models.conditions import cover, model_for, size_like
from blade.models.loaded import LoadedModel
from blade.models.loading import load_model
from blade.models.loras import load_loras, merge_loras

PROMPT = "a red ball moving right"
TINY = {"height": 64, "width": 64, "frames": 9, "steps": 3, "device": "cpu"}
SPARSE = BladeConfig(sparsity=0.4, dense_steps=0, dense_layers=(), asa=AdaptiveConfig(block_size=32))


def tiny(model: Path, **changes) -> GenerationRequest:
    return GenerationRequest(**{"prompt": PROMPT, "model": str(model), "blade_config": SPARSE, **TINY, **changes})


def make(request: GenerationRequest) -> torch.Tensor:
    model, resolved = prepare_model(request)
    model.pipe.set_progress_bar_config(disable=True)
    return run_request(model, resolved).video


@pytest.fixture(scope="module")
def plain(saved_tiny_pipeline: Path) -> torch.Tensor:
    """The video of the plain request."""
    return make(tiny(saved_tiny_pipeline))


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (160, 80)) -> str:
    Image.new("RGB", size, colour).save(path)
    return str(path)


def lora(pipe, path: Path, seed: int) -> str:
    """Write a LoRA of rank 2 for the transformer's queries."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, module in pipe.transformer.named_modules():
        if name.endswith("attn1.to_q"):
            rows, columns = module.weight.shape
            state[f"transformer.{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
            state[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    save_file(state, path)
    return str(path)


@pytest.mark.slow
def test_a_video_starts_from_an_image_and_takes_its_shape(saved_tiny_ti2v: Path, tmp_path: Path) -> None:
    red = picture(tmp_path / "red.png", (230, 40, 40))
    request = tiny(saved_tiny_ti2v, image=red, height=None, width=None)
    model = model_for(load_model(saved_tiny_ti2v), "image")
    assert type(model.pipe).__name__ == "WanImageToVideoPipeline"
    resolved = resolve_request(request, model)
    assert resolved.width == pytest.approx(2 * resolved.height, rel=0.05)
    assert resolved.height * resolved.width == pytest.approx(480 * 832, rel=0.05)
    made = [make(tiny(saved_tiny_ti2v, image=image)) for image in (red, picture(tmp_path / "blue.png", (40, 40, 230)))]
    assert made[0].shape == (9, 3, 64, 64)
    assert not torch.equal(*made)
    report = generate_files(tiny(saved_tiny_ti2v, image=red), tmp_path / "video.mp4")
    generate_files(read_request(report.record_path), tmp_path / "again.mp4")
    assert torch.equal(read_mp4(tmp_path / "again.mp4"), read_mp4(report.video_path))


def test_a_video_is_changed_as_far_as_asked(saved_tiny_pipeline: Path, tmp_path: Path) -> None:
    path = tmp_path / "before.mp4"
    path.write_bytes(encode_mp4(torch.rand(14, 3, 48, 80, generator=torch.Generator().manual_seed(0)), 16))
    request = tiny(saved_tiny_pipeline, video=str(path), frames=None, steps=8)
    model, resolved = prepare_model(request)
    assert type(model.pipe).__name__ == "WanVideoToVideoPipeline" and resolved.frames == 13
    little, much = (make(tiny(saved_tiny_pipeline, video=str(path), steps=8, strength=s)) for s in (0.25, 1.0))
    assert little.shape == much.shape == (9, 3, 64, 64)
    assert not torch.equal(little, much)


def test_a_video_of_another_rate_is_taken_by_time(
    saved_tiny_pipeline: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a second of 48 frames a second: at 16, every third; that the video is not that long is found at once."""
    path = tmp_path / "before.mp4"
    gray = torch.linspace(0, 1, 24)[:, None, None, None].expand(-1, 3, 64, 64)
    path.write_bytes(encode_mp4(gray, 48))
    with caplog.at_level("INFO", logger="blade"):
        request = plan_run(tiny(saved_tiny_pipeline, video=str(path), frames=None)).request
    assert (request.frames, request.fps) == (5, 16)
    assert "24 frames at 48 a second, the first 0.31 of 0.50 s are taken, as 5 frames at 16 a second" in caplog.text
    assert plan_run(tiny(saved_tiny_pipeline, video=str(path), frames=None, fps=48)).request.frames == 21
    given = call_arguments(model_for(load_model(saved_tiny_pipeline), "video"), request)["video"]
    seen = torch.tensor([frame.getpixel((32, 32))[0] / 255 for frame in given])
    assert torch.allclose(seen, gray[:13:3, 0, 0, 0], atol=0.03)
    with pytest.raises(
        ValueError, match=r"`frames` must be at most the 8 that `video` .* has at 16 a second \(24 at 48"
    ):
        plan_run(tiny(saved_tiny_pipeline, video=str(path), frames=9))


def test_a_video_to_change_takes_the_memory_of_its_frames_alone(tmp_path: Path) -> None:
    """Of 300 frames of 640x480, 260 MiB of pixels and a gibibyte of numbers, nine are taken, and 300 counted."""
    path = tmp_path / "long.mp4"
    path.write_bytes(encode_mp4((torch.full((3, 480, 640), number / 300) for number in range(300)), 16))
    code = f"""
import resource
from blade.models.conditions import cover, measure_video, read_frames
path = {str(path)!r}
list(read_frames(path, 1, 16))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert measure_video(path, 16).count_at(16) == 300
kept = [cover(frame, 64, 64) for frame in read_frames(path, 300, 16)]
print(len(kept), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    frames, mebibytes = done.stdout.split()
    assert int(frames) == 300 and float(mebibytes) < 60


def test_dense_steps_of_a_changed_video_are_those_of_the_whole_schedule(
    saved_tiny_pipeline: Path, tmp_path: Path
) -> None:
    """Which begins at the fifth step of eight; counted as the plan says."""
    path = tmp_path / "before.mp4"
    path.write_bytes(encode_mp4(torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0)), 8))
    options = {"video": str(path), "strength": 0.5, "steps": 8, "guidance_scale": 1.0}
    for dense_steps, dense in ((0.2, 0), (2, 0), (5, 1), (0.9, 4)):
        request = tiny(saved_tiny_pipeline, dense_steps=dense_steps, **options)
        model, resolved = prepare_model(request)
        model.pipe.set_progress_bar_config(disable=True)
        made = run_request(model, resolved)
        layers = made.summary.transformers[0].layers
        assert [(layer.dense_calls, layer.sparse_calls) for layer in layers] == [(dense, 4 - dense)] * 2
        cost = plan_run(request).cost
        assert (cost.passes, cost.sparse_passes) == (4, 4 - dense)


def test_the_strength_of_a_change_is_recorded_and_leaves_a_step(saved_tiny_pipeline: Path, tmp_path: Path) -> None:
    path = tmp_path / "before.mp4"
    path.write_bytes(encode_mp4(torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0)), 8))
    plan = plan_run(tiny(saved_tiny_pipeline, video=str(path), steps=10))
    assert plan.request.strength == 0.8 and plan.request.skipped_steps == 2  # the pipeline's own
    assert "10 steps (the first 2 skipped)" in str(plan)
    with pytest.raises(ValueError, match=r"`strength` must be at least 0.125 with 8 steps, .*got 0.1"):
        plan_run(tiny(saved_tiny_pipeline, video=str(path), steps=8, strength=0.1))
    assert plan_run(tiny(saved_tiny_pipeline)).request.strength is None


def test_conditions_that_a_model_does_not_take_are_refused(
    saved_tiny_pipeline: Path, saved_tiny_ti2v: Path, tmp_path: Path
) -> None:
    red = picture(tmp_path / "red.png", (230, 40, 40))
    with pytest.raises(ValueError, match="`image` must not be given: this model is a WanPipeline"):
        make(tiny(saved_tiny_pipeline, image=red))
    with pytest.raises(ValueError, match="`image` must be an image file"):
        make(tiny(saved_tiny_ti2v, image=str(tmp_path / "missing.png")))
    with pytest.raises(ValueError, match="`video` must be a video file"):
        make(tiny(saved_tiny_pipeline, video=red[:-4]))
    for changes, message in (
        ({"image": red, "video": red}, "`image` and `video` must not both be given"),
        ({"strength": 0.5}, "`strength` must not be given without `video`"),
        ({"last_image": red}, "`last_image` must not be given without `image`"),
        ({"video": red, "strength": 1.5}, "`strength` must be above 0 and at most 1, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(saved_tiny_pipeline, **changes)


def test_an_image_is_cut_to_a_shape_without_being_stretched(saved_tiny_pipeline: Path) -> None:
    image = Image.new("RGB", (400, 100), (0, 0, 0))
    image.paste((255, 255, 255), (140, 0, 260, 100))  # a little more than the square in the middle
    assert cover(image, 64, 64).getextrema() == ((255, 255),) * 3
    assert size_like(load_model(saved_tiny_pipeline), image, 128 * 128) == (64, 256)


def test_loras_add_up_with_their_strengths(saved_tiny_pipeline: Path, plain: torch.Tensor, tmp_path: Path) -> None:
    pipe = load_model(saved_tiny_pipeline).pipe
    files = [lora(pipe, tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    load_loras(LoadedModel(pipe), [files[0], f"{files[1]}=0.5"])
    layer = pipe.transformer.blocks[0].attn1.to_q
    assert {name: layer.scaling[name] for name in layer.active_adapters} == {"lora_0": 1.0, "lora_1": 0.5}
    nothing = make(tiny(saved_tiny_pipeline, loras=(f"{files[0]}=0",)))
    torch.testing.assert_close(nothing, plain)
    both = make(tiny(saved_tiny_pipeline, loras=(files[0], f"{files[1]}=0.5")))
    assert (both - plain).abs().max() > 1e-3
    report = generate_files(tiny(saved_tiny_pipeline, loras=(files[0],)), tmp_path / "video.mp4")
    assert read_request(report.record_path).loras == (files[0],)
    assert report.record["changed_modules"] == {files[0]: {"transformer": 2}}
    with pytest.raises(ValueError, match="holds whole weights and no LoRA, such as decoder"):
        make(tiny(saved_tiny_pipeline, loras=(str(saved_tiny_pipeline / "vae"),)))
    with pytest.raises(ValueError, match="`loras` must be sources, each with =STRENGTH or not"):
        tiny(saved_tiny_pipeline, loras=("style=much",))


@pytest.mark.parametrize("offload", ["model", "group", "sequential"])
def test_offloading_changes_nothing(saved_tiny_pipeline: Path, plain: torch.Tensor, offload: str) -> None:
    model, resolved = prepare_model(tiny(saved_tiny_pipeline))
    if offload == "sequential":  # what Diffusers does on a GPU, and refuses on the CPU
        for part in (model.pipe.text_encoder, model.pipe.transformer, model.pipe.vae):
            cpu_offload(part, torch.device("cpu"))
        assert next(model.pipe.transformer.parameters()).is_meta
    else:
        place(model, torch.device("cpu"), offload)
    model.pipe.set_progress_bar_config(disable=True)
    for _ in range(2):
        torch.testing.assert_close(run_request(model, resolved).video, plain)


def test_offloading_on_the_cpu_is_refused(saved_tiny_pipeline: Path) -> None:
    with pytest.raises(ValueError, match="`offload` must be none on the CPU"):
        prepare_model(tiny(saved_tiny_pipeline, offload="auto"))
    for other in ({"quantize": "int8"}, {"compile": True}):
        with pytest.raises(ValueError, match="with `offload` sequential"):
            tiny(saved_tiny_pipeline, offload="sequential", **other)


def test_the_fastest_offloading_that_fits_is_chosen() -> None:
    weights = {"text_encoder": 11.0, "transformer": 2.7, "vae": 0.5}
    activations = {"transformer": 3.0, "decoding": 6.0}
    chosen = [choose_offload(weights, activations, gib) for gib in (80, 24, 16, 8)]
    assert chosen == ["none", "none", "model", "group"]
    assert "--vae-tiling" in advise("none", quantized=False, tiled=False, decoding=True)
    steps = [advise(offload, quantized=False, tiled=True, decoding=False) for offload in ("none", "model", "group")]
    assert ["--offload model" in steps[0], "--offload group" in steps[1], "--quantize" in steps[2]] == [True] * 3


def test_two_transformers_take_a_lora_each(saved_tiny_pipeline: Path, tmp_path: Path, monkeypatch) -> None:
    """In the plan, in the video, in the record, from the record, and in what marks the state of the inputs."""
    pipe = load_model(saved_tiny_pipeline).pipe
    folder = tmp_path / "two"
    WanPipeline(**pipe.components | {"transformer_2": pipe.transformer}, boundary_ratio=0.5).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("high", "low")):
        lora(pipe, tmp_path / f"{name}.safetensors", seed)
    request = tiny(folder, loras=("high.safetensors:low.safetensors=0.5:50",))
    paths = [str(tmp_path / f"{name}.safetensors") for name in ("high", "low")]
    plan = plan_run(request)
    assert plan.request.loras == (f"{paths[0]}:{paths[1]}=0.5:50",)
    report = generate_files(request, tmp_path / "video.mp4")
    changed = {"transformer": 2, "transformer_2": 2}
    assert report.record["changed_modules"] == {"high.safetensors:low.safetensors": changed}
    again = read_request(report.record_path)
    assert again.loras == plan.request.loras
    video = make(again)
    assert torch.equal(video, make(request))
    for other in ("high.safetensors:low.safetensors=0", "high.safetensors:low.safetensors=0.5"):
        assert (video - make(tiny(folder, loras=(other,)))).abs().max() > 1e-5
    lora(pipe, tmp_path / "low.safetensors", 7)
    assert plan_run(request).request.input_state != plan.request.input_state
    with pytest.raises(ValueError, match=r"changes 2 modules of transformer and nothing in transformer_2\. Name a"):
        make(tiny(folder, loras=("high.safetensors",)))
    with pytest.raises(ValueError, match="must name one source for a model of one transformer"):
        plan_run(tiny(saved_tiny_pipeline, loras=request.loras))


def test_the_command_gives_each_of_two_experts_its_lora(saved_tiny_pipeline: Path, tmp_path: Path) -> None:
    """As Wan 2.2: other weights for less noise, a LoRA for each from a file of its own, both sparse."""
    pipe = load_model(saved_tiny_pipeline).pipe
    folder, second = tmp_path / "two", copy.deepcopy(pipe.transformer)
    for parameter in second.parameters():
        parameter.data.mul_(1.1)
    WanPipeline(**pipe.components | {"transformer_2": second}, boundary_ratio=0.6).save_pretrained(folder)
    high, low = (lora(pipe, tmp_path / f"{name}.safetensors", seed) for seed, name in enumerate(("high", "low")))
    SPARSE.save_pretrained(tmp_path / "config")
    given = {**TINY, "steps": 4, "model": folder, "config": tmp_path / "config", "guidance_scale": 2, "prompt": PROMPT}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]

    def video(name: str, *loras: str) -> tuple[torch.Tensor, dict]:
        with pytest.raises(SystemExit) as done:
            main([*options, *(f"--lora={value}" for value in loras), f"--output={tmp_path / name}.mp4"])
        assert done.value.code == 0
        return read_mp4(tmp_path / f"{name}.mp4"), json.loads((tmp_path / f"{name}.json").read_text())

    made, record = video("made", f"{high}:{low}=0.8")
    assert record["changed_modules"] == {f"{high}:{low}": {"transformer": 2, "transformer_2": 2}}
    assert 0.4 < record["layer_density"] < 0.6 and record["layer_density"] == record["run_density"]
    for name, other in (("plain", ()), ("swapped", (f"{low}:{high}=0.8",)), ("weaker", (f"{high}:{low}=0.1",))):
        assert (video(name, *other)[0] - made).abs().max() > 0.01
    assert torch.equal(video("again", f"{high}:{low}=0.8")[0], made)


def test_merged_loras_make_the_same_video(saved_tiny_pipeline: Path, tmp_path: Path) -> None:
    pipe = load_model(saved_tiny_pipeline).pipe
    path = lora(pipe, tmp_path / "style.safetensors", 1)
    load_loras(LoadedModel(pipe), [f"{path}=0.5"])
    request = resolve_request(tiny(saved_tiny_pipeline), LoadedModel(pipe))
    before = run_request(LoadedModel(pipe), request).video
    merge_loras(LoadedModel(pipe))
    assert not any("lora" in name or "base_layer" in name for name, _ in pipe.transformer.named_parameters())
    assert (run_request(LoadedModel(pipe), request).video - before).abs().max() < 1e-4


def test_quantizing_leaves_loras_in(saved_tiny_pipeline: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    path = lora(load_model(saved_tiny_pipeline).pipe, tmp_path / "style.safetensors", 1)
    whole = make(tiny(saved_tiny_pipeline, loras=(path,)))
    assert (make(tiny(saved_tiny_pipeline, loras=(path,), quantize="int8")) - whole).square().mean().sqrt() < 0.05


def test_every_block_and_the_decoder_are_compiled(saved_tiny_pipeline: Path) -> None:
    pipe = load_model(saved_tiny_pipeline).pipe
    compile_blocks(LoadedModel(pipe))
    parts = [*pipe.transformer.blocks, pipe.vae.decoder]
    assert all(part._compiled_call_impl is not None for part in parts)


@pytest.mark.parametrize(
    ("cache", "guidance_scale"),
    [
        ("first-block=1.0", 2.0),
        ("mag=10", 2.0),
        ("sea=10", 2.0),
        ("taylor-seer=2", 2.0),
        ("cache-dit=10", 2.0),
        ("pyramid=2", 1.0),
        ("faster=2", 1.0),
    ],
)
def test_caches_save_attention(
    saved_tiny_pipeline: Path, cache: str, guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where attention is computed, under BLADE, against the run without the cache."""
    if cache.startswith("cache-dit"):
        pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    from blade.attention.layer import SparseLayer

    counts, attend = {}, SparseLayer.attend

    def counted(self, *args, **kwargs):
        counts[key] += 1
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(SparseLayer, "attend", counted)
    for key in ("plain", "cached"):
        counts[key] = 0
        asked = cache if key == "cached" else None
        video = make(tiny(saved_tiny_pipeline, steps=12, guidance_scale=guidance_scale, cache=asked))
        assert video.isfinite().all()
    assert 0 < counts["cached"] < counts["plain"]


def test_caches_that_are_none_are_refused(saved_tiny_pipeline: Path) -> None:
    assert parse_cache("first-block") == ("first-block", 0.05)
    assert parse_cache("taylor-seer") == ("taylor-seer", 5) and parse_cache("faster=3") == ("faster", 3)
    for text in ("teacache", "first-block=0", "cache-dit=nan", "pyramid=1", "taylor-seer=2.5", "faster=many"):
        with pytest.raises(ValueError, match="`cache`"):
            tiny(saved_tiny_pipeline, cache=text)


def test_a_list_of_prompts_is_resumed_and_survives_a_failure(
    saved_tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["a red ball moving right", "a blue ball moving up", "a white square moving left"]
    original = team.run_request

    def sometimes(model, request):
        if "blue" in request.prompt:
            raise RuntimeError("out of luck")
        return original(model, request)

    monkeypatch.setattr(team, "run_request", sometimes)
    report = generate_list(tiny(saved_tiny_pipeline), prompts, tmp_path)
    assert [path.video_path.name[:10] for path in report.made] == ["a-red-ball", "a-white-sq"]
    assert report.failed == {"a blue ball moving up": "out of luck"}
    assert "2 made, 0 there before, 1 failed" in str(report)
    monkeypatch.setattr(team, "run_request", original)
    again = generate_list(tiny(saved_tiny_pipeline), prompts, tmp_path)
    assert (len(again.made), len(again.skipped), len(again.failed)) == (1, 2, 0)
    alone = generate_files(tiny(saved_tiny_pipeline, prompt=prompts[1]), tmp_path / "alone.mp4")
    assert torch.equal(read_mp4(alone.video_path), read_mp4(again.made[0].video_path))


def test_a_list_keeps_no_video_in_memory(
    saved_tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, original = [], team.run_request

    def watched(model, request):
        generation = original(model, request)
        made.append(weakref.ref(generation))
        return generation

    monkeypatch.setattr(team, "run_request", watched)
    report = generate_list(tiny(saved_tiny_pipeline), ["a red ball moving right", "a blue ball moving up"], tmp_path)
    gc.collect()
    assert [generation() for generation in made] == [None, None]
    assert [one.generation for one in report.made] == [None, None]
    assert report.made[0].video_path.is_file() and report.made[0].record["frames"] == 9


@pytest.mark.slow
def test_the_memory_of_a_list_does_not_grow_with_it(saved_tiny_pipeline: Path, tmp_path: Path) -> None:
    """The resident memory after 60 prompts is within 5 % of that after the third, which 40 MiB each would not be."""
    code = f"""
import psutil, torch
from blade.generation import outputs, team
from blade.generation.request import GenerationRequest
run, resident = team.run_request, []
def measured(model, request, **options):
    resident.append(psutil.Process().memory_info().rss)
    generation = run(model, request, **options)
    larger = torch.nn.functional.interpolate(generation.video, size=(620, 620))  # which glibc frees at once
    object.__setattr__(generation, "video", larger)
    return generation
team.run_request = measured
outputs.encode_mp4 = lambda video, fps, sound: b"a video"
words = [f"a {{colour}} {{shape}} moving {{way}}" for colour in ("red", "green", "blue", "yellow", "white")
         for shape in ("ball", "square", "triangle") for way in ("left", "right", "up", "down")]
request = GenerationRequest(
    prompt=words[0], model={str(saved_tiny_pipeline)!r}, height=64, width=64, frames=9, steps=1, device="cpu"
)
report = outputs.generate_list(request, words, {str(tmp_path)!r})
assert (len(report.made), report.failed) == (60, {{}}), report
resident.append(psutil.Process().memory_info().rss)
print(resident[3], resident[-1])  # before the fourth, and after the last
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    third, last = map(int, done.stdout.split()[-2:])
    assert last <= 1.05 * third


def test_a_prompt_that_cannot_be_drawn_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it loaded for: the first prompt is the one that is refused."""
    drawn = []

    def made(model, request, **options):
        drawn.append(request.prompt)
        return FinishedVideo(record={}, video=b"a video", comparison=None, published_students=(), generation=None)

    monkeypatch.setattr(outputs, "make_video", made)
    monkeypatch.setattr(team, "prepare_model", lambda request, team: (None, resolve_without_weights(request)[1]))
    prompts = ["a cat walks on the grass", "a red ball going right", "a blue sqare moving up"]
    request = GenerationRequest(prompt=prompts[0])
    report = generate_list(request, prompts, tmp_path)
    assert drawn == ["a red ball going right"] and len(report.made) == 1
    assert list(report.failed) == [prompts[0], prompts[2]]
    assert '"cat", "walks", "on", "the", "grass"' in report.failed[prompts[0]]
    assert '"sqare" (did you mean square?)' in report.failed[prompts[2]]
    monkeypatch.setattr(team, "prepare_model", lambda request, team: pytest.fail("loaded"))
    assert len(generate_list(request, ["a cat"], tmp_path).failed) == 1


def test_a_crashed_gpu_ends_a_list(saved_tiny_pipeline: Path, tmp_path: Path, monkeypatch) -> None:
    drawn = []

    def crash(model, request):
        drawn.append(request.prompt)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(team, "run_request", crash)
    with pytest.raises(DeviceCrashError, match="prompt 'a red ball moving right' has crashed cpu: CUDA error"):
        generate_list(tiny(saved_tiny_pipeline), ["a red ball moving right", "a blue ball moving up"], tmp_path)
    assert drawn == ["a red ball moving right"]


def test_the_command_takes_a_list(saved_tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# two\na red ball moving right\n\na red ball moving right\na blue ball moving up\n")
    assert read_prompts(file) == ["a red ball moving right", "a blue ball moving up"]
    options = [f"--{name}={value}" for name, value in {**TINY, "model": saved_tiny_pipeline}.items()]
    with pytest.raises(SystemExit) as done:
        main([*options, f"--prompts={file}", f"--output={tmp_path / 'videos'}"])
    assert done.value.code == 0
    assert "2 made, 0 there before, 0 failed" in capsys.readouterr().out
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2
    with pytest.raises(SystemExit):
        main([*options, f"--prompts={file}", "--prompt=x"])
    assert "`--prompt` must not be given with `--prompts`" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has none"):
        file.write_text("# nothing\n")
        read_prompts(file)


def test_too_little_memory_ends_with_advice(saved_tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, resolved = prepare_model(tiny(saved_tiny_pipeline))

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(model.pipe.transformer.blocks[0].ffn, "forward", full)
    with pytest.raises(MemoryError, match=r"Tried to allocate 20 GiB.*--offload model"):
        run_request(model, resolved)
    monkeypatch.undo()
    monkeypatch.setattr(model.pipe.vae, "decode", full)
    with pytest.raises(MemoryError, match="--vae-tiling"):
        run_request(model, resolved)


def test_a_pipeline_stays_usable_by_itself(saved_tiny_pipeline: Path) -> None:
    """A pipeline that was rebuilt for a video has the same parts, so that BLADE on one is BLADE on the other."""
    model = load_model(saved_tiny_pipeline)
    pipe, other = model.pipe, model_for(model, "video").pipe
    assert other.transformer is pipe.transformer and other.vae is pipe.vae
    with use_blade(other, SPARSE):
        assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanSparseProcessor"
