"""`blade-generate` and `blade-bench generate` in several processes that make each video together."""

import json
import os
import subprocess
import sys

import pytest
import torch

from blade.cli.generate import main
from blade.media.video import read_mp4
from blade.models.devices import resolve_device
from blade.models.parallel import Team

SIZE = ("--height=64", "--width=96", "--frames=9", "--steps=3", "--guidance-scale=2")
SPARSE = ("--sparsity=0.5", "--dense-steps=1", "--dense-layers=0")


def launch(folder, *arguments, command="generate", processes=2):
    """Run a command in several processes; return its exit code and what it printed."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    run = subprocess.run(
        [sys.executable, *launcher, "-m", f"blade.cli.{command}", *map(str, arguments)],
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


@pytest.mark.slow
def test_a_benchmark_times_passes_of_two_processes(saved_tiny_pipeline, tmp_path):
    small = ("--height=64", "--width=64", "--frames=9", "--steps=2", "--student-steps=1", "--repeats=1")
    sizes = (*small, "--measured-passes=1", "--sparsity=0.5")
    code, printed = launch(
        tmp_path, "generate", "--model", saved_tiny_pipeline, *sizes, "--output=out", command="bench"
    )
    assert code == 0, printed
    assert printed.count("out/generation.json") == 1
    report = json.loads((tmp_path / "out" / "generation.json").read_text(encoding="utf-8"))
    assert report["processes"] == 2 and report["parts_ms"]["communication"] > 0
    assert "2 processes compute every pass together" in (tmp_path / "out" / "generation.md").read_text(
        encoding="utf-8"
    )


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="`device` must be cuda where every process takes its own, got cuda:1"):
        Team(2, "cuda:1")


def test_processes_of_a_machine_take_a_gpu_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert resolve_device() == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device() == torch.device("cuda:3") and resolve_device("cuda") == torch.device("cuda")
