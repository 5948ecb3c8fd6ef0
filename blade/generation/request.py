"""What is asked for in a generation, with a model's defaults filled in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from blade.attention.config import CONFIG_NAME, BladeConfig
from blade.models.acceleration import OFFLOADS, QUANTIZATIONS, parse_cache, split_lora
from blade.models.devices import DTYPES
from blade.models.source import BUNDLED, look_up
from blade.students.loading import parse_times
from blade.students.source import BUNDLED_STUDENTS

FPS = 16
"""Frames a second of a model that does not say its own: Wan's."""

BUNDLED_DEFAULTS = {"height": 96, "width": 96, "frames": 33, "steps": 30, "guidance_scale": 2.0}
"""What the shapes model was trained for, with little guidance, since much deforms its shapes; Diffusers' own
defaults are those of the large models."""

OPTIONAL_DEFAULTS = ("fps", "negative_prompt", "guidance_scale_2", "flow_shift")
"""Fields of a request that a family may recommend a value for."""

SPARSE_OPTIONS = ("sparsity", "dense_steps", "dense_layers")
"""Fields of a request that change a field of the same name in the BLADE configuration."""

NO_STUDENT = "none"
"""What is asked for as a student by who wants none."""

TEACHER_OPTIONS = (
    "negative_prompt", "attention", "config", *SPARSE_OPTIONS, "guidance_scale", "guidance_scale_2", "student_weight",
    "scheduler", "noise_kept", "flow_shift", "loras", "cache",
)  # fmt: skip
"""Fields of a request that say how a model itself is sampled, which a student has settled."""

STUDENT_OPTIONS = ("student", "student_weight", "scheduler", "noise_kept")
"""Fields of a request that belong to a student."""

MODEL_OPTIONS = ("guidance_scale_2", "flow_shift", "loras", "cache", "image", "last_image", "video", "strength")
"""Fields of a request that make sense for some models only."""

MAXIMUM_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Everything that decides a video. None takes the model's default, which `resolve_request` fills in."""

    prompt: str
    """What the video shows."""
    negative_prompt: str | None = None
    """What it should not show; without effect where `guidance_scale` is at most 1."""
    model: str = BUNDLED
    """`BUNDLED`, a folder in Diffusers format, or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id; None takes its main branch. Once resolved: the commit."""
    attention: Literal["dense", "asa", "asa-gt", "patterns"] | None = None
    """The attention method: over the configuration's, or over the model's training-free preset. `patterns` only with a
    configuration that has them."""
    config: str | None = None
    """Where a BLADE configuration is read from: a folder, a file, or a Hub id."""
    blade_config: BladeConfig | None = None
    """The BLADE configuration itself, instead of `config`. None in a resolved request: dense."""
    sparsity: float | None = None
    """Over the configuration's `sparsity`."""
    dense_steps: int | float | None = None
    """Over the configuration's `dense_steps`."""
    dense_layers: str | tuple[int, ...] | None = None
    """Over the configuration's `dense_layers`."""
    steps: int | None = None
    """Denoising steps."""
    guidance_scale: float | None = None
    """Weight of classifier-free guidance; at most 1: none."""
    height: int | None = None
    """Pixels."""
    width: int | None = None
    """Pixels."""
    frames: int | None = None
    """Number of frames."""
    fps: int | None = None
    """Frames a second, when played."""
    seed: int = 0
    """Seed of the noise, which is drawn on the CPU whatever the device."""
    device: str | None = None
    """A torch device; None takes CUDA if there is one."""
    dtype: str | None = None
    """A name of `blade.models.devices.DTYPES`; None takes bfloat16 on CUDA and float32 elsewhere."""
    student: str | None = None
    """A few-step student, one of `BUNDLED_STUDENTS`, a folder, or a Hub id; see `load_student`."""
    student_weight: float | None = None
    """Strength of its LoRA; None takes 1."""
    scheduler: str | None = None
    """The times that the student was trained at, such as "999,856,665,399", where it doesn't bring them itself."""
    noise_kept: float | None = None
    """The share of the noise that the student's steps keep, in [0, 1]; None takes its own."""
    image: str | None = None
    """The first frame: an image file, or the address of one."""
    last_image: str | None = None
    """The last frame, beside `image`."""
    video: str | None = None
    """The video that is changed."""
    strength: float | None = None
    """How far `video` is changed, in (0, 1]; None takes the pipeline's default."""
    guidance_scale_2: float | None = None
    """`guidance_scale` of a second transformer."""
    flow_shift: float | None = None
    """Shift of a flow-matching scheduler toward high noise."""
    loras: tuple[str, ...] = ()
    """Folders, files or Hub ids of LoRAs, each with "=STRENGTH" or without."""
    offload: str = "none"
    """One of `blade.models.acceleration.OFFLOADS`."""
    vae_tiling: bool = False
    """Decode in tiles."""
    quantize: str | None = None
    """One of `blade.models.acceleration.QUANTIZATIONS`."""
    compile: bool = False
    """Compile the transformer's blocks and the decoder."""
    cache: str | None = None
    """One of `blade.models.acceleration.CACHES`, with "=NUMBER" or without."""

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError("`prompt` must say what the video shows, got an empty one.")
        if not self.model:
            raise ValueError("`model` must be a folder or a Hub id, got an empty one.")
        for name in ("steps", "height", "width", "frames", "fps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        for name in ("guidance_scale", "guidance_scale_2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be at least 0 and finite, got {value!r}.")
        if self.flow_shift is not None and not 0 < self.flow_shift < math.inf:
            raise ValueError(f"`flow_shift` must be above 0 and finite, got {self.flow_shift!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= MAXIMUM_SEED:
            raise ValueError(f"`seed` must be an integer from 0 to 2**63 - 1, got {self.seed!r}.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.noise_kept is not None and not 0 <= self.noise_kept <= 1:
            raise ValueError(f"`noise_kept` must be in [0, 1], got {self.noise_kept!r}.")
        for name in STUDENT_OPTIONS:
            if getattr(self, name) is not None and self.student is None:
                raise ValueError(f"`{name}` must not be given without `student`.")
        if self.scheduler is not None:
            parse_times(self.scheduler)
        self._check_conditions()
        self._check_acceleration()
        if self.config is not None and self.blade_config is not None:
            raise ValueError("`config` and `blade_config` must not both be given.")
        given = self._given(*SPARSE_OPTIONS)
        BladeConfig(attention="asa" if self.attention in (None, "patterns") else self.attention, **given)
        if self.attention == "dense" and given:
            raise ValueError(f'`{next(iter(given))}` must not be given where `attention` is "dense".')

    def _check_conditions(self) -> None:
        if self.image is not None and self.video is not None:
            raise ValueError("`image` and `video` must not both be given.")
        for name, needed in (("last_image", "image"), ("strength", "video")):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ValueError(f"`{name}` must not be given without `{needed}`.")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"`strength` must be above 0 and at most 1, got {self.strength!r}.")

    def _check_acceleration(self) -> None:
        object.__setattr__(self, "loras", tuple(self.loras))
        for lora in self.loras:
            split_lora(lora)
        for name, known in (("offload", OFFLOADS), ("quantize", QUANTIZATIONS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        if self.cache is not None:
            parse_cache(self.cache)
        if self.offload == "sequential":
            for name in ("quantize", "compile"):
                if getattr(self, name):
                    raise ValueError(
                        f"`{name}` must not be given with `offload` sequential, which takes every weight apart; "
                        'take "group".'
                    )

    @property
    def condition(self) -> str | None:
        """What the video starts from beside the prompt: "image", "video" or nothing."""
        return next((name for name in ("image", "video") if getattr(self, name) is not None), None)

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def sparse_config(self, preset: Callable[[], BladeConfig]) -> BladeConfig | None:
        """Return the BLADE configuration of this request, None for dense.

        Args:
            preset: what to start from where the request names no configuration.
        """
        if self.attention == "dense":
            return None
        config = read_config(self.config) if self.config is not None else self.blade_config or preset()
        changes = self._given(*SPARSE_OPTIONS)
        if self.attention == "asa-gt":
            changes |= {"attention": "asa", "pooled_tokens": "all", "patterns": None}
        elif self.attention == "asa":
            changes |= {"attention": "asa", "pooled_tokens": _without_all(config.pooled_tokens), "patterns": None}
        elif self.attention == "patterns" and config.attention != "patterns":
            raise ValueError('`attention` must not be "patterns" without a `config` that has a table of them.')
        config = replace(config, **changes)
        return None if config.attention == "dense" else config


def default_student(given: Mapping[str, Any]) -> str | None:
    """Return the student that makes a video where none is named: one of the bundled model's, or None.

    Args:
        given: the fields of a request that were given. Some call for the model itself: `TEACHER_OPTIONS`, and numbers
            of steps that no student has.
    """
    if given.get("model", BUNDLED) != BUNDLED or any(name in given for name in TEACHER_OPTIONS):
        return None
    return BUNDLED_STUDENTS.get(given.get("steps", min(BUNDLED_STUDENTS)))


def read_config(source: str) -> BladeConfig:
    """Read a BLADE configuration.

    Args:
        source: a folder or file that holds it, or a Hub id.

    Raises:
        ValueError: if there is none.
    """
    if not Path(source).exists():
        look_up(source, "config", CONFIG_NAME)
    return BladeConfig.from_pretrained(source)


def dense_request(request: GenerationRequest) -> GenerationRequest:
    """Return the same request with dense attention, for comparison."""
    nothing: dict[str, Any] = dict.fromkeys(SPARSE_OPTIONS)
    return replace(request, attention="dense", blade_config=None, **nothing)


def _without_all(pooled_tokens: str) -> str:
    return "none" if pooled_tokens == "all" else pooled_tokens
