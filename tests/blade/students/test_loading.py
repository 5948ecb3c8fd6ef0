"""Students are loaded as they are published, beside other LoRAs, and leave nothing behind."""

import warnings
from pathlib import Path

import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from safetensors.torch import save_file
from tiny_students import CONFIG, TIMES, lora, run

from blade import BladeConfig, apply_blade, blade_summary, load_student, unload_student
from blade.attention.applied import applied_to
from blade.generation.fingerprint import model_fingerprint
from blade.models.source import ModelError
from blade.students.scheduler import FewStepScheduler
from blade.students.source import WEIGHT_NAME, StudentFiles, student_files


def test_a_folder_brings_lora_attention_and_sampler_and_takes_them_away(pipe, folder):
    scheduler, plain = pipe.scheduler, run(pipe)
    student = load_student(pipe, folder)
    assert (student.steps, student.guidance_scale, student.config) == (4, 1.0, CONFIG)
    assert str(student) == f"student {folder}: 4 steps, guidance 1, asa at sparsity 0.5"
    assert student.reach == {"transformer": 16} and student.step_counts == (4,)
    assert isinstance(pipe.scheduler, FewStepScheduler) and applied_to(pipe.transformer).config == CONFIG
    output = run(pipe)
    assert (output - plain).abs().max() > 0.1
    assert [layer.sparse_calls for layer in blade_summary(pipe).transformers[0].layers] == [4, 4]
    with pytest.raises(ValueError, match="`num_inference_steps` must be 4, as trained, got 50"):
        run(pipe, steps=50)
    with pytest.raises(ValueError, match=r"`steps` must be 4, as the student .* is trained, got 8"):
        student.check_steps(8)
    assert torch.equal(run(load_again(pipe, folder)), output)

    unload_student(pipe)
    assert pipe.scheduler is scheduler and applied_to(pipe.transformer) is None
    assert torch.equal(run(pipe), plain)
    with pytest.raises(ValueError, match="No student is loaded here"):
        unload_student(pipe)


def load_again(pipe, folder):
    load_student(pipe, folder)
    return pipe


def test_weight_zero_is_no_lora(pipe, folder):
    load_student(pipe, folder, weight=0.0)
    output = run(pipe)
    unload_student(pipe)
    apply_blade(pipe, CONFIG)
    pipe.scheduler = FewStepScheduler.like(pipe.scheduler, [TIMES], noise_kept=0.9)
    assert torch.equal(run(pipe), output)


def test_another_share_of_the_noise_is_kept_where_it_is_asked_for(pipe, folder):
    outputs = {}
    for kept in (None, 0.9, 0.0):
        load_student(pipe, folder, noise_kept=kept)
        assert pipe.scheduler.config.noise_kept == (0.9 if kept is None else kept)
        outputs[kept] = run(pipe)
    assert torch.equal(outputs[None], outputs[0.9]) and not torch.equal(outputs[0.9], outputs[0.0])
    with pytest.raises(ValueError, match=r"`noise_kept` must not be given: .* is sampled by a EulerDiscreteScheduler"):
        load_student(pipe, folder, scheduler=EulerDiscreteScheduler(), noise_kept=0.5)


def test_a_style_lora_keeps_its_strength_below_and_after(pipe, folder):
    style = lora(pipe.transformer, seed=7, rank=4, scale=0.3)
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.set_adapters("style", 0.5)
    styled = run(pipe)
    load_student(pipe, folder)
    layer = pipe.transformer.blocks[0].attn1.to_q
    assert set(layer.active_adapters) == {"style", "blade_student"}
    assert (layer.scaling["style"], layer.scaling["blade_student"]) == (0.5, 1.0)
    both = run(pipe)
    pipe.transformer.delete_adapters("style")
    assert not torch.equal(run(pipe), both)
    pipe.load_lora_weights(style, adapter_name="style")
    unload_student(pipe)
    assert pipe.transformer.blocks[0].attn1.to_q.active_adapters == ["style"]
    pipe.set_adapters("style", 0.5)
    torch.testing.assert_close(run(pipe), styled)


def test_blade_that_was_applied_before_comes_back(pipe, folder):
    mine = BladeConfig(sparsity=0.3, asa=CONFIG.asa)
    apply_blade(pipe, mine)
    load_student(pipe, folder)
    unload_student(pipe)
    assert applied_to(pipe.transformer).config == mine


def test_any_few_step_lora_with_times_or_a_scheduler(pipe, tmp_path):
    save_file(lora(pipe.transformer), tmp_path / "lightning.safetensors")
    student = load_student(
        pipe, tmp_path, weight_name="lightning.safetensors", scheduler=(1000.0, 937.5, 833.3, 625.0)
    )
    assert student.steps == 4 and student.config is None and applied_to(pipe.transformer) is None
    assert str(student).endswith(
        "4 steps, guidance 1, attention as it was, since it brings none; the few-step preset is meant for it"
    )
    assert run(pipe).isfinite().all()
    own = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    student = load_student(pipe, tmp_path, weight_name="lightning.safetensors", scheduler=own, steps=8)
    assert pipe.scheduler is own and student.steps == 8
    with pytest.raises(ValueError, match="`scheduler` must be a Diffusers scheduler or times, got 8"):
        load_student(pipe, tmp_path, weight_name="lightning.safetensors", scheduler=8)


def test_a_student_trained_dense_says_which_preset_it_takes(pipe, tmp_path, caplog):
    caplog.set_level("INFO", logger="blade")
    save_file(lora(pipe.transformer), tmp_path / "pytorch_lora_weights.safetensors")
    scheduler, expected = (1000.0, 937.5, 833.3, 625.0), BladeConfig.from_preset("shapes", "few-step")
    student = load_student(pipe, tmp_path, scheduler=scheduler)
    assert caplog.messages == [str(student)] and "since it brings none; the few-step preset" in str(student)
    dense = run(pipe)
    apply_blade(pipe)
    assert caplog.messages[1:] == [
        f"transformer takes the few-step preset: the student {tmp_path} has no sparse attention."
    ]
    assert applied_to(pipe.transformer).config == expected
    apply_blade(pipe, sparsity=0.4, asa=CONFIG.asa, pooled_tokens="none")
    assert not torch.equal(run(pipe), dense)
    assert [layer.sparse_calls for layer in blade_summary(pipe).transformers[0].layers] == [0, 3]  # of 4 steps
    apply_blade(pipe, kind="training-free")
    assert applied_to(pipe.transformer).config == BladeConfig.from_preset("shapes")
    unload_student(pipe)
    apply_blade(pipe)
    assert applied_to(pipe.transformer).config == BladeConfig.from_preset("shapes")
    assert len(caplog.messages) == 3  # apply_blade spoke of the preset twice

    BladeConfig(attention="dense", kind="student").save_pretrained(tmp_path)  # this project's own, trained dense
    student = load_student(pipe, tmp_path, scheduler=scheduler)
    assert str(student).endswith("dense attention; the few-step preset is meant for it")
    apply_blade(pipe, kind="few-step")
    assert applied_to(pipe.transformer).config == expected


def test_a_student_with_sparse_attention_leaves_the_presets_kind(pipe, folder, caplog):
    caplog.set_level("INFO", logger="blade")
    student = load_student(pipe, folder)
    assert caplog.messages == []
    with pytest.warns(UserWarning, match="was trained with asa at sparsity 0.5, which this attention replaces"):
        apply_blade(pipe)
    assert applied_to(pipe.transformer).config == BladeConfig.from_preset("shapes")
    for target in (pipe, pipe.transformer):
        with pytest.warns(UserWarning, match=r"`apply_blade\(pipe, student.config\)` puts it back") as told:
            apply_blade(target, BladeConfig(sparsity=0.5))
        assert len(told) == 1  # and nothing of the model's preset
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_blade(pipe, student.config)
        apply_blade(pipe.transformer, student.config, seed=3)
        apply_blade(pipe, attention="dense")  # which nobody does without meaning it
        unload_student(pipe)
        apply_blade(pipe, sparsity=0.6)


def hub(monkeypatch, repository: Path):
    """Put a folder in place of the Hub."""
    names = [path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()]
    monkeypatch.setattr("blade.students.source.look_up", lambda *_, **known: names)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda source, name: str(repository / name))


def test_the_released_wan_student_gets_its_attention_and_sampler(pipe, tmp_path, monkeypatch):
    """Whose repository has a subfolder for each family."""
    for folder in ("wanx/checkpoint", "cogvideox/checkpoint"):
        (tmp_path / folder).mkdir(parents=True)
        save_file(lora(pipe.transformer), tmp_path / folder / "pytorch_lora_weights.safetensors")
    hub(monkeypatch, tmp_path)
    with pytest.raises(
        ValueError, match=r"has students of cogvideox-5b and wan2.1-t2v-1.3b; this model is of the kind"
    ):
        load_student(pipe, "GYP666/VIDEO-BLADE")
    monkeypatch.setattr("blade_pipelines.wan.WanFamily.preset_name", lambda *_: "wan2.1-t2v-1.3b")
    student = load_student(pipe, "GYP666/VIDEO-BLADE")
    assert (student.subfolder, student.steps) == ("wanx/checkpoint", 8)
    assert student.config == BladeConfig.from_preset("wan2.1-t2v-1.3b", "student")
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler) and pipe.scheduler.config.flow_shift == 3.0
    assert run(pipe, steps=8).isfinite().all()


def test_the_released_cogvideox_student_gets_its_attention_and_sampler(tmp_path, monkeypatch):
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=8, num_layers=2, max_text_seq_length=6, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipe = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    (tmp_path / "CogVideoX-5b").mkdir()
    save_file(lora(transformer), tmp_path / "CogVideoX-5b" / "pytorch_lora_weights.safetensors")
    hub(monkeypatch, tmp_path)
    monkeypatch.setattr("blade_pipelines.cogvideox.CogVideoXFamily.preset_name", lambda *_: "cogvideox-5b")
    student = load_student(pipe, "GYP666/VIDEO-BLADE")
    assert student.config == BladeConfig.from_preset("cogvideox-5b", "student")
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    pipe.scheduler.set_timesteps(8)
    assert pipe.scheduler.timesteps.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]


def test_what_does_not_fit_changes_nothing(pipe, tmp_path):
    scheduler, plain = pipe.scheduler, run(pipe)
    with pytest.raises(ModelError, match=r"`source` .*nothing is no folder here"):
        load_student(pipe, tmp_path / "nothing")
    with pytest.raises(
        ValueError, match=r"`subfolder` must be one .* holds a pytorch_lora_weights.safetensors, .*: none"
    ):
        load_student(pipe, tmp_path)
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        save_file({"unrelated.weight": torch.zeros(2, 2)}, tmp_path / folder / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="got None; it is in: first, second"):
        load_student(pipe, tmp_path)
    with pytest.raises(
        ValueError,
        match=r"`source` .*: pytorch_lora_weights.safetensors cannot be loaded onto this model: 1 of its modules",
    ):
        load_student(pipe, tmp_path, subfolder="first")
    wrong = {name: torch.zeros(64, 48) for name in lora(pipe.transformer)}
    save_file(wrong, tmp_path / "second" / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="cannot be loaded onto this model"):
        load_student(pipe, tmp_path, subfolder="second")
    assert pipe.scheduler is scheduler and applied_to(pipe.transformer) is None
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("name", [".blade-0123abcd-0000-77-0.tmp", ".student.77.tmp", ".tmp"])
def test_what_a_kill_left_is_no_student(pipe, tmp_path, name):
    """Neither where it is looked for, nor in its fingerprint, nor where it is pushed."""
    folder = tmp_path / "student"
    save_file(lora(pipe.transformer), make(folder) / WEIGHT_NAME)
    before = student_files(folder), model_fingerprint(str(folder))
    for leftover in (folder / name, folder / "scheduler" / name, tmp_path / name):
        save_file(lora(pipe.transformer, seed=1), make(leftover) / WEIGHT_NAME)
    (folder / "scheduler" / f"{name}x").with_suffix(".tmp").touch()
    assert (student_files(folder), model_fingerprint(str(folder))) == before
    assert StudentFiles(str(folder)).names == [WEIGHT_NAME]
    assert StudentFiles(str(tmp_path)).find_subfolder(None, WEIGHT_NAME, None) == "student"


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
