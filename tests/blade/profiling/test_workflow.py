"""Profiles of a small pipeline: stopped and gone on with, published and budgeted, by one process or several."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from blade.attention.config import BladeConfig
from blade.attention.patterns import HeadPattern
from blade.common.files import OutputError
from blade.generation.prepare import prepare_model
from blade.generation.run import run_request
from blade.models.loaded import LoadedModel
from blade.models.loading import load_model
from blade.profiling import recording, workflow
from blade.profiling.assignment import GreedyRule
from blade.profiling.influence import _ratios
from blade.profiling.objectives import Budget
from blade.profiling.profile import PROFILE_NAME, AttentionProfile
from blade.profiling.record_prompts import dense_video
from blade.profiling.recording_plan import Recording
from blade.profiling.request import ProfileRequest
from blade.profiling.workflow import profile_attention

PROMPTS = ("a red ball moving right", "a blue square moving up")
FIELDS = ("error", "energy", "head_error", "mass", "best_mass", "columns", "maps")


@pytest.fixture
def request_for(saved_tiny_pipeline, tmp_path):
    """Return a function that makes a request for the tiny pipeline, with its options changed."""

    def make(folder="profile", steps=4, **options):
        generation = {
            "model": str(saved_tiny_pipeline),
            "steps": steps,
            "guidance_scale": 2.0,
            "height": 64,
            "width": 64,
            "frames": 9,
            "device": "cpu",
        }
        given = {"budget": Budget(target_density=0.6), "sampled_blocks": None, "verify_prompts": 0, **options}
        return ProfileRequest.of(generation, prompts=PROMPTS, output=tmp_path / folder, **given)

    return make


def assert_same(one: AttentionProfile, other: AttentionProfile):
    assert one.source == other.source
    for name in FIELDS:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


@pytest.mark.slow
def test_what_is_stopped_goes_on_where_it_was(request_for, monkeypatch):
    whole = profile_attention(request_for("whole"))
    request, kept = request_for("stopped"), recording.save_file
    saved = []

    def stop_after_eleven(tensors, path):
        if len(saved) == 11:  # in the second prompt's second step
            raise KeyboardInterrupt
        saved.append(path)
        kept(tensors, path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recording, "save_file", stop_after_eleven)
        profile_attention(request)
    lines = []
    stopped = profile_attention(request, lines.append)
    assert_same(whole.profile, stopped.profile)
    assert whole.config == stopped.config and whole.choice.error == stopped.choice.error
    assert sum("prompt 2/2" in line for line in lines) == 8 and not any("prompt 1/2, step" in line for line in lines)
    saved.clear()
    with monkeypatch.context() as patched:  # all is known, but for nothing
        patched.setattr(recording, "save_file", stop_after_eleven)
        again = profile_attention(request)
    assert not saved and again.config == whole.config
    assert not list(request.output.rglob("pass-*")) and not list(request.output.rglob("*.tmp"))


@pytest.mark.slow
def test_the_table_is_used_and_dense_videos_are_diffusers_own(request_for):
    request = request_for(verify_prompts=2)
    report = profile_attention(request)
    model, resolved = prepare_model(replace(request.generation, prompt=PROMPTS[0]))
    dense = run_request(model, replace(resolved.dense(), seed=1, prompt=PROMPTS[1])).video
    assert np.array_equal((dense * 255).round().byte().numpy(), dense_video(request.output / "recordings", 1))
    config = BladeConfig.from_pretrained(request.output)
    assert config == report.config and config.attention == "patterns"
    sparse = run_request(model, replace(resolved, attention=None, blade_config=config, prompt=PROMPTS[0]))
    assert sparse.run_density == pytest.approx(report.choice.density, abs=0.002) and sparse.run_density <= 0.602
    assert AttentionProfile.load(request.output / PROFILE_NAME).source.prompts == PROMPTS
    adaptive = BladeConfig.from_pretrained(request.output / "asa")
    assert adaptive.attention == "asa" and adaptive.sparsity == report.adaptive.config.sparsity
    assert [one.prompt for one in report.verified] == list(PROMPTS) and min(one.psnr for one in report.verified) > 20
    assert f"blade-generate --config {request.output}" in str(report)


@pytest.mark.slow
def test_recordings_of_something_else_are_refused(request_for):
    request = request_for(influence_prompts=0)
    profile_attention(request)
    for change, message in (
        ({"generation": replace(request.generation, steps=5)}, "another `steps`, 4 instead of 5"),
        ({"prompts": PROMPTS[::-1]}, "another `prompts`"),
        ({"sampled_blocks": 3}, "another `recording`"),
        ({"generation": replace(request.generation, dtype="bfloat16")}, "another `dtype`"),
    ):
        with pytest.raises(ValueError, match=message):
            profile_attention(replace(request, **change))
    source = request.output / "recordings" / "source.json"  # as earlier versions wrote it
    spelled = source.read_text()
    source.write_text(spelled.replace("multi-diagonal", "multi_diagonal").replace("token-major", "token_major"))
    assert source.read_text() != spelled
    denser = profile_attention(replace(request, budget=Budget(target_density=0.9)))
    assert 0.6 < denser.choice.density <= 0.9


@pytest.mark.slow
def test_processes_share_the_prompts(request_for, tmp_path):
    request = request_for("shared", influence_prompts=0)
    for number in (2, 1):
        assert profile_attention(replace(request, share=(number, 2))) is None
    lines = []
    report = profile_attention(request, lines.append)
    assert not any("step" in line for line in lines)
    assert_same(report.profile, profile_attention(request_for("alone", influence_prompts=0)).profile)


@pytest.mark.slow
def test_the_published_method_goes_on_with_what_it_chose(request_for):
    request = request_for("published", method="published", budget=Budget(target_density=0.7))
    report = profile_attention(request)
    assert report.choice.density <= 0.7 and report.rule.threshold > 0 and report.rule.weight == 0.5
    kinds = [pattern.kind for pattern in report.profile.source.candidates]
    assert kinds == ["full", "skip", "diagonal", "multi-diagonal", "vertical"]
    assert all(pattern.key_blocks is None for pattern in report.config.patterns.patterns)
    assert report.adaptive is None and "epsilon" in str(report)
    nothing = profile_attention(request_for("full", method="published", budget=None, rule=GreedyRule(threshold=0.0)))
    everything = profile_attention(
        request_for("sparse", method="published", budget=None, rule=GreedyRule(weight=0.0, threshold=100.0))
    )
    assert nothing.choice.density == pytest.approx(1) and (everything.choice.candidates > 0).all()
    # what later layers see depends on what was chosen before them
    assert not np.allclose(nothing.profile.energy[:, :, 1:], everything.profile.energy[:, :, 1:], rtol=1e-3)
    with pytest.raises(ValueError, match="`target_density` is the only budget of the published method"):
        request_for(method="published", budget=Budget(max_error=0.1))


def test_students_are_profiled_without_their_sparsity(request_for, saved_tiny_pipeline, tmp_path):
    """A transformer to which BLADE is applied already is measured densely, and keeps what was applied."""
    from blade import apply_blade
    from blade.attention.applied import applied_to
    from blade.profiling.recording import recorded

    pipe = load_model(saved_tiny_pipeline).pipe
    apply_blade(
        pipe, BladeConfig(sparsity=0.6, dense_steps=0, dense_layers=(), asa=replace(BladeConfig().asa, block_size=32))
    )
    before = applied_to(pipe.transformer)
    only = Recording(candidates=(HeadPattern(kind="full"), HeadPattern(kind="skip")), block_size=32)
    options = {"prompt": PROMPTS[0], "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 1}
    noise = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with recorded(pipe.transformer, only, tmp_path / "passes", pipe):
        pipe(**options, latents=noise, output_type="latent")
    assert applied_to(pipe.transformer) is before
    assert len(list((tmp_path / "passes").glob("pass-*"))) == 2


def test_bad_requests_are_refused(request_for):
    for options, message in (
        ({"method": "guess"}, "`method` must be one of budgeted, published, got 'guess'"),
        ({"costs": "free"}, "`costs` must be auto, operations or time, got 'free'"),
        ({"verify_prompts": 3}, "`verify_prompts` must be from 0 to 2, the number of prompts, got 3"),
        ({"budget": None}, "one of `target_density`, `target_speedup` and `max_error` must be given"),
    ):
        with pytest.raises(ValueError, match=message):
            request_for(**options)


class TwoTransformers(LoadedModel):
    """A model that has its transformer twice."""

    @property
    def transformers(self):
        return {"one": self.pipe.transformer, "two": self.pipe.transformer}


def test_two_transformers_are_refused(request_for, monkeypatch):
    def prepared(request, team):
        model, resolved = prepare_model(request)
        return TwoTransformers(model.pipe), resolved

    request = request_for(influence_prompts=0)
    monkeypatch.setattr(workflow, "lead", prepared)
    with pytest.raises(ValueError, match="`model` must have one transformer to be profiled, but a WanPipeline has 2"):
        profile_attention(request)
    assert not request.output.exists()


@pytest.mark.parametrize("budget", [Budget(target_speedup=1.001), Budget(max_error=0.05)])
def test_speed_and_error_as_budgets_with_costs_timed(request_for, budget):
    report = profile_attention(request_for(budget=budget, costs="time", influence_prompts=0, groups=2))
    costs = report.search.costs
    assert costs.measured and costs.candidates[1] == 0 and (costs.candidates[2:] > 0).all() and costs.step_share > 0
    if budget.objective.name == "max_error":
        assert report.choice.error <= 0.05
    else:
        assert costs.speedup(report.choice.cost) >= 1.001 - 1e-9
    assert report.config.patterns.assignment.shape == (2, 2, 2)


def test_what_cannot_be_met_is_said_before_anything_is_measured(request_for):
    request = request_for(budget=Budget(target_speedup=50.0))
    with pytest.raises(ValueError, match=r"`target_speedup` must be at most 1\.\d+ here"):
        profile_attention(request)
    assert not list(request.output.rglob("prompt-*"))
    with pytest.raises(ValueError, match="`method` must be budgeted in several processes"):
        request_for(method="published", share=(1, 2))


def test_the_published_threshold_is_tried_against_dense_videos(request_for):
    report = profile_attention(
        request_for(method="published", budget=None, rule=GreedyRule(threshold=0.0), verify_prompts=1)
    )
    assert report.choice.density == pytest.approx(1) and report.verified[0].psnr > 60


def test_parts_without_an_error_of_their_own_count_like_the_others():
    expected = np.array([[1.0, 2.0], [0.0, 0.0], [4.0, 4.0]])
    places = np.zeros((3, 3, 2), dtype=bool)
    for step, place in enumerate(places):
        place[step] = True
    found = _ratios(np.array([0.3, 1e-8, 0.2]), expected, places)
    assert found == pytest.approx([0.1, np.sqrt(0.1 * 0.025), 0.025])
    assert (_ratios(np.full(3, 1e-8), np.zeros((3, 2)), places) == 1).all()


def test_what_cannot_be_written_is_found_before_the_model_is_loaded(request_for, monkeypatch, tmp_path):
    monkeypatch.setattr(workflow, "lead", lambda *args: pytest.fail("the model was loaded first"))
    (tmp_path / "file").touch()
    for folder, message in (("file", "Not a directory"), ("x" * 300, "File name too long")):
        with pytest.raises(OutputError, match=message):
            profile_attention(request_for(folder))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match="has 1 kB free on its disk, but the recording needs about"):
        profile_attention(request_for())


@pytest.mark.slow
def test_the_room_that_is_asked_for_is_needed(request_for, monkeypatch):
    asked, real, request = [], recording.save_file, request_for(influence_prompts=0)
    monkeypatch.setattr(workflow, "check_writable", lambda *paths, needed, purpose: asked.append(needed))
    most = []

    def save(tensors, path):
        real(tensors, path)
        most.append(sum(file.stat().st_size for file in (request.output / "recordings").rglob("*") if file.is_file()))

    monkeypatch.setattr(recording, "save_file", save)
    profile_attention(request)
    assert 0 < asked[0] <= max(most)


@pytest.mark.slow
def test_a_disk_that_was_full_and_a_broken_pass_change_nothing(request_for, small_disk, caplog, monkeypatch):
    whole = profile_attention(request_for("whole"))
    disk, lines = small_disk(8192), []

    def fill(line):
        lines.append(line)
        if "step 3/4" in line:
            (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))

    request = replace(request_for(), output=disk / "profile")
    with pytest.raises(OutputError, match=r"^No space left: the disk of .*pass-0000\d\.safetensors is full\.$"):
        profile_attention(request, fill)
    assert not list(disk.rglob(".*.tmp"))
    (disk / "other").unlink()
    broken = disk / "profile" / "recordings" / "prompt-000" / "pass-00001.safetensors"
    broken.write_bytes(broken.read_bytes()[:5000])
    resumed = profile_attention(request)
    assert f"{broken} cannot be read, and is made again" in caplog.text
    assert_same(whole.profile, resumed.profile)
    assert whole.config == resumed.config
