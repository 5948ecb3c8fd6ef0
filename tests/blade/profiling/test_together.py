"""Profiles of a small pipeline whose videos several processes make together, compared with those of one."""

from pathlib import Path

import numpy as np
import pytest
from profile_together import OPTIONS, request_of
from ranks import run_ranks

from blade.attention.config import BladeConfig
from blade.profiling import recording
from blade.profiling.profile import PROFILE_NAME, AttentionProfile
from blade.profiling.workflow import profile_attention

SCRIPT = Path(__file__).parent / "profile_together.py"
FIELDS = ("error", "energy", "head_error", "mass", "best_mass", "columns", "maps")
RANKS = 3  # of two heads, so that one has none
STOPPED_AFTER = 3


def stop(request, monkeypatch):
    """Run a request in this process until a few passes of its recording are saved."""
    saved, kept = [], recording.save_file

    def stop_later(tensors, path):
        if len(saved) == STOPPED_AFTER:
            raise KeyboardInterrupt
        saved.append(path)
        kept(tensors, path)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recording, "save_file", stop_later)
        profile_attention(request)


@pytest.mark.slow
def test_processes_that_share_videos_find_what_one_finds(saved_tiny_pipeline, tmp_path, monkeypatch):
    stop(request_of("resumed", saved_tiny_pipeline, tmp_path), monkeypatch)
    run_ranks(SCRIPT, RANKS, tmp_path, saved_tiny_pipeline, tmp_path, *OPTIONS)
    for name in ("budgeted", "published"):
        report, folder = profile_attention(request_of(name, saved_tiny_pipeline, tmp_path / "alone")), tmp_path / name
        assert len(np.unique(report.choice.candidates)) > 1 and BladeConfig.from_pretrained(folder) == report.config
        assert_same(report.profile, folder)
        if name == "budgeted":
            assert BladeConfig.from_pretrained(folder / "asa") == report.adaptive.config
            assert_same(report.profile, tmp_path / "resumed")


def assert_same(expected, folder):
    """Compare what one process measured with the file of several."""
    profile = AttentionProfile.load(folder / PROFILE_NAME)
    assert profile.source == expected.source
    for name in FIELDS:
        np.testing.assert_allclose(getattr(profile, name), getattr(expected, name), rtol=1e-4, atol=1e-6, err_msg=name)
    assert not list(folder.rglob("pass-*")) and not list(folder.rglob("*.tmp"))
