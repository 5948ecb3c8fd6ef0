"""A generation request, and how unset fields are left to the model."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blade.attention.config import CONFIG_NAME, BladeConfig
from blade.common.fields import check_types
from blade.common.options import option_names, prepare_options
from blade.generation.options import (
    GROUPS,
    AccelerationOptions,
    ModelOptions,
    PromptOptions,
    SamplingOptions,
    SparseOptions,
    StudentOptions,
    VideoOptions,
    added_groups,
)
from blade.models.choices import DtypeName
from blade.models.source import BUNDLED, look_up
from blade.moving_shapes.bundled import BUNDLED_DEFAULTS, check_prompt
from blade.students.lookup import parse_times
from blade.students.source import BUNDLED_STUDENTS, DEFAULT_STUDENT_STEPS

SPARSE_OPTIONS = ("sparsity", "dense_steps", "dense_layers", "precision")
"""Fields of a request that change a field of the same name in the BLADE configuration."""

_SETTLED = ("blade_config", *option_names(*GROUPS, settled_by_student=True))

NO_STUDENT = "none"
"""Value of `--student` that disables the default student."""


# The bases are listed from the last to the first, the order in which dataclasses take over their fields.
@dataclass(frozen=True, kw_only=True)
class GenerationRequest(
    AccelerationOptions,
    StudentOptions,
    SparseOptions,
    SamplingOptions,
    VideoOptions,
    ModelOptions,
    PromptOptions,
):
    """Everything that decides a video. None takes the model's default, which `resolve_request` fills in."""

    blade_config: BladeConfig | None = None
    """The BLADE configuration itself, instead of `config`. None in a resolved request: dense."""
    added: Mapping[str, Any] = field(default_factory=dict)
    """Options of groups that others have added; see `blade.generation.options.register_options`."""

    def __post_init__(self) -> None:
        for group in GROUPS:
            group.check(self)
        if self.config is not None and self.blade_config is not None:
            raise ValueError("`config` and `blade_config` must not both be given.")
        if self.preset is not None and self.blade_config is not None:
            raise ValueError("`preset` and `blade_config` must not both be given.")
        given = self._given(*SPARSE_OPTIONS)
        BladeConfig(attention="asa" if self.attention in (None, "patterns") else self.attention, **given)
        if self.attention == "dense" and given:
            raise ValueError(f'`{next(iter(given))}` must not be given where `attention` is "dense".')
        check_types(self)
        if self.scheduler is not None:
            parse_times(self.scheduler)
        unknown = sorted(set(self.added) - set(option_names(*added_groups())))
        if unknown:
            raise ValueError(f"`{unknown[0]}` must be an option of a generation; no installed package adds it.")
        self.added_options()

    def added_options(self) -> list[Any]:
        """Return the groups of options that others have added, with the values of this request."""
        groups = added_groups()
        return [
            group(**{name: self.added[name] for name in option_names(group) if name in self.added}) for group in groups
        ]

    def prepare(self, model: Any) -> None:
        """Do to a loaded model what the options of this request say."""
        for options in (self, *self.added_options()):
            prepare_options(model, options)

    def sparse_config(self, preset: Callable[[], BladeConfig]) -> BladeConfig | None:
        """Return the BLADE configuration of this request, None for dense.

        Args:
            preset: returns the configuration to start from where the request names none.
        """
        if self.attention == "dense":
            return None
        config = read_config(self.config) if self.config is not None else self.blade_config or preset()
        changes = self._given(*SPARSE_OPTIONS)
        if self.attention == "asa-gt":
            changes |= {"attention": "asa", "pooled_tokens": "all", "patterns": None}
        elif self.attention == "asa":
            pooled = "none" if config.pooled_tokens == "all" else config.pooled_tokens
            changes |= {"attention": "asa", "pooled_tokens": pooled, "patterns": None}
        elif self.attention == "patterns" and config.attention != "patterns":
            raise ValueError('`attention` must not be "patterns" without a `config` that has a table of them.')
        config = replace(config, **changes)
        return None if config.attention == "dense" else config

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest(GenerationRequest):
    """A request in which everything that a run needs is said, so that it stays the same when defaults change.

    Still None: what this model does not take, what belongs to a student where there is none, and what belongs to BLADE
    where the attention is dense.
    """

    height: int = field()
    """Pixels."""
    width: int = field()
    """Pixels."""
    frames: int = field()
    """Number of frames."""
    fps: int = field()
    """Frames a second."""
    steps: int = field()
    """Denoising steps."""
    guidance_scale: float = field()
    """Weight of classifier-free guidance; at most 1: none."""
    device: str = field()
    """A torch device."""
    dtype: DtypeName = field()
    """A name of `blade.models.devices.DTYPES`."""
    input_state: str | None = None
    """See `blade.generation.inputs.input_state`, when the request was resolved; None: it names no files here."""

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames", "fps", "steps", "guidance_scale", "device", "dtype"):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` must be given in a resolved request, got None.")
        super().__post_init__()
        if self.skipped_steps == self.steps:
            least = math.ceil(1000 / self.steps) / 1000
            raise ValueError(
                f"`strength` must be at least {least:g} with {self.steps} steps, so that one is taken, got "
                f"{self.strength:g}."
            )

    @property
    def skipped_steps(self) -> int:
        """Steps from the start of the schedule that are not taken, since the video to change stands for them."""
        return 0 if self.strength is None else self.steps - int(self.steps * self.strength)  # as Diffusers rounds

    @property
    def size(self) -> tuple[int, int, int]:
        """Height and width in pixels, and frames."""
        return self.height, self.width, self.frames

    def dense(self) -> ResolvedRequest:
        """Return the same request with dense attention, for comparison."""
        nothing: dict[str, Any] = dict.fromkeys(SPARSE_OPTIONS)
        return replace(self, attention="dense", blade_config=None, **nothing)


def default_student(given: Mapping[str, Any]) -> str | None:
    """Return the student that makes a video where none is named: one of the bundled model's, or None.

    Args:
        given: the fields of a request that were given. Some call for the model itself: those that a student has
            settled, and numbers of steps that no student has.
    """
    if given.get("model", BUNDLED) != BUNDLED or any(name in given for name in _SETTLED):
        return None
    return BUNDLED_STUDENTS.get(given.get("steps", DEFAULT_STUDENT_STEPS))


def lost_student(given: Mapping[str, Any]) -> str | None:
    """Return what to tell where options call for the bundled model itself instead of its student; None if none do.

    Args:
        given: the fields of a request that were given.
    """
    if given.get("model", BUNDLED) != BUNDLED or "student" in given or default_student(given) is not None:
        return None
    steps = given.get("steps")
    reasons = [f"`{name}`" for name in _SETTLED if name in given]
    few = steps if steps in BUNDLED_STUDENTS else DEFAULT_STUDENT_STEPS
    named = f", or name it: --student {BUNDLED_STUDENTS[few]}"
    if steps not in (None, few):
        reasons.append(f"`steps` {steps}")
        named = ""
    guidance = given.get("guidance_scale", BUNDLED_DEFAULTS["guidance_scale"])
    passes = (steps or BUNDLED_DEFAULTS["steps"]) * (2 if guidance > 1 else 1)
    return (
        f"{' and '.join(reasons)} rule{'s' if len(reasons) == 1 else ''} out the bundled model's student: without it "
        f"this takes {passes} forward passes, with it {few}. To keep it, leave "
        f"{'that' if len(reasons) == 1 else 'those'} out{named}."
    )


def check_known(request: GenerationRequest) -> None:
    """Check that the model can draw what the prompt says, as far as that is known before it is loaded.

    Raises:
        ValueError: naming the words that the model does not know.
    """
    if request.model == BUNDLED:
        check_prompt(request.prompt)


def refused_prompts(request: GenerationRequest, prompts: Iterable[str]) -> dict[str, str]:
    """Return why the model cannot draw prompts, by those that it cannot; see `check_known`."""
    refused = {}
    for prompt in prompts:
        try:
            check_known(replace(request, prompt=prompt))
        except ValueError as error:
            refused[prompt] = str(error)
    return refused


def read_config(source: str) -> BladeConfig:
    """Read a BLADE configuration.

    Args:
        source: a folder or file that holds it, or a Hub id.

    Raises:
        ValueError: if there is none.
    """
    source = os.path.expanduser(source)
    if not Path(source).exists():
        look_up(source, "config", CONFIG_NAME)
    return BladeConfig.from_pretrained(source)
