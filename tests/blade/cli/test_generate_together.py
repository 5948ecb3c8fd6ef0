"""`blade-generate` in several processes that make each video together."""

import json
import os
import subprocess
import sys

import pytest
import torch

from blade.cli.generate import main
from blade.media.video import read_mp4
from blade.models.parallel import Team

SIZE = ("--height=64", "--width=96", "--frames=9", "--steps=3", "--guidance-scale=2")
SPARSE = ("--sparsity=0.5", "--dense-steps=1", "--dense-layers=0")


def launch(folder, *arguments, processes=2):
    """Run the command in several processes; return its exit code and what it printed."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    run = subprocess.run(
        [sys.executable, *launcher, "-m", "blade.cli.generate", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    return run.returncode, run.stdout


def alone(*arguments):
    """Run the command in this process."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments)])
    assert end.value.code in (0, None)


@pytest.mark.slow
def test_two_processes_make_one_video_and_write_it_once(saved_tiny_pipeline, tmp_path):
    shared = ("a red ball", "--model", saved_tiny_pipeline, *SIZE, *SPARSE)
    code, printed = launch(tmp_path, *shared, "--output=two.mp4", "--compare")
    assert code == 0, printed
    assert printed.count("video       two.mp4") == 1 and printed.count("comparison  ") == 1
    alone(*shared, "--output", tmp_path / "one.mp4", "--compare")
    assert sorted(path.name for path in tmp_path.glob("two*")) == ["two-compare.mp4", "two.json", "two.mp4"]
    records = [json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in ("one", "two")]
    assert [record["processes"] for record in records] == [1, 2]
    for field in ("layer_density", "run_density", "psnr"):
        assert records[0][field] == pytest.approx(records[1][field], rel=1e-4), field
    videos = [read_mp4(tmp_path / f"{name}.mp4") for name in ("one", "two")]
    assert float((videos[0] - videos[1]).abs().max()) <= 2 / 255


@pytest.mark.slow
def test_a_list_is_made_together_and_what_is_there_stays(saved_tiny_pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red ball\na blue cube\n", encoding="utf-8")
    shared = ("--prompts=prompts.txt", "--output=out", "--model", saved_tiny_pipeline, *SIZE, "--attention=dense")
    code, printed = launch(tmp_path, *shared, "--parallel=2")
    assert code == 0, printed
    assert "2 made, 0 there before, 0 failed" in printed and printed.count("made, ") == 1
    code, printed = launch(tmp_path, *shared, "--parallel=2", "--seeds=0,1")
    assert code == 0, printed
    assert "2 made, 2 there before, 0 failed" in printed
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 4


def test_the_number_of_processes_must_be_that_of_the_launched(monkeypatch, capsys, saved_tiny_pipeline):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit) as end:
        main(["a red ball", "--model", str(saved_tiny_pipeline), "--parallel=2"])
    assert end.value.code == 2
    assert "`parallel` must be the number of processes that were launched, 1, got 2" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["a red ball", "--parallel=0"])
    assert "`parallel` must be" in capsys.readouterr().err


def test_a_numbered_device_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="`device` must have no number where every process takes a GPU of its own"):
        Team(2, torch.device("cuda:1"))
