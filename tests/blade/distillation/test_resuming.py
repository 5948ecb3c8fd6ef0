"""A training resumes equally after a full disk and after broken checkpoints."""

import json
import logging
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blade.common.files import OutputError
from blade.common.leftovers import is_temporary
from blade.common.training_log import TrainingLog, load_checkpoint, save_checkpoint
from blade.distillation.output_files import checkpoint_bytes, student_weights
from blade.distillation.recipes import load_config
from blade.distillation.resuming import (
    CONTENT,
    checkpoint_path,
    checkpoint_paths,
    newest_checkpoint,
    remove_checkpoints,
)
from blade.distillation.workflow import distill
from blade.models.loading import load_empty_model

CONTENTS = {name: 0 for name in CONTENT}


def trained(settings, **options):
    return distill(load_config("shapes", settings), **options)


def log(folder):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def assert_equal(one, two):
    for name, weight in load_file(one / "pytorch_lora_weights.safetensors").items():
        assert torch.equal(weight, load_file(two / "pytorch_lora_weights.safetensors")[name]), name
    assert log(one) == log(two)
    assert not [path for path in two.rglob("*") if is_temporary(path.relative_to(two))]


def make_checkpoints(output, *updates):
    for update in updates:
        save_checkpoint(checkpoint_path(output, update), {**CONTENTS, "update": update})


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BREAKING = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "other bytes": lambda path: path.write_bytes(bytes(range(256)) * 9),
    "text": lambda path: path.write_text("not a checkpoint"),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
    "something else": lambda path: torch.save([1, 2], path),
    "a key less": lambda path: torch.save({"trainer": 0}, path),
}


@pytest.mark.parametrize("name", BREAKING)
def test_a_broken_checkpoint_is_passed_over_for_the_one_before(tmp_path, caplog, name):
    make_checkpoints(tmp_path, 1, 2, 3)
    broken = checkpoint_path(tmp_path, 3)
    BREAKING[name](broken)
    with caplog.at_level(logging.WARNING, "blade"):
        path, content = newest_checkpoint(tmp_path)
    assert path == checkpoint_path(tmp_path, 2) and content["update"] == 2
    (warning,) = caplog.messages
    assert str(broken) in warning and "is passed over for the one before" in warning and "\n" not in warning


def test_where_none_can_be_read_nothing_is_begun_anew(tmp_path, caplog):
    assert newest_checkpoint(tmp_path) is None
    make_checkpoints(tmp_path, 1, 2)
    for update in (1, 2):
        truncate(checkpoint_path(tmp_path, update))
    with pytest.raises(ValueError, match=r"update-000001\.pt cannot be read: .*delete .*checkpoints to begin anew"):
        newest_checkpoint(tmp_path)


def test_the_newest_is_the_one_with_the_most_updates(tmp_path):
    make_checkpoints(tmp_path, 999_999, 1_000_000)
    assert newest_checkpoint(tmp_path)[1]["update"] == 1_000_000


def test_checkpoints_that_were_passed_over_do_not_push_out_new_ones(tmp_path):
    make_checkpoints(tmp_path, 2, 4, 6)
    checkpoint_path(tmp_path, 8).mkdir()
    remove_checkpoints(tmp_path, 6, 2)
    assert checkpoint_paths(tmp_path) == [checkpoint_path(tmp_path, update) for update in (4, 6)]


def test_a_checkpoint_that_cannot_be_read_is_named(tmp_path):
    assert load_checkpoint(tmp_path / "none.pt") is None
    save_checkpoint(tmp_path / "new" / "a.pt", {"step": 1})
    assert load_checkpoint(tmp_path / "new" / "a.pt") == {"step": 1}
    truncate(tmp_path / "new" / "a.pt")
    with pytest.raises(ValueError, match=r"the checkpoint .*a\.pt cannot be read: "):
        load_checkpoint(tmp_path / "new" / "a.pt")


def test_a_log_with_half_a_line_is_continued(tmp_path, caplog):
    path = tmp_path / "log.jsonl"
    path.write_text('{"stage": "a", "step": 1}\n{"stage": "a", "step": 2}\n{"stage": "a", "st')
    written = TrainingLog(path, stage="a", start=1, total=3, show=lambda text: None)
    written.write(2, loss=0.5)
    assert [line["step"] for line in log(tmp_path)] == [1, 2]
    assert "last line" in caplog.text and str(path) in caplog.text


def test_a_training_with_a_broken_last_checkpoint_resumes_equally(settings, tmp_path, caplog):
    trained(settings("whole", "run.updates=4"))
    trained(settings("broken", "run.updates=3"))
    truncate(checkpoint_path(tmp_path / "broken", 3))
    with (tmp_path / "broken" / "log.jsonl").open("a") as file:
        file.write('{"stage": "distillation", "ste')
    trained(settings("broken", "run.updates=4"))
    assert "update-000003.pt" in caplog.text and "is passed over" in caplog.text
    assert_equal(tmp_path / "whole", tmp_path / "broken")
    assert newest_checkpoint(tmp_path / "broken")[0] == checkpoint_path(tmp_path / "broken", 4)


@pytest.mark.slow
@pytest.mark.parametrize("left", [0, 8, 40, 64, 100])
def test_a_training_that_filled_the_disk_resumes_equally(settings, tmp_path, small_disk, left):
    """Wherever it is full: in the log, in the checkpoint, or in the student."""
    others = ("run.updates=4", "run.checkpoint_every=2", "validation.every=2", "validation.count=1")
    trained(settings("whole", *others))
    disk = small_disk(4096)
    filled = []

    def fill(line):
        filled.append(line)
        if len(filled) == 3:
            (disk / "other").write_bytes(b"")
            subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'other'}", "bs=4k"], capture_output=True, check=False)
            size = (disk / "other").stat().st_size
            with (disk / "other").open("rb+") as file:
                file.truncate(size - 1024 * left)

    output = disk / "out"
    with pytest.raises(OutputError, match=rf"^No space left: the disk of {output}.* is full\.$"):
        trained(settings("out", *others, f"output={output}"), on_update=fill)
    assert newest_checkpoint(output)[1]["trainer"]["update"] in (2, 4)
    assert not [path for path in output.rglob("*") if is_temporary(path.relative_to(output))]
    json.loads((output / "log.jsonl").read_text().splitlines()[-1])
    (disk / "other").unlink()
    trained(settings("out", *others, f"output={output}"))
    assert_equal(tmp_path / "whole", output)


def test_too_little_room_for_a_training_is_found_before_the_model_is_loaded(settings, small_disk, monkeypatch):
    from blade.distillation import workflow

    monkeypatch.setattr(workflow, "load_model", lambda *args, **options: pytest.fail("the model was loaded first"))
    disk = small_disk(64)
    with pytest.raises(OutputError, match=r"has .* kB free on its disk, but the training needs about .* kB"):
        trained(settings("out", f"output={disk / 'out'}"))
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("others", [(), ("weights.ema_decay=0.9",)])
def test_the_size_of_checkpoints_is_known_beforehand(settings, tmp_path, others):
    config = load_config("shapes", settings("out", "run.updates=1", "weights.rank=64", *others))
    expected = checkpoint_bytes(student_weights(load_empty_model(config.model), config.weights), config)
    distill(config)
    size = checkpoint_path(tmp_path / "out", 1).stat().st_size
    assert 0.8 * size < expected <= size


def test_broken_files_of_the_preparation_are_made_again(settings, tmp_path, caplog):
    others = ("generator.ode_updates=1", "generator.trajectories=2", "run.updates=1")
    trained(settings("whole", *others))
    files = [tmp_path / "whole" / name for name in ("trajectories/000001.safetensors", "embeddings/00000.safetensors")]
    before = [path.read_bytes() for path in files]
    for path in files:
        truncate(path)
    trained(settings("again", *others, *(f"{path.parent.name}={path.parent}" for path in files)))
    assert [path.read_bytes() for path in files] == before
    for path in files:
        assert f"{path} cannot be read, and is made again" in caplog.text
    assert_equal(tmp_path / "whole", tmp_path / "again")


@pytest.mark.parametrize("name", ["x" * 300, "file/out"])
def test_an_output_that_cannot_be_written_is_named(settings, tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"`output` .*log\.jsonl cannot be written: (File name|Not a directory)"):
        trained(settings(name))
