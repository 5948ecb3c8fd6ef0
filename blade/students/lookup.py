"""Finding a student: its files, and the steps, guidance, sampler and attention that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import SchedulerMixin

from blade.attention.config import BladeConfig
from blade.families.registry import released_students
from blade.families.transformers import find_transformers
from blade.models.loaded import LoadedModel
from blade.models.untrusted import find_scheduler_class
from blade.students.description import Student
from blade.students.scheduler import FewStepScheduler
from blade.students.source import TRANSFORMER_FOLDER, WEIGHT_NAME, StudentFiles

if TYPE_CHECKING:
    from blade.families.data import ReleasedStudent


@dataclass(frozen=True, kw_only=True)
class FoundStudent:
    """A student before it is loaded."""

    files: StudentFiles
    weight_names: tuple[str | None, ...]
    """File of each transformer's weights, in the student's subfolder; empty where those are a folder, or a pair."""
    sampler: Any
    """None: the pipeline's own."""
    student: Student

    @property
    def is_folder(self) -> bool:
        """True for a whole transformer in Diffusers' format, in a folder."""
        return not self.weight_names and self.files.pair is None


def find_student(
    pipe: Any,
    source: str,
    subfolder: str | None,
    weight_names: tuple[str | None, str | None],
    scheduler: Any,
    steps: int | Sequence[int] | None,
    noise_kept: float | None,
) -> FoundStudent:
    """Find a student's files, and the sampler, attention and steps that belong to them; see `load_student`.

    Args:
        pipe: the pipeline.
        source: see `StudentFiles`.
        subfolder: where in it.
        weight_names: names of the files of weights, as far as they are given.
        scheduler: a scheduler or times, if given.
        steps: numbers of steps, if given.
        noise_kept: see `load_student`.

    Raises:
        ValueError: see `load_student`.
    """
    files = StudentFiles(source)
    model = LoadedModel(pipe)
    released = find_released(files, model)
    if released is not None and released.refused is not None:
        raise ValueError(f"`source` {source} ({released.about}) cannot be used: {released.refused}.")
    names: tuple[str | None, ...] = ()
    if files.pair is not None:
        _check_pair(files, model, weight_names)
    elif released is not None and released.files and weight_names == (None, None) and files.file is None:
        names = released.files
        _check_files(files, names)
    elif weight_names[0] is not None or files.fetch(subfolder, f"{TRANSFORMER_FOLDER}/config.json") is None:
        subfolder, names = _find_weights(files, subfolder, weight_names, released)
    elif len(transformers := find_transformers(pipe)) > 1:
        raise ValueError(
            f"`source` {source} is one whole transformer, and this model has {' and '.join(transformers)}; give LoRAs."
        )
    config = files.read_config(subfolder)
    sampler = _sampler(pipe, files, subfolder, scheduler, released)
    if released is not None:
        if released.preset is not None:
            config = config or BladeConfig.from_preset(released.preset, "student")
        steps = steps or released.steps
    if noise_kept is not None:
        if not isinstance(sampler, FewStepScheduler):
            sampled_by = type(pipe.scheduler if sampler is None else sampler).__name__
            raise ValueError(
                f"`noise_kept` must not be given: {source} is sampled by a {sampled_by}, which keeps all."
            )
        sampler = FewStepScheduler.from_config(sampler.config, noise_kept=noise_kept)
    if isinstance(sampler, FewStepScheduler):
        steps = sampler.step_counts
    student = Student(
        source=source,
        subfolder=subfolder,
        step_counts=(steps,) if isinstance(steps, int) else None if steps is None else tuple(steps),
        guidance_scale=1.0 if released is None else released.guidance_scale,
        config=config,
    )
    return FoundStudent(files=files, weight_names=names, sampler=sampler, student=student)


def find_released(files: StudentFiles, model: LoadedModel) -> ReleasedStudent | None:
    """Return the published student of a source that fits a model, if the source is one that this project knows.

    Files here are known by their names.

    Raises:
        ValueError: if the source is known, and is for other models.
    """
    facts = (model_facts(model), model.preset_name)
    if files.pair is not None or files.file is not None:
        names = {Path(name).name for name in files.pair or (str(files.file),)} - {WEIGHT_NAME}
        known = [one for one in released_students() if names and names <= {Path(name).name for name in one.files}]
        return next((student for student in known if student.suits(*facts)), None)
    known = [student for student in released_students() if student.source == files.repository]
    if files.within is not None:
        within = files.within.rstrip("/")
        known = [one for one in known if any(name == within or name.startswith(f"{within}/") for name in one.files)]
    if not known:
        return None
    fitting = [student for student in known if student.suits(*facts)]
    if not fitting:
        listed = " and ".join(dict.fromkeys(student.preset or student.about for student in known))
        raise ValueError(
            f"`source` {files.source} has students of {listed}; this model is of the kind {model.preset_name}."
        )
    return fitting[0]


def model_facts(model: LoadedModel) -> dict[str, Any]:
    """Return what a published student's `fits` is compared with."""
    transformer = model.transformer
    return {**transformer.config, "class": type(transformer).__name__, "transformers": len(model.transformers)}


def make_scheduler(released: ReleasedStudent, scheduler: Any) -> Any:
    """Return the sampler of a published student.

    Args:
        released: the student.
        scheduler: the model's own scheduler.
    """
    options = dict(released.scheduler_options)
    if released.scheduler == FewStepScheduler.__name__:
        shift = options.pop("flow_shift", 1.0)
        levels = [time / 1000 for time in options.pop("times")]
        times = [1000 * shift * level / (1 + (shift - 1) * level) for level in levels]
        return FewStepScheduler.like(scheduler, [times], **options)
    kind: Any = find_scheduler_class(released.scheduler, f"`source` {released.source}")
    return kind.from_config(scheduler.config, **options)


def parse_times(text: str) -> tuple[float, ...]:
    """Read the times of a `FewStepScheduler`, such as "999,856,665,399".

    Raises:
        ValueError: if these are no numbers separated by commas.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(
            f"`scheduler` must be times separated by commas, such as 999,856,665,399, got {text!r}."
        ) from None


def _sampler(
    pipe: Any, files: StudentFiles, subfolder: str | None, scheduler: Any, released: ReleasedStudent | None
) -> Any:
    """Return the sampler: the one that was given, that of the table, or that of the files; None if there is none."""
    scheduler = parse_times(scheduler) if isinstance(scheduler, str) else scheduler
    if isinstance(scheduler, Sequence):
        return FewStepScheduler.like(pipe.scheduler, [list(scheduler)])
    if scheduler is not None and not isinstance(scheduler, SchedulerMixin):
        raise ValueError(f"`scheduler` must be a Diffusers scheduler or times, got {scheduler!r}.")
    if scheduler is not None:
        return scheduler
    return files.read_scheduler(subfolder) if released is None else make_scheduler(released, pipe.scheduler)


def _find_weights(
    files: StudentFiles,
    subfolder: str | None,
    weight_names: tuple[str | None, str | None],
    released: ReleasedStudent | None,
) -> tuple[str | None, tuple[str | None, ...]]:
    """Return the subfolder and names of a student's files of weights."""
    first, second = weight_names
    if files.within is not None and files.within.endswith(".safetensors"):
        _check_files(files, (files.within,))
        return subfolder, (files.within, second)
    subfolder = subfolder or files.within
    if first is None and released is None and (only := files.only_weights(subfolder)) is not None:
        return subfolder, (only, second)
    family = None if released is None else released.folder_word
    subfolder = files.find_subfolder(subfolder, first or WEIGHT_NAME, family)
    return subfolder, (first or WEIGHT_NAME, second)


def _check_pair(files: StudentFiles, model: LoadedModel, weight_names: tuple[str | None, str | None]) -> None:
    """Check that a file for each of two transformers is given for a model that has two."""
    if len(model.transformers) == 1:
        raise ValueError(f"`source` must be one for a model of one transformer, got {files.source}.")
    if weight_names != (None, None):
        raise ValueError(f"`weight_name` must not be given: `source` {files.source} names the files.")


def _check_files(files: StudentFiles, names: tuple[str | None, ...]) -> None:
    """Check that the files of a student that is known are in its repository."""
    for name in names:
        if name not in files.names:
            raise ValueError(
                f"`source` {files.source} lacks {name}; name another file of it: {files.repository}/FILE."
            )
