"""What a distillation is made by: a structured configuration, read from YAML and `key=value`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from blade.attention.config import BladeConfig
from blade.common.checks import check_choice, check_flag, check_integer, check_number
from blade.distillation.roles import TARGETS
from blade.distillation.trajectory import INTERVALS
from blade.models.devices import DTYPES
from blade.models.source import BUNDLED

RECIPES = "recipes"
"""Folder of the package that holds the recipes."""


def _positive(value: float) -> bool:
    return value > 0


def _share(value: float) -> bool:
    return 0 <= value < 1


@dataclass(kw_only=True)
class VideoSize:
    """Size of the videos that are trained on; what is left out is the model's default."""

    height: int | None = None
    """Pixels."""
    width: int | None = None
    """Pixels."""
    frames: int | None = None
    """Number of frames."""

    def __post_init__(self) -> None:
        for name in ("height", "width", "frames"):
            if getattr(self, name) is not None:
                check_integer(f"video.{name}", getattr(self, name), least=1)


@dataclass(kw_only=True)
class TrajectoryConfig:
    """The student's times. See `blade.distillation.trajectory`."""

    steps: list[int] = field(default_factory=lambda: [4])
    """Numbers of steps that the student is for. With several, it is told which."""
    flow_shift: float | None = None
    """Of a flow-matching model's times; none: the scheduler's own."""
    times: list[list[float]] | None = None
    """The grids themselves, one for each of `steps`."""
    noise_kept: float = 1.0
    """Share of the noise that a step keeps (BLADE's release: 0.9); below 1 no scheduler of Diffusers does the same."""
    sampling_noise_kept: float | None = None
    """The same of the finished student, where it shall be sampled otherwise than it was trained; none: as it was."""
    intervals: str = "separate"
    """`separate` (TDM) or `shared` (BLADE's release); with shared ones the fake score is told the step."""
    lowest_time: float = 20.0
    """Lowest time that is trained at."""
    highest_time: float = 980.0
    """Highest time that is trained at."""

    def __post_init__(self) -> None:
        check_choice("trajectory.intervals", self.intervals, INTERVALS)
        for name in ("noise_kept", "sampling_noise_kept"):
            if getattr(self, name) is not None:
                check_number(f"trajectory.{name}", getattr(self, name), "in [0, 1]", lambda x: 0 <= x <= 1)
        if self.flow_shift is not None:
            check_number("trajectory.flow_shift", self.flow_shift, "above 0", _positive)


@dataclass(kw_only=True)
class AttentionConfig:
    """The student's attention, and whose else it is."""

    config: str | None = None
    """A folder or Hub id with a BLADE configuration, or the name of a preset for students; none: the model's."""
    method: str | None = None
    """`dense`, `asa` or `asa-gt`, over the configuration's."""
    sparsity: float | None = None
    """Over the configuration's."""
    dense_steps: float | None = None
    """Over the configuration's: a count, or a fraction below 1."""
    dense_layers: str | None = None
    """Over the configuration's, such as "0-1,39"."""
    fake: str = "dense"
    """Attention of the fake score: `dense`, or the `student`'s."""
    warmup_updates: int = 0
    """Updates over which the sparsity rises from 0, in steps of an eighth."""

    def __post_init__(self) -> None:
        if self.method is not None:
            check_choice("attention.method", self.method, ("dense", "asa", "asa-gt"))
        check_choice("attention.fake", self.fake, ("dense", "student"))
        check_integer("attention.warmup_updates", self.warmup_updates, least=0)


@dataclass(kw_only=True)
class WeightsConfig:
    """What is trained."""

    rank: int = 64
    """Of the LoRAs of student and fake score."""
    alpha: int = 64
    """A LoRA's update is scaled by `alpha / rank`."""
    targets: list[str] = field(default_factory=lambda: list(TARGETS))
    """Names, or ends of names, of the layers that a LoRA is put on."""
    full: bool = False
    """Train all weights instead, in float32: three copies of the transformer."""
    start_from: str | None = None
    """A student to begin with, of the same kind and rank; none: the base."""
    ema_decay: float = 0.0
    """Average the student's weights over updates, with this decay at most; 0: the last ones are the student."""
    saved_as: str | None = None
    """Type of the weights in the student's files: float32, bfloat16 or float16; none: as the base is kept."""

    def __post_init__(self) -> None:
        check_integer("weights.rank", self.rank, least=1)
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
    updates: int = 1
    """For each update of the generator."""
    weighting: str = "velocity"
    """Weight of its error by the noise: `velocity`, `min-snr` or `none`; see `blade.distillation.losses`."""
    importance: bool = False
    """Weigh samples by how likely their noise is (TDM)."""
    regularization: float = 0.0
    """Weight of its distance to the teacher (BLADE's release: 0.5 for CogVideoX)."""

    def __post_init__(self) -> None:
        check_number("fake.learning_rate", self.learning_rate, "above 0", _positive)
        check_integer("fake.updates", self.updates, least=1)
        check_choice("fake.weighting", self.weighting, ("velocity", "min-snr", "none"))
        check_flag("fake.importance", self.importance)
        check_number("fake.regularization", self.regularization, "at least 0", lambda x: x >= 0)


@dataclass(kw_only=True)
class GeneratorConfig:
    """Updates of the student."""

    objective: str = "distribution"
    """`distribution` (TDM), or `imitation`: predict what the dense teacher does, without guidance, for videos of its
    own; no fewer steps come of it, only weights that have learned to live with sparsity, to start from."""
    learning_rate: float = 1e-4
    ode_updates: int = 0
    """The first so many updates teach the student to go where the guided teacher goes (ODE initialization, CausVid,
    arXiv 2412.07772): it gets near in short ones, which the objective then need not make. The learning rate's
    schedule begins anew after them."""
    ode_learning_rate: float | None = None
    """Of these; none: `learning_rate`."""
    trajectories: int = 256
    """Of the guided teacher, made before training, which ODE initialization and imitation learn from: of the first
    prompts."""
    substeps: int = 3
    """Steps of the teacher in them for one of the student's."""
    guidance_scale: float | None = None
    """Of the teacher; none: the model's default."""
    negative_prompt: str | None = None
    """What guidance leads away from; none: the model's default."""
    loss: str = "squared"
    """`squared` or `huber`."""
    huber: float = 1e-3
    """Constant c of the pseudo-Huber loss."""
    normalize: bool = True
    """Divide by how far the student is from the teacher."""
    normalize_cap: float | None = None
    """At most so much is divided by (BLADE's release: 5)."""

    def __post_init__(self) -> None:
        check_number("generator.learning_rate", self.learning_rate, "above 0", _positive)
        check_choice("generator.objective", self.objective, ("distribution", "imitation"))
        check_integer("generator.ode_updates", self.ode_updates, least=0)
        check_integer("generator.trajectories", self.trajectories, least=1)
        check_integer("generator.substeps", self.substeps, least=1)
        if self.ode_learning_rate is not None:
            check_number("generator.ode_learning_rate", self.ode_learning_rate, "above 0", _positive)
        check_choice("generator.loss", self.loss, ("squared", "huber"))
        check_number("generator.huber", self.huber, "above 0", _positive)
        check_flag("generator.normalize", self.normalize)
        if self.normalize_cap is not None:
            check_number("generator.normalize_cap", self.normalize_cap, "above 0", _positive)
        if self.guidance_scale is not None:
            check_number("generator.guidance_scale", self.guidance_scale, "at least 1", lambda x: x >= 1)


@dataclass(kw_only=True)
class OptimizerConfig:
    """Of both trained roles."""

    name: str = "adamw"
    """`adamw`, or `adamw-8bit`, which needs the extra `quantize`."""
    beta1: float = 0.0
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 1e-4
    clip: float = 1.0
    """Largest norm of a gradient."""
    schedule: str = "constant"
    """Of the student's learning rate: `constant` or `cosine`, down to 0 at the last update (of either kind)."""
    warmup_updates: int = 5
    """Over which both learning rates rise."""

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
    """How long, how large, where."""

    updates: int = 300
    """Of the generator."""
    batch_size: int = 1
    """Samples in a forward pass, on each process."""
    accumulation: int = 1
    """Forward passes of each process for an update."""
    precision: str | None = None
    """`bf16`, `fp32`, or `mixed`, which computes in bf16 and keeps the frozen base in float32; what is trained always
    is. None: bf16 on a GPU."""
    gradient_checkpointing: bool = True
    """Compute the blocks again in the backward pass instead of keeping what they need."""
    parallel: str = "ddp"
    """With several processes: `ddp`, or `fsdp`, which shares out the base's weights too."""
    device: str | None = None
    """With one process: cpu, cuda, cuda:1, ...; none: CUDA if there is one."""
    seed: int = 0
    checkpoint_every: int = 25
    """Updates."""
    checkpoints_kept: int = 2
    skip_factor: float = 20.0
    """A step is left out if its gradient is so many times as large as the last ones were in the middle."""

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "accumulation", "checkpoint_every", "checkpoints_kept"):
            check_integer(f"run.{name}", getattr(self, name), least=1)
        check_integer("run.seed", self.seed, least=0)
        check_number("run.skip_factor", self.skip_factor, "above 1", lambda x: x > 1)
        check_choice("run.parallel", self.parallel, ("ddp", "fsdp"))
        if self.precision is not None:
            check_choice("run.precision", self.precision, ("bf16", "mixed", "fp32"))


@dataclass(kw_only=True)
class ValidationConfig:
    """Videos of the student on the way, for the eye; of the bundled model with scores. They choose nothing."""

    every: int = 50
    """Updates; 0: none at all, not even at the end."""
    prompts: list[str] = field(default_factory=list)
    """What they show; none: the first of the training prompts."""
    count: int = 4
    """How many, where there are no `prompts`."""

    def __post_init__(self) -> None:
        check_integer("validation.every", self.every, least=0)
        check_integer("validation.count", self.count, least=1)


@dataclass(kw_only=True)
class DistillationConfig:
    """Everything that decides a student."""

    model: str = BUNDLED
    """The bundled model, a folder in Diffusers format, or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    output: str = "outputs/student"
    """Folder of the student; what is needed to go on with a stopped run is kept in it too."""
    prompts: str | None = None
    """A text file, a prompt a line, or JSONL with a `prompt` in each; of the bundled model by default captions."""
    embeddings: str | None = None
    """Folder of the prompts' embeddings, which several runs can share; none: in `output`."""
    trajectories: str | None = None
    """Folder of the teacher's trajectories, which several runs can share; none: in `output`."""
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
    """Names of accelerate's trackers, such as tensorboard or wandb, beside the log that is always written."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that ship with the package."""
    folder = files("blade") / RECIPES
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def load_config(source: str | Path | None = None, overrides: Sequence[str] = ()) -> DistillationConfig:
    """Read a configuration.

    Args:
        source: a YAML file, or the name of a recipe; None: the defaults.
        overrides: `key=value`, such as `trajectory.steps=[4,8]`, over what the file says.

    Raises:
        ValueError: if there is no such file, or a key or a value is not what it must be.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        merged = OmegaConf.structured(DistillationConfig)
        if source is not None:
            merged = OmegaConf.merge(merged, OmegaConf.load(_find(source)))
        for override in overrides:
            if "=" not in override:
                raise ValueError(f"What follows the configuration must be `key=value`, got {override!r}.")
        merged = OmegaConf.merge(merged, OmegaConf.from_dotlist(list(overrides)))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        reason = " ".join(str(error).split("\n    ")[0].split())
        key = getattr(error, "full_key", None)
        where = f"`{key}`" if key else f"the configuration {source}"
        raise ValueError(f"{where} is not right: {reason}") from error
    assert isinstance(config, DistillationConfig)
    return config


def _find(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if str(source) in recipe_names():
        return Path(str(files("blade") / RECIPES / f"{source}.yaml"))
    raise ValueError(
        f"The configuration must be a YAML file, or one of the recipes {', '.join(recipe_names())}, got {source}."
    )


def student_attention(config: AttentionConfig, preset: BladeConfig) -> BladeConfig | None:
    """Return the student's attention, None for dense.

    Args:
        config: what was asked for.
        preset: what the model takes where it names no configuration.
    """
    from blade.families.registry import preset_names
    from blade.generation.request import read_config

    base = preset
    if config.config in preset_names("student"):
        base = BladeConfig.from_preset(str(config.config), "student")
    elif config.config is not None:
        base = read_config(config.config)
    given = {
        name: value
        for name in ("sparsity", "dense_steps", "dense_layers")
        if (value := getattr(config, name)) is not None
    }
    if config.method == "dense":
        return None
    if config.method is not None:
        pooled = "all" if config.method == "asa-gt" else "none"
        given |= {"attention": "asa", "pooled_tokens": pooled, "patterns": None}
    base = replace(base, kind="student", **given)
    return None if base.attention == "dense" else base
