"""Recordings by workers are those of one process; the workers are in this process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_ray import Lost, fake_connected

from blade.common.leftovers import files_in
from blade.fleet import profiling as fleet_profiling
from blade.fleet.options import FleetOptions
from blade.fleet.profiling import profile_many
from blade.profiling import record_prompts, workflow
from blade.profiling.objectives import Budget
from blade.profiling.request import ProfileRequest
from blade.profiling.workflow import profile_attention

PROMPTS = ("a red ball moving right", "a blue square moving up", "a green ball moving left")
OPTIONS = FleetOptions(workers=2)


@pytest.fixture(autouse=True)
def workers_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_profiling, "connected", fake_connected)


@pytest.fixture
def request_(saved_tiny_pipeline: Path, tmp_path: Path) -> ProfileRequest:
    """A small profile of the tiny pipeline."""
    size = {"steps": 2, "guidance_scale": 1.0, "height": 64, "width": 64, "frames": 9, "device": "cpu"}
    return ProfileRequest.of(
        {"model": str(saved_tiny_pipeline), **size}, prompts=PROMPTS, output=tmp_path / "workers",
        budget=Budget(target_density=0.6), influence_prompts=0, verify_prompts=0,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files_in(folder)}


def test_the_files_are_those_of_one_process(request_: ProfileRequest, tmp_path: Path, monkeypatch) -> None:
    """Also where a worker is lost, and what it had recorded with it."""
    make, lost, progress = record_prompts.write_files, [], list[Any]()

    def lose_once(files: Any) -> None:
        if any(path.name == "video-001.npz" for path in files) and not lost:
            lost.append(True)
            raise Lost
        make(files)

    monkeypatch.setattr(record_prompts, "write_files", lose_once)
    report = profile_many(request_, options=OPTIONS, on_recording=progress.append)
    assert lost and (progress[-1].done, progress[-1].failed) == (3, 0)
    one = profile_attention(replace(request_, output=tmp_path / "alone"))
    assert one is not None and str(report.choice) == str(one.choice)
    assert contents(request_.output) == contents(tmp_path / "alone")
    monkeypatch.setattr(fleet_profiling, "_record", lambda *_: pytest.fail("recorded again"))
    assert str(profile_many(request_, options=OPTIONS).choice) == str(one.choice)


def test_a_prompt_that_fails_keeps_the_other_recordings(request_: ProfileRequest, monkeypatch) -> None:
    make = record_prompts.make_recorded

    def fail(model: Any, request: Any, *options: Any) -> Any:
        if request.prompt == PROMPTS[1]:
            raise ValueError("not finite")
        return make(model, request, *options)

    monkeypatch.setattr(record_prompts, "make_recorded", fail)
    with pytest.raises(ValueError, match="not finite"):
        profile_many(request_, options=OPTIONS)
    names = {path.name for path in (request_.output / "recordings").iterdir()}
    assert names == {"source.json", *(f"{kind}-{n:03d}.{end}" for n in (0, 2)
                                      for kind, end in (("prompt", "safetensors"), ("video", "npz")))}  # fmt: skip


def test_recordings_of_other_settings_are_refused(request_: ProfileRequest, monkeypatch) -> None:
    monkeypatch.setattr(fleet_profiling, "profile_attention", lambda request, on_progress: "a report")
    profile_many(replace(request_, prompts=PROMPTS[:2]), options=OPTIONS)
    with pytest.raises(ValueError, match="`output` holds recordings with another `prompts`"):
        profile_many(request_, options=OPTIONS)


def test_the_published_method_is_not_shared(request_: ProfileRequest) -> None:
    published = replace(request_, method="published")
    with pytest.raises(ValueError, match="`method` must be budgeted with `workers`, got published"):
        profile_many(published, options=OPTIONS)
    assert workflow.RECORDINGS_NAME == "recordings"
