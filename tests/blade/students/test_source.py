"""Where a student's files are."""

import shutil
from pathlib import Path

import pytest

from blade.generation.fingerprint import model_fingerprint
from blade.students.source import (
    SCHEDULER_NAME,
    WEIGHT_NAME,
    StudentFiles,
    bundled_student_path,
    check_scheduler_values,
)


def test_a_file_of_weights_is_a_student_without_its_neighbours(tmp_path: Path) -> None:
    shutil.copytree(bundled_student_path("shapes-4-steps"), tmp_path / "folder")
    file = tmp_path / "folder" / "mine.safetensors"
    (tmp_path / "folder" / WEIGHT_NAME).rename(file)
    files = StudentFiles(str(file))
    assert files.find_subfolder(None, WEIGHT_NAME, None) is None
    assert files.fetch(None, WEIGHT_NAME) == file
    assert files.read_scheduler(None) is None and files.read_config(None) is None
    assert model_fingerprint(str(file)) not in (None, model_fingerprint(str(tmp_path / "folder")))


def test_the_file_of_a_students_folder_is_the_student(tmp_path: Path) -> None:
    shutil.copytree(bundled_student_path("shapes-4-steps"), tmp_path / "folder")
    files = StudentFiles(str(tmp_path / "folder" / WEIGHT_NAME))
    assert files.read_scheduler(None).step_counts == (4,) and files.read_config(None) is not None


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "student.gguf").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"^`source` must be a folder, a Hub id or a \.safetensors file, got the file"
    ):
        StudentFiles(str(tmp_path / "student.gguf"))


@pytest.mark.parametrize("name", ["student.pt", "TurboDiffusion/TurboWan2.1-T2V-1.3B-480P/student.pth"])
def test_a_pickle_is_refused_with_what_to_do(tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student.pt").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"`source` must be a \.safetensors file, got .*, a pickle, .*weights_only=True.*save_file"
    ):
        StudentFiles(name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_train_timesteps": 10**10}, "`num_train_timesteps` must be an integer of at most 100,000"),
        ({"beta_end": float("inf")}, "`beta_end` must be a finite number, got inf"),
        ({"trained_betas": [0.1] * 100_001}, "`trained_betas` must be a list of at most 100,000, got"),
    ],
)
def test_a_sampler_that_would_fill_the_memory_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{SCHEDULER_NAME}: {message}"):
        check_scheduler_values(values, SCHEDULER_NAME)
    check_scheduler_values({"num_train_timesteps": 1000, "shift": 3.0, "trained_betas": None, "x": True}, "")
