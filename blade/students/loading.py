"""Few-step students: a LoRA, the attention that it was trained with, and its sampler, loaded together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import SchedulerMixin
from torch import nn

from blade.attention.applied import applied_to
from blade.attention.apply import STUDENT_ATTRIBUTE, install_blade, remove_blade
from blade.attention.config import BladeConfig
from blade.common.errors import first_line
from blade.common.rollback import unchanged_on_error
from blade.common.terminal import logger
from blade.families.registry import released_students
from blade.families.transformers import Transformer, find_transformers
from blade.models.adapters import Reach, activate_adapters, active_adapters, adapter_layers, check_reach
from blade.models.loaded import LoadedModel
from blade.models.untrusted import check_files
from blade.students.description import Student
from blade.students.scheduler import FewStepScheduler
from blade.students.source import CONDITION_NAME, TRANSFORMER_FOLDER, WEIGHT_NAME, StudentFiles, student_files
from blade.students.step_condition import StepCondition, load_condition
from blade.students.watch import StudentWatch

if TYPE_CHECKING:
    from blade.families.data import ReleasedStudent

ADAPTER = "blade_student"
"""Name of the student's adapter."""

BOTH_STUDENTS = (
    "Give both LoRAs, in Python: `load_student(pipe, source, weight_name=FILE, weight_name_2=FILE_2)`, the second for "
    "transformer_2."
)
"""Advice for a student that is for one of two transformers."""


@dataclass(frozen=True)
class _Before:
    """State that `unload_student` puts back."""

    scheduler: Any
    configs: dict[str, BladeConfig | None]
    adapters: dict[str, list[str]]
    transformers: dict[str, Transformer]
    trained: list[nn.Parameter]


@dataclass(frozen=True)
class _Loaded:
    """State that a pipeline and its transformers keep of their student."""

    before: _Before
    student: Student
    condition: StepCondition | None
    watch: StudentWatch


def loaded_student(pipe: Any) -> Student | None:
    """Return the student that is loaded onto a pipeline, or None."""
    loaded = getattr(pipe, STUDENT_ATTRIBUTE, None)
    return None if loaded is None else loaded.student


def published_students(model: LoadedModel) -> tuple[str, ...]:
    """Return the Hub ids of the students that this project knows for a model."""
    fitting = [student.source for student in released_students() if student.preset == model.preset_name]
    return tuple(dict.fromkeys(fitting))


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


def load_student(
    pipe: Any,
    source: str | Path,
    *,
    subfolder: str | None = None,
    weight_name: str | None = None,
    weight_name_2: str | None = None,
    scheduler: Any = None,
    steps: int | Sequence[int] | None = None,
    weight: float = 1.0,
    noise_kept: float | None = None,
) -> Student:
    """Load a student onto a pipeline: its LoRA, its attention and its scheduler.

    LoRAs that are active already stay active beside it. A student that is loaded already is replaced. One that brings
    no attention leaves it as it was, and says so; `apply_blade(pipe)` then takes the few-step preset. If anything
    fails, the pipeline stays as it was.

    When the pipeline runs, a warning says so, once, if the student has been switched off since, as Diffusers'
    `load_lora_weights` does, or runs with guidance.

    Args:
        pipe: the pipeline of the model that the student was trained from.
        source: a folder or Hub id: one of this project (a LoRA or a whole transformer, a `blade_config.json` and a
            scheduler), a published one that this project knows (BLADE's `GYP666/VIDEO-BLADE`), or any few-step LoRA
            that Diffusers loads.
        subfolder: where in it; found by itself where only one fits the model.
        weight_name: name of the LoRA's file.
        weight_name_2: of the LoRA of the second transformer, for pipelines that have two.
        scheduler: the sampler, where the source has none or another one is wanted: a Diffusers scheduler, or the times
            of a `FewStepScheduler`, such as (999, 856, 665, 399) or "999,856,665,399".
        steps: the numbers of steps that it is trained for, where the source doesn't say.
        weight: strength of the LoRA.
        noise_kept: the share of the noise that a step keeps, in [0, 1], in place of the student's own; see
            `FewStepScheduler`.

    Returns:
        The student; run the pipeline with its `steps` and `guidance_scale`.

    Raises:
        ValueError: if the source has no such LoRA, or more than one that fits, or it is of another model, or for one
            of two transformers only; if loading it would run code or read files elsewhere.

    Example:
        ```python
        from blade import load_student

        student = load_student(pipe, "shapes-8-steps")
        pipe(
            "a red ball moving right",
            height=96,
            width=96,
            num_frames=9,
            num_inference_steps=student.steps,
            guidance_scale=student.guidance_scale,
        )
        ```
    """
    with unchanged_on_error(pipe):
        unload_student(pipe, missing_ok=True)
        found = _find(pipe, str(source), subfolder, weight_name, scheduler, steps, noise_kept)
        return _load(pipe, found, weight, (weight_name or WEIGHT_NAME, weight_name_2))


def read_student(pipe: Any, source: str | Path, *, scheduler: Any = None, noise_kept: float | None = None) -> Student:
    """Return the student that `load_student` would load, without its weights.

    Args:
        pipe: see `load_student`; its models may be empty.
        source: see `load_student`.
        scheduler: see `load_student`.
        noise_kept: see `load_student`.

    Raises:
        ValueError: if the source has no student of this model, or none that can be sampled so.
    """
    return _find(pipe, str(source), None, None, scheduler, None, noise_kept).student


def unload_student(pipe: Any, *, missing_ok: bool = False) -> None:
    """Take a student away again: LoRA, attention and scheduler are as they were before `load_student`.

    Args:
        pipe: the pipeline.
        missing_ok: do nothing if no student is loaded.

    Raises:
        ValueError: if no student is loaded.

    Example:
        ```python
        from blade import load_student, unload_student

        load_student(pipe, "shapes-8-steps")
        unload_student(pipe)
        ```
    """
    loaded = getattr(pipe, STUDENT_ATTRIBUTE, None)
    if loaded is None:
        if missing_ok:
            return
        raise ValueError("No student is loaded here; call `load_student` first.")
    before = loaded.before
    with unchanged_on_error(pipe, *before.transformers.values()):
        loaded.watch.remove()
        if loaded.condition is not None:
            loaded.condition.remove()
        for owner in (pipe, *find_transformers(pipe).values()):
            delattr(owner, STUDENT_ATTRIBUTE)
        remove_blade(pipe)
        for name, transformer in before.transformers.items():
            setattr(pipe, name, transformer)
            if ADAPTER in getattr(transformer, "peft_config", {}):
                activate_adapters(transformer, before.adapters[name] or [ADAPTER], {})
                transformer.delete_adapters(ADAPTER)
                if not getattr(transformer, "peft_config", None):
                    transformer.unload_lora()
        for parameter in before.trained:
            parameter.requires_grad_(True)
        install_blade(pipe, {name: config for name, config in before.configs.items() if config is not None})
        pipe.scheduler = before.scheduler


def push_student(
    folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | bool | None = None
) -> str:
    """Upload a student to a Hugging Face Hub repository, made if missing, and return the commit's URL.

    Args:
        folder: of a student of this project; checkpoints and what else its training has left there stay behind.
        repo_id: owner/name.
        private: whether a repository that is made is private.
        token: access token for the Hub; by default the one that is logged in.

    Raises:
        ValueError: if the folder holds no student, or one of its files is a link that leads out of it.

    Example:
        ```python
        from blade import push_student

        push_student("outputs/my-student", "me/my-student")
        ```
    """
    # not by a mixin: those push an object that they save first, with a model card of their own; a student is a folder,
    # has its own card, and only some of its files are uploaded
    from huggingface_hub import HfApi

    folder = Path(folder)
    names = student_files(folder)
    if not any(name.endswith(".safetensors") and name != CONDITION_NAME for name in names):
        raise ValueError(
            f"`folder` must hold a student, with a {WEIGHT_NAME} or a {TRANSFORMER_FOLDER}, got {folder}."
        )
    for name in names:  # a link would upload a file from elsewhere
        check_files(folder, name, f"`folder` {folder}")
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message="Upload a student"
    )
    return str(commit.commit_url)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A student before it is loaded."""

    files: StudentFiles
    is_whole: bool
    """A whole transformer instead of a LoRA."""
    sampler: Any
    """None: the pipeline's own."""
    student: Student


def _find(
    pipe: Any,
    source: str,
    subfolder: str | None,
    weight_name: str | None,
    scheduler: Any,
    steps: int | Sequence[int] | None,
    noise_kept: float | None,
) -> _Found:
    """Find a student's files, and the sampler, attention and steps that belong to them; see `load_student`."""
    files = StudentFiles(source)
    released = _released(files, LoadedModel(pipe))
    is_whole = weight_name is None and files.fetch(subfolder, f"{TRANSFORMER_FOLDER}/config.json") is not None
    if is_whole and len(names := find_transformers(pipe)) > 1:
        raise ValueError(
            f"`source` {source} is one whole transformer, and this model has {' and '.join(names)}; give LoRAs."
        )
    if not is_whole:
        subfolder = files.find_subfolder(
            subfolder, weight_name or WEIGHT_NAME, released.folder_word if released else None
        )
    config = files.read_config(subfolder)
    sampler = scheduler = parse_times(scheduler) if isinstance(scheduler, str) else scheduler
    if isinstance(scheduler, Sequence):
        sampler = FewStepScheduler.like(pipe.scheduler, [list(scheduler)])
    elif scheduler is not None and not isinstance(scheduler, SchedulerMixin):
        raise ValueError(f"`scheduler` must be a Diffusers scheduler or times, got {scheduler!r}.")
    sampler = sampler or files.read_scheduler(subfolder)
    if released is not None:
        config = config or BladeConfig.from_preset(released.preset, "student")
        sampler = sampler or released.make_scheduler(pipe.scheduler)
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
    counts = (steps,) if isinstance(steps, int) else None if steps is None else tuple(steps)
    student = Student(source=source, subfolder=subfolder, step_counts=counts, guidance_scale=1.0, config=config)
    return _Found(files=files, is_whole=is_whole, sampler=sampler, student=student)


def _released(files: StudentFiles, model: LoadedModel) -> ReleasedStudent | None:
    """Return the published student of a source that fits a model, if the source is one that this project knows."""
    known = [student for student in released_students() if student.source == files.source]
    if not known:
        return None
    fitting = [student for student in known if student.preset == model.preset_name]
    if not fitting:
        listed = " and ".join(student.preset for student in known)
        raise ValueError(
            f"`source` {files.source} has students of {listed}; this model is of the kind {model.preset_name}."
        )
    return fitting[0]


def _load(pipe: Any, found: _Found, weight: float, weight_names: tuple[str, str | None]) -> Student:
    """Load a student onto a pipeline without one; see `load_student`."""
    source, subfolder = found.student.source, found.student.subfolder
    transformers = find_transformers(pipe)
    if found.is_whole and weight != 1.0:
        raise ValueError(f"`weight` must be 1: {source} is a whole transformer and no LoRA, got {weight}.")
    before = _Before(
        pipe.scheduler,
        {name: applied.config if (applied := applied_to(one)) else None for name, one in transformers.items()},
        {name: active_adapters(one) for name, one in transformers.items()},
        transformers,
        [parameter for one in transformers.values() for parameter in one.parameters() if parameter.requires_grad],
    )
    if found.is_whole:
        if any(before.adapters.values()):
            raise ValueError(
                f"`source` {source} is a whole transformer, which the loaded LoRAs are not for; unload them."
            )
        _replace_transformer(pipe, found.files, subfolder)
        transformers = find_transformers(pipe)
        reach: Reach = {
            name: sum(1 for part in one.modules() if part._parameters) for name, one in transformers.items()
        }
    else:
        reach = _load_weights(pipe, found.files, subfolder, *weight_names)
        for name, transformer in transformers.items():
            activate_adapters(transformer, [*before.adapters[name], ADAPTER], {ADAPTER: weight})
    path = found.files.fetch(subfolder, CONDITION_NAME)
    condition = None if path is None else load_condition(pipe, path, found.sampler, ADAPTER, f"`source` {source}")
    if found.student.config is not None:
        install_blade(pipe, found.student.config)
    if found.sampler is not None:
        pipe.scheduler = found.sampler
    student = replace(found.student, reach=reach)
    watch = StudentWatch(pipe, student, transformers, None if found.is_whole else ADAPTER)
    for owner in (pipe, *transformers.values()):
        setattr(owner, STUDENT_ATTRIBUTE, _Loaded(before, student, condition, watch))
    if student.config is None:
        logger.info(str(student))
    return student


def _load_weights(
    pipe: Any, files: StudentFiles, subfolder: str | None, weight_name: str, weight_name_2: str | None
) -> Reach:
    """Load a student's LoRAs, and return how many modules they change in each transformer."""
    from safetensors.torch import load_file

    transformers = find_transformers(pipe)
    if weight_name_2 is not None and len(transformers) == 1:
        raise ValueError(f"`weight_name_2` must not be given: this model has one transformer, got {weight_name_2!r}.")
    for field, name, options in (
        ("weight_name", weight_name, {}),
        ("weight_name_2", weight_name_2, {"load_into_transformer_2": True}),
    ):
        if name is None:
            continue
        path = files.fetch(subfolder, name)
        if path is None:
            raise ValueError(f"`{field}` must be a file of {files.source}, got {name!r}.")
        try:
            pipe.load_lora_weights(load_file(path), adapter_name=ADAPTER, **options)
        except Exception as error:  # whatever Diffusers, PEFT and safetensors raise for weights that do not fit
            raise ValueError(
                f"`source` {files.source}: {name} cannot be loaded onto this model: {first_line(error)}"
            ) from error
    reach = {name: len(adapter_layers(transformer, ADAPTER)) for name, transformer in transformers.items()}
    check_reach(f"`source` {files.source}", reach, BOTH_STUDENTS)
    return reach


def _replace_transformer(pipe: Any, files: StudentFiles, subfolder: str | None) -> None:
    """Put a student of whole weights in the transformer's place."""
    before = LoadedModel(pipe).transformer
    folder = files.fetch_transformer(subfolder)
    try:
        transformer = type(before).from_pretrained(folder, use_safetensors=True, local_files_only=True)
    except Exception as error:  # whatever Diffusers and safetensors raise for a broken model
        raise ValueError(f"`source` {files.source}: the transformer cannot be loaded: {first_line(error)}") from error
    # as JSON: a model that was not read from a file may have tuples where the file has lists
    mine, theirs = (json.loads(model.to_json_string()) for model in (before, transformer))
    differing = [key for key, value in mine.items() if key[0] != "_" and theirs.get(key) != value]
    if differing:
        raise ValueError(
            f"`source` {files.source} is a student of another model: its `{differing[0]}` is "
            f"{theirs.get(differing[0])} instead of {mine[differing[0]]}."
        )
    like = next(before.parameters())
    pipe.transformer = transformer.to(like.device, like.dtype).eval().requires_grad_(False)
