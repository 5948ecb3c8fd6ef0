"""The options of a generation in their groups.

Requests are made of these groups; the command line, its help and its completion, and the rules of which options go
together are read off them. Imports nothing heavy, so that a command's help does not wait for PyTorch.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import ClassVar, Literal

from blade.common.checks import (
    LARGEST_INTEGER,
    MOST_FRAMES,
    MOST_PIXELS,
    MOST_STEPS,
    check_choice,
    check_integer,
    check_number,
    shortened,
)
from blade.common.fields import check_type
from blade.common.options import OptionGroup, option, option_choices, option_names
from blade.families.kinds import PRESET_KINDS, PresetKind
from blade.models.choices import (
    CACHES,
    DECODERS,
    DTYPE_NAMES,
    OFFLOADS,
    QUANTIZATIONS,
    Decoder,
    DtypeName,
    Offload,
    Quantization,
    parse_cache,
    parse_lora,
    parse_transformer,
)
from blade.models.source import BUNDLED

PRECISIONS = ("full", "int8", "fp8")

ATTENTIONS = ("dense", "asa", "asa-gt", "patterns")
"""Attention methods."""

MAXIMUM_SEED = LARGEST_INTEGER

MOST = {"height": MOST_PIXELS, "width": MOST_PIXELS, "frames": MOST_FRAMES, "fps": 1000, "steps": MOST_STEPS}
"""Largest values of options that count something."""

ENTRY_POINTS = "blade.options"
"""Entry point group of third parties' groups of options."""


@dataclass(frozen=True, kw_only=True)
class PromptOptions(OptionGroup):
    """The prompt."""

    title: ClassVar[str] = "Prompt"

    prompt: str = option(MISSING)
    """Content of the video, in words."""

    def check(self) -> None:
        """Check the prompt."""
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError("`prompt` must say what the video shows, got an empty one.")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup):
    """The model, its weights and its LoRAs."""

    title: ClassVar[str] = "Model and LoRA"

    model: str = option(BUNDLED)
    """A folder in Diffusers format or a Hub id; by default the bundled model of moving shapes."""
    revision: str | None = option()
    """Branch, tag or commit of a Hub id; by default its main branch."""
    transformer: str | None = option(settled_by_student=True, of_model=True)
    """Weights in place of the model's transformer: a .safetensors or .gguf file, a folder, or owner/name/FILE on the
    Hub; for a model of two transformers FIRST:SECOND."""
    loras: tuple[str, ...] = option((), flag="lora", settled_by_student=True, of_model=True)
    """A LoRA: folder, file or Hub id, with =STRENGTH or without; repeatable. For a model of two transformers
    FIRST:SECOND=STRENGTH, or =STRENGTH:STRENGTH."""

    def check(self) -> None:
        """Check that there is a model, that its files can be told apart, and that LoRAs' strengths are numbers."""
        if not self.model:
            raise ValueError("`model` must be a folder or a Hub id, got an empty one.")
        if self.transformer is not None:
            check_type("transformer", self.transformer, str)
            parse_transformer(self.transformer)
        check_type("loras", self.loras, tuple[str, ...])
        object.__setattr__(self, "loras", tuple(self.loras))
        for lora in self.loras:
            parse_lora(lora)


@dataclass(frozen=True, kw_only=True)
class VideoOptions(OptionGroup):
    """The size of the video, and the inputs that it is made from."""

    title: ClassVar[str] = "Video"

    height: int | None = option()
    """Pixels; by default the model's own."""
    width: int | None = option()
    """Pixels; by default the model's own."""
    frames: int | None = option()
    """Number of frames; by default the model's own."""
    fps: int | None = option()
    """Frames a second, when played."""
    image: str | None = option(of_model=True)
    """The first frame: an image file or its address."""
    last_image: str | None = option(of_model=True)
    """The last frame, beside the first."""
    video: str | None = option(of_model=True)
    """A video to change; its frames are taken by their times at --fps."""
    strength: float | None = option(of_model=True)
    """Share of the video that is changed, above 0 and at most 1; by default the pipeline's own."""

    def check(self) -> None:
        """Check sizes, and which inputs go together."""
        _check_counts(self, "height", "width", "frames", "fps")
        if self.image is not None and self.video is not None:
            raise ValueError("`image` and `video` must not both be given.")
        for name, needed in (("last_image", "image"), ("strength", "video")):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ValueError(f"`{name}` must not be given without `{needed}`.")
        if self.strength is not None:
            check_number("strength", self.strength, "above 0 and at most 1", lambda x: 0 < x <= 1)

    @property
    def condition(self) -> Literal["image", "video"] | None:
        """The input that the video starts from beside the prompt, if any."""
        return "image" if self.image is not None else "video" if self.video is not None else None


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(OptionGroup):
    """The denoising."""

    title: ClassVar[str] = "Sampling"

    steps: int | None = option()
    """Denoising steps; by default the model's or the student's own."""
    seed: int = option(0)
    """Seed of the noise, which is drawn on the CPU whatever the device; by default 0."""
    guidance_scale: float | None = option(settled_by_student=True)
    """Weight of classifier-free guidance; at most 1: none."""
    guidance_scale_2: float | None = option(settled_by_student=True, of_model=True)
    """Guidance scale of a second transformer."""
    negative_prompt: str | None = option(settled_by_student=True)
    """Content that the video should not have; without effect where there is no guidance."""
    flow_shift: float | None = option(settled_by_student=True, of_model=True)
    """Shift of a flow-matching scheduler toward high noise."""

    def check(self) -> None:
        """Check that the numbers are in range."""
        _check_counts(self, "steps")
        for name in ("guidance_scale", "guidance_scale_2"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), "at least 0 and finite", lambda x: x >= 0)
        if self.flow_shift is not None:
            check_number("flow_shift", self.flow_shift, "above 0 and finite", lambda x: x > 0)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= MAXIMUM_SEED:
            raise ValueError(f"`seed` must be an integer from 0 to 2**63 - 1, got {shortened(self.seed)}.")


@dataclass(frozen=True, kw_only=True)
class SparseOptions(OptionGroup):
    """Sparse attention, over a configuration or a preset of the model's."""

    title: ClassVar[str] = "Sparse attention"

    sparsity: float | None = option(settled_by_student=True)
    """Share of query-key pairs that sparse layers leave out, in [0, 1)."""
    attention: Literal["dense", "asa", "asa-gt", "patterns"] | None = option(
        choices=ATTENTIONS, settled_by_student=True
    )
    """dense, asa (adaptive block-sparse, the default), asa-gt (asa with all pooled tokens), or patterns (those of the
    configuration)."""
    config: str | None = option(settled_by_student=True)
    """A folder or Hub id with a blade_config.json; by default the model's preset."""
    preset: PresetKind | None = option(choices=PRESET_KINDS, settled_by_student=True)
    """Kind of the model's preset: training-free (the default), few-step (for students trained dense, the default if a
    student brings no sparse attention) or student (for weights trained with it)."""
    dense_steps: int | float | None = option(settled_by_student=True)
    """Steps from the start of the schedule that stay dense: a count, or a fraction below 1. A --strength below 1 skips
    steps from the start, dense ones first."""
    dense_layers: str | tuple[int, ...] | None = option(settled_by_student=True)
    """Layers that stay dense, such as "0-1,39"."""
    precision: Literal["full", "int8", "fp8"] | None = option(choices=PRECISIONS)
    """full; int8: sparse layers multiply queries and keys as 8-bit integers; or fp8: with them weights and values as
    8-bit floats."""

    def check(self) -> None:
        """Check that there is such a preset, and nothing that it contradicts."""
        if self.preset is None:
            return
        check_choice("preset", self.preset, PRESET_KINDS)
        if self.config is not None or self.attention in ("dense", "patterns"):
            other = "`config`" if self.config is not None else f'`attention` "{self.attention}"'
            raise ValueError(f"`preset` must not be given with {other}, got {self.preset!r}.")


@dataclass(frozen=True, kw_only=True)
class StudentOptions(OptionGroup):
    """The few-step student."""

    title: ClassVar[str] = "Student"

    student: str | None = option(of_student=True)
    """A few-step student: a folder, a safetensors file in any LoRA layout or of whole weights, or a Hub id, such as
    GYP666/VIDEO-BLADE; FIRST:SECOND for a model of two transformers; of the bundled model shapes-8-steps, which
    blade-generate takes by default, or shapes-4-steps; none: the model itself."""
    student_weight: float | None = option(of_student=True, settled_by_student=True)
    """Strength of the student's LoRA; by default 1."""
    scheduler: str | None = option(of_student=True, settled_by_student=True)
    """Times that the student was trained at, such as 999,856,665,399, if it brings none and none are known."""
    noise_kept: float | None = option(of_student=True, settled_by_student=True)
    """Share of the noise that the student's steps keep, in [0, 1]; by default its own."""

    def check(self) -> None:
        """Check the range of the share, and that nothing is said of a student that is none."""
        if self.noise_kept is not None:
            check_number("noise_kept", self.noise_kept, "in [0, 1]", lambda x: 0 <= x <= 1)
        for name in ("student_weight", "scheduler", "noise_kept"):
            if getattr(self, name) is not None and self.student is None:
                raise ValueError(f"`{name}` must not be given without `student`.")


@dataclass(frozen=True, kw_only=True)
class AccelerationOptions(OptionGroup):
    """The device, memory and speed."""

    title: ClassVar[str] = "Memory and speed"

    device: str | None = option()
    """cpu, cuda, cuda:1, ...; by default CUDA if there is one."""
    dtype: DtypeName | None = option(choices=DTYPE_NAMES)
    """float32, bfloat16 or float16; by default bfloat16 on CUDA and float32 elsewhere."""
    offload: Offload = option("none", choices=OFFLOADS)
    """Offloading of weights to the CPU while they are not needed: none, model, sequential, group, or auto for the
    fastest way that fits."""
    quantize: Quantization | None = option(choices=QUANTIZATIONS, prepare="blade.models.acceleration:quantize")
    """Store the transformer's weights as int8 or fp8 (torchao). int8-dynamic, fp8-dynamic (from sm_89 on) and nvfp4
    (from sm_100 on) multiply in that type too, which is faster with --compile."""
    cache: str | None = option(settled_by_student=True, of_model=True, choices=tuple(CACHES))
    """Reuse what changes little from step to step: first-block, mag, sea or cache-dit, with =THRESHOLD or without;
    taylor-seer, pyramid or faster, with =STEPS or without."""
    compile: bool = option(False, prepare="blade.models.acceleration:compile_blocks")
    """Compile the transformer's blocks and the decoder."""
    vae_tiling: bool = option(False, prepare="blade.models.acceleration:enable_tiling")
    """Decode in tiles, which takes less memory."""
    decoder: Decoder = option("full", choices=DECODERS, of_model=True)
    """full, the VAE's own, or tiny: a small one that takes a fraction of the time and memory, and is less exact."""
    decoder_weights: str | None = option(of_model=True)
    """Weights of a tiny decoder (TAEHV): a .safetensors or .pth file, or a Hub id, with /FILE or without."""

    def check(self) -> None:
        """Check that the names exist, and go together."""
        for name in ("dtype", "offload", "quantize", "decoder"):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), option_choices(AccelerationOptions, name))
        if self.decoder == "tiny" and not self.decoder_weights:
            raise ValueError('`decoder_weights` must be given with `decoder` "tiny": a file, or a Hub id.')
        if self.decoder != "tiny" and self.decoder_weights is not None:
            raise ValueError('`decoder_weights` must not be given without `decoder` "tiny".')
        if self.cache is not None:
            check_type("cache", self.cache, str)
            parse_cache(self.cache)
        if self.offload == "sequential":
            for name in ("quantize", "compile"):
                if getattr(self, name):
                    raise ValueError(
                        f"`{name}` must not be given with `offload` sequential, which takes every weight apart; "
                        'take "group".'
                    )


GROUPS: tuple[type[OptionGroup], ...] = (
    PromptOptions,
    ModelOptions,
    VideoOptions,
    SamplingOptions,
    SparseOptions,
    StudentOptions,
    AccelerationOptions,
)
"""The groups of options that a request is made of, in the order of the help."""

_ADDED: list[type[OptionGroup]] = []


def register_options(group: type[OptionGroup]) -> type[OptionGroup]:
    """Add a group of options of somebody else's; a class decorator.

    Its options appear on the command line and in records, and their `prepare` runs. A package does the same for all
    who install it by an entry point of the group `blade.options` that names the class.

    Args:
        group: a frozen dataclass of options, every one of them with a default.

    Raises:
        ValueError: if an option of that name exists already.
    """
    known = {name for other in (*GROUPS, *_ADDED) if other is not group for name in option_names(other)}
    twice = sorted(known & set(option_names(group)))
    if twice:
        raise ValueError(f"`{twice[0]}` of {group.__name__} is an option already; take another name.")
    if group not in _ADDED:
        _ADDED.append(group)
    return group


def added_groups() -> tuple[type[OptionGroup], ...]:
    """Return the groups of options that others have added."""
    _load_entry_points()
    return tuple(_ADDED)


@cache
def _load_entry_points() -> None:
    for entry in entry_points(group=ENTRY_POINTS):
        register_options(entry.load())


def _check_counts(group: OptionGroup, *names: str) -> None:
    for name in names:
        if getattr(group, name) is not None:
            check_integer(name, getattr(group, name), least=1, most=MOST[name])
