"""What switches a loaded student off, or runs it as it was not trained, is said once, with the call that mends it."""

import copy
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from tiny_students import lora, run

from blade import load_student, unload_student
from blade.models.loaded import LoadedModel
from blade.models.loras import merge_loras


@pytest.fixture
def style(pipe):
    """Weights of a LoRA that is no student."""
    return lora(pipe.transformer, seed=7, rank=4, scale=0.3)


def mend(pipe, message):
    """Make the call that a message names."""
    exec(re.search(r"`(pipe\.[^`]+\)|load_student[^`]+\))`", message)[1], {"pipe": pipe, "load_student": load_student})


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize(
    ("switch", "reason"),
    [
        (lambda pipe, style: pipe.load_lora_weights(style, adapter_name="style"), "its adapter is not active in tra"),
        (lambda pipe, style: pipe.set_adapters("style", 0.25), "its adapter is not active in transformer"),
        (lambda pipe, style: pipe.disable_lora(), "`disable_lora` was called on transformer"),
        (lambda pipe, style: pipe.unload_lora_weights(), "its LoRA is no longer in transformer"),
    ],
    ids=["load", "set", "disable", "unload"],
)
def test_a_student_that_was_switched_off_says_so_once(pipe, folder, style, caplog, switch, reason, weight):
    before = reason.startswith(("its adapter is not active in transformer", "`disable"))
    if before:
        pipe.load_lora_weights(style, adapter_name="style")
        pipe.set_adapters("style", 0.25)
    load_student(pipe, folder, weight=weight)
    expected = run(pipe)
    assert caplog.messages == []
    switch(pipe, style)
    assert not torch.equal(run(pipe), expected)
    run(pipe)
    (message,) = caplog.messages
    assert message.startswith(f"The student {folder} is switched off: {reason}")
    if before or "unload" not in message:
        mend(pipe, message)
    else:
        mend(pipe, message.replace("')", f"', weight={weight})"))
    output = run(pipe)
    if "load_lora_weights` or" in message and not before:  # beside the style
        pipe.delete_adapters("style")
        output = run(pipe)
    torch.testing.assert_close(output, expected)
    assert len(caplog.messages) == 1


def test_a_merged_student_is_on(pipe, folder, caplog):
    load_student(pipe, folder)
    merge_loras(LoadedModel(pipe))
    run(pipe)
    assert caplog.messages == []


def test_a_student_that_runs_with_guidance_says_so_once(pipe, folder, caplog):
    load_student(pipe, folder)
    run(pipe)
    assert caplog.messages == []
    run(pipe, guidance_scale=5.0)  # Diffusers' own default
    run(pipe, guidance_scale=5.0)
    (message,) = caplog.messages
    assert (
        message.startswith(f"The student {folder} was trained without guidance") and "`guidance_scale=1.0`" in message
    )
    unload_student(pipe)
    run(pipe, guidance_scale=5.0)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    ("name", "warned"),
    [("CogVideoXPipeline", True), ("HunyuanVideo15Pipeline", True), ("HunyuanVideoPipeline", False)],
)
def test_guidance_is_seen_in_every_kind_of_pipeline(small_pipelines, tmp_path, caplog, name, warned):
    """HunyuanVideo's scale is an input of its transformer, and takes one pass."""
    pipe = small_pipelines[name]()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.save_pretrained(tmp_path / "transformer")
    load_student(pipe, tmp_path)
    pipe("a cat", output_type="latent")
    assert any("= pipe.guider.new(" in text or "`guidance_scale=1.0`" in text for text in caplog.messages) == warned
    caplog.clear()
    load_student(pipe, tmp_path)
    if getattr(pipe, "guider", None) is not None:
        pipe.guider = pipe.guider.new(guidance_scale=1.0)
        pipe("a cat", output_type="latent")
    else:
        pipe("a cat", output_type="latent", guidance_scale=1.0)
    assert not any("guidance" in text for text in caplog.messages)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused_until_the_student_is_unloaded(pipe, tmp_path, duplicate):
    save_file(lora(pipe.transformer), tmp_path / "pytorch_lora_weights.safetensors")
    load_student(pipe, tmp_path, scheduler=(999.0, 749.0, 499.0, 249.0))
    for target in (pipe, pipe.transformer):
        with pytest.raises(
            TypeError, match=r"with a student cannot be copied or pickled: call `unload_student` first"
        ):
            duplicate(target)
    unload_student(pipe)
    duplicate(pipe.transformer)
