from __future__ import annotations

import json

import pytest

from blade.cli.evaluate import main
from blade.evaluation import worker

PROTOCOL = ["--protocol", "wan1.3b-480p"]


def run(arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def small(model, folder):
    return [
        "--model", model, "--output", folder, "--height", 64, "--width", 64, "--frames", 9, "--steps", 2,
        "--guidance", 1, "--device", "cpu",
    ]  # fmt: skip


def test_captions_of_moving_shapes(saved_tiny_pipeline, tmp_path, capsys):
    arguments = ["--shapes", "--single", 1, "--two", 0, "--run", "dense", *small(saved_tiny_pipeline, tmp_path)]
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert "1/1 dense, seed 0" in shown and "Single-object prompts" in shown
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["missing"] == 0 and report["runs"][0]["groups"]["single"]["basics"]["videos"] == 1


def test_a_file_of_prompts(saved_tiny_pipeline, patterns_folder, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("# two prompts\na cat\n\na dog\n")
    runs = ["--run", "dense", "--run", f"found={patterns_folder}", "--run", "other=preset,dense_steps=1"]
    folder = tmp_path / "out"
    arguments = ["--prompts", file, "--seeds", "0,4", *runs, *small(saved_tiny_pipeline, folder)]
    assert run([*arguments, "--shard", "1/2"]) == 0
    assert "6 videos of other shards are still missing" in capsys.readouterr().out
    assert run([*arguments, "--shard", "2/2"]) == 0
    assert "seed 4, a dog: PSNR" in capsys.readouterr().out
    assert {path.name for path in (folder / "compare").iterdir()} == {
        f"a-{animal}-{seed}.mp4" for animal in ("cat", "dog") for seed in (0, 4)
    }
    assert len(list((folder / "vbench" / "found").iterdir())) == 4
    assert "compare/a-dog-4.mp4" in (folder / "report.html").read_text()
    report = json.loads((folder / "report.json").read_text())
    assert (report["missing"], report["baseline"], report["prompts"]) == (0, "found", {"all": 4})
    dense, found, other = report["runs"]
    assert found["groups"]["all"]["psnr"]["videos"] == 4 and "basics" not in found["groups"]["all"]
    expected = other["groups"]["all"]["psnr"]["mean"] - found["groups"]["all"]["psnr"]["mean"]
    assert other["differences"]["all"]["psnr"]["mean"] == pytest.approx(expected)
    assert (dense["steps"], dense["guidance"]) == (2, 1)


def test_a_failed_run_leaves_a_report_of_the_others(saved_tiny_pipeline, tmp_path, monkeypatch, capsys):
    generate = worker.run_request

    def sometimes(model, request):
        if request.blade_config is not None:
            raise MemoryError("too little <memory>")
        return generate(model, request)

    monkeypatch.setattr(worker, "run_request", sometimes)
    file, folder = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("a cat\na dog\n")
    runs = ["--run", "dense", "--run", "asa=asa,dense_steps=0,sparsity=0.5"]
    arguments = ["--prompts", file, *runs, *small(saved_tiny_pipeline, folder)]
    assert run(arguments) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == "error: too little <memory>"
    report = json.loads((folder / "report.json").read_text())
    assert (report["missing"], report["failed"]) == (2, {"asa": "too little <memory>"})
    dense, sparse = report["runs"]
    assert dense["groups"]["all"]["motion"]["videos"] == 2 and sparse["groups"] == {}
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        assert "2 videos are still missing" in text and "Run asa failed: too little" in text
        assert "<memory>" not in text
    monkeypatch.setattr(worker, "run_request", lambda *given: pytest.fail("made again"))
    assert run(["--prompts", file, "--run", "dense", *small(saved_tiny_pipeline, folder)]) == 0


def test_steps_that_a_student_lacks_are_found_before_the_first_video(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worker, "load_model", lambda *given, **options: pytest.fail("loaded"))
    runs = ["--run", "dense", "--run", "few=student=shapes-8-steps"]
    assert run(["--shapes", *runs, "--steps", 10, "--output", tmp_path / "out", "--device", "cpu"]) == 2
    assert "run `few`: `steps` must be 8, as the student shapes-8-steps is trained, got 10" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_selector_of_a_temporary_module(later_selector, saved_tiny_pipeline, tmp_path, capsys):
    file, folder = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("a cat\n")
    runs = ["--run", "dense", "--run", "x=selector=later,dense_steps=1,sparsity=0.5"]
    runs += ["--run", "y=asa-gt,selector=later"]
    assert run(["--prompts", file, *runs, *small(saved_tiny_pipeline, folder)]) == 0
    assert "x, seed 0, a cat: PSNR" in capsys.readouterr().out
    _, alone, pooled = json.loads((folder / "report.json").read_text())["runs"]
    assert (alone["attention"], pooled["attention"]) == ("later", "asa-gt, later")
    assert alone["blade_config"]["asa"]["selector"] == pooled["blade_config"]["asa"]["selector"] == "later"
    layer, whole = (alone["groups"]["all"][name]["mean"] for name in ("layer_density", "run_density"))
    assert layer == 0.5 and whole == pytest.approx(1 - layer / 4)  # in one of two layers, at one of two steps
    words = "Key blocks are scored: later by how late a block stands, from a place that each head draws (a control"
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        assert words in text and "asa-gt, later" in text
    assert "| x | 2 | 1.0 | later |" in (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`prompts` or `shapes`"),
        (["--shapes", "--prompts", "file"], "`prompts` or `shapes`"),
        (["--shapes", "--seeds", "1"], "`seeds` must not be given without `prompts`"),
        (["--prompts", "file", "--single", "1"], "`single` must not be given without `shapes`"),
        (["--prompts", "nothing-here"], "`prompts` must be a text file"),
        (["--shapes", "--shard", "two"], "`shard`"),
        (["--shapes", "--run", "x=steps=0"], "`steps`"),
        (["--shapes", "--run", "x=speed=1"], "with keys steps"),
        (["--shapes", "--run", "dense", "--run", "dense"], "different names"),
        (["--shapes", "--run", "x=no-folder"], "no-folder"),
        (["--shapes", "--baseline", "x"], "`baseline` must be one of the runs dense, preset"),
        (["--shapes", "--single", "0", "--two", "0"], "not both 0"),
        (["--shapes", "--model", "no/such/model"], "no/such/model"),
        (["--protocol", "wan1.3b"], "\"wan14b-720p\", got 'wan1.3b'"),
        ([*PROTOCOL, "--shapes"], "`shapes` must not be given with `protocol`"),
        (PROTOCOL, "curl -LO https://raw.githubusercontent.com/Vchitect/VBench/"),
        ([*PROTOCOL, "--prompts", "none.txt"], "`prompts` must be a text file"),
        ([*PROTOCOL, "--run", "x=preset,steps=8"], "`run` must not name `steps` with `protocol`"),
        ([*PROTOCOL, "--run", "x=student=dir"], "`run` must not name `student` with `protocol`"),
        ([*PROTOCOL, "--find-sparsity", "--psnr", "30"], "`protocol` must not be given with `find_sparsity`"),
    ],
)
def test_bad_input_ends_with_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "seeds", "message"),
    [
        (b"# none\n\n", "0", "`prompts`"),
        (b"\xff\xfe a cat", "0", "`prompts`"),
        (b"a cat\n", "3-1", "`seeds`"),
    ],
)
def test_prompts_that_cannot_be_are_refused(content, seeds, message, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert run(["--prompts", file, "--seeds", seeds, "--output", tmp_path / "out"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
