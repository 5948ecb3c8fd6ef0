"""What a distillation leaves is a student that everything takes."""

import ast
import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DPMSolverMultistepScheduler
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import load_file

from blade import BladeConfig, load_student, push_student, unload_student
from blade.cli.evaluate import main as evaluate
from blade.cli.generate import main as generate
from blade.distillation.config import DistillationConfig
from blade.distillation.recipes import load_config
from blade.distillation.student_files import write_student
from blade.distillation.workflow import distill
from blade.media.video import read_mp4
from blade.models.loading import load_model
from blade.students.scheduler import FewStepScheduler
from blade.students.source import student_settings

SIZE = {"height": 64, "width": 64, "num_frames": 9}


@pytest.fixture(autouse=True)
def quiet(quiet_adapters):
    """Ignore what Diffusers and PEFT say of adapters."""


@pytest.fixture
def pipe(saved_tiny_pipeline):
    pipe = load_model(saved_tiny_pipeline).pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, steps, prompt="a red ball moving left", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        prompt, num_inference_steps=steps, guidance_scale=1.0, generator=generator, output_type="latent", **SIZE
    ).frames  # fmt: skip


def trained(settings):
    return distill(load_config("shapes", settings)).output


def relative(first, second):
    return float((first - second).abs().max() / second.abs().max())


def test_loaded_it_makes_the_videos_of_its_training(settings, pipe, tmp_path):
    folder = trained(settings("out", "validation.every=3", "validation.count=1", "weights.ema_decay=0.5"))
    video = next((folder / "validation" / "000003").glob("*.mp4"))
    record = json.loads(video.with_suffix(".json").read_text())
    student = load_student(pipe, folder)
    assert (student.steps, student.guidance_scale) == (2, 1.0)
    assert (student.config.sparsity, student.config.kind) == (0.6, "student")
    generator = torch.Generator().manual_seed(record["seed"])
    again = pipe(
        record["prompt"], num_inference_steps=2, guidance_scale=1.0, generator=generator, output_type="pt", **SIZE
    ).frames[0]  # fmt: skip
    assert float((read_mp4(video) - again).abs().mean()) < 0.02  # what the MP4 loses


@pytest.mark.slow
def test_an_average_is_saved_where_it_is_asked_for(settings, tmp_path):
    averaged, last = (
        load_file(trained(settings(name, f"weights.ema_decay={decay}")) / "pytorch_lora_weights.safetensors")
        for name, decay in (("averaged", 0.9), ("last", 0.0))
    )
    name = "transformer.blocks.0.attn1.to_q.lora_B.weight"
    assert not torch.equal(averaged[name], last[name])


@pytest.mark.slow
def test_it_is_sampled_as_the_configuration_says(settings):
    """What was trained is the same, and of a finished run the sampler alone is written anew."""
    folder = trained(settings("kept", "trajectory.sampling_noise_kept=1"))
    weights = (folder / "pytorch_lora_weights.safetensors").read_bytes()
    assert student_settings(folder).noise_kept == 1
    assert trained(settings("kept", "trajectory.sampling_noise_kept=0.25")) == folder
    assert student_settings(folder).noise_kept == 0.25
    assert (folder / "pytorch_lora_weights.safetensors").read_bytes() == weights
    card = (folder / "README.md").read_text()
    assert "Share of the noise that a step keeps: 0.25, in training 1." in card
    assert "every step keeps its noise there, as in training" in card
    trained(settings("renewed", "trajectory.sampling_noise_kept=0.25"))
    assert (folder.parent / "renewed" / "pytorch_lora_weights.safetensors").read_bytes() == weights


def test_a_stock_pipeline_samples_it(settings, pipe, capsys):
    """The three lines of the model card: without BLADE, the attention is dense, and times are whole numbers."""
    folder = trained(settings("out", "attention.method=dense"))
    load_student(pipe, folder, noise_kept=1.0)
    ours = latents(pipe, 2)
    unload_student(pipe)
    card = (folder / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("pipe.scheduler"))
    pipe.load_lora_weights(folder)
    exec(line, {"pipe": pipe, "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler})
    error = relative(latents(pipe, 2), ours)
    print(f"relative error of the stock sampler: {error:.1e}")
    assert 0 < error < 0.02


@pytest.mark.slow
def test_a_student_for_several_numbers_of_steps(settings, pipe):
    folder = trained(settings("out", "trajectory.steps=[2,4]", "run.updates=6"))
    before = latents(pipe, 4)
    student = load_student(pipe, folder)
    assert (student.steps, student.step_counts) == (4, (2, 4))
    both = {steps: latents(pipe, steps) for steps in (2, 4)}
    with torch.no_grad():
        pipe.transformer.get_submodule("condition_embedder.time_embedder").step_condition.vectors[
            "blade_student"
        ].weight.zero_()
    for steps, video in both.items():
        assert relative(latents(pipe, steps), video) > 1e-6  # it was told
    unload_student(pipe)
    assert torch.equal(latents(pipe, 4), before)
    assert not hasattr(pipe.transformer.get_submodule("condition_embedder.time_embedder"), "step_condition")


def test_a_student_of_whole_weights(settings, pipe, tmp_path):
    folder = trained(settings("out", "weights.full=true", "generator.learning_rate=1e-3", "fake.learning_rate=1e-3"))
    assert not (folder / "pytorch_lora_weights.safetensors").exists()
    base, before = pipe.transformer, latents(pipe, 4)
    load_student(pipe, folder)
    assert pipe.transformer is not base
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    own = pipe.transformer.state_dict()
    assert weights.keys() == own.keys() and all(torch.equal(own[name], weights[name]) for name in own)
    assert any(not torch.equal(own[name], one) for name, one in base.state_dict().items())
    assert relative(latents(pipe, 2), latents(pipe, 2)) == 0
    unload_student(pipe)
    assert pipe.transformer is base and torch.equal(latents(pipe, 4), before)
    with pytest.raises(ValueError, match=r"`weight` must be 1"):
        load_student(pipe, folder, weight=0.5)


@pytest.mark.slow
def test_a_student_goes_on_from_another(settings, tmp_path):
    first = trained(settings("first"))
    second = trained(
        settings("second", f"weights.start_from={first}", "generator.learning_rate=1e-12", "weights.alpha=8")
    )
    weights = [load_file(Path(folder) / "pytorch_lora_weights.safetensors") for folder in (first, second)]
    for name, one in weights[0].items():
        assert torch.allclose(one, weights[1][name], atol=1e-6), name
    with pytest.raises(ValueError, match=r"must have the rank 2 of `weights.rank`, got \{4\}"):
        trained(settings("third", f"weights.start_from={first}", "weights.rank=2"))
    with pytest.raises(ValueError, match="must be a student's folder with a pytorch_lora_weights"):
        trained(settings("third", f"weights.start_from={tmp_path}"))


@pytest.mark.slow
def test_the_commands_take_it(settings, saved_tiny_pipeline, tmp_path):
    folder = trained(settings("out"))
    options = [f"--model={saved_tiny_pipeline}", "--height=64", "--width=64", "--frames=9", "--device=cpu"]
    video = tmp_path / "video.mp4"
    with pytest.raises(SystemExit) as ended:
        generate(["--prompt=a red ball moving left", f"--student={folder}", f"--output={video}", *options])
    assert ended.value.code == 0
    record = json.loads(video.with_suffix(".json").read_text())
    assert (record["steps"], record["guidance_scale"], record["sparsity"]) == (2, 1.0, 0.6)
    runs = ["--run=teacher=dense,steps=3,guidance=3", f"--run=student=student={folder}"]
    runs.append(f"--run=dense=student={folder},attention=dense")
    runs.append(f"--run=untrained=config={folder},steps=2,guidance=1")
    output = tmp_path / "evaluation"
    with pytest.raises(SystemExit) as ended:
        evaluate([*runs, "--shapes", "--single=1", "--two=1", "--repeats=2", f"--output={output}", *options])
    assert ended.value.code == 0
    report = json.loads((output / "report.json").read_text())
    assert [(run["name"], run["steps"], run["guidance"]) for run in report["runs"]] == [
        ("teacher", 3, 3.0), ("student", 2, 1.0), ("dense", 2, 1.0), ("untrained", 2, 1.0)
    ]  # fmt: skip
    assert report["prompts"] == {"single": 2, "two": 2, "all": 4} and report["reference"] == "teacher"
    groups = {run["name"]: run["groups"]["all"] for run in report["runs"]}
    assert groups["student"]["run_density"]["mean"] < 0.5 and groups["dense"]["run_density"]["mean"] == 1
    assert groups["student"]["psnr"]["mean"] < 100  # against the dense run of the same student
    assert groups["student"]["diversity"]["videos"] == 2


@pytest.fixture
def uploaded(monkeypatch):
    """What is uploaded to a Hub that accepts everything."""
    uploaded = {}

    class Api:
        def __init__(self, token):
            uploaded["token"] = token

        def create_repo(self, repo_id, **options):
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, **options):
            uploaded.update(options)
            return type("Commit", (), {"commit_url": "https://huggingface.co/me/x/commit/1"})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return uploaded


def sent(uploaded):
    """The files that the Hub's client takes for the patterns that it is given."""
    folder = uploaded["folder_path"]
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return {name for name in files if any(fnmatch(name, pattern) for pattern in uploaded["allow_patterns"])}


STUDENT = {
    "pytorch_lora_weights.safetensors", "blade_config.json", "README.md", "distillation.yaml",
    "scheduler/scheduler_config.json",
}  # fmt: skip


def test_it_is_pushed_without_what_its_training_left(settings, tmp_path, uploaded):
    folder = trained(settings("out"))
    assert push_student(folder, "x", token="t") == "https://huggingface.co/me/x/commit/1"
    assert sent(uploaded) == STUDENT
    with pytest.raises(ValueError, match="`folder` must hold a student"):
        push_student(tmp_path / "nothing", "x")


@pytest.fixture
def small_student(tmp_path):
    """The files of a student, without any weights in them."""
    folder = tmp_path / "student"
    for name in STUDENT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_only_its_own_files_are_pushed(small_student, uploaded):
    for name in (
        "scheduler/notes.txt", "scheduler/.env", "scheduler/more/scheduler_config.json", "transformer/token.json",
        "transformer/checkpoint.pt", "transformer/diffusion_pytorch_model-00001-of-00002.safetensors.bak",
        "transformer/more/config.json", "log.jsonl", "more/README.md", "pytorch_lora_weights.bin",
    ):  # fmt: skip
        (small_student / name).parent.mkdir(parents=True, exist_ok=True)
        (small_student / name).write_text("hf_secret")
    own = {
        "pattern_table.json", "step_condition.safetensors", "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
    }  # fmt: skip
    for name in own:
        (small_student / name).write_text('{"weight_map": {}}' if name.endswith("index.json") else "{}")
    push_student(small_student, "x")
    assert sent(uploaded) == STUDENT | own


@pytest.mark.parametrize("name", ["README.md", "distillation.yaml", "scheduler/scheduler_config.json"])
def test_no_file_from_elsewhere_is_pushed(name, small_student, uploaded, tmp_path):
    (tmp_path / "secret").write_text("hf_secret")
    (small_student / name).unlink()
    (small_student / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=f"holds {name}, a link to"):
        push_student(small_student, "x")
    assert not uploaded


def test_what_others_have_named_is_text_in_the_model_card(pipe, tmp_path):
    hostile = 'a/<script>alert(1)</script>[b](https://example.com)](javascript:alert(1)) `x` "|\n\n```\n# b: !!python'
    folder = tmp_path / "student"
    facts = {
        "base": hostile, "source": hostile, "updates": 3, "batch": 1, "prompts": "4",
        "video": {"num_frames": 9, "height": 64, "width": 64}, "fps": 8,
        "guidance_scale": 3.0, "trained": "a LoRA of rank 4", "scores": f"{hostile}: 1.000", "machine": hostile,
        "versions": hostile, "hours": 1.0,
    }  # fmt: skip
    write_student(
        folder, transformer=pipe.transformer, weights={}, config=DistillationConfig(model=hostile),
        sampler=FewStepScheduler.like(pipe.scheduler, [(999.0, 500.0)]), attention=None, facts=facts,
        dtype=torch.float32,
    )  # fmt: skip
    _, front, page = (folder / "README.md").read_text().split("---\n", 2)
    assert "base_model" not in yaml.safe_load(front)  # no name of a model on the Hub
    tokens = [part for token in MarkdownIt("commonmark").parse(page) for part in (token, *(token.children or []))]
    kinds = [token.type for token in tokens]
    assert not {"html_block", "html_inline", "link_open", "image"} & set(kinds) and kinds.count("heading_open") == 4
    python = "\n".join(token.content for token in tokens if token.type == "fence")
    assert kinds.count("fence") == 2 and compile(python, "card", "exec")
    assert [node.value for node in ast.walk(ast.parse(python)) if getattr(node, "value", None) == hostile]
    command = next(token.content for token in tokens if token.content.startswith("blade-generate --prompt"))
    assert "\n" not in command and "<script>" in command


CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("full", ["false", "true"])
def test_the_code_of_the_model_card_runs_as_pasted(settings, monkeypatch, tmp_path, full):
    """From the folder that holds the student; only the device is another."""
    folder = trained(settings("out", "attention.method=dense", f"weights.full={full}"))
    monkeypatch.chdir(folder.parent)
    blocks = CODE.findall((folder / "README.md").read_text(encoding="utf-8"))
    assert len(blocks) == 2 and "load_student(" in blocks[0] and "blade" not in blocks[1]
    for block in blocks:
        exec(compile(block.replace('"cuda"', '"cpu"'), "card", "exec"), {})
        video = read_mp4(tmp_path / "video.mp4")
        assert video.shape == (9, 3, 64, 64) and float(video.std()) > 0.01
        (tmp_path / "video.mp4").unlink()


@pytest.mark.parametrize(
    ("model", "named"),
    [("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", True), ("bundled", False), ("/home/me/wan", False), ("~/wan", False)],
)
def test_the_front_matter_of_the_model_card_is_valid_for_the_hub(pipe, tmp_path, model, named):
    facts = {
        "base": model, "source": "student", "updates": 3, "batch": 1, "prompts": "4", "fps": 8,
        "video": {"num_frames": 9, "height": 64, "width": 64}, "guidance_scale": 3.0, "trained": "a LoRA of rank 4",
        "scores": "", "machine": "two cores", "versions": "torch 2", "hours": 1.0,
    }  # fmt: skip
    write_student(
        tmp_path / "student", transformer=pipe.transformer, weights={}, config=DistillationConfig(model=model),
        sampler=FewStepScheduler.like(pipe.scheduler, [(999.0, 500.0)]), attention=None, facts=facts,
        dtype=torch.float32,
    )  # fmt: skip
    text = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-video")
    assert data.base_model == (model if named else None)
    for block in CODE.findall(text):
        names = {name.id for name in ast.walk(ast.parse(block)) if isinstance(name, ast.Name)}
        assert ("torch" in names) == ("import torch" in block) and "\n\n\n" not in block


def test_the_files_say_what_it_is(settings):
    folder = trained(settings("out"))
    assert BladeConfig.from_pretrained(folder).sparsity == 0.6
    assert FewStepScheduler.from_pretrained(folder / "scheduler").step_counts == (2,)
    assert load_config(folder / "distillation.yaml").run.updates == 3
    assert not list(folder.glob(".*")), "nothing half-written is left"
