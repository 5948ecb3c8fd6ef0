"""The configuration of a distillation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from blade.attention.config import BladeConfig
from blade.common.checks import (
    MOST_FRAMES,
    MOST_PIXELS,
    MOST_STEPS,
    check_choice,
    check_integer,
    check_number,
)
from blade.common.fields import check_types
from blade.distillation.roles import TARGETS
from blade.distillation.trajectory import INTERVALS
from blade.models.devices import DTYPES
from blade.models.source import BUNDLED

MOST_BATCH = 2**16
"""Most samples that are computed at a time; more are taken for a mistake."""


def _positive(value: float) -> bool:
    return value > 0


def _share(value: float) -> bool:
    return 0 <= value < 1


@dataclass(kw_only=True)
class VideoSize:
    """Size of the videos in training; unset values take the model's defaults."""

    height: int | None = None
    """Pixels."""
    width: int | None = None
    """Pixels."""
    frames: int | None = None
    """Number of frames."""

    def __post_init__(self) -> None:
        for name, most in (("height", MOST_PIXELS), ("width", MOST_PIXELS), ("frames", MOST_FRAMES)):
            if getattr(self, name) is not None:
                check_integer(f"video.{name}", getattr(self, name), least=1, most=most)


@dataclass(kw_only=True)
class TrajectoryConfig:
    """The student's sampling times; see `blade.distillation.trajectory`."""

    steps: list[int] = field(default_factory=lambda: [4])
    """Numbers of sampling steps. With several, the student is conditioned on the number."""
    flow_shift: float | None = None
    """Flow shift of a flow-matching model's times; none: the scheduler's own."""
    times: list[list[float]] | None = None
    """Explicit grids of times, one for each of `steps`."""
    noise_kept: float = 1.0
    """Share of the noise that a step keeps (BLADE's release: 0.9); below 1, no Diffusers scheduler is equivalent."""
    sampling_noise_kept: float | None = None
    """The same for the finished student, whose sampling noise may differ from training; none: as in training."""
    intervals: str = "separate"
    """`separate` (TDM) or `shared` (BLADE's release), which conditions the fake score on the step."""
    lowest_time: float = 20.0
    """Lowest time in training."""
    highest_time: float = 980.0
    """Highest time in training."""

    def __post_init__(self) -> None:
        check_choice("trajectory.intervals", self.intervals, INTERVALS)
        for steps in self.steps:
            check_integer("trajectory.steps", steps, least=1, most=MOST_STEPS)
        for name in ("noise_kept", "sampling_noise_kept"):
            if getattr(self, name) is not None:
                check_number(f"trajectory.{name}", getattr(self, name), "in [0, 1]", lambda x: 0 <= x <= 1)
        if self.flow_shift is not None:
            check_number("trajectory.flow_shift", self.flow_shift, "above 0", _positive)


@dataclass(kw_only=True)
class AttentionConfig:
    """Attention of the student and of the fake score."""

    config: str | None = None
    """A folder or Hub id with a BLADE configuration, or the name of a preset for students; none: the model's."""
    method: str | None = None
    """`dense`, `asa` or `asa-gt`; overrides the configuration."""
    sparsity: float | None = None
    """Sparsity; overrides the configuration."""
    dense_steps: float | None = None
    """Number of dense steps, or a fraction below 1; overrides the configuration."""
    dense_layers: str | None = None
    """Dense layers, such as "0-1,39"; overrides the configuration."""
    fake: str = "dense"
    """Attention of the fake score: `dense`, or `student` for the student's."""
    warmup_updates: int = 0
    """Updates over which the sparsity rises from 0, in steps of an eighth."""

    def __post_init__(self) -> None:
        if self.method is not None:
            check_choice("attention.method", self.method, ("dense", "asa", "asa-gt"))
        check_choice("attention.fake", self.fake, ("dense", "student"))
        check_integer("attention.warmup_updates", self.warmup_updates, least=0)
        BladeConfig(**self.changes())

    def changes(self) -> dict[str, Any]:
        """Return the fields of a `BladeConfig` that are overridden by name."""
        values = {name: getattr(self, name) for name in ("sparsity", "dense_steps", "dense_layers")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(kw_only=True)
class WeightsConfig:
    """The trained weights."""

    rank: int = 64
    """Rank of the LoRAs of student and fake score."""
    alpha: int = 64
    """A LoRA's update is scaled by `alpha / rank`."""
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    """Names, or ends of names, of the layers with a LoRA."""
    full: bool = False
    """Train all weights instead, in float32, which takes three copies of the transformer."""
    start_from: str | None = None
    """Initial student, of the same kind and rank; none: the base."""
    ema_decay: float = 0.0
    """Largest decay of the average of the student's weights over updates; 0: no averaging."""
    saved_as: str | None = None
    """Type of the weights in the student's files: float32, bfloat16 or float16; none: the type of the base."""

    def __post_init__(self) -> None:
        check_integer("weights.rank", self.rank, least=1, most=2**16)
        check_integer("weights.alpha", self.alpha, least=1)
        check_number("weights.ema_decay", self.ema_decay, "in [0, 1)", _share)
        if self.saved_as is not None:
            check_choice("weights.saved_as", self.saved_as, tuple(DTYPES))
        if not self.targets:
            raise ValueError("`weights.targets` must name at least one layer, got none.")


@dataclass(kw_only=True)
class FakeConfig:
    """Updates of the fake score."""

    learning_rate: float = 5e-4
    """Peak learning rate."""
    updates: int = 1
    """Updates for each update of the generator."""
    weighting: str = "velocity"
    """Weighting of the error over noise levels: `velocity`, `min-snr` or `none`; see `blade.distillation.losses`."""
    importance: bool = False
    """Weight samples by the likelihood of their noise (TDM)."""
    regularization: float = 0.0
    """Weight of the distance to the teacher (BLADE's release: 0.5 for CogVideoX)."""

    def __post_init__(self) -> None:
        check_number("fake.learning_rate", self.learning_rate, "above 0", _positive)
        check_integer("fake.updates", self.updates, least=1)
        check_choice("fake.weighting", self.weighting, ("velocity", "min-snr", "none"))
        check_number("fake.regularization", self.regularization, "at least 0", lambda x: x >= 0)


@dataclass(kw_only=True)
class GeneratorConfig:
    """Updates of the student."""

    objective: str = "distribution"
    """`distribution` (TDM), or `imitation`: match the dense teacher's predictions without guidance on its own videos,
    which does not reduce the steps but adapts the weights to sparsity, as a starting point."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    ode_updates: int = 0
    """Number of initial updates that regress the student onto the guided teacher's trajectories (ODE initialization,
    CausVid, arXiv 2412.07772): cheap updates that bring it close to the teacher before the objective takes over. The
    learning rate's schedule restarts after them."""
    ode_learning_rate: float | None = None
    """Peak learning rate of these updates; none: `learning_rate`."""
    trajectories: int = 256
    """Number of trajectories of the guided teacher, made before training from the first prompts, for ODE
    initialization and imitation."""
    substeps: int = 3
    """Steps of the teacher in them for each step of the student."""
    guidance_scale: float | None = None
    """Guidance scale of the teacher; none: the model's default."""
    negative_prompt: str | None = None
    """Negative prompt of the teacher's guidance; none: the model's default."""
    loss: str = "squared"
    """`squared` or `huber`."""
    huber: float = 1e-3
    """Constant c of the pseudo-Huber loss."""
    normalize: bool = True
    """Divide each sample's loss by the distance of the student to the teacher."""
    normalize_cap: float | None = None
    """Upper limit of that divisor (BLADE's release: 5)."""

    def __post_init__(self) -> None:
        check_number("generator.learning_rate", self.learning_rate, "above 0", _positive)
        check_choice("generator.objective", self.objective, ("distribution", "imitation"))
        check_integer("generator.ode_updates", self.ode_updates, least=0)
        check_integer("generator.trajectories", self.trajectories, least=1)
        check_integer("generator.substeps", self.substeps, least=1, most=MOST_STEPS)
        if self.ode_learning_rate is not None:
            check_number("generator.ode_learning_rate", self.ode_learning_rate, "above 0", _positive)
        check_choice("generator.loss", self.loss, ("squared", "huber"))
        check_number("generator.huber", self.huber, "above 0", _positive)
        if self.normalize_cap is not None:
            check_number("generator.normalize_cap", self.normalize_cap, "above 0", _positive)
        if self.guidance_scale is not None:
            check_number("generator.guidance_scale", self.guidance_scale, "at least 1", lambda x: x >= 1)


@dataclass(kw_only=True)
class OptimizerConfig:
    """Optimizers of both trained roles."""

    name: str = "adamw"
    """`adamw`, or `adamw-8bit`, which needs the extra `quantize`."""
    beta1: float = 0.0
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    clip: float = 1.0
    """Gradient norm above which gradients are clipped."""
    schedule: str = "constant"
    """Schedule of the student's learning rate: `constant`, or `cosine` down to 0 at the last update of each kind."""
    warmup_updates: int = 5
    """Updates over which both learning rates rise."""

    def __post_init__(self) -> None:
        check_choice("optimizer.name", self.name, ("adamw", "adamw-8bit"))
        check_choice("optimizer.schedule", self.schedule, ("constant", "cosine"))
        for name in ("beta1", "beta2"):
            check_number(f"optimizer.{name}", getattr(self, name), "in [0, 1)", _share)
        for name in ("epsilon", "clip"):
            check_number(f"optimizer.{name}", getattr(self, name), "above 0", _positive)
        check_number("optimizer.weight_decay", self.weight_decay, "at least 0", lambda x: x >= 0)
        check_integer("optimizer.warmup_updates", self.warmup_updates, least=0)


@dataclass(kw_only=True)
class RunConfig:
    """Length, batch size, precision and devices of a run."""

    updates: int = 300
    """Updates of the generator."""
    batch_size: int = 1
    """Samples per forward pass on each process, or each group of `sequence_parallel` processes."""
    accumulation: int = 1
    """Forward passes of each process per update."""
    precision: str | None = None
    """`bf16`, `fp32`, or `mixed`, which computes in bf16 and keeps the frozen base in float32; trained weights are
    always float32. None: bf16 on a GPU, fp32 elsewhere."""
    gradient_checkpointing: bool = True
    """Recompute the blocks in the backward pass instead of keeping their activations."""
    parallel: str = "ddp"
    """Parallelism of several processes: `ddp`, or `fsdp`, which shards the base's weights too."""
    sequence_parallel: int = 1
    """Processes in a group that computes its samples together, each a part of the tokens (Ulysses); 1: no groups."""
    device: str | None = None
    """Device of a single process: cpu, cuda, cuda:1, ...; none: CUDA if available."""
    seed: int = 0
    """Seed of all random draws."""
    checkpoint_every: int = 25
    """Updates between checkpoints."""
    checkpoints_kept: int = 2
    """Number of newest checkpoints to keep."""
    skip_factor: float = 20.0
    """Skip a step whose gradient norm exceeds the median of the last ones by this factor."""

    def __post_init__(self) -> None:
        for name in ("updates", "accumulation", "checkpoint_every", "checkpoints_kept"):
            check_integer(f"run.{name}", getattr(self, name), least=1)
        check_integer("run.batch_size", self.batch_size, least=1, most=MOST_BATCH)
        check_integer("run.sequence_parallel", self.sequence_parallel, least=1)
        check_integer("run.seed", self.seed, least=0)
        check_number("run.skip_factor", self.skip_factor, "above 1", lambda x: x > 1)
        check_choice("run.parallel", self.parallel, ("ddp", "fsdp"))
        if self.precision is not None:
            check_choice("run.precision", self.precision, ("bf16", "mixed", "fp32"))


@dataclass(kw_only=True)
class ValidationConfig:
    """Videos of the student during training, for inspection only; with scores for the bundled model."""

    every: int = 50
    """Updates between validations; 0: no validation, not even at the end."""
    prompts: list[str] = field(default_factory=list)
    """Prompts of the videos; none: the first training prompts."""
    count: int = 4
    """Number of training prompts to take if `prompts` is empty."""

    def __post_init__(self) -> None:
        check_integer("validation.every", self.every, least=0)
        check_integer("validation.count", self.count, least=1, most=MOST_BATCH)


@dataclass(kw_only=True)
class DistillationConfig:
    """All settings that determine a student."""

    model: str = BUNDLED
    """The bundled model, a folder in Diffusers format, or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    output: str = "outputs/student"
    """Folder of the student and of the checkpoints from which an interrupted run resumes."""
    prompts: str | None = None
    """A text file with one prompt per line, or JSONL with a `prompt` each; none: captions, for the bundled model."""
    embeddings: str | None = None
    """Folder of the prompts' embeddings, which several runs may share; none: in `output`."""
    trajectories: str | None = None
    """Folder of the teacher's trajectories, which several runs may share; none: in `output`."""
    video: VideoSize = field(default_factory=VideoSize)
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    fake: FakeConfig = field(default_factory=FakeConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    trackers: list[str] = field(default_factory=list)
    """Names of Accelerate's trackers, such as tensorboard or wandb, in addition to the log that is always written."""

    def __post_init__(self) -> None:
        check_types(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def student_attention(config: AttentionConfig, preset: BladeConfig) -> BladeConfig | None:
    """Return the student's attention; None for dense.

    Args:
        config: the student's and the fake score's attention.
        preset: the model's preset, for a `config` that names no configuration.
    """
    from blade.families.registry import preset_names
    from blade.generation.request import read_config

    base = preset
    if config.config in preset_names("student"):
        base = BladeConfig.from_preset(str(config.config), "student")
    elif config.config is not None:
        base = read_config(config.config)
    changes = config.changes()
    if config.method == "dense":
        return None
    if config.method is not None:
        pooled = "all" if config.method == "asa-gt" else "none"
        changes |= {"attention": "asa", "pooled_tokens": pooled, "patterns": None}
    base = replace(base, kind="student", **changes)
    return None if base.attention == "dense" else base
