"""Published students: found by their ids and files, with their steps, guidance and sampler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from tiny_students import TIMES, lora, run

from blade import load_student, unload_student
from blade.families.registry import published_configurations, released_students
from blade.generation.request import GenerationRequest
from blade.generation.resolve import resolve_request
from blade.models.loaded import LoadedModel
from blade.models.source import ModelError
from blade.students import lookup
from blade.students.lookup import find_released, make_scheduler
from blade.students.scheduler import FewStepScheduler
from blade.students.source import StudentFiles

LIGHTNING = "lightx2v/Wan2.2-Lightning"
SHIFTED = [1000.0, 937.5, 5000 / 6, 625.0]


def values_of(pipe: Any) -> dict[tuple[str, str], torch.Tensor]:
    """Return copies of all weights, by transformer and name without adapters."""
    parts = LoadedModel(pipe).transformers.items()
    return {
        (part, name.replace("base_layer.", "")): weight.detach().clone()
        for part, transformer in parts
        for name, weight in transformer.named_parameters()
        if ".lora_" not in name
    }


def original(transformer: Any) -> dict[str, torch.Tensor]:
    """Return a LoRA by the authors' names, with differences of a norm and a modulation."""
    renamed = {}
    for key, tensor in lora(transformer).items():
        name = key.removeprefix("transformer.").replace("attn1.to_", "self_attn.").replace("attn2.to_", "cross_attn.")
        renamed[name.replace("attn.out.0.", "attn.o.")] = tensor
    return renamed | {"blocks.0.self_attn.norm_q.diff": torch.ones(32), "blocks.1.diff_m": torch.ones(1, 6, 32)}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published students fit models of their number of transformers, whatever the size."""
    students = [
        replace(student, fits={"transformers": student.fits.get("transformers", 1)}) for student in released_students()
    ]
    monkeypatch.setattr(lookup, "released_students", lambda: students)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in place of the Hub's repositories."""

    def names(*_: Any, **__: Any) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]

    monkeypatch.setattr("blade.students.source.look_up", names)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda source, name: str(tmp_path / name))
    return tmp_path


def write(pipe: Any, folder: Path, *names: str) -> None:
    for name, transformer in zip(names, LoadedModel(pipe).transformers.values(), strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(original(transformer), folder / name)


@pytest.mark.parametrize("student", released_students(), ids=lambda student: f"{student.source}, {student.about}")
def test_each_entry_says_how_it_is_sampled_or_why_not(student) -> None:
    assert student.about and student.evidence and (student.fits or student.preset)
    if student.refused is not None:
        assert not student.files and ("take " in student.refused or "run it with" in student.refused)
        return
    assert student.steps and student.scheduler
    if student.scheduler == FewStepScheduler.__name__:
        sampler = make_scheduler(student, FlowMatchEulerDiscreteScheduler())
        assert sampler.step_counts == student.steps


@pytest.mark.parametrize(
    ("model", "source", "about"),
    [
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "lightx2v/Wan2.1-Distill-Loras", "text to video, 14B"),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", LIGHTNING, "text to video, A14B (of 28 September 2025)"),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "FastVideo/FastWan2.2-TI2V-5B-FullAttn-Diffusers", "TI2V-5B"),
        ("Lightricks/LTX-2", "Lightricks/LTX-2", "LoRA, 19B"),
        ("Lightricks/LTX-2.5-Diffusers", "Lightricks/LTX-2.5", "LoRA, 22B"),
        ("MiniMaxAI/MiniMax-H3", "lightx2v/Minimax-h3-Turbo", "(v1.1), text or frames to video"),
        ("hunyuanvideo-community/HunyuanVideo", "FastVideo/FastHunyuan-diffusers", "text to video"),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "FastVideo/FastWan2.1-T2V-1.3B-Diffusers", "text to video, 1.3B"),
    ],
)
def test_an_entry_is_taken_by_the_published_models_configuration(model, source, about) -> None:
    configuration = published_configurations()[model]
    parts = [part for part in ("transformer", "transformer_2") if part in configuration]
    kind = configuration["transformer"]["_class_name"]
    facts = {**configuration["transformer"], "class": kind, "transformers": len(parts)}
    fitting = [student for student in released_students() if student.source == source and student.suits(facts, "wan")]
    assert fitting and fitting[0].about.endswith(about)


def test_an_id_brings_both_experts_files_times_and_guidance(two, hub, known) -> None:
    files = [f"Wan2.2-T2V-A14B-4steps-lora-250928/{part}_noise_model.safetensors" for part in ("high", "low")]
    write(two, hub, *files)
    before, plain, scheduler = values_of(two), run(two), two.scheduler
    student = load_student(two, LIGHTNING)
    assert student.reach == {"transformer": 18, "transformer_2": 18}
    assert (student.steps, student.guidance_scale, student.preset_kind) == (4, 1.0, "few-step")
    assert two.scheduler.config.grids[0] == pytest.approx(SHIFTED) and two.scheduler.config.noise_kept == 1.0
    assert not torch.equal(run(two), plain)
    after = values_of(two)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {name for _, name in changed} == {"blocks.0.attn1.norm_q.weight", "blocks.1.scale_shift_table"}
    unload_student(two)
    assert two.scheduler is scheduler
    assert all(torch.equal(before[key], value) for key, value in values_of(two).items())


def test_a_folder_or_file_of_an_id_is_named_behind_it(two, pipe, hub, known) -> None:
    files = [
        f"Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1/{part}_noise_model.safetensors" for part in ("high", "low")
    ]
    write(two, hub, *files)
    with pytest.raises(ValueError, match=rf"`source` {LIGHTNING} lacks Wan2.2-T2V-A14B-4steps-lora-250928/high"):
        load_student(two, LIGHTNING)
    student = load_student(two, f"{LIGHTNING}/Wan2.2-T2V-A14B-4steps-lora-rank64-Seko-V1.1")
    assert student.steps == 4
    unload_student(two)
    write(pipe, hub, "mine/style.safetensors")
    student = load_student(pipe, "somebody/loras/mine/style.safetensors")
    assert student.steps is None and student.reach == {"transformer": 18}
    with pytest.raises(ValueError, match=r"lacks other\.safetensors; name another file of it: somebody/loras/FILE"):
        load_student(pipe, "somebody/loras/other.safetensors")
    with pytest.raises(ValueError, match=r"has students of LoRA for each expert, .*; this model is of the kind s"):
        load_student(pipe, LIGHTNING)


def test_files_here_are_known_by_their_names(two, pipe, tmp_path, known) -> None:
    name = "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors"
    write(pipe, tmp_path, name)
    student = load_student(pipe, tmp_path / name)
    assert student.steps == 4 and pipe.scheduler.config.noise_kept == 0.0
    unload_student(pipe)
    write(two, tmp_path, "high_noise_model.safetensors", "low_noise_model.safetensors")
    pair = f"{tmp_path}/high_noise_model.safetensors:{tmp_path}/low_noise_model.safetensors"
    assert load_student(two, pair).reach == {"transformer": 18, "transformer_2": 18}
    assert two.scheduler.config.grids[0] == pytest.approx(SHIFTED)
    with pytest.raises(ValueError, match=r"`source` must be one for a model of one transformer, got .*:"):
        load_student(pipe, pair)
    with pytest.raises(ModelError, match=r"`source` .*nothing.safetensors is no file or folder here"):
        load_student(two, f"{tmp_path}/high_noise_model.safetensors:{tmp_path}/nothing.safetensors")


def test_a_known_file_of_another_model_is_a_file_like_others(pipe, tmp_path) -> None:
    files = StudentFiles("unused:unused")
    files.pair, files.file = None, tmp_path / "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors"
    assert find_released(files, LoadedModel(pipe)) is None


def test_those_that_cannot_be_used_are_refused_before_anything_is_downloaded(pipe, hub, known) -> None:
    for source, word in (
        ("FastVideo/FastWan2.1-T2V-1.3B-Diffusers", "to_gate_compress"),
        ("TurboDiffusion/TurboWan2.1-T2V-14B-480P", r"pickled \(\.pth\).*proj_l"),
    ):
        with pytest.raises(ValueError, match=rf"`source` {source} \(.*\) cannot be used: .*{word}.* run it with"):
            load_student(pipe, source)


def test_a_failed_load_leaves_the_differences_of_the_student_before(pipe, tmp_path) -> None:
    write(pipe, tmp_path, "a.safetensors")
    plain = values_of(pipe)
    load_student(pipe, tmp_path / "a.safetensors", scheduler=TIMES)
    loaded, output = values_of(pipe), run(pipe)
    save_file({"elsewhere.diff": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors cannot be loaded onto this model"):
        load_student(pipe, tmp_path / "b.safetensors")
    assert all(torch.equal(loaded[key], value) for key, value in values_of(pipe).items())
    assert torch.equal(run(pipe), output)
    load_student(pipe, tmp_path / "a.safetensors", scheduler=TIMES, weight=0.5)
    halved, norm = values_of(pipe), ("transformer", "blocks.0.attn1.norm_q.weight")
    torch.testing.assert_close(halved[norm], plain[norm] + 0.5)
    unload_student(pipe)
    assert all(torch.equal(plain[key], value) for key, value in values_of(pipe).items())


def test_differences_alone_are_a_student_that_nothing_switches_off(pipe, tmp_path, caplog) -> None:
    save_file({"blocks.0.self_attn.norm_q.diff": torch.ones(32)}, tmp_path / "a.safetensors")
    assert load_student(pipe, tmp_path / "a.safetensors", scheduler=TIMES).reach == {"transformer": 1}
    run(pipe)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    unload_student(pipe)


def test_whole_weights_in_a_file_take_the_transformers_place(pipe, make_wan, tmp_path) -> None:
    other = make_wan(layers=2, seed=5)
    save_file(
        {f"model.diffusion_model.{name}": weight for name, weight in other.state_dict().items()},
        tmp_path / "w.safetensors",
    )
    before = pipe.transformer
    student = load_student(pipe, tmp_path / "w.safetensors", scheduler=TIMES)
    assert pipe.transformer is not before and not pipe.transformer.training
    assert all(torch.equal(weight, pipe.transformer.state_dict()[name]) for name, weight in other.state_dict().items())
    assert str(student).startswith(f"student {tmp_path}/w.safetensors: 4 steps") and run(pipe).isfinite().all()
    unload_student(pipe)
    assert pipe.transformer is before
    weights = dict(other.state_dict())
    del weights["proj_out.bias"]
    save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"less\.safetensors lacks 1 of this model's weights, such as proj_out\.bias"):
        load_student(pipe, tmp_path / "less.safetensors")
    pipe.load_lora_weights(lora(pipe.transformer, rank=4), adapter_name="style")
    with pytest.raises(ValueError, match=r"is a whole transformer, which the loaded LoRAs are not for; unload them"):
        load_student(pipe, tmp_path / "w.safetensors", scheduler=TIMES)
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match=r"`weight` must be 1: .* is a whole transformer and no LoRA, got 0.5"):
        load_student(pipe, tmp_path / "w.safetensors", weight=0.5)


def test_unknown_steps_are_asked_for(pipe, tmp_path) -> None:
    write(pipe, tmp_path, "a.safetensors")
    student = load_student(pipe, tmp_path / "a.safetensors")
    model = SimpleNamespace(pipe=pipe, preset_name="shapes")
    request = GenerationRequest(prompt="a cat", attention="dense")
    with pytest.raises(
        ValueError, match=r"`steps` must be given: nothing says for how many .*; give --steps, and .*--sch"
    ):
        resolve_request(request, model, student=student)


def test_the_levels_that_pipelines_ask_for_may_be_the_grids_own() -> None:
    """LTX-2's pipeline is given them, with a shift."""
    scheduler = FewStepScheduler(grids=[[1000.0, 725.0, 421.875]])
    scheduler.set_timesteps(sigmas=[1.0, 0.725, 0.421875], mu=1.1)
    assert scheduler.timesteps.tolist() == [1000.0, 725.0, 421.875]
    scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3], mu=1.1)
    assert scheduler.timesteps.tolist() == [1000.0, 725.0, 421.875]
    with pytest.raises(ValueError, match="`sigmas` must be left to the scheduler"):
        scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.3])


def test_pefts_alpha_beside_the_file_is_taken(pipe, tmp_path) -> None:
    """Also where a folder has no other file of weights."""
    save_file(original(pipe.transformer), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 64, "lora_alpha": 128}')
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        load_student(pipe, source, scheduler=TIMES)
        assert pipe.transformer.blocks[0].attn1.to_q.scaling["blade_student"] == 2.0
        unload_student(pipe)
