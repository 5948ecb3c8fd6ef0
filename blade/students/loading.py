"""Few-step students: a LoRA, the attention that it was trained with, and its sampler, loaded together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blade.attention.applied import applied_to
from blade.attention.apply import STUDENT_ATTRIBUTE, install_blade, remove_blade
from blade.attention.config import BladeConfig
from blade.common.rollback import unchanged_on_error
from blade.common.terminal import logger
from blade.families.registry import released_students
from blade.families.transformers import Transformer, find_transformers
from blade.models.adapters import activate_adapters, active_adapters
from blade.models.loaded import LoadedModel
from blade.models.loras import put_back
from blade.models.untrusted import check_files
from blade.students.description import Student
from blade.students.lookup import FoundStudent, find_student, model_facts
from blade.students.source import CONDITION_NAME, TRANSFORMER_FOLDER, WEIGHT_NAME, student_files
from blade.students.step_condition import StepCondition, load_condition
from blade.students.watch import StudentWatch
from blade.students.weights import ADAPTER, load_weights, peek_weights


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
    values: list[tuple[torch.Tensor, torch.Tensor]]
    """Parameters that were changed at once, and their values before."""


def loaded_student(pipe: Any) -> Student | None:
    """Return the student that is loaded onto a pipeline, or None."""
    loaded = getattr(pipe, STUDENT_ATTRIBUTE, None)
    return None if loaded is None else loaded.student


def published_students(model: LoadedModel) -> tuple[str, ...]:
    """Return the Hub ids of the students that this project knows for a model."""
    facts = (model_facts(model), model.preset_name)
    usable = [student for student in released_students() if student.refused is None]
    return tuple(dict.fromkeys(student.source for student in usable if student.suits(*facts)))


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
            scheduler), a published one that this project knows, whose steps, guidance and sampler are in a table (such
            as BLADE's `GYP666/VIDEO-BLADE`), or any few-step LoRA; a safetensors file of a LoRA in any common layout,
            or of a whole transformer; a file of a Hub id, "owner/name/FILE"; "FIRST:SECOND" for two transformers.
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
    with unchanged_on_error(pipe), _values_unchanged_on_error(pipe):
        unload_student(pipe, missing_ok=True)
        names = (weight_name, weight_name_2)
        return _load(pipe, find_student(pipe, str(source), subfolder, names, scheduler, steps, noise_kept), weight)


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
    found = find_student(pipe, str(source), None, (None, None), scheduler, None, noise_kept)
    peek_weights(pipe, found)
    return found.student


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
    with unchanged_on_error(pipe, *before.transformers.values()), _values_unchanged_on_error(pipe):
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
        put_back(loaded.values)
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


@contextmanager
def _values_unchanged_on_error(pipe: Any) -> Iterator[None]:
    """Put back the values of weights that a pipeline's student has changed at once, if the block fails."""
    loaded = getattr(pipe, STUDENT_ATTRIBUTE, None)
    now = [] if loaded is None else [(parameter, parameter.detach().clone()) for parameter, _ in loaded.values]
    try:
        yield
    except BaseException:
        put_back(now)
        raise


def _load(pipe: Any, found: FoundStudent, weight: float) -> Student:
    """Load a student onto a pipeline without one; see `load_student`."""
    subfolder = found.student.subfolder
    transformers = find_transformers(pipe)
    before = _Before(
        pipe.scheduler,
        {name: applied.config if (applied := applied_to(one)) else None for name, one in transformers.items()},
        {name: active_adapters(one) for name, one in transformers.items()},
        transformers,
        [parameter for one in transformers.values() for parameter in one.parameters() if parameter.requires_grad],
    )
    reach, parts = load_weights(pipe, found)
    _check_replaced(found, transformers, find_transformers(pipe), before.adapters, weight)
    transformers = find_transformers(pipe)
    for name, transformer in transformers.items():
        if ADAPTER in getattr(transformer, "peft_config", {}):
            activate_adapters(transformer, [*before.adapters[name], ADAPTER], {ADAPTER: weight})
    path = found.files.fetch(subfolder, CONDITION_NAME)
    condition = (
        None
        if path is None
        else load_condition(pipe, path, found.sampler, ADAPTER, f"`source` {found.student.source}")
    )
    if found.student.config is not None:
        install_blade(pipe, found.student.config)
    if found.sampler is not None:
        pipe.scheduler = found.sampler
    student = replace(found.student, reach=reach)
    watch = StudentWatch(pipe, student, transformers, ADAPTER)
    values: list[tuple[torch.Tensor, torch.Tensor]] = []
    for owner in (pipe, *transformers.values()):
        setattr(owner, STUDENT_ATTRIBUTE, _Loaded(before, student, condition, watch, values))
    for part in parts:  # nothing fails any more
        values.extend(part.apply_whole(weight))
    if student.config is None:
        logger.info(str(student))
    return student


def _check_replaced(
    found: FoundStudent,
    before: Mapping[str, Transformer],
    after: Mapping[str, Transformer],
    adapters: Mapping[str, list[str]],
    weight: float,
) -> None:
    """Check that whole weights, which replace transformers, are not to be weaker, and that no LoRA is lost."""
    source = found.student.source
    if all(before[name] is after[name] for name in before):
        return
    if weight != 1.0:
        raise ValueError(f"`weight` must be 1: {source} is a whole transformer and no LoRA, got {weight}.")
    if any(adapters.values()):
        raise ValueError(f"`source` {source} is a whole transformer, which the loaded LoRAs are not for; unload them.")
