"""The students that ship with the package: when they are taken, what they bring, and that they are what they say."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import typer
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file

from blade import load_student
from blade.cli.generate import main
from blade.distillation.recipes import load_config
from blade.generation.fingerprint import model_fingerprint
from blade.generation.request import GenerationRequest, default_student
from blade.generation.resolve import resolve_request
from blade.generation.run import run_request
from blade.models.loaded import LoadedModel
from blade.models.loading import load_model
from blade.moving_shapes.scoring import score
from blade.students.source import BUNDLED_STUDENTS, WEIGHT_NAME, bundled_student_path

PROMPT = "a red ball moving right"
SHIP = runpy.run_path(str(Path(__file__).parents[3] / "scripts" / "distill_shapes.py"))


@pytest.fixture(scope="module")
def pipe():
    pipe = load_model().pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("given", "student"),
    [
        ({}, "shapes-8-steps"),
        ({"seed": 3, "device": "cpu", "frames": 33}, "shapes-8-steps"),
        ({"steps": 4}, "shapes-4-steps"),
        ({"steps": 8}, "shapes-8-steps"),
        ({"steps": 30}, None),
        ({"attention": "dense"}, None),
        ({"guidance_scale": 2.0}, None),
        ({"sparsity": 0.5}, None),
        ({"loras": ["mine.safetensors"]}, None),
        ({"model": "elsewhere"}, None),
    ],
)
def test_a_student_is_taken_unless_something_calls_for_the_model_itself(given, student):
    assert default_student(given) == student


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "name"), BUNDLED_STUDENTS.items())
def test_each_brings_its_steps_and_its_attention(pipe, steps, name):
    student = load_student(pipe, name)
    assert (student.source, student.steps, student.guidance_scale) == (name, steps, 1.0)
    assert student.config.sparsity == 0.8 and student.config.pooled_tokens == "all"
    resolved = resolve_request(GenerationRequest(prompt=PROMPT, student=name), LoadedModel(pipe))
    assert (resolved.student, resolved.steps, resolved.attention) == (name, steps, "asa-gt")
    made = run_request(LoadedModel(pipe), resolved)
    assert score(made.video, PROMPT).basics
    assert made.layer_density < 0.25


@pytest.mark.slow
def test_stock_diffusers_samples_them_alike(pipe):
    """By the three lines of the card, but for attention, which is dense there."""
    load_student(pipe, "shapes-4-steps")
    request = GenerationRequest(prompt=PROMPT, student="shapes-4-steps", attention="dense")
    own = run_request(LoadedModel(pipe), resolve_request(request, LoadedModel(pipe))).video
    stock = load_model().pipe
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(str(bundled_student_path("shapes-4-steps")))
    card = (bundled_student_path("shapes-4-steps") / "README.md").read_text(encoding="utf-8")
    expression = card.split("pipe.scheduler = ")[1].split("video = ")[0]
    stock.scheduler = eval(expression, {"DPMSolverMultistepScheduler": DPMSolverMultistepScheduler})
    video = stock(
        prompt=PROMPT, negative_prompt="", height=96, width=96, num_frames=33, num_inference_steps=4,
        guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type="pt",
    ).frames[0]  # fmt: skip
    assert (video - own).abs().mean() < 5e-3  # Diffusers rounds the times to whole ones
    assert score(video, PROMPT).basics


@pytest.mark.parametrize("name", BUNDLED_STUDENTS.values())
def test_they_are_small_and_tell_how_they_were_made(name):
    folder = bundled_student_path(name)
    weights = load_file(folder / WEIGHT_NAME)
    assert {one.dtype for one in weights.values()} == {torch.float16}
    assert (folder / WEIGHT_NAME).stat().st_size < 4e6
    config = load_config(folder / "distillation.yaml")
    assert config.output == f"outputs/{name}" and config.embeddings is config.trajectories is None
    assert config.attention.sparsity == 0.8 and config.run.updates == load_config("shapes").run.updates
    assert "/tmp" not in (folder / "README.md").read_text(encoding="utf-8")
    assert len(model_fingerprint(name)) == 16


@pytest.mark.slow
def test_the_command_says_which_it_took_and_how_to_do_without(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--prompt", PROMPT, "--device", "cpu", "--output", str(tmp_path / "student.mp4")])
    assert not end.value.code
    assert "student     shapes-8-steps (the bundled model itself: --student none)" in capsys.readouterr().out
    record = json.loads((tmp_path / "student.json").read_text())
    assert (record["student"], record["steps"], record["guidance_scale"]) == ("shapes-8-steps", 8, 1.0)
    again = ["--from-json", str(tmp_path / "student.json"), "--output", str(tmp_path / "model.mp4")]
    with pytest.raises(SystemExit) as end:
        main([*again, "--student", "none", "--steps", "2"])
    assert not end.value.code
    assert "student     none; there is one for this model, for fewer steps: --student shapes-8-steps" in (
        capsys.readouterr().out
    )
    record = json.loads((tmp_path / "model.json").read_text())
    assert (record["student"], record["steps"], record["guidance_scale"]) == (None, 2, 2.0)


def test_shipping_leaves_the_trainings_folders_behind(tmp_path, monkeypatch):
    trained = tmp_path / "trained"
    for name in SHIP["SHIPPED"]:
        folder = trained / name
        (folder / "scheduler").mkdir(parents=True)
        (folder / "checkpoints").mkdir()
        (folder / WEIGHT_NAME).write_bytes(b"weights")
        (folder / "scheduler" / "scheduler_config.json").write_text("{}")
        (folder / "distillation.yaml").write_text(
            f"output: {folder}\nembeddings: {trained}/embeddings\nmodel: bundled\n"
        )
        (folder / "README.md").write_text(f'load_lora_weights("{name}")\n--student {name}\n## What it scores\n\nx\n')
    ship = SHIP["ship"]
    monkeypatch.setitem(ship.__globals__, "bundled_student_path", lambda name: tmp_path / "shipped" / name)
    ship(trained)
    shipped = tmp_path / "shipped" / "shapes-8-steps"
    assert (shipped / WEIGHT_NAME).read_bytes() == b"weights" and not (shipped / "checkpoints").exists()
    assert str(tmp_path) not in (shipped / "distillation.yaml").read_text()
    card = (shipped / "README.md").read_text()
    assert 'load_lora_weights("blade/assets/students/shapes-8-steps")' in card and "--student shapes-8-steps" in card
    assert "docs/distillation.md" in card and "seed" not in card


def test_a_mean_of_trainings_is_one_student(tmp_path, capsys):
    """Of three whose updates are 0, 1 and 2 times one student's, it is that student."""
    source = bundled_student_path("shapes-8-steps")
    weights = load_file(source / WEIGHT_NAME)
    for seed in range(3):
        folder = shutil.copytree(source, tmp_path / f"joint-8-seed-{seed}")
        save_file(
            {name: seed * one if "lora_B" in name else one for name, one in weights.items()}, folder / WEIGHT_NAME
        )
    SHIP["average"](tmp_path, "joint-8")
    assert "rank 64 holds 100.00% of the mean's squared norm" in capsys.readouterr().out
    mean = load_file(tmp_path / "joint-8-average" / WEIGHT_NAME)
    assert mean.keys() == weights.keys()
    for first in (name for name in weights if "lora_A" in name):
        found, wanted = (
            one[first.replace("lora_A", "lora_B")].float() @ one[first].float() for one in (mean, weights)
        )
        assert (found - wanted).norm() < 2e-3 * wanted.norm(), first  # they are kept in half precision
    card = (tmp_path / "joint-8-average" / "README.md").read_text()
    assert "3 LoRAs of rank 64, of the seeds from 0 on" in card and "Not measured by the trainings." in card
    assert load_config(tmp_path / "joint-8-average" / "distillation.yaml").trajectory.steps == [8]
    with pytest.raises(typer.BadParameter, match="there is no joint-8-seed-3"):
        SHIP["average"](tmp_path, "joint-8", seeds=4)


def test_a_mean_of_lower_rank_is_the_nearest():
    generator = torch.Generator().manual_seed(0)
    shapes = {"x.lora_A.weight": (2, 7), "x.lora_B.weight": (5, 2)}
    loras = [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(3)]
    mean = sum(lora["x.lora_B.weight"] @ lora["x.lora_A.weight"] for lora in loras) / 3
    found, held = SHIP["mean_lora"](loras, 2)
    left, values, right = torch.linalg.svd(mean, full_matrices=False)
    assert torch.allclose(
        found["x.lora_B.weight"] @ found["x.lora_A.weight"], left[:, :2] * values[:2] @ right[:2], atol=1e-5
    )
    assert held == pytest.approx(float(values[:2].square().sum() / values.square().sum()))


def test_the_comparison_has_the_model_and_what_was_trained(tmp_path):
    for trained in (
        "joint-4-seed-0",
        "joint-4-average",
        "joint-4-sparser-seed-0",
        "dense-4-seed-0",
        "adapted-seed-0",
        "dense-8-seed-1",
    ):
        (tmp_path / trained).mkdir()
        (tmp_path / trained / WEIGHT_NAME).touch()
    students = {
        *("dense-4-seed-0", "dense-4-afterwards-0.8-seed-0", "dense-4-afterwards-0.9-seed-0"),
        *("dense-8-seed-1", "dense-8-afterwards-0.8-seed-1", "dense-8-afterwards-0.9-seed-1"),
        *("joint-4-seed-0", "joint-4-sparser-seed-0"),
    }
    runs = [run.partition("=")[0] for run in SHIP["comparison"](tmp_path, 3)]
    teachers = {"teacher-50", "teacher-8", "teacher-4", "teacher-8-sparse", "teacher-4-sparse"}
    assert set(runs) == teachers | {"joint-4-average"} | students | {
        name.replace("-seed", "-renewed-seed") for name in students
    }
    assert len(runs) == len(set(runs))
