"""Files of a student, in a folder or a repository of the Hub, and the settings in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from blade.attention.config import CONFIG_NAME, BladeConfig
from blade.common.leftovers import files_in, is_temporary
from blade.models.source import look_up
from blade.students.scheduler import FewStepScheduler

BUNDLED_STUDENTS = {4: "shapes-4-steps", 8: "shapes-8-steps"}
"""Names of the bundled model's students, which ship with this package, by their numbers of steps."""

DEFAULT_STUDENT_STEPS = 8
"""Steps of the bundled student that is taken by default: with 4, more videos show an object twice."""

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
"""Name of the LoRA's file where none is given, as Diffusers saves it."""

CONDITION_NAME = "step_condition.safetensors"
"""File of the vectors that tell a student for several numbers of steps how many there are."""

TRANSFORMER_FOLDER = "transformer"
"""Folder of the weights of a student that is a whole transformer."""

SCHEDULER_FOLDER = "scheduler"
"""Folder of a student's `scheduler_config.json`, beside its LoRA."""

STUDENT_FILES = (
    WEIGHT_NAME,
    CONDITION_NAME,
    CONFIG_NAME,
    "README.md",
    "distillation.yaml",
    f"{SCHEDULER_FOLDER}/*",
    f"{TRANSFORMER_FOLDER}/*",
)
"""Files of a student's folder that belong to the student, and not to its training."""


def student_files(folder: Path) -> list[Path]:
    """Return the files of a student's folder that belong to the student, sorted."""
    found = (path for pattern in STUDENT_FILES for path in folder.glob(pattern))
    return sorted(path for path in found if path.is_file() and not is_temporary(path.relative_to(folder)))


@dataclass(frozen=True)
class StudentSettings:
    """Settings in a student's folder."""

    config: BladeConfig | None
    """Its attention."""
    steps: tuple[int, ...] | None
    """Its numbers of steps."""
    noise_kept: float | None
    """The share of the noise that its steps keep; None if another scheduler than `FewStepScheduler` samples it."""


def bundled_student_path(name: str) -> Path:
    """Return the folder of a student that ships with this package.

    Args:
        name: one of `BUNDLED_STUDENTS`.
    """
    return Path(str(files("blade") / "assets" / "students" / name))


def student_settings(source: str | Path) -> StudentSettings:
    """Read the settings of a student of this project, without its weights.

    Args:
        source: one of `BUNDLED_STUDENTS`, a folder, or a Hub id.
    """
    found = StudentFiles(str(source))
    scheduler = found.read_scheduler(None)
    if not isinstance(scheduler, FewStepScheduler):
        return StudentSettings(found.read_config(None), None, None)
    return StudentSettings(found.read_config(None), scheduler.step_counts, scheduler.config.noise_kept)


class StudentFiles:
    """The files of a bundled student, of a folder, or of a repository of the Hub."""

    def __init__(self, source: str) -> None:
        self.source = source
        is_bundled = source in BUNDLED_STUDENTS.values()
        self.folder: Path | None = bundled_student_path(source) if is_bundled else Path(source).expanduser()
        if not self.folder.is_dir():
            names = look_up(source, "source", WEIGHT_NAME)
            self.folder = None
            if names is not None:
                self.names = [name for name in names if not is_temporary(name)]
                return
            from huggingface_hub import snapshot_download  # the Hub cannot be reached: what its cache has

            self.folder = Path(snapshot_download(source, local_files_only=True))
        self.names = [path.relative_to(self.folder).as_posix() for path in files_in(self.folder)]

    def find_subfolder(self, subfolder: str | None, weight_name: str, family: str | None) -> str | None:
        """The subfolder that holds the LoRA, None for the top."""
        found = {name.rpartition("/")[0] for name in self.names if name.rpartition("/")[2] == weight_name}
        if subfolder is not None:
            if subfolder.strip("/") in found:
                return subfolder.strip("/")
            found = {folder for folder in found if folder.startswith(subfolder.strip("/") + "/")}
        elif family is not None:
            found = {folder for folder in found if family in folder.lower()} or found
        elif "" in found:
            return None
        if len(found) != 1:
            listed = ", ".join(sorted(folder or "the top" for folder in found)) or "none"
            raise ValueError(
                f"`subfolder` must be one of {self.source} that holds a {weight_name}, got {subfolder!r}; it is in: "
                f"{listed}."
            )
        return found.pop() or None

    def inside(self, subfolder: str | None) -> list[str]:
        """The names of the files in a subfolder."""
        prefix = "" if subfolder is None else f"{subfolder}/"
        return [name.removeprefix(prefix) for name in self.names if name.startswith(prefix)]

    def fetch(self, subfolder: str | None, name: str) -> Path | None:
        """The path of a file here; None if there is none."""
        name = name if subfolder is None else f"{subfolder}/{name}"
        if name not in self.names:
            return None
        if self.folder is not None:
            return self.folder / name
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.source, name))

    def read_config(self, subfolder: str | None) -> BladeConfig | None:
        """The attention that the student was trained with, if it says so."""
        path = self.fetch(subfolder, CONFIG_NAME)
        return None if path is None else BladeConfig.from_pretrained(path.parent)

    def read_scheduler(self, subfolder: str | None) -> Any:
        """The sampler that the student brings, if it does."""
        path = self.fetch(subfolder, f"{SCHEDULER_FOLDER}/scheduler_config.json")
        if path is None:
            return None
        import diffusers

        name = json.loads(path.read_text(encoding="utf-8"))["_class_name"]
        kind = FewStepScheduler if name == FewStepScheduler.__name__ else getattr(diffusers, name)
        return kind.from_pretrained(path.parent)
