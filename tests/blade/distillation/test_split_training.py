"""A training is the same where groups of processes compute each sample together."""

import json

import pytest
from safetensors.torch import load_file

from blade import BladeConfig
from blade.attention.config import AdaptiveConfig
from blade.common.training_log import load_checkpoint
from blade.distillation.recipes import load_config
from blade.distillation.workflow import distill

BOUND = 1e-4
"""Relative error of each tensor and logged value after ten updates in float32. Some gradients of cross-attention
nearly cancel, so that one process differs from itself with accumulation: by 2.4e-5 with this seed, by up to 1.1e-4
with others."""
COMPARED = ("student_loss", "student_norm", "fake_loss", "fake_norm", "difference", "critic_ratio", "sparsity")
SPARSE = BladeConfig(
    sparsity=0.6,
    pooled_tokens="all",
    kind="student",
    asa=AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4, budget="layer", token_order="gilbert"),
)
WHOLE = (
    "run.seed=2",
    "run.batch_size=4",
    "run.updates=11",
    "run.checkpoint_every=10",
    "attention.fake=student",
    "attention.warmup_updates=4",
    "weights.ema_decay=0.9",
)
FULL = (
    "run.batch_size=4",
    "run.updates=2",
    "weights.full=true",
    "attention.method=dense",
    "generator.ode_updates=1",
    "generator.trajectories=3",
)
GROUPS = ("run.batch_size=2", "run.sequence_parallel=2")
"""For four processes, two groups with two samples each."""


@pytest.fixture(scope="module")
def trainings(saved_patched_pipeline, small_settings, start_for_module, tmp_path_factory):
    """Folder of trainings by four processes, and of the same by one."""
    folder = tmp_path_factory.mktemp("split")
    SPARSE.save_pretrained(folder / "attention")

    def settings(output, *others):
        # 3 x 5 x 7 = 105 tokens, which neither 2 nor 4 divides
        shared = (f"attention.config={folder / 'attention'}", f"embeddings={folder / 'embeddings'}")
        size = ("video.height=80", "video.width=112")
        return small_settings(saved_patched_pipeline, folder / output, *size, *shared, *others)

    groups = settings("groups", *WHOLE, *GROUPS, "run.parallel=fsdp")
    validated = ("validation.every=10", "validation.count=2")
    one_group = ("run.sequence_parallel=4", "run.accumulation=2", "run.parallel=ddp")
    split = [
        {"settings": [*groups, *validated, "run.updates=10"], "fault": None},
        {"settings": [*groups, *one_group], "fault": None},  # which goes on with it
        {"settings": settings("full-groups", *FULL, *GROUPS, "run.parallel=ddp"), "fault": None},
        {"settings": settings("dry", *WHOLE, *GROUPS, "run.parallel=fsdp"), "fault": None, "dry_run": True},
    ]
    for fault in ("own noise", "gradients averaged"):
        faulty = settings(fault, *WHOLE, *GROUPS, "run.parallel=fsdp", "run.updates=1")
        split.append({"settings": faulty, "fault": fault})
    (folder / "split.json").write_text(json.dumps(split), encoding="utf-8")
    four = start_for_module("split_trainings.py", str(folder / "split.json"), processes=4)
    output, _ = four.communicate(timeout=500)
    assert four.returncode == 0, output
    (folder / "output.txt").write_text(output, encoding="utf-8")
    distill(load_config("shapes", settings("one", *WHOLE)))
    distill(load_config("shapes", settings("full-one", *FULL)))
    return folder


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def state(folder, update):
    return load_checkpoint(folder / "checkpoints" / f"update-{update:06d}.pt")["trainer"]


def relative_error(other, one):
    return float((other - one).abs().max() / one.abs().max())


def weight_errors(folder, other, update):
    """Relative errors of the weights of both trained roles after an update, by the role."""
    one, split = state(folder / "one", update)["weights"], state(folder / other, update)["weights"]
    return {
        role: max(relative_error(split[role][name], weight) for name, weight in weights.items())
        for role, weights in one.items()
    }


def log_errors(first, second):
    """Relative errors of the logged values of two updates, by their name."""
    assert first.keys() == second.keys()
    names = [name for name in COMPARED if name in first]
    return {name: abs(second[name] - first[name]) / abs(first[name] or 1.0) for name in names}


@pytest.mark.slow
def test_two_groups_equal_one_process_with_the_double_batch(trainings):
    errors = weight_errors(trainings, "groups", 10)
    assert set(errors) == {"student", "fake"} and max(errors.values()) < BOUND, errors
    assert min(errors.values()) > 0  # two computations
    one, groups = log(trainings / "one"), log(trainings / "groups")
    assert [record["sparsity"] for record in one[:5]] == sorted({record["sparsity"] for record in one})  # and stays
    for update in range(10):
        errors = log_errors(one[update], groups[update])
        assert len(errors) == len(COMPARED) and max(errors.values()) < BOUND, (update, errors)
    averages = [state(trainings / name, 10)["ema"]["shadow_params"] for name in ("one", "groups")]
    assert max(map(relative_error, *averages)) < BOUND


@pytest.mark.slow
def test_a_run_of_two_groups_goes_on_with_one_group_of_all(trainings):
    """Four processes share two heads there, and the samples come one after the other."""
    errors = weight_errors(trainings, "groups", 11)
    assert max(errors.values()) < BOUND, errors
    (one, group) = (log(trainings / name)[10:] for name in ("one", "groups"))
    assert len(one) == len(group) == 1
    assert max(log_errors(one[0], group[0]).values()) < BOUND


@pytest.mark.slow
def test_each_group_validates_a_prompt(trainings):
    folder = trainings / "groups" / "validation" / "000010"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"a-red-ball-moving-{way}-{number}-steps-2.{ending}"
        for number, way in enumerate(("left", "right"))
        for ending in ("json", "mp4")
    ]


@pytest.mark.slow
def test_dense_separate_networks_and_trajectories_are_split_too(trainings):
    for number in range(3):
        one, groups = (
            load_file(trainings / name / "trajectories" / f"{number:06d}.safetensors")["points"].float()
            for name in ("full-one", "full-groups")
        )
        assert float((one - groups).abs().max()) < 5e-3  # kept in half precision
    records = [log(trainings / name) for name in ("full-one", "full-groups")]
    for number, (one, groups) in enumerate(zip(*records, strict=True)):
        errors = log_errors(one, groups)
        assert len(errors) == (3 if number == 0 else len(COMPARED))  # only the student's in ODE initialization
        assert max(errors.values()) < 1e-3, errors  # of points in half precision


@pytest.mark.slow
def test_a_dry_run_measures_groups_and_writes_nothing(trainings):
    output = (trainings / "output.txt").read_text(encoding="utf-8")
    assert output.count("of student and fake score together") == output.count("GiB at most on") == 1
    assert not (trainings / "dry").exists()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["own noise", "gradients averaged"])
def test_a_planted_fault_shows_in_the_first_update(trainings, fault):
    errors = log_errors(log(trainings / "one")[0], log(trainings / fault)[0])
    assert min(errors["student_norm"], errors["fake_norm"]) > 100 * BOUND, errors


def test_groups_must_come_out_even(settings):
    with pytest.raises(ValueError, match=r"`run\.sequence_parallel` must divide the number of processes, 1, got 2"):
        distill(load_config("shapes", settings("out", "run.sequence_parallel=2")))
