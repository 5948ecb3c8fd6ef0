from __future__ import annotations

from dataclasses import replace

import pytest

from blade.attention.config import BladeConfig
from blade.attention.pattern_table import PatternTable, uniform_table
from blade.attention.patterns import HeadPattern
from blade.evaluation.plan import Evaluation, plan_evaluation
from blade.evaluation.prompts import prompts_with_seeds
from blade.evaluation.runs import RunSettings, parse_run
from blade.models.source import ModelError
from blade.students.source import WEIGHT_NAME

PROMPTS = prompts_with_seeds(["a red ball moving left"], (0,))


def evaluation_of(*runs: str, **changes) -> Evaluation:
    return Evaluation(
        runs=tuple(parse_run(text) for text in runs), prompts=PROMPTS, folder=None, device="cpu", **changes
    )


def save_table(folder, **changes):
    table = uniform_table(HeadPattern(kind="diagonal", frames=0.5), 2, 2, block_size=32)
    values = {name: getattr(table, name) for name in ("patterns", "assignment", "block_size")} | changes
    BladeConfig(attention="patterns", patterns=PatternTable(**values)).save_pretrained(folder)
    return folder


def test_the_bundled_model_fills_in_its_own_defaults():
    plan = plan_evaluation(evaluation_of("dense", "preset", "few=asa,steps=4,guidance=1"))
    assert plan.size == {"height": 96, "width": 96, "frames": 33, "fps": 16}
    assert [(run.steps, run.guidance) for run in plan.evaluation.runs] == [(30, 2.0), (30, 2.0), (4, 1.0)]
    assert plan.requests["dense"].blade_config is None
    assert plan.requests["preset"].blade_config == BladeConfig.from_preset("shapes")
    assert plan.requests["preset"].device == "cpu" and plan.requests["preset"].dtype == "float32"
    assert plan.evaluation.of_shapes and len(plan.fingerprint) == 16


def test_other_models_keep_their_own_defaults_unless_they_show_shapes(saved_tiny_pipeline):
    options = {"model": str(saved_tiny_pipeline), "height": 64, "width": 64, "frames": 9}
    plan = plan_evaluation(evaluation_of("dense", **options))
    request = plan.requests["dense"]
    assert (request.steps, request.guidance_scale, request.negative_prompt) == (50, 5.0, None)
    plan = plan_evaluation(evaluation_of("dense", of_shapes=True, **options))
    request = plan.requests["dense"]
    assert (request.steps, request.guidance_scale, request.negative_prompt, request.height) == (30, 2.0, "", 64)


def test_dense_runs_of_the_same_steps_and_guidance_are_references():
    plan = plan_evaluation(
        evaluation_of("asa", "dense=steps=30", "few=steps=4", "few-asa=asa,steps=4", "x=asa,steps=8")
    )
    sparse, dense, few, few_sparse, other = plan.evaluation.runs
    assert plan.evaluation.reference_of(sparse) == dense
    assert plan.evaluation.reference_of(few_sparse) == few
    assert plan.evaluation.reference_of(other) is None and plan.evaluation.reference_of(dense) is None


def test_the_baseline_is_the_first_run_that_is_not_dense():
    assert evaluation_of("dense", "asa", "local").baseline_run.name == "asa"
    assert evaluation_of("dense", "asa", "local", baseline="local").baseline_run.name == "local"
    assert evaluation_of("slow=steps=50", "fast=steps=4").baseline_run.name == "slow"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runs": ()}, "at least one run"),
        ({"runs": (RunSettings(name="x"), RunSettings(name="x", steps=3))}, "different names, got 'x' twice"),
        (
            {"runs": (RunSettings(name="Asa"), RunSettings(name="b"), RunSettings(name="asa", steps=3))},
            "different names, got 'Asa' and 'asa'",
        ),
        ({"prompts": ()}, "`prompts` must hold"),
        ({"prompts": PROMPTS * 2}, "`prompts` must be different"),
        ({"shard": (3, 2)}, "`shard`"),
        ({"baseline": "nobody"}, "`baseline` must be one of the runs asa, got 'nobody'"),
    ],
)
def test_bad_evaluations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(evaluation_of("asa"), **changes)


def test_a_table_of_patterns_is_planned(saved_tiny_pipeline, patterns_folder):
    options = {"model": str(saved_tiny_pipeline), "height": 64, "width": 64, "frames": 9}
    plan = plan_evaluation(evaluation_of(f"found={patterns_folder}", **options))
    request = plan.requests["found"]
    assert request.attention == "patterns"
    assert request.blade_config == BladeConfig.from_pretrained(patterns_folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x=nothing-here", "`config` nothing-here is no folder here"),
        ("x=asa,dense_layers=99", "`dense_layers` must be from 0 to 1"),
        ("x={},steps=6", "`patterns` were found for other runs: this one has 6 steps, not 4"),
    ],
)
def test_runs_that_blade_would_refuse_are_refused_before_anything_runs(saved_tiny_pipeline, tmp_path, text, message):
    text = text.format(save_table(tmp_path / "table", steps=4))
    options = {"model": str(saved_tiny_pipeline), "height": 64, "width": 64, "frames": 9}
    with pytest.raises(ValueError, match=f"run `x`: {message}"):
        plan_evaluation(evaluation_of("dense", text, **options))


def test_all_impossible_runs_are_named_before_anything_runs():
    """With steps that a student lacks, and with layers that are not there."""
    steps = "student=shapes-8-steps,steps=10"
    texts = ("dense", f"few={steps}", f"same={steps}", "x=asa,dense_layers=99")
    with pytest.raises(ValueError) as caught:
        plan_evaluation(evaluation_of(*texts))
    assert str(caught.value).splitlines() == [
        "run `few` (and 1 others): `steps` must be 8, as the student shapes-8-steps is trained, got 10.",
        "run `x`: `dense_layers` must be from 0 to 5, the last layer here, got [99].",
    ]
    plan = plan_evaluation(evaluation_of("dense", "few=student=shapes-8-steps"))
    assert (plan.requests["few"].steps, plan.requests["few"].guidance_scale) == (8, 1.0)


def test_a_student_of_another_model_or_that_is_none_is_refused(saved_tiny_pipeline, tmp_path):
    options = {"model": str(saved_tiny_pipeline), "height": 64, "width": 64, "frames": 9}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"run `x`: .*holds a pytorch_lora_weights.safetensors"):
        plan_evaluation(evaluation_of("dense", f"x=student={tmp_path / 'empty'}", **options))
    (tmp_path / "empty" / WEIGHT_NAME).touch()
    with pytest.raises(ValueError, match=r"run `x`: `noise_kept` must not be given: .* is sampled by a Flow"):
        plan_evaluation(evaluation_of("dense", f"x=student={tmp_path / 'empty'},noise_kept=0.5,steps=4", **options))


def test_a_strict_run_without_a_block_to_leave_out_is_refused(saved_tiny_pipeline, tmp_path):
    BladeConfig(sparsity=0.1, strict=True).save_pretrained(tmp_path / "strict")
    options = {"model": str(saved_tiny_pipeline), "height": 64, "width": 64, "frames": 1}
    with pytest.raises(ValueError, match=r"run `x`: All layers stay dense at 1 x 8 x 8 tokens"):
        plan_evaluation(evaluation_of(f"x={tmp_path / 'strict'}", **options))


def test_prompts_that_the_bundled_model_cannot_draw_are_refused():
    prompts = prompts_with_seeds(["a red ball moving left", "a cat", "a dog"], (0, 1))
    with pytest.raises(ValueError, match=r'^`prompt` must name a shape .*got "a cat".*\(2 such prompts\)$'):
        plan_evaluation(replace(evaluation_of("dense"), prompts=prompts))


def test_a_table_for_another_model_or_size_is_refused(saved_tiny_pipeline, tmp_path, patterns_folder):
    with pytest.raises(ValueError, match=r"run `x`: `patterns` must be a table for this model, which has \d+ layers"):
        plan_evaluation(evaluation_of(f"x={patterns_folder}"))
    from blade.token_grid import TokenGrid

    folder = save_table(tmp_path / "table", grid=TokenGrid(3, 8, 8))
    options = {"model": str(saved_tiny_pipeline), "width": 64, "frames": 9}
    assert plan_evaluation(evaluation_of(f"x={folder}", height=64, **options)).requests
    with pytest.raises(ValueError, match="`patterns` were found for other runs: this one has 3 x 10 x 8 tokens"):
        plan_evaluation(evaluation_of(f"x={folder}", height=80, **options))


@pytest.mark.parametrize(
    "name",
    ["WanPipeline", "CogVideoXPipeline", "HunyuanVideoPipeline", "HunyuanVideo15Pipeline", "LTXPipeline"],
)
def test_every_family_is_planned_from_its_configuration(name, configurations):
    size = {"height": 512, "width": 512} if name == "LTXPipeline" else {"height": 128, "width": 128}
    plan = plan_evaluation(evaluation_of("dense", "preset", model=str(configurations(name)), frames=9, **size))
    assert all(run.steps >= 30 and run.guidance > 1 for run in plan.evaluation.runs)
    assert plan.requests["preset"].blade_config.attention == "asa" and not plan.evaluation.of_shapes


def test_a_model_that_is_not_there_is_refused():
    with pytest.raises(ModelError, match="no/such/model"):
        plan_evaluation(evaluation_of("dense", model="no/such/model"))
