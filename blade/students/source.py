"""Files of a student, in a folder or a repository of the Hub, and the settings in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from blade.attention.config import CONFIG_NAME, BladeConfig
from blade.attention.pattern_table import TABLE_NAME
from blade.common.checks import check_integer, check_number, shortened
from blade.common.errors import first_line
from blade.common.leftovers import files_in, is_temporary
from blade.families.registry import released_students
from blade.models.choices import split_sources
from blade.models.lora_files import ADAPTER_CONFIG, LoraFile, is_peft, peek_lora, read_lora, read_lora_file
from blade.models.source import look_up
from blade.models.untrusted import PICKLES, check_files, find_scheduler_class, read_json
from blade.students.scheduler import MOST_TIMES, FewStepScheduler

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

SCHEDULER_NAME = f"{SCHEDULER_FOLDER}/scheduler_config.json"
"""File of a student's sampler."""

FULL_WEIGHT_NAME = "diffusion_pytorch_model.safetensors"
"""Diffusers' file name for the weights of a transformer."""

STUDENT_FILES = (
    WEIGHT_NAME,
    CONDITION_NAME,
    CONFIG_NAME,
    TABLE_NAME,
    "README.md",
    "distillation.yaml",
    SCHEDULER_NAME,
    f"{TRANSFORMER_FOLDER}/config.json",
    f"{TRANSFORMER_FOLDER}/{FULL_WEIGHT_NAME}",
    f"{TRANSFORMER_FOLDER}/{FULL_WEIGHT_NAME}.index.json",
)
"""Files of a student's folder that belong to the student, and not to its training; see `is_student_file`."""

SHARD = re.compile(rf"{TRANSFORMER_FOLDER}/diffusion_pytorch_model-\d{{5}}-of-\d{{5}}\.safetensors")
"""Names of the files of a transformer's weights where there are several."""


def is_student_file(name: str) -> bool:
    """Return whether a file belongs to a student.

    Args:
        name: its path in the student's folder, with slashes.
    """
    return name in STUDENT_FILES or SHARD.fullmatch(name) is not None


def student_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that belong to a student.

    Args:
        folder: the student's folder, in which a training may have left other files.
    """
    names = (path.relative_to(folder).as_posix() for path in files_in(folder))
    return [name for name in names if is_student_file(name)]


@dataclass(frozen=True)
class StudentSettings:
    """Settings in a student's folder."""

    config: BladeConfig | None
    """Its attention."""
    step_counts: tuple[int, ...] | None
    """Numbers of steps that it is trained for; None if unknown."""
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


def check_scheduler_values(values: Mapping[str, Any], problem: str) -> None:
    """Refuse values of a sampler that its class would not check: infinite ones, and those that would fill the memory.

    Args:
        values: its configuration.
        problem: the beginning of the message.

    Raises:
        ValueError: for a value that is no finite number, or too long a table of times.
    """
    try:
        check_integer("num_train_timesteps", values.get("num_train_timesteps", 1), least=1, most=MOST_TIMES)
        for name, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_number(name, value, "a finite number", lambda x: True)
            if isinstance(value, list) and len(value) > MOST_TIMES:
                raise ValueError(f"`{name}` must be a list of at most {MOST_TIMES:,}, got {shortened(value)}.")
    except ValueError as error:
        raise ValueError(f"{problem}: {error}") from None


class StudentFiles:
    """The files of a bundled student, of a folder, of a repository of the Hub, or one file for each transformer."""

    def __init__(self, source: str) -> None:
        """Find the files.

        Args:
            source: one of `BUNDLED_STUDENTS`, a folder, a safetensors file, a Hub id, a folder or file of one
                (`owner/name/FILE`), or two of them with ":" between, one for each of two transformers.

        Raises:
            ValueError: if there is none of them, or it is pickled.
        """
        self.source = source
        self.repository = source
        """The Hub id, of a student that is there."""
        self.within: str | None = None
        """The folder or file of the Hub id that was named behind it."""
        self.file: Path | None = None
        """The only file that is the student, whatever else is in its folder."""
        self.folder: Path | None = None
        self.names: list[str] = []
        sources = split_sources(source)
        self.pair = sources if sources is not None and len(sources) == 2 else None
        """Sources of each of two transformers."""
        if self.pair is not None:
            return
        is_bundled = source in BUNDLED_STUDENTS.values()
        path = bundled_student_path(source) if is_bundled else Path(source).expanduser()
        if path.is_file() or path.suffix in PICKLES:
            self._check_ending(path)
            if path.name != WEIGHT_NAME:
                self.file, self.names = path, [WEIGHT_NAME]
            path = path.parent
        self.folder = path
        if self.file is not None:
            return
        if not self.folder.is_dir():
            self._look_up()
            if self.folder is None:
                return
        self.names = [path.relative_to(self.folder).as_posix() for path in files_in(self.folder)]

    def _check_ending(self, path: Path) -> None:
        """Refuse a file that is no safetensors."""
        if path.suffix in PICKLES:
            raise ValueError(
                f"`source` must be a .safetensors file, got {self.source}, a pickle, which can run code; write "
                "`torch.load(FILE, weights_only=True)` with `safetensors.torch.save_file`, and give that."
            )
        if path.suffix != ".safetensors":
            raise ValueError(
                f"`source` must be a folder, a Hub id or a .safetensors file, got the file {self.source}."
            )

    def _look_up(self) -> None:
        """Find a repository of the Hub, or its cache where the Hub cannot be reached."""
        parts = self.source.split("/")
        if len(parts) > 2 and all(parts) and self.source[0] not in ".~":
            self.repository, self.within = "/".join(parts[:2]), "/".join(parts[2:])
        known = [*BUNDLED_STUDENTS.values(), *(student.source for student in released_students())]
        names = look_up(self.repository, "source", self.within or WEIGHT_NAME, known=list(dict.fromkeys(known)))
        if names is not None:
            self.folder, self.names = None, [name for name in names if not is_temporary(name)]
            return
        from huggingface_hub import snapshot_download  # the Hub cannot be reached: what its cache has

        self.folder = Path(snapshot_download(self.repository, local_files_only=True))

    def read_pair(self, *, values: bool = True) -> list[LoraFile | None]:
        """The files of the two transformers.

        Args:
            values: read the tensors; else their shapes alone, and None for what would have to be downloaded.
        """
        assert self.pair is not None
        return [read_lora(source, "source") if values else peek_lora(source, "source") for source in self.pair]

    def read_weights(self, subfolder: str | None, name: str, *, values: bool = True) -> LoraFile | None:
        """A file of weights; None if there is none, or, where its values are not wanted, if it is on the Hub."""
        if not values and self.folder is None and self.file is None:
            return None
        path = self.fetch(subfolder, name)
        if path is None:
            return None
        what = path.name if self.source.endswith(path.name) else f"{self.source}: {path.name}"
        return read_lora_file(path, f"`source` {what}", self._adapter_config(path, subfolder, name), values=values)

    def _adapter_config(self, path: Path, subfolder: str | None, name: str) -> Path | None:
        """PEFT's configuration beside its file of weights, if that is one."""
        if not is_peft(path.name):
            return None
        if self.folder is None and self.file is None:
            beside = "/".join([*([] if subfolder is None else [subfolder]), *name.split("/")[:-1], ADAPTER_CONFIG])
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(self.repository, beside)) if beside in self.names else None
        config = path.with_name(ADAPTER_CONFIG)
        return config if config.is_file() else None

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

    def only_weights(self, subfolder: str | None) -> str | None:
        """The only safetensors file at the top of a folder, whatever its name."""
        tops = [name for name in self.inside(subfolder) if "/" not in name and name.endswith(".safetensors")]
        return tops[0] if len(tops) == 1 else None

    def inside(self, subfolder: str | None) -> list[str]:
        """The names of the files in a subfolder."""
        prefix = "" if subfolder is None else f"{subfolder}/"
        return [name.removeprefix(prefix) for name in self.names if name.startswith(prefix)]

    def has(self, subfolder: str | None, name: str) -> bool:
        """Return whether there is a file, without downloading it."""
        if self.folder is None and self.file is None:
            return (name if subfolder is None else f"{subfolder}/{name}") in self.names
        return self.fetch(subfolder, name) is not None

    def fetch(self, subfolder: str | None, name: str) -> Path | None:
        """The path of a file here; None if there is none."""
        if self.pair is not None:
            return None
        name = name if subfolder is None else f"{subfolder}/{name}"
        folder = self.folder
        if self.file is not None:
            if name not in (WEIGHT_NAME, self.file.name):
                return None
            check_files(self.file.parent, self.file.name, f"`source` {self.source}")
            return self.file
        if name not in self.names and (folder is None or not (folder / name).exists()):  # there are none below links
            return None
        if folder is None:
            from huggingface_hub import hf_hub_download

            folder = Path(hf_hub_download(self.repository, name)).parents[name.count("/")]
        check_files(folder, name, f"`source` {self.source}")
        return folder / name

    def fetch_transformer(self, subfolder: str | None) -> Path | None:
        """The folder of the whole transformer here; None if there is none."""
        names = [name for name in self.inside(subfolder) if name.startswith(f"{TRANSFORMER_FOLDER}/")]
        paths = [self.fetch(subfolder, name) for name in names if is_student_file(name)]
        folder = next((path.parent for path in paths if path is not None), None)
        if folder is not None:  # all that is there, the files that are not read among it
            check_files(folder.parent, TRANSFORMER_FOLDER, f"`source` {self.source}")
        return folder

    def read_config(self, subfolder: str | None) -> BladeConfig | None:
        """The attention that the student was trained with, if it says so."""
        path = self.fetch(subfolder, CONFIG_NAME)
        self.fetch(subfolder, TABLE_NAME)  # which is read along with it
        return None if path is None else BladeConfig.from_pretrained(path.parent)

    def read_scheduler(self, subfolder: str | None) -> Any:
        """The sampler that the student brings, if it does."""
        path = self.fetch(subfolder, SCHEDULER_NAME)
        if path is None:
            return None
        what = f"`source` {self.source}"
        values = read_json(path, what)
        check_scheduler_values(values, f"{what} has a {SCHEDULER_NAME} that cannot be read")
        name = values.get("_class_name")
        kind: Any = FewStepScheduler if name == FewStepScheduler.__name__ else find_scheduler_class(name, what)
        try:
            return kind.from_pretrained(path.parent, local_files_only=True)
        except Exception as error:  # whatever Diffusers raises for values that make no scheduler
            raise ValueError(f"{what} has a {SCHEDULER_NAME} that cannot be read: {first_line(error)}") from error
