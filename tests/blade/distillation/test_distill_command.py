"""`blade-distill` from the command line: what it says of bad input, and what it leaves."""

import json

import pytest

from blade.cli.distill import main


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_a_student_from_the_command_line(settings, capsys, tmp_path):
    code, out, err = run(capsys, "shapes", *settings("out", "trackers=[]"))
    assert code == 0, err
    assert f"student     {tmp_path / 'out'}" in out and "left out: student 0, fake 0" in out
    assert "distillation 3/3" in out and "min left" in out
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_a_dry_run_tells_time_and_memory(settings, capsys, tmp_path):
    code, out, err = run(capsys, "shapes", *settings("out"), "--dry-run")
    assert code == 0, err
    assert "hours" in out and "GiB at most" in out and not (tmp_path / "out").exists()


def test_a_dry_run_without_weights(settings, capsys, saved_tiny_pipeline, tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(saved_tiny_pipeline, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    report = tmp_path / "report" / "estimate.json"
    options = ("--dry-run", "--random-weights", f"--report={report}")
    code, out, err = run(capsys, "shapes", *settings("out", f"model={bare}"), *options)
    assert code == 0, err
    values = json.loads(report.read_text())
    assert values["seconds_update"] > 0 and values["config"]["weights"]["rank"] == 4 and "torch" in values["versions"]
    assert "hours" in out and "weights     random" in out
    code, _, err = run(capsys, "shapes", *settings("out"), "--random-weights")
    assert code == 2 and "`random_weights` requires `dry_run`" in err


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (("run.updatse=3",), "`run.updatse` is not right"),
        (("model=nobody",), "`model` nobody is no folder here"),
        (("video.height=65",), "`height` must be a multiple of 16 for this model, got 65"),
        (("trajectory.steps=[0]",), "`trajectory.steps` must be an integer of at least 1, got 0"),
        (("attention.dense_layers=7",), "`dense_layers` must be from 0 to 1"),
        (("weights.targets=[nothing]",), "`targets` must be ends of layers' names"),
        (("run.device=cuda:9",), "`device`"),
        (("trackers=[nonsense]",), "`trackers` must be installed ones"),
    ],
)
def test_bad_input_is_named(settings, capsys, tmp_path, others, message):
    code, _, err = run(capsys, "shapes", *settings("out", *others))
    assert code == 2 and message in err, err
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_prompts_that_are_missing_or_empty(settings, capsys, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n# nothing\n\n")
    code, _, err = run(capsys, "shapes", *settings("out", f"prompts={empty}"))
    assert code == 2 and f"`prompts` must be a text file with one prompt a line, but {empty} has none" in err
    code, _, err = run(capsys, "shapes", *settings("out", "prompts=null"))
    assert code == 2 and "`prompts` must be a file with prompts for" in err


def test_prompts_as_json_lines(settings, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a red ball moving left", "id": 1}\n\n{"prompt": "a blue square moving up"}\n')
    code, _, err = run(capsys, "shapes", *settings("out", f"prompts={path}", "run.updates=1"))
    assert code == 0, err
    path.write_text('{"text": "a red ball moving left"}\n')
    code, _, err = run(capsys, "shapes", *settings("out2", f"prompts={path}"))
    assert code == 2 and "must have an object with a `prompt` in each line" in err


def test_a_base_that_is_distilled_draws_a_warning(settings, capsys, saved_tiny_pipeline, tmp_path):
    import shutil

    other = shutil.copytree(saved_tiny_pipeline, tmp_path / "tiny-lightning")
    code, _, err = run(capsys, "shapes", *settings("out", f"model={other}", "run.updates=1"))
    assert code == 0 and "seems to be distilled for few steps already" in err


@pytest.mark.parametrize("field", ["model", "weights.start_from"])
def test_a_student_does_not_replace_what_it_is_made_from(settings, capsys, tmp_path, field):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "out").symlink_to(source)
    code, _, err = run(capsys, "shapes", *settings("out", f"{field}={source}"))
    assert code == 2 and f"`output` must not replace an input, got {tmp_path / 'out'}, which is `{field}`" in err
    assert not list(source.iterdir())


def test_a_report_does_not_replace_the_prompts(settings, capsys, prompt_file):
    before = prompt_file.read_text()
    code, _, err = run(capsys, "shapes", *settings("out"), "--dry-run", f"--report={prompt_file}")
    assert code == 2 and "`report` must not replace an input, got" in err and prompt_file.read_text() == before


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_which_then_resumes(settings, start, tmp_path):
    """One of two processes is killed: the other one does not wait for ever, and its checkpoints are whole."""
    import os
    import signal
    import time

    from blade.common.training_log import load_checkpoint

    def begin(updates):
        options = settings("out", f"run.updates={updates}", "run.checkpoint_every=2")
        return start("-m", "blade.cli.distill", "shapes", *options, processes=2)

    process = begin(400)
    checkpoints = tmp_path / "out" / "checkpoints"
    while not list(checkpoints.glob("*.pt")) and process.poll() is None:
        time.sleep(0.05)
    children = os.popen(f"pgrep -P {process.pid}").read().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "Signal 9" in output
    reached = max(load_checkpoint(path)["trainer"]["update"] for path in checkpoints.glob("*.pt"))
    assert reached >= 2

    process = begin(reached + 2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert not list((tmp_path / "out").rglob("*.tmp"))  # a kill may leave them; the next start removes them
    assert max(load_checkpoint(path)["trainer"]["update"] for path in checkpoints.glob("*.pt")) == reached + 2


@pytest.mark.slow
def test_several_processes_are_refused_a_folder_in_use(settings, start, hold, tmp_path):
    """The first process says so, and the others, which wait for it, end too."""
    other = hold(tmp_path / "out")
    process = start("-m", "blade.cli.distill", "shapes", *settings("out"), processes=2)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count(f"error: `output` {tmp_path / 'out'} is in use by process {other.pid} on ") == 1
    assert not (tmp_path / "out" / "embeddings").exists()
