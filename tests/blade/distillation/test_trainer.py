"""A training is the same however it is shared out, accumulated or stopped."""

import json
import math
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blade.common.training_log import load_checkpoint
from blade.distillation.draws import Draws, prompt_numbers
from blade.distillation.optimizers import RoleOptimizer
from blade.distillation.recipes import load_config
from blade.distillation.updates import Updates
from blade.distillation.workflow import distill


def trained(settings):
    return distill(load_config("shapes", settings))


def weights(folder):
    return load_file(Path(folder) / "pytorch_lora_weights.safetensors")


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def assert_close(first, second):
    for name, one in weights(first).items():
        two = weights(second)[name]
        assert float((one - two).abs().max()) <= 1e-5 * max(float(one.abs().max()), 1e-3), name
    for one, two in zip(log(first), log(second), strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() & {"student_loss", "fake_loss", "student_norm", "fake_norm"}:
            assert one[name] == pytest.approx(two[name], rel=1e-4), name


@pytest.mark.slow
def test_accumulation_equals_the_large_batch(settings, tmp_path):
    trained(settings("large", "run.batch_size=4", "run.updates=2"))
    trained(settings("small", "run.batch_size=1", "run.accumulation=4", "run.updates=2"))
    assert_close(tmp_path / "large", tmp_path / "small")


@pytest.mark.slow
def test_processes_that_share_weights_run_as_many_passes(settings, start):
    """Each has one sample, at another step of the trajectory than the other's."""
    others = ("run.parallel=fsdp", "run.batch_size=1", "trajectory.steps=[4]", "run.updates=6")
    two = start("-m", "blade.cli.distill", "shapes", *settings("two", *others), processes=2)
    output, _ = two.communicate(timeout=300)
    assert two.returncode == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_the_double_batch(settings, start, tmp_path, parallel):
    shared = ("weights.ema_decay=0.9", "run.accumulation=2")
    validated = ("validation.every=2", "validation.count=1")
    two = start(
        "-m", "blade.cli.distill", "shapes", *settings("two", f"run.parallel={parallel}", *shared, *validated),
        processes=2,
    )  # fmt: skip
    output, _ = two.communicate(timeout=300)
    assert two.returncode == 0, output
    trained(settings("one", "run.batch_size=4", *shared))
    assert output.count("student     ") == 1  # one of them reports
    assert_close(tmp_path / "one", tmp_path / "two")
    # and one goes on where two have stopped
    trained(settings("two", "run.batch_size=4", *shared, "run.updates=4"))
    trained(settings("one", "run.batch_size=4", *shared, "run.updates=4"))
    assert_close(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_share_out_the_trajectories(settings, start, tmp_path, parallel):
    shared = ("generator.ode_updates=1", "generator.trajectories=5", "run.updates=1")
    two = start(
        "-m", "blade.cli.distill", "shapes", *settings("two", f"run.parallel={parallel}", *shared), processes=2
    )
    output, _ = two.communicate(timeout=300)
    assert two.returncode == 0, output
    trained(settings("one", "run.batch_size=4", *shared))
    names = [f"{number:06d}.safetensors" for number in range(5)]
    points = [
        [load_file(tmp_path / run / "trajectories" / name)["points"] for name in names] for run in ("one", "two")
    ]
    for one, another in zip(*points):
        assert float((one.float() - another.float()).abs().max()) < 5e-3  # kept in half precision
    losses = [log(tmp_path / run)[0]["student_loss"] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "shared", [("run.batch_size=1",), ("run.batch_size=2", "run.sequence_parallel=2", "run.parallel=fsdp")]
)
def test_sigterm_ends_two_processes_which_then_resume(settings, start, tmp_path, shared):
    """Each has samples of its own, or both are one group."""
    others = (*shared, "run.updates=400")
    two = start("-m", "blade.cli.distill", "shapes", *settings("out", *others), processes=2)
    checkpoints = tmp_path / "out" / "checkpoints"
    while not list(checkpoints.glob("*.pt")) and two.poll() is None:
        time.sleep(0.05)
    two.send_signal(signal.SIGTERM)
    output, _ = two.communicate(timeout=60)
    assert two.returncode not in (0, -signal.SIGKILL), output
    assert output.count("error: terminated") == 2, output
    assert not list((tmp_path / "out").rglob(".*.tmp"))
    reached = max(load_checkpoint(path)["trainer"]["update"] for path in checkpoints.glob("*.pt"))
    trained(settings("out", "run.batch_size=2", f"run.updates={reached + 1}"))
    trained(settings("whole", "run.batch_size=2", f"run.updates={reached + 1}"))
    assert_close(tmp_path / "whole", tmp_path / "out")


@pytest.mark.slow
def test_gradients_on_two_processes(start):
    process = start("two_processes.py", str(Path(__file__).parents[2] / "pipelines"), processes=2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_run_goes_on_bit_by_bit(settings, start, tmp_path, number, code):
    others = (
        "run.updates=12",
        "run.checkpoint_every=3",
        "weights.ema_decay=0.9",
        "attention.warmup_updates=6",
        "generator.ode_updates=5",
        "generator.trajectories=3",
    )
    trained(settings("whole", *others))
    process = start("-m", "blade.cli.distill", "shapes", *settings("stopped", *others))
    checkpoints = tmp_path / "stopped" / "checkpoints"
    while not list(checkpoints.glob("*.pt")) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.random() / 3)
    process.send_signal(number)
    output, _ = process.communicate()
    # once all is done, and Python itself ends, nobody handles a signal
    done = "distillation 12/12" in output
    assert process.returncode in ((code, 0, -number) if done else (code,)), output
    assert code < 0 or not list((tmp_path / "stopped").rglob(".*.tmp"))
    assert log(tmp_path / "stopped"), "it was killed before the first update"
    trained(settings("stopped", *others))
    for name, one in weights(tmp_path / "whole").items():
        assert torch.equal(one, weights(tmp_path / "stopped")[name]), name
    records = [
        [{k: v for k, v in record.items() if "seconds" not in k} for record in log(tmp_path / name)]
        for name in ("whole", "stopped")
    ]
    assert records[0] == records[1]
    states = [
        load_checkpoint(tmp_path / name / "checkpoints" / "update-000012.pt")["trainer"]
        for name in ("whole", "stopped")
    ]
    assert str(states[0]) == str(states[1])
    assert records[0][0]["sparsity"] < records[0][-1]["sparsity"] == 0.6


def test_another_configuration_is_refused_and_says_what_differs(settings):
    trained(settings("out", "run.updates=1"))
    with pytest.raises(
        ValueError, match=r"`generator.loss` squared instead of huber; 2 samples an update instead of 4"
    ):
        trained(settings("out", "generator.loss=huber", "run.batch_size=4"))


def test_a_full_disk_leaves_the_checkpoint_before(settings, tmp_path, monkeypatch):
    trained(settings("out", "run.updates=1"))
    before = sorted((tmp_path / "out" / "checkpoints").iterdir())

    def full(state, path):
        Path(path).write_bytes(b"half of it")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left: the disk of .*update-000002\.pt is full"):
        trained(settings("out", "run.updates=2"))
    assert sorted((tmp_path / "out" / "checkpoints").iterdir()) == before
    assert load_checkpoint(before[0])["trainer"]["update"] == 1


def test_what_is_not_finite_is_left_out_and_counted(settings, monkeypatch):
    from blade.distillation import updates

    plain, calls = updates.denoising_loss, []

    def sometimes_infinite(*arguments):
        calls.append(1)
        return plain(*arguments) * (math.inf if len(calls) == 1 else 1.0)

    monkeypatch.setattr(updates, "denoising_loss", sometimes_infinite)
    report = trained(settings("out"))
    assert report.skipped == {"student": 0, "fake": 1}
    assert all(one.isfinite().all() for one in weights(report.output).values())


def test_divergence_ends_the_run(settings, monkeypatch):
    from blade.distillation import updates

    monkeypatch.setattr(updates, "denoising_loss", lambda estimate, *others: estimate.sum() * math.nan)
    with pytest.raises(ArithmeticError, match="The last 20 steps were left out"):
        trained(settings("out", "run.updates=30", "run.checkpoint_every=30"))


def test_several_numbers_of_steps_and_shared_intervals(settings, tmp_path):
    others = ("trajectory.steps=[2,4]", "trajectory.intervals=shared", "fake.importance=true", "run.updates=6")
    others += ("trajectory.noise_kept=0.9", "fake.updates=2", "attention.fake=student")
    report = trained(settings("out", *others, "generator.ode_updates=2", "generator.trajectories=2"))
    vectors = load_file(report.output / "step_condition.safetensors")["weight"]
    assert vectors.shape[0] == 2 and vectors.abs().amax(dim=1).min() > 0
    card = (report.output / "README.md").read_text()
    assert "Diffusers alone cannot sample it: every step renews a part of the noise" in card


@pytest.mark.slow
def test_eight_bit_adam_goes_on_where_it_was(settings, tmp_path):
    pytest.importorskip("torchao")
    trained(settings("whole", "optimizer.name=adamw-8bit"))
    trained(settings("stopped", "optimizer.name=adamw-8bit", "run.updates=2"))
    trained(settings("stopped", "optimizer.name=adamw-8bit"))
    plain = weights(trained(settings("plain")).output)
    for name, one in weights(tmp_path / "whole").items():
        assert torch.equal(one, weights(tmp_path / "stopped")[name]), name
        assert float((one - plain[name]).abs().max()) < 0.2 * float(plain[name].abs().max()), name


def test_imitation_teaches_sparsity_and_can_be_started_from(settings):
    others = (
        "generator.objective=imitation",
        "generator.trajectories=4",
        "run.updates=24",
        "generator.learning_rate=3e-3",
        "optimizer.epsilon=1e-8",
        "trajectory.steps=[4]",
    )
    first = trained(settings("first", *others)).output
    losses = [record["student_loss"] for record in log(first)]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    assert "fake_loss" not in log(first)[0]
    assert trained(settings("second", f"weights.start_from={first}")).updates == 3


INITIALIZED = ("generator.ode_updates=2", "generator.substeps=2", "generator.trajectories=6")


def test_ode_initialization_comes_first_at_its_own_rate(settings, monkeypatch):
    rates = []
    plain = RoleOptimizer.set_rate

    def record(self, rate):
        rates.append(rate)
        plain(self, rate)

    monkeypatch.setattr(RoleOptimizer, "set_rate", record)
    others = ("generator.ode_learning_rate=0.1", "optimizer.schedule=cosine", "optimizer.warmup_updates=0")
    made = log(trained(settings("student", *INITIALIZED, *others, "run.updates=4")).output)
    assert ["fake_loss" in record for record in made] == [False, False, True, True]
    # the student's alone; then the fake score's, which does not fall, and the student's from the start of its schedule
    assert rates == pytest.approx([0.1, 0.05, 2e-2, 1e-2, 2e-2, 0.5e-2])


def test_trajectories_are_the_guided_teachers_and_are_kept(settings, tmp_path, monkeypatch):
    shared = (*INITIALIZED, f"trajectories={tmp_path / 'shared'}")
    trained(settings("first", *shared, "run.updates=1"))
    files = sorted((tmp_path / "shared").glob("*.safetensors"))
    assert len(files) == 6  # of five prompts
    points = load_file(files[5])["points"].float()
    assert points.shape[0] == 3  # two times, and 0
    assert float(points[0].std()) == pytest.approx(1.0, abs=0.05)
    seen = []
    plain = Updates.teacher_trajectory

    def record(self, conditions, noise, times):
        seen.append(noise)
        return plain(self, conditions, noise, times)

    monkeypatch.setattr(Updates, "teacher_trajectory", record)
    files[5].unlink()  # as after a kill
    trained(settings("second", *shared, "run.updates=1", "run.seed=1"))
    assert [len(one) for one in seen] == [2]  # the batch that it was in, so that nothing is rounded otherwise
    assert torch.equal(load_file(files[5])["points"].float(), points)
    with pytest.raises(
        ValueError, match=r"`trajectories` .*shared are of another guidance_scale \(3.0 instead of 4.0\)"
    ):
        trained(settings("third", *shared, "generator.guidance_scale=4"))


def test_a_dry_run_writes_nothing(settings, tmp_path):
    estimate = distill(load_config("shapes", settings("out", "run.updates=100", *INITIALIZED)), dry_run=True)
    assert not (tmp_path / "out").exists()
    assert min(estimate.seconds_update, estimate.seconds_ode_update, estimate.seconds_trajectories) > 0
    # trajectories, each at two times and 0, latents of 4 x 3 x 8 x 8, bytes
    assert estimate.gib_trajectories == 6 * 3 * (4 * 3 * 8 * 8) * 2 / 2**30
    assert estimate.peak_gib > 0.1
    assert estimate.trained_parameters == 2 * 2 * 2 * 4 * 2 * 32 * 4  # roles, layers, attentions, projections, A and B


def test_every_prompt_once_an_epoch_whatever_the_batches():
    for batch in (1, 4, 7):
        numbers = [n for first in range(0, 28, batch) for n in prompt_numbers(0, first, batch, 7)]
        assert all(sorted(numbers[epoch * 7 : epoch * 7 + 7]) == list(range(7)) for epoch in range(4))
        assert numbers == prompt_numbers(0, 0, 28, 7)
    assert prompt_numbers(0, 0, 7, 7) != prompt_numbers(0, 7, 7, 7)


def test_draws_belong_to_samples():
    draws = Draws(0, 3, 1)
    together = draws.noise(5, range(4), (2, 3))
    assert torch.equal(together[2:], draws.noise(5, range(2, 4), (2, 3)))
    assert not torch.equal(together, Draws(0, 4, 1).noise(5, range(4), (2, 3)))
    steps = draws.steps(range(8), 4, together=False)
    assert sorted(steps) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(set(draws.steps(range(8), 4, together=True))) == 1
