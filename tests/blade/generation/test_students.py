"""Videos made with a few-step student: its steps, attention and sampler, recorded and made again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blade.attention.config import AdaptiveConfig, BladeConfig
from blade.cli.generate import main
from blade.evaluation.plan import Evaluation, plan_evaluation
from blade.evaluation.prompts import prompts_with_seeds
from blade.evaluation.records import read_records
from blade.evaluation.runs import parse_run
from blade.evaluation.worker import evaluate_videos
from blade.generation.outputs import generate_files
from blade.generation.plan import plan_run
from blade.generation.record import read_request
from blade.generation.request import GenerationRequest, default_student
from blade.media.video import read_mp4
from blade.models.loading import load_model
from blade.students.scheduler import FewStepScheduler

TINY = {"prompt": "a red ball moving right", "height": 64, "width": 64, "frames": 9, "device": "cpu"}
CONFIG = BladeConfig(sparsity=0.4, kind="student", asa=AdaptiveConfig(block_size=32))


@pytest.fixture(scope="module")
def student(saved_tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of the tiny pipeline, for two or three steps."""
    folder = tmp_path_factory.mktemp("student")
    pipe = load_model(saved_tiny_pipeline).pipe
    generator, state = torch.Generator().manual_seed(0), {}
    for name, module in pipe.transformer.named_modules():
        if name.endswith((".to_q", ".to_v")):
            rows, columns = module.weight.shape
            state[f"transformer.{name}.lora_A.weight"] = torch.randn(4, columns, generator=generator)
            state[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 4, generator=generator)
    save_file(state, folder / "pytorch_lora_weights.safetensors")
    CONFIG.save_pretrained(folder)
    FewStepScheduler.like(pipe.scheduler, [[999.0, 500.0], [999.0, 666.0, 333.0]]).save_pretrained(
        folder / "scheduler"
    )
    return folder


@pytest.mark.slow
def test_a_student_decides_steps_guidance_attention_and_sampler(saved_tiny_pipeline, student, tmp_path):
    request = GenerationRequest(model=str(saved_tiny_pipeline), student=str(student), **TINY)
    report = generate_files(request, tmp_path / "video.mp4", compare=True)
    record = json.loads(report.record_path.read_text())
    assert (record["steps"], record["guidance_scale"], record["student"]) == (3, 1.0, str(student))
    assert record["blade_config"] == CONFIG.to_dict() and record["layer_density"] < 0.7
    assert record["changed_modules"] == {str(student): {"transformer": 8}}
    assert record["psnr"] < 60  # the comparison is dense, with the same student
    assert f"student     {student}" in str(report)
    generate_files(read_request(report.record_path), tmp_path / "again.mp4")
    assert torch.equal(read_mp4(tmp_path / "again.mp4"), read_mp4(report.video_path))
    for changes in ({"model": "bundled"}, {"student": None}):  # nothing of the student stays
        plain = read_request(report.record_path, changes)
        assert plain.student is plain.steps is plain.guidance_scale is plain.blade_config is None
        assert (plain.frames, plain.seed) == (9, 0)
    planned = plan_run(request)
    assert (planned.request.steps, planned.request.guidance_scale, planned.cost.passes) == (3, 1.0, 3)
    assert planned.request.blade_config == CONFIG and f"student     {student}" in str(planned)


@pytest.mark.slow
def test_an_evaluation_makes_the_videos_of_a_generation(saved_tiny_pipeline, student, tmp_path):
    settings = {name: TINY[name] for name in ("height", "width", "frames", "device")}
    evaluation = Evaluation(
        runs=(
            parse_run(f"few=student={student}"),
            parse_run(f"renewed=student={student},noise_kept=0"),
            parse_run("dense=dense,steps=2,guidance=1"),
        ),
        prompts=prompts_with_seeds([TINY["prompt"]], (0,)),
        folder=tmp_path / "evaluation",
        model=str(saved_tiny_pipeline),
        **settings,
    )
    evaluate_videos(plan_evaluation(evaluation))
    model = GenerationRequest(model=str(saved_tiny_pipeline), **TINY)
    for name, request in {
        "few": replace(model, student=str(student)),
        "renewed": replace(model, student=str(student), noise_kept=0.0),
        "dense": replace(model, attention="dense", steps=2, guidance_scale=1.0),
    }.items():
        (path,) = (evaluation.folder / "videos" / name).iterdir()
        video = read_mp4(generate_files(request, tmp_path / f"{name}.mp4").video_path)
        assert torch.equal(read_mp4(path), video), name


@pytest.mark.slow
def test_every_sparse_student_is_compared_with_itself_dense(saved_tiny_pipeline, student, tmp_path):
    """Whatever the order in which the videos are made."""
    settings = {name: TINY[name] for name in ("height", "width", "frames", "device")}
    dense = [
        parse_run(f"dense-{kept}=student={student},attention=dense,steps=2,noise_kept={kept}") for kept in (0.0, 1.0)
    ]
    sparse = [parse_run(f"sparse-{kept}=student={student},steps=2,noise_kept={kept}") for kept in (0.0, 1.0)]
    evaluation = Evaluation(
        runs=(*dense, *sparse),
        prompts=prompts_with_seeds([TINY["prompt"]], (0,)),
        folder=tmp_path / "at once",
        model=str(saved_tiny_pipeline),
        **settings,
    )
    apart = replace(evaluation, folder=tmp_path / "apart")
    evaluate_videos(plan_evaluation(evaluation))
    evaluate_videos(plan_evaluation(replace(apart, runs=tuple(dense))))
    evaluate_videos(plan_evaluation(apart))
    plan, plan_apart = plan_evaluation(evaluation), plan_evaluation(apart)
    found, others = read_records(plan), read_records(plan_apart)
    psnrs = {key[0]: record["psnr"] for key, record in found.items()}
    assert psnrs == {key[0]: record["psnr"] for key, record in others.items()}
    assert psnrs["dense-0.0"] is None and psnrs["sparse-0.0"] != psnrs["sparse-1.0"]


def test_untrained_steps_are_refused(saved_tiny_pipeline, student, tmp_path):
    request = GenerationRequest(model=str(saved_tiny_pipeline), student=str(student), steps=50, **TINY)
    with pytest.raises(ValueError, match=r"`steps` must be 2 or 3, as the student .* is trained, got 50"):
        generate_files(request, tmp_path / "video.mp4")
    assert not list(tmp_path.iterdir())


def test_times_make_a_sampler_for_a_lora_that_brings_none(saved_tiny_pipeline, student, tmp_path, capsys):
    bare = tmp_path / "lora"
    bare.mkdir()
    (bare / "pytorch_lora_weights.safetensors").write_bytes(
        (student / "pytorch_lora_weights.safetensors").read_bytes()
    )
    output = tmp_path / "video.mp4"
    arguments = [
        "--prompt",
        "a red ball",
        "--model",
        str(saved_tiny_pipeline),
        "--student",
        str(bare),
        "--height",
        "64",
    ]
    arguments += ["--width", "64", "--frames", "9", "--device", "cpu", "--output", str(output)]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--scheduler", "1000,800,400", "--student-weight", "0.5", "--attention", "dense"])
    assert not ended.value.code
    record = json.loads(output.with_suffix(".json").read_text())
    assert (record["steps"], record["scheduler"], record["student_weight"]) == (3, "1000,800,400", 0.5)
    kept = read_request(output.with_suffix(".json"), {"noise_kept": 0.0})
    assert (kept.noise_kept, kept.scheduler) == (0.0, "1000,800,400")
    assert read_request(output.with_suffix(".json"), {"student": "another"}).noise_kept is None


@pytest.fixture(scope="module")
def foreign(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that brings no attention and no sampler."""
    folder = tmp_path_factory.mktemp("foreign")
    name = "pytorch_lora_weights.safetensors"
    (folder / name).write_bytes((student / name).read_bytes())
    return folder


FEW_STEP = BladeConfig.from_preset("shapes", "few-step")


def test_a_student_trained_dense_takes_the_few_step_preset_and_says_why(
    saved_tiny_pipeline, foreign, tmp_path, caplog
):
    caplog.set_level("INFO", logger="blade")
    request = GenerationRequest(model=str(saved_tiny_pipeline), student=str(foreign), scheduler="1000,800,400", **TINY)
    report = generate_files(request, tmp_path / "video.mp4")
    record = json.loads(report.record_path.read_text())
    assert record["blade_config"] == FEW_STEP.to_dict() and record["blade_config"]["dense_steps"] == 1
    assert record["blade_config"]["kind"] == "few-step" and "preset" not in record
    assert 0.5 < record["run_density"] < 1  # in one of two layers, at two of three steps
    assert caplog.messages[1] == (
        f"Attention starts from the few-step preset: the student {foreign} has no sparse attention."
    )
    lines = str(report).splitlines()
    assert f"student     {foreign} (attention of the few-step preset, for students trained dense)" in lines
    assert any(line.startswith("attention   asa (few-step preset), requested sparsity 0.5; ") for line in lines)
    again = read_request(report.record_path)
    assert again.blade_config == FEW_STEP and again.preset is None
    other = read_request(report.record_path, {"preset": "training-free"})
    assert (other.preset, other.blade_config, other.sparsity, other.steps) == ("training-free", None, None, 3)
    planned = plan_run(replace(request, sparsity=0.4))
    assert planned.request.blade_config == replace(FEW_STEP, sparsity=0.4)
    assert f"student     {foreign} (attention of the few-step preset" in str(planned)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"attention": "asa"}, FEW_STEP),
        ({"preset": "training-free"}, BladeConfig.from_preset("shapes")),
        ({"attention": "dense"}, None),
    ],
)
def test_what_is_asked_for_comes_before_the_few_step_preset(saved_tiny_pipeline, foreign, options, expected):
    request = GenerationRequest(model=str(saved_tiny_pipeline), student=str(foreign), steps=4, **TINY, **options)
    assert plan_run(request).request.blade_config == expected


def test_a_dense_student_of_this_project_is_dense_unless_sparsity_is_asked_for(saved_tiny_pipeline, foreign, tmp_path):
    folder = Path(shutil.copytree(foreign, tmp_path / "dense"))
    BladeConfig(attention="dense", kind="student").save_pretrained(folder)
    request = GenerationRequest(model=str(saved_tiny_pipeline), student=str(folder), steps=4, **TINY)
    assert plan_run(request).request.blade_config is None
    assert plan_run(replace(request, sparsity=0.3)).request.blade_config == replace(FEW_STEP, sparsity=0.3)


def test_few_step_weights_without_a_student_take_their_preset_by_name(saved_tiny_pipeline):
    request = GenerationRequest(model=str(saved_tiny_pipeline), preset="few-step", steps=4, **TINY)
    assert plan_run(request).request.blade_config == FEW_STEP
    assert default_student({"prompt": "a cat", "preset": "few-step"}) is None
    assert default_student({"prompt": "a cat"}) is not None


def test_an_evaluation_names_the_few_step_preset(saved_tiny_pipeline, student, foreign):
    settings = {name: TINY[name] for name in ("height", "width", "frames", "device")}
    runs = {
        "alone": f"student={foreign},steps=4",
        "few": f"student={foreign},preset=few-step,steps=4",
        "sparse": f"preset,student={foreign},steps=4,sparsity=0.3",
        "old": f"student={foreign},preset=training-free,steps=4",
        "joint": f"student={student},attention=preset",
        "model": "preset=few-step,steps=4,guidance=1",
    }
    evaluation = Evaluation(
        runs=tuple(parse_run(f"{name}={text}") for name, text in runs.items()),
        prompts=prompts_with_seeds([TINY["prompt"]], (0,)),
        folder=None,
        model=str(saved_tiny_pipeline),
        **settings,
    )
    requests, training_free = plan_evaluation(evaluation).requests, BladeConfig.from_preset("shapes")
    assert {name: request.blade_config for name, request in requests.items()} == {
        "alone": None,
        "few": FEW_STEP,
        "sparse": replace(FEW_STEP, sparsity=0.3),
        "old": training_free,
        "joint": training_free,
        "model": FEW_STEP,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "999,500"}, "`scheduler` must not be given without `student`"),
        ({"noise_kept": 0.5}, "`noise_kept` must not be given without `student`"),
        ({"student": "x", "noise_kept": 1.5}, r"`noise_kept` must be in \[0, 1\], got 1.5"),
        ({"preset": "fast"}, '`preset` must be one of "training-free", "few-step", "student", got \'fast\''),
        ({"preset": "few-step", "config": "x"}, "`preset` must not be given with `config`, got 'few-step'"),
        ({"preset": "few-step", "attention": "dense"}, '`preset` must not be given with `attention` "dense"'),
        ({"preset": "few-step", "blade_config": CONFIG}, "`preset` and `blade_config` must not both be given"),
        ({"student": "x", "scheduler": "fast"}, "`scheduler` must be times separated by commas, .* got 'fast'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationRequest(prompt="a cat", **options)


def test_a_model_with_a_published_student_says_so(saved_tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("blade_pipelines.wan.WanFamily.preset_name", lambda *_: "wan2.1-t2v-1.3b")
    request = GenerationRequest(model=str(saved_tiny_pipeline), attention="dense", steps=1, **TINY)
    report = generate_files(request, tmp_path / "video.mp4")
    assert "there is one for this model, for fewer steps: --student GYP666/VIDEO-BLADE" in str(report)


@pytest.fixture(scope="module")
def comfy(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LoRA of the student in ComfyUI's layout, with a difference of a norm, and nothing else."""
    path, tensors = tmp_path_factory.mktemp("comfy") / "lightning.safetensors", {}
    for key, tensor in load_file(student / "pytorch_lora_weights.safetensors").items():
        name = key.removeprefix("transformer.").replace("attn1.to_", "self_attn.").replace("attn2.to_", "cross_attn.")
        tensors[f"diffusion_model.{name}"] = tensor
    width = next(tensor.shape[1] for key, tensor in tensors.items() if key.endswith("self_attn.q.lora_A.weight"))
    save_file({**tensors, "diffusion_model.blocks.0.self_attn.norm_q.diff": torch.ones(width)}, path)
    return path


@pytest.mark.slow
def test_a_file_in_another_layout_is_a_student(saved_tiny_pipeline, comfy, tmp_path):
    request = GenerationRequest(
        model=str(saved_tiny_pipeline), student=str(comfy), scheduler="999,500", attention="dense", **TINY
    )
    report = generate_files(request, tmp_path / "video.mp4")
    record = json.loads(report.record_path.read_text())
    assert (record["steps"], record["guidance_scale"], record["student"]) == (2, 1.0, str(comfy))
    assert record["changed_modules"] == {str(comfy): {"transformer": 9}}


def exit_code(command: list[str]) -> int | str | None:
    try:
        main(command)
    except SystemExit as ended:
        return ended.code
    return 0


def test_a_student_of_unknown_steps_says_what_to_give(saved_tiny_pipeline, comfy, capsys):
    command = ["a ball", "--model", str(saved_tiny_pipeline), "--student", str(comfy), "--dry-run"]
    assert exit_code(command) == 2
    assert "`steps` must be given: nothing says for how many the student" in capsys.readouterr().err
    assert exit_code([*command, "--steps", "4", "--height", "64", "--width", "64", "--frames", "9"]) == 0
    assert f"student     {comfy}" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--lora", "--student"])
def test_a_dry_run_reads_the_files(saved_tiny_pipeline, student, comfy, tmp_path, capsys, option):
    """Whether they are there, can be read and fit; nothing of a model is loaded."""
    command = ["a ball", "--model", str(saved_tiny_pipeline), "--dry-run", "--height", "64", "--width", "64"]
    command += ["--frames", "9", "--steps", "3", option]
    assert exit_code([*command, str(student if option == "--student" else comfy)]) == 0
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    save_file({"blocks.0.elsewhere.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    capsys.readouterr()
    for name, message in (
        ("broken.safetensors", "broken.safetensors cannot be read as safetensors"),
        ("other.safetensors", "none of its 1 modules fits transformer: blocks.0.elsewhere (no such module)"),
        ("missing.safetensors", "missing.safetensors is no f"),
    ):
        assert exit_code([*command, str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
