"""A list of prompts by workers: names, locks, failures; the workers are in this process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_ray import FakeConnection, Lost, fake_connected
from small_videos import SMALL

from blade.common.files import OutputError
from blade.common.locks import file_locked
from blade.fleet import generation
from blade.fleet.generation import generate_many
from blade.fleet.options import FleetOptions
from blade.generation import team
from blade.generation.outputs import FinishedVideo, ListReport, generate_list
from blade.generation.prepare import prepare_model
from blade.generation.request import GenerationRequest

PROMPTS = ("a red ball moving right", "a blue square moving up", "a green ball moving left")
REQUEST = GenerationRequest(prompt=PROMPTS[0], **SMALL)
OPTIONS = FleetOptions(workers=1)


@pytest.fixture(scope="module")
def loaded() -> Any:
    """The model with its student, and its request."""
    return prepare_model(REQUEST)


@pytest.fixture(autouse=True)
def workers_in_this_process(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    """Workers that have the model loaded."""
    monkeypatch.setattr(generation, "connected", fake_connected)
    for module in (generation, team):
        monkeypatch.setattr(module, "prepare_model", lambda request, team=None: loaded)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., ListReport]:
    """Return a function that makes a list of videos by workers into `tmp_path / "out"`."""

    def run(request: GenerationRequest = REQUEST, prompts: Any = PROMPTS, **options: Any) -> ListReport:
        return generate_many(request, prompts, tmp_path / "out", options=OPTIONS, **options)

    return run


def videos(folder: Path) -> dict[str, bytes]:
    """Return the MP4s of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.mp4"))}


def refusing(monkeypatch: pytest.MonkeyPatch, prompt: str, error: BaseException, times: int = 1000) -> None:
    """Let workers raise for a prompt, so many times."""
    left, real = [times], team.run_request

    def run(model: Any, request: Any, **options: Any) -> Any:
        if request.prompt == prompt and left[0]:
            left[0] -= 1
            raise error
        return real(model, request, **options)

    monkeypatch.setattr(team, "run_request", run)


def test_videos_names_and_comparisons_are_those_of_one_process(make, tmp_path: Path) -> None:
    listed = {"prompts": PROMPTS[:1], "compare": True, "seeds": (0, 1)}
    report = make(**listed)
    one = generate_list(REQUEST, folder=tmp_path / "alone", **listed)
    assert videos(tmp_path / "out") == videos(tmp_path / "alone") and len(videos(tmp_path / "out")) == 4
    assert [made.video_path.name for made in report.made] == [made.video_path.name for made in one.made]
    assert [made.record["psnr"] for made in report.made] == [made.record["psnr"] for made in one.made]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".mp4", ".json"}
    again = make(**listed)
    assert (len(again.made), len(again.skipped)) == (0, 2)


def test_what_is_there_is_not_made_again(make, tmp_path: Path) -> None:
    generate_list(REQUEST, PROMPTS[:2], tmp_path / "out")
    before = videos(tmp_path / "out")
    report = make()
    assert (len(report.made), len(report.skipped), report.failed) == (1, 2, {})
    assert {name: videos(tmp_path / "out")[name] for name in before} == before


def test_a_failing_prompt_is_named_and_the_others_are_made(make, monkeypatch) -> None:
    refusing(monkeypatch, PROMPTS[1], ValueError("the latents are not finite"))
    report = make(prompts=[*PROMPTS, "a cat"])
    assert len(report.made) == 2
    assert report.failed[PROMPTS[1]] == "the latents are not finite" and "cat" in report.failed["a cat"]


@pytest.mark.parametrize("times", [3, 4])
def test_a_prompt_whose_workers_are_lost(make, tmp_path: Path, monkeypatch, times: int) -> None:
    refusing(monkeypatch, PROMPTS[1], Lost(), times)
    report = make()
    assert len(report.made) == (3 if times == 3 else 2)
    assert list(report.failed) == ([] if times == 3 else [PROMPTS[1]])
    assert "was lost 4 times" in report.failed.get(PROMPTS[1], "was lost 4 times")
    assert not list((tmp_path / "out").glob(".blade-*"))  # no lock stays


def test_a_video_that_another_process_makes_comes_last(make, tmp_path: Path, monkeypatch) -> None:
    """It is waited for, and taken as it is there then."""
    alone = generate_list(REQUEST, PROMPTS[:1], tmp_path / "alone").made[0]
    plain, released = tmp_path / "out" / alone.video_path.name, []
    lock = file_locked(plain, note=generation_note())
    lock.__enter__()
    claim = generation.claim_path

    def claimed(*arguments: Any, wait: bool = False) -> Path:
        if wait and not released:  # the other process ends
            for source in (alone.video_path, alone.record_path):
                (tmp_path / "out" / Path(source).name).write_bytes(Path(source).read_bytes())
            lock.__exit__(None, None, None)
            released.append(True)
        return claim(*arguments, wait=wait)

    monkeypatch.setattr(generation, "claim_path", claimed)
    report = make()
    assert released and len(report.made) == 2 and report.skipped == (plain,)


def generation_note() -> str:
    """Return what a process that makes the first video says of it."""
    from blade.generation.naming import settings_hash
    from blade.generation.plan import resolve_without_weights

    return settings_hash(resolve_without_weights(REQUEST)[1])


def test_a_video_that_cannot_be_written_is_a_failed_one(make, monkeypatch) -> None:
    write = FinishedVideo.write

    def refuse(video: FinishedVideo, path: Path) -> Any:
        if "blue" in path.name:
            raise OutputError("No space left: the disk is full.")
        return write(video, path)

    monkeypatch.setattr(FinishedVideo, "write", refuse)
    report = make()
    assert report.failed == {PROMPTS[1]: "No space left: the disk is full."} and len(report.made) == 2


def test_a_machine_with_another_model_is_refused(make, monkeypatch) -> None:
    prepare = generation.prepare_model

    def other(request: GenerationRequest) -> Any:
        model, resolved = prepare(request)
        return model, replace(resolved, fps=12)

    monkeypatch.setattr(generation, "prepare_model", other)
    with pytest.raises(ValueError, match="`fps` is 12 on this machine, and 16 where the command runs"):
        make()


def test_a_model_that_a_worker_cannot_read_is_told(make, monkeypatch) -> None:
    def unreadable(request: GenerationRequest) -> Any:
        raise ValueError("`model` /models/x is no folder here")

    monkeypatch.setattr(generation, "prepare_model", unreadable)
    with pytest.raises(ValueError, match="`model` /models/x is no folder here"):
        make()


def test_a_dense_list_is_not_compared(make) -> None:
    with pytest.raises(ValueError, match="`compare` sets sparse attention beside dense"):
        make(replace(REQUEST, student=None, attention="dense"), compare=True)


def test_the_device_of_other_machines_decides_the_type(monkeypatch, tmp_path: Path) -> None:
    """Where the command runs there is no GPU: the request is resolved for those of the workers."""
    seen = []
    monkeypatch.setattr(generation, "_run", lambda connection, job, driver, on_progress: seen.append(job))
    crew = replace(FakeConnection(1).crew, gpus=1.0)

    class OnGpus(FakeConnection):
        def __init__(self) -> None:
            super().__init__(1)
            self.crew = crew

    monkeypatch.setattr(generation, "connected", lambda options, device: nullcontext(OnGpus()))
    generate_many(replace(REQUEST, device=None), PROMPTS, tmp_path / "out", options=OPTIONS)
    (job,) = seen
    assert (job.request.device, job.resolved.device, job.resolved.dtype) == ("cuda", "cuda", "bfloat16")
