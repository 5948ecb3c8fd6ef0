"""A student that cannot be loaded changes nothing, whatever step fails, and one that was loaded before stays."""

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import AutoencoderKLWan
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from tiny_students import CONFIG, TIMES, lora, run

from blade import BladeConfig, apply_blade, load_student, unload_student
from blade.attention.applied import applied_to
from blade.students import loading
from blade.students.loading import loaded_student
from blade.students.scheduler import FewStepScheduler

WEIGHTS, CONDITION = "pytorch_lora_weights.safetensors", "step_condition.safetensors"
MULTIPLE = ([999.0, 499.0], list(TIMES))


def state(pipe):
    """Everything of a pipeline that loading a student changes, by identity."""
    values = {"pipe": {name: id(value) for name, value in vars(pipe).items()}}
    for part in ("transformer", "transformer_2"):
        transformer = getattr(pipe, part, None)
        for name, module in transformer.named_modules() if transformer is not None else ():
            own = vars(module)
            values[part, name] = [id(module), sorted(own), id(own.get("forward")), id(own.get("processor"))]
            values[part, name] += [list(own[hooks].items()) for hooks in ("_forward_hooks", "_forward_pre_hooks")]
            values[part, name] += [
                (key, id(value), value.requires_grad, value.device)
                for key, value in module._parameters.items()
                if value is not None
            ]
            if isinstance(module, LoraLayer):
                values[part, name] += [list(module.active_adapters), dict(module.scaling), module.disable_adapters]
        values[part] = None if transformer is None else (applied_to(transformer), transformer.training)
    return values


@pytest.fixture
def other(pipe, tmp_path):
    """Another student, for two numbers of steps, with everything that one can bring."""
    folder = tmp_path / "other"
    folder.mkdir()
    save_file(lora(pipe.transformer, seed=5), folder / WEIGHTS)
    save_file(lora(pipe.transformer, seed=6), folder / "second.safetensors")
    save_file({"weight": torch.ones(2, 32)}, folder / CONDITION)
    CONFIG.save_pretrained(folder)
    FewStepScheduler.like(pipe.scheduler, MULTIPLE).save_pretrained(folder / "scheduler")
    return folder


def prepare(pipe, before, folder):
    """Put a pipeline into a state in which a student may be loaded."""
    if before in ("style", "student"):
        pipe.load_lora_weights(lora(pipe.transformer, seed=7, rank=4, scale=0.3), adapter_name="style")
        pipe.set_adapters("style", 0.5)
    if before == "blade":
        apply_blade(pipe, BladeConfig(sparsity=0.3, dense_layers=(0,), asa=CONFIG.asa))
    if before == "student":
        load_student(pipe, folder, weight=0.5)
    if before == "whole":
        pipe.transformer.save_pretrained(folder / "transformer")
        load_student(pipe, folder)


def break_file(name, content=b"broken"):
    return lambda other: (other / name).write_bytes(content)


def replace_whole(other):
    """Make the student a whole transformer of another model."""
    from diffusers import WanTransformer3DModel

    WanTransformer3DModel(num_attention_heads=2, attention_head_dim=16, num_layers=1, ffn_dim=8).save_pretrained(
        other / "transformer"
    )


BROKEN = {
    "LoRA": (break_file(WEIGHTS), "cannot be read as safetensors"),
    "LoRA of nothing here": (
        lambda other: save_file({"transformer.elsewhere.lora_A.weight": torch.zeros(2, 2)}, other / WEIGHTS),
        "cannot be loaded onto this model|holds no weights for this model's transformer",
    ),
    "condition": (break_file(CONDITION), f"has a {CONDITION} that cannot be loaded"),
    "condition of another shape": (
        lambda other: save_file({"weight": torch.ones(2, 5)}, other / CONDITION),
        r"`weight` must be of shape \(2, 32\), got \(2, 5\)",
    ),
    "scheduler": (break_file("scheduler/scheduler_config.json"), "cannot be read"),
    "scheduler of another kind": (
        break_file("scheduler/scheduler_config.json", b'{"_class_name": "EulerDiscreteScheduler"}'),
        "which is for a FewStepScheduler; it is sampled by a EulerDiscreteScheduler",
    ),
    "attention": (
        lambda other: BladeConfig(dense_layers=(7,)).save_pretrained(other),
        "`dense_layers` must be from 0 to",
    ),
    "attention that is no JSON": (break_file("blade_config.json"), "blade_config.json"),
    "whole transformer": (replace_whole, "is a student of another model|which the loaded LoRAs are not for"),
}


CASES = [(before, name) for name in BROKEN for before in ("nothing", "student")]
CASES += [(before, name) for name in ("condition", "attention") for before in ("style", "blade", "whole")]


@pytest.mark.parametrize(("before", "name"), CASES)
def test_a_broken_student_changes_nothing(pipe, folder, other, before, name):
    break_it, message = BROKEN[name]
    prepare(pipe, before, folder)
    student, saved = loaded_student(pipe), state(pipe)
    break_it(other)
    with pytest.raises(ValueError, match=message):
        load_student(pipe, other)
    assert state(pipe) == saved and loaded_student(pipe) is student


CALLS = (
    "remove_blade", "unload_student", "find_student", "find_transformers", "load_weights", "activate_adapters",
    "load_condition", "install_blade", "StudentWatch", "replace", "setattr",
)  # fmt: skip
"""What `load_student` calls, in the module, the first only if there is a student; each fails once it has worked."""


@pytest.mark.parametrize(
    ("before", "name"), [("nothing", name) for name in CALLS[1:]] + [("student", name) for name in CALLS]
)
def test_an_error_at_any_step_changes_nothing(pipe, folder, other, monkeypatch, before, name):
    plain = run(pipe)
    prepare(pipe, before, folder)
    saved, output = state(pipe), run(pipe)
    function = setattr if name == "setattr" else getattr(loading, name)

    def fail(*args, **kwargs):
        function(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loading, name, fail, raising=name != "setattr")
        with pytest.raises(KeyboardInterrupt):
            load_student(pipe, other)
    assert {**state(pipe), "pipe": {}} == {**saved, "pipe": {}}
    assert torch.equal(run(pipe), output)
    if before == "student":
        unload_student(pipe)
        pipe.unload_lora_weights()
    torch.testing.assert_close(run(pipe), plain)
    assert not pipe.transformer._forward_pre_hooks


def test_a_failed_unloading_leaves_the_student(pipe, folder, monkeypatch):
    load_student(pipe, folder)
    saved = state(pipe)

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loading, "install_blade", fail)
        with pytest.raises(KeyboardInterrupt):
            unload_student(pipe)
    assert state(pipe) == saved
    unload_student(pipe)


def test_unloading_leaves_weights_as_trainable_as_they_were(pipe, folder):
    pipe.transformer.proj_out.requires_grad_(False)
    before = [(name, one.requires_grad) for name, one in pipe.transformer.named_parameters()]
    load_student(pipe, folder)
    unload_student(pipe)
    assert [(name, one.requires_grad) for name, one in pipe.transformer.named_parameters()] == before


def test_offloading_that_diffusers_takes_off_is_put_back(pipe, folder):
    """It takes offloading off all parts while it loads a LoRA, and loses it where that fails."""
    pipe.vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    for part in (pipe.transformer, pipe.vae):
        cpu_offload_with_hook(part, "cpu")
    (folder / WEIGHTS).write_bytes(b"broken")
    hooks, forward = (pipe.transformer._hf_hook, pipe.vae._hf_hook), pipe.transformer.forward
    saved = state(pipe)
    save_file({name: torch.zeros(64, 48) for name in lora(pipe.transformer)}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="cannot be loaded onto this model"):
        load_student(pipe, folder)
    assert (pipe.transformer._hf_hook, pipe.vae._hf_hook) == hooks and pipe.transformer.forward is forward
    assert state(pipe) == saved


def test_a_student_for_one_of_two_transformers_is_refused(two, folder):
    saved = state(two)
    with pytest.raises(
        ValueError,
        match=r"changes 16 modules of transformer and nothing in transformer_2. Give a file for each transformer: "
        r"`FIRST:SECOND`, .*weight_name_2=",
    ):
        load_student(two, folder)
    assert state(two) == saved


def test_a_student_of_two_files_is_for_both_transformers(two, folder, other):
    save_file(lora(two.transformer_2, seed=6), folder / "second.safetensors")
    student = load_student(two, folder, weight_name=WEIGHTS, weight_name_2="second.safetensors")
    assert student.reach == {"transformer": 16, "transformer_2": 16}
    assert [applied_to(one).config for one in (two.transformer, two.transformer_2)] == [CONFIG, CONFIG]
    saved = state(two)
    for break_it, options, message in (
        (break_file("second.safetensors"), {"weight_name_2": "second.safetensors"}, "second.safetensors cannot be"),
        (break_file("README.md"), {"weight_name_2": "third.safetensors"}, "`weight_name_2` must be a file of"),
    ):
        break_it(other)
        with pytest.raises(ValueError, match=message):
            load_student(two, other, weight_name=WEIGHTS, **options)
        assert state(two) == saved
    unload_student(two)


def test_what_is_for_one_transformer_is_refused_where_there_are_two(two, other):
    save_file(lora(two.transformer_2, seed=6), other / "second.safetensors")
    with pytest.raises(
        ValueError, match=f"has a {CONDITION}, which is for models with one transformer; this one has two"
    ):
        load_student(two, other, weight_name=WEIGHTS, weight_name_2="second.safetensors")
    replace_whole(other)
    with pytest.raises(ValueError, match="is one whole transformer, and this model has transformer and transformer_2"):
        load_student(two, other)


def test_a_second_file_is_refused_where_there_is_one_transformer(pipe, other):
    with pytest.raises(ValueError, match="`weight_name_2` must not be given: this model has one transformer"):
        load_student(pipe, other, weight_name_2="second.safetensors")
