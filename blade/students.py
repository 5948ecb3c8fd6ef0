"""Few-step students: a LoRA, the attention that it was trained with, and its sampler, loaded together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import SchedulerMixin
from torch import nn

from blade.attention.applied import applied_to
from blade.attention.apply import STUDENT_ATTRIBUTE, find_transformers, install_blade, remove_blade
from blade.attention.family import find_family
from blade.config import CONFIG_NAME, BladeConfig
from blade.models import first_line, look_up, main_transformer
from blade.pipelines import released_students
from blade.schedulers import FewStepScheduler
from blade.step_condition import StepCondition

if TYPE_CHECKING:
    from blade.pipelines import ReleasedStudent

ADAPTER = "blade_student"
"""Name of the student's adapter."""

WEIGHT_NAME = "pytorch_lora_weights.safetensors"
"""Name of the LoRA's file where none is given, as Diffusers saves it."""

CONDITION_NAME = "step_condition.safetensors"
"""Where a student keeps what it is told of the number of steps by, if it is for several."""

TRANSFORMER_FOLDER = "transformer"
"""Where a student of whole weights keeps them."""

SCHEDULER_FOLDER = "scheduler"
"""Where a student of this project keeps its `scheduler_config.json`, beside its LoRA."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """A loaded student; `print` it."""

    source: str
    """Folder or Hub id."""
    subfolder: str | None
    """Where in it."""
    steps: tuple[int, ...] | None
    """Numbers of steps that it is trained for; None if nobody says."""
    guidance_scale: float
    """Weight of guidance that it is trained for: 1 is none."""
    config: BladeConfig | None
    """Its attention; None leaves the pipeline's as it was."""

    def check_steps(self, steps: int) -> None:
        """Raise a `ValueError` if this is no number of steps that it is trained for."""
        if self.steps is not None and steps not in self.steps:
            counts = " or ".join(str(count) for count in self.steps)
            raise ValueError(f"`steps` must be {counts}, as the student {self.source} is trained, got {steps}.")

    def __str__(self) -> str:
        where = self.source if self.subfolder is None else f"{self.source}/{self.subfolder}"
        steps = "steps unknown" if self.steps is None else f"{' or '.join(map(str, self.steps))} steps"
        attention = "attention as it was" if self.config is None else "dense attention"
        if self.config is not None and self.config.attention != "dense":
            attention = f"{self.config.attention} at sparsity {self.config.sparsity:g}"
        return f"student {where}: {steps}, guidance {self.guidance_scale:g}, {attention}"


@dataclass(frozen=True)
class _Before:
    """What `unload_student` puts back."""

    scheduler: Any
    configs: dict[str, BladeConfig | None]
    adapters: dict[str, list[str]]
    transformers: dict[str, nn.Module]


@dataclass
class _Loaded:
    """What a pipeline remembers of its student."""

    before: _Before
    student: Student | None = None
    condition: StepCondition | None = None


def loaded_student(pipe: Any) -> Student | None:
    """Return the student that is loaded onto a pipeline, or None."""
    loaded = getattr(pipe, STUDENT_ATTRIBUTE, None)
    return None if loaded is None else loaded.student


@dataclass(frozen=True)
class StudentSettings:
    """What a student's folder says of it."""

    config: BladeConfig | None
    """Its attention."""
    steps: tuple[int, ...] | None
    """Its numbers of steps."""


def student_settings(source: str | Path) -> StudentSettings:
    """Read what a student of this project says of itself, without its weights.

    Args:
        source: a folder or Hub id.
    """
    files = _Files(str(source))
    scheduler = files.read_scheduler(None)
    steps = scheduler.step_counts if isinstance(scheduler, FewStepScheduler) else None
    return StudentSettings(files.read_config(None), steps)


def published_students(pipe: Any) -> tuple[str, ...]:
    """Return the Hub ids of the students that this project knows for a pipeline's model."""
    transformer = next(iter(find_transformers(pipe).values()))
    preset = find_family(transformer).preset_name(transformer)
    known = released_students().items()
    return tuple(source for source, students in known if any(student.preset == preset for student in students))


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
) -> Student:
    """Load a student onto a pipeline: its LoRA, its attention and its scheduler.

    LoRAs that are active already stay active beside it. A student that is loaded already is unloaded first.

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

    Returns:
        What was loaded; run the pipeline with its `steps` and `guidance_scale`.

    Raises:
        ValueError: if the source has no such LoRA, or more than one that fits, or it is of another model.
    """
    unload_student(pipe, missing_ok=True)
    transformers = find_transformers(pipe)
    files = _Files(str(source))
    released = _released(files, transformers)
    is_whole = weight_name is None and files.fetch(subfolder, f"{TRANSFORMER_FOLDER}/config.json") is not None
    if not is_whole:
        subfolder = files.find_subfolder(subfolder, weight_name or WEIGHT_NAME, released.family if released else None)
    elif weight != 1.0:
        raise ValueError(f"`weight` must be 1: {source} is a whole transformer and no LoRA, got {weight}.")
    before = _Before(
        pipe.scheduler,
        {name: applied.config if (applied := applied_to(one)) else None for name, one in transformers.items()},
        {name: _active_adapters(one) for name, one in transformers.items()},
        transformers,
    )
    if is_whole and any(before.adapters.values()):
        raise ValueError(f"`source` {source} is a whole transformer, which the loaded LoRAs are not for; unload them.")
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
    if isinstance(sampler, FewStepScheduler):
        steps = sampler.step_counts

    loaded = _Loaded(before)
    setattr(pipe, STUDENT_ATTRIBUTE, loaded)
    try:
        if is_whole:
            _replace_transformer(pipe, files, subfolder)
        else:
            _load_weights(pipe, files, subfolder, weight_name, weight_name_2)
            for name, transformer in transformers.items():
                _activate(transformer, [*before.adapters[name], ADAPTER], weight)
        loaded.condition = _load_condition(pipe, files, subfolder, sampler)
        if config is not None:
            install_blade(pipe, config)
        if sampler is not None:
            pipe.scheduler = sampler
    except BaseException:
        unload_student(pipe)
        raise
    counts = (steps,) if isinstance(steps, int) else None if steps is None else tuple(steps)
    loaded.student = Student(source=str(source), subfolder=subfolder, steps=counts, guidance_scale=1.0, config=config)
    return loaded.student


def unload_student(pipe: Any, *, missing_ok: bool = False) -> None:
    """Take a student away again: LoRA, attention and scheduler are as they were before `load_student`.

    Args:
        pipe: the pipeline.
        missing_ok: do nothing if no student is loaded.

    Raises:
        ValueError: if no student is loaded.
    """
    loaded = getattr(pipe, STUDENT_ATTRIBUTE, None)
    if loaded is None:
        if missing_ok:
            return
        raise ValueError("No student is loaded here; call `load_student` first.")
    before = loaded.before
    if loaded.condition is not None:
        loaded.condition.remove()
    remove_blade(pipe)
    for name, transformer in before.transformers.items():
        setattr(pipe, name, transformer)
    transformers = before.transformers
    for name, transformer in transformers.items():
        if ADAPTER in getattr(transformer, "peft_config", {}):
            _activate(transformer, before.adapters[name] or [ADAPTER])
            transformer.delete_adapters(ADAPTER)
            if not getattr(transformer, "peft_config", None):
                transformer.unload_lora()
    install_blade(pipe, {name: config for name, config in before.configs.items() if config is not None})
    pipe.scheduler = before.scheduler
    delattr(pipe, STUDENT_ATTRIBUTE)


STUDENT_FILES = (
    WEIGHT_NAME,
    CONDITION_NAME,
    CONFIG_NAME,
    "README.md",
    "distillation.yaml",
    f"{SCHEDULER_FOLDER}/*",
    f"{TRANSFORMER_FOLDER}/*",
)
"""What of a student's folder belongs to the student, and not to its training."""


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
        ValueError: if the folder holds no student.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    if not any((folder / name).exists() for name in (WEIGHT_NAME, TRANSFORMER_FOLDER)):
        raise ValueError(
            f"`folder` must hold a student, with a {WEIGHT_NAME} or a {TRANSFORMER_FOLDER}, got {folder}."
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, allow_patterns=list(STUDENT_FILES), commit_message="Upload a student"
    )
    return commit.commit_url


class _Files:
    """The files of a folder, or of a repository of the Hub."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.folder: Path | None = Path(source).expanduser()
        if not self.folder.is_dir():
            names = look_up(source, "source", WEIGHT_NAME)
            self.folder = None
            if names is not None:
                self.names = list(names)
                return
            from huggingface_hub import snapshot_download  # the Hub cannot be reached: what its cache has

            self.folder = Path(snapshot_download(source, local_files_only=True))
        self.names = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]

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


def _released(files: _Files, transformers: dict[str, nn.Module]) -> ReleasedStudent | None:
    """What this project knows of a published student, for this model."""
    known = released_students().get(files.source)
    if known is None:
        return None
    transformer = next(iter(transformers.values()))
    preset = find_family(transformer).preset_name(transformer)
    fitting = [student for student in known if student.preset == preset]
    if not fitting:
        listed = " and ".join(student.preset for student in known)
        raise ValueError(f"`source` {files.source} has students of {listed}; this model is of the kind {preset}.")
    return fitting[0]


def _load_weights(
    pipe: Any, files: _Files, subfolder: str | None, weight_name: str | None, weight_name_2: str | None
) -> None:
    from safetensors.torch import load_file

    for name, options in ((weight_name or WEIGHT_NAME, {}), (weight_name_2, {"load_into_transformer_2": True})):
        if name is None:
            continue
        path = files.fetch(subfolder, name)
        if path is None:
            raise ValueError(f"`weight_name` must be a file of {files.source}, got {name!r}.")
        try:
            pipe.load_lora_weights(load_file(path), adapter_name=ADAPTER, **options)
        except Exception as error:  # whatever Diffusers, PEFT and safetensors raise for weights that do not fit
            raise ValueError(
                f"`source` {files.source}: {name} cannot be loaded onto this model: {first_line(error)}"
            ) from error
    if not any(ADAPTER in getattr(one, "peft_config", {}) for one in find_transformers(pipe).values()):
        raise ValueError(f"`source` {files.source} holds no weights for this model's transformer.")


def _replace_transformer(pipe: Any, files: _Files, subfolder: str | None) -> None:
    """Put a student of whole weights in the transformer's place."""
    before = main_transformer(pipe)
    prefix = f"{TRANSFORMER_FOLDER}/"
    paths = [files.fetch(subfolder, name) for name in files.inside(subfolder) if name.startswith(prefix)]
    folder = next(path.parent for path in paths if path is not None)
    try:
        transformer = type(before).from_pretrained(folder)
    except Exception as error:  # whatever Diffusers and safetensors raise for a broken model
        raise ValueError(f"`source` {files.source}: the transformer cannot be loaded: {first_line(error)}") from error
    differing = [key for key, value in before.config.items() if key[0] != "_" and transformer.config.get(key) != value]
    if differing:
        raise ValueError(
            f"`source` {files.source} is a student of another model: its `{differing[0]}` is "
            f"{transformer.config.get(differing[0])} instead of {before.config[differing[0]]}."
        )
    like = next(before.parameters())
    pipe.transformer = transformer.to(like.device, like.dtype).eval().requires_grad_(False)


def _load_condition(pipe: Any, files: _Files, subfolder: str | None, sampler: Any) -> StepCondition | None:
    """Tell a student for several numbers of steps how many there are."""
    path = files.fetch(subfolder, CONDITION_NAME)
    if path is None:
        return None
    from safetensors.torch import load_file

    weight = load_file(path)["weight"]
    transformer, counts = main_transformer(pipe), [len(grid) for grid in sampler.config.grids]
    embedding = find_family(transformer).time_embedding(transformer)
    condition = StepCondition(embedding, {ADAPTER: len(weight)})
    condition.vectors[ADAPTER].weight.data.copy_(weight)
    condition.requires_grad_(False)

    def choose() -> tuple[str, torch.Tensor] | None:
        count = len(pipe.scheduler.timesteps)
        return (ADAPTER, torch.tensor([counts.index(count)])) if count in counts else None

    condition.choose = choose
    return condition


def _active_adapters(transformer: nn.Module) -> list[str]:
    return transformer.active_adapters() if getattr(transformer, "peft_config", None) else []


def _activate(transformer: nn.Module, names: list[str], weight: float | None = None) -> None:
    """Make these adapters active together; Diffusers' own way would set the strength of all of them anew."""
    from peft.tuners.lora import LoraLayer

    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter([name for name in names if name in layer.scaling])
            if weight is not None and ADAPTER in layer.scaling:
                layer.set_scale(ADAPTER, weight)
