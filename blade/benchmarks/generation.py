"""Benchmark of whole generations at real size, dense and sparse: passes, their parts, and decoding."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from blade_kernels.crashes import naming_crashes
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch import nn

from blade.attention.adaptive import select
from blade.attention.applied import AppliedBlade, applied_to
from blade.attention.apply import use_blade
from blade.attention.budget import configured_budget
from blade.attention.config import BladeConfig
from blade.benchmarks.other_parts import time_decoding, time_encoding
from blade.common.errors import first_line
from blade.common.machine import GIB, describe_machine, describe_versions
from blade.families.protocol import Inputs, ModelFamily
from blade.generation.request import GenerationRequest
from blade.generation.resolve import resolve_request
from blade.metrics.timing import Stopwatch, measure, time_calls
from blade.models.devices import resolve_device, resolve_dtype
from blade.models.loaded import LatentSize, LoadedModel
from blade.models.loading import load_empty_model, load_model
from blade.models.parallel import Team, check_splits
from blade.models.source import BUNDLED

PACKAGES = ("blade-video", "diffusers", "torch", "triton", "flash-attn", "flash-attn-3")
"""Packages whose versions are recorded."""

BACKENDS = ("native", "_native_cudnn", "_native_flash", "flash", "_flash_3", "_flash_3_hub")
"""Diffusers' backends of exact dense attention; dense runs take the fastest."""

BACKEND_ERRORS = (RuntimeError, ValueError, ImportError, TypeError, NotImplementedError)
"""Exceptions that backends raise for unsupported inputs."""

PARTS = (
    "attention",
    "block selection",
    "communication",
    "norms and RoPE",
    "linear layers",
    "token permutation",
    "other",
)
"""Parts of a sparse pass. Attention includes pooling; communication is the all-to-all of queries, keys, values and
outputs, where several processes compute a pass; other means cross-attention, modulation and activations."""

REACHED_SPEED = 0.85
"""Speed of sparse attention per query-key pair that the bound assumes, as a share of dense attention's."""

ALLOWANCE = 1.10
"""Factor by which a sparse pass may exceed its bound."""


PRESET_PASSES = 2
"""Passes with a preset that are timed."""

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules that multiply with weight matrices."""


@dataclass(frozen=True, kw_only=True)
class GenerationBenchmark:
    """Options of the generation benchmark."""

    model: str = BUNDLED
    """`BUNDLED`, a folder in Diffusers format, or a Hub id."""
    random_weights: bool = False
    """Use random weights, which needs the model's configuration files only."""
    height: int | None = None
    """Pixels; None takes the model's default."""
    width: int | None = None
    """Pixels; None takes the model's default."""
    frames: int | None = None
    """Number of frames; None takes the model's default."""
    steps: int | None = None
    """Steps of the runs with guidance; None takes the model's default."""
    student_steps: tuple[int, ...] = (8, 4)
    """Steps of the runs without guidance."""
    sparsity: float = 0.8
    """Sparsity of every layer and step."""
    pooled_tokens: Literal["none", "all", "dropped"] = "all"
    """Pooled tokens, which count toward the budget; see `BladeConfig`."""
    preset_sparsities: tuple[float, ...] = ()
    """Sparsities at which a pass with the model's training-free preset is timed beside."""
    measured_passes: int | None = None
    """Measured passes of a run, from which the others are extrapolated; None measures all."""
    repeats: int = 3
    """Measured calls of single parts."""
    device: str | None = None
    """A torch device; None takes CUDA if there is one."""
    dtype: str | None = None
    """Type of the transformer; None takes bfloat16 on CUDA and float32 elsewhere. The VAE runs in float32."""

    def __post_init__(self) -> None:
        for name in ("measured_passes", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not all(0 < sparsity < 1 for sparsity in self.preset_sparsities):
            raise ValueError(f"`preset_sparsities` must be between 0 and 1, got {self.preset_sparsities}.")
        if not self.student_steps or min(self.student_steps) < 1:
            raise ValueError(f"`student_steps` must be counts of at least 1, got {self.student_steps}.")


def run_generation_benchmark(
    settings: GenerationBenchmark,
    *,
    command: str | None = None,
    on_stage: Callable[[str], None] | None = None,
    team: Team | None = None,
) -> dict[str, Any]:
    """Measure a model's runs: dense with guidance, sparse with guidance, and sparse with few steps without guidance.

    The budget of blocks is fixed, so that no time depends on the weights. A run consists of the encoding of its text,
    its transformer's passes and the decoding of its latent, all with random inputs; the scheduler's steps and writing
    a file are left out.

    Args:
        settings: the options.
        command: the command line to record.
        on_stage: called with the name of each stage.
        team: the processes that compute every pass together; each of them calls this, and measures itself.

    Returns:
        Plain JSON values: `date`, `command`, `machine`, `versions`, `processes` that compute a pass together,
        `settings` and their resolved values: the size,
        `config`, `tokens`, `layers`, `density`; `dense_attention_ms` of one layer by backend, `backend`, the fastest
        that the transformer accepts, and `missing`, the reasons why others were not measured or accepted; `pass_ms` of
        a dense and a sparse pass; `parts_ms` of a sparse pass, by `PARTS`; `bound_ms`; `preset_pass_ms` by sparsity;
        `encoding_seconds` of one text, None if it was not measured; `unmeasured`, the reasons why parts were not;
        `decoding_seconds`; `peak_gib` on CUDA; and `runs`.

    Raises:
        ValueError: for a model or a size that cannot be measured.
    """
    on_stage = on_stage or (lambda stage: None)
    device = resolve_device(settings.device) if team is None else team.device
    dtype = resolve_dtype(settings.dtype, device)
    on_stage("building the model")
    if settings.random_weights:
        loaded = load_empty_model(settings.model, dtype=dtype, random_weights_on=device)
    else:
        loaded = load_model(settings.model, device=device, dtype=dtype)
    config = _fixed_budget(loaded.preset, settings)
    options = {name: getattr(settings, name) for name in ("model", "height", "width", "frames", "steps")}
    request = resolve_request(GenerationRequest(prompt="a benchmark", blade_config=config, **options), loaded)
    latent = loaded.latent_size(*request.size)
    model = _Model(loaded, latent, device, team)
    if configured_budget(config, model.grid).is_full:
        raise ValueError(
            f"`sparsity` must leave out a block, got {settings.sparsity} of {model.grid.sequence_length:,} tokens in "
            f"blocks of {config.asa.block_size}."
        )
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "machine": describe_machine(device),
        "versions": describe_versions(PACKAGES),
        "processes": 1 if team is None else team.count,
        "settings": {**asdict(settings), "device": str(device), "dtype": str(dtype).removeprefix("torch.")},
        **{name: getattr(request, name) for name in ("height", "width", "frames", "steps")},
        "config": config.to_dict(),
    }
    # choosing a transformer's backend also changes Diffusers' default for all others; the context restores it
    with torch.inference_mode(), attention_backend(AttentionBackendName.NATIVE):
        report |= model.describe(config)
        on_stage("dense attention")
        report |= model.dense_attention(settings.repeats)
        on_stage("parts of a sparse pass")
        with model.using(config):
            report["parts_ms"] = model.parts(settings.repeats)
        on_stage("text encoding")
        report |= model.encoding(loaded, settings, dtype)
        on_stage("decoding")
        decoding = time_decoding(loaded, latent, device)
        report["runs"], report["pass_ms"], report["peak_gib"] = [], {}, {"decoding": _gib(decoding.peak_bytes)}
        report["decoding_seconds"] = decoding.median / 1e3
        guided = model.family.guidance_passes
        plans = [("dense, guidance", None, request.steps, guided), ("sparse, guidance", config, request.steps, guided)]
        plans += [("sparse", config, steps, 1) for steps in settings.student_steps]
        for name, run_config, steps, passes in plans:
            on_stage(f"{name}, {steps} steps")
            report["runs"].append(model.run(name, run_config, steps, passes, settings.measured_passes, report))
        report["preset_pass_ms"] = {}
        for sparsity in settings.preset_sparsities:
            on_stage(f"preset, sparsity {sparsity}")
            report["preset_pass_ms"][f"{sparsity:g}"] = model.preset_pass(replace(loaded.preset, sparsity=sparsity))
    _conclude(report)
    return report


class _Model:
    """A transformer with random inputs of one size."""

    def __init__(self, loaded: LoadedModel, latent: LatentSize, device: torch.device, team: Team | None) -> None:
        self.transformer, self.family, self.device, self.team = loaded.transformer, loaded.family, device, team
        if team is not None:
            check_splits(self.transformer)
        self.inputs: Inputs = {name: _random(name, value) for name, value in loaded.example_inputs(latent).items()}
        self.grid = loaded.token_grid(latent)
        self.attentions = self.family.attention_layers(self.transformer)

    def describe(self, config: BladeConfig) -> dict[str, Any]:
        """Return the model's sizes and the planned density."""
        return {
            "tokens": self.grid.sequence_length,
            "layers": len(self.attentions),
            "heads": self.family.heads(self.attentions[0]),
            "head_dim": self.transformer.config.attention_head_dim,
            "parameters": sum(parameter.numel() for parameter in self.transformer.parameters()),
            "density": configured_budget(config, self.grid).density,
        }

    @contextmanager
    def using(self, config: BladeConfig | None) -> Iterator[None]:
        """Apply a configuration, None for dense, inside a `with` block, in which the team shares out the passes."""
        with ExitStack() as stack:
            if config is None and self.team is not None:
                config = BladeConfig(attention="dense")
            if config is not None:
                stack.enter_context(use_blade(self.transformer, config, dense_steps=0))
            if self.team is not None:
                stack.enter_context(self.team.splitting([self.transformer]))
            yield

    def forward(self, _: int = 0) -> object:
        """Run one forward pass."""
        return self.transformer(**self.inputs)

    def dense_attention(self, repeats: int) -> dict[str, Any]:
        """Time one layer's dense attention by backend, and set the fastest that the transformer accepts."""
        shape = (1, self.grid.sequence_length, self.family.heads(self.attentions[0]))
        parameter = next(self.attentions[0].parameters())
        query, key, value = (
            torch.randn(*shape, self.transformer.config.attention_head_dim, device=self.device, dtype=parameter.dtype)
            for _ in range(3)
        )
        times, missing = dict[str, float](), dict[str, str]()
        for name in BACKENDS:
            try:
                backend = AttentionBackendName(name)
                self.transformer.set_attention_backend(name)
                with naming_crashes(f"attention of backend {name}", self.device):
                    times[name] = measure(
                        lambda _: dispatch_attention_fn(query, key, value, backend=backend),  # noqa: B023
                        self.device,
                        repeats,
                    ).median
            except BACKEND_ERRORS as problem:
                missing[name] = first_line(problem)
        for name in sorted(times, key=lambda name: times[name]):
            self.transformer.set_attention_backend(name)
            try:
                with naming_crashes(f"the transformer with backend {name}", self.device):
                    self.forward()
            except BACKEND_ERRORS as problem:  # for example, not every backend takes a mask
                missing[name] = first_line(problem)
            else:
                return {"dense_attention_ms": times, "missing": missing, "backend": name}
        raise ValueError(f"`device` must run one of Diffusers' attention backends, got {self.device}: {missing}.")

    def encoding(self, loaded: LoadedModel, settings: GenerationBenchmark, dtype: torch.dtype) -> dict[str, Any]:
        """Time the encoding of one text, or note why it cannot be."""
        text, seconds, unmeasured = self.inputs["encoder_hidden_states"], None, dict[str, str]()
        try:
            with naming_crashes("text encoding", self.device):
                seconds = time_encoding(loaded, text.shape[1], self.device, dtype, settings.repeats) / 1e3
        except (torch.OutOfMemoryError, NotImplementedError) as problem:
            unmeasured["text encoder"] = first_line(problem)
        return {"encoding_seconds": seconds, "unmeasured": unmeasured}

    def preset_pass(self, preset: BladeConfig) -> float:
        """Return the milliseconds of a pass in which no step is dense, but the preset's layers are."""
        config = replace(preset, dense_steps=0, asa=replace(preset.asa, cumulative_mass=None))
        with self.using(config):
            self.forward()
            return time_calls(self.forward, self.device, PRESET_PASSES).median

    def parts(self, repeats: int) -> dict[str, float]:
        """Return the milliseconds of the parts of a sparse pass; BLADE must be applied."""
        applied = applied_to(self.transformer)
        assert applied is not None
        self.forward()
        watch = Stopwatch(self.device)
        with _parts_watched(self.transformer, applied, self.attentions, watch) as calls:
            for _ in range(repeats):
                with watch.region("other"):
                    self.forward()
        parts_ms = {name: ms / repeats for name, ms in watch.milliseconds().items()}
        layer, arguments = calls[0]
        query, key, value, *lengths = arguments
        key_lengths = lengths[0] if lengths else None
        rows, share = (layer.tables[0][0],), layer.share
        timed = measure if share is None else time_calls  # as often in every process
        apart = dict[str, float]()
        if share is not None:
            local = (query, key, value)
            query, key, value = share.to_heads(*local)
            rows = layer.plan.rows_of_heads(rows, share.heads)
            apart["communication"] = timed(
                lambda _: share.to_tokens(share.to_heads(*local)[0]), self.device, repeats
            ).median
        apart["block selection"] = timed(
            lambda _: select(query, key, value, layer.plan, rows[0], key_lengths, share), self.device, repeats
        ).median
        for name, milliseconds in apart.items():
            parts_ms[name] = milliseconds * len(calls) / repeats
            parts_ms["attention"] -= parts_ms[name]
        return {name: parts_ms.get(name, 0.0) for name in PARTS if name != "communication" or name in parts_ms}

    def run(
        self,
        name: str,
        config: BladeConfig | None,
        steps: int,
        passes_of_step: int,
        measured: int | None,
        report: dict[str, Any],
    ) -> dict[str, Any]:
        """Time a run's passes, after a warm-up pass."""
        passes = self.family.evaluations(steps) * passes_of_step
        measured = min(passes, measured or passes)
        with self.using(config):
            self.forward()
            measurement = time_calls(self.forward, self.device, measured)
        kind, texts = "dense" if config is None else "sparse", min(passes_of_step, 2)
        report["pass_ms"].setdefault(kind, measurement.median)
        report["peak_gib"].setdefault(kind, _gib(measurement.peak_bytes))
        seconds = sum(measurement.milliseconds) / measured * passes / 1e3
        encoding = texts * (report["encoding_seconds"] or 0.0)
        return {
            "run": name,
            "steps": steps,
            "passes": passes,
            "measured_passes": measured,
            "encoding_seconds": encoding,
            "transformer_seconds": seconds,
            "seconds": encoding + seconds + report["decoding_seconds"],
        }


def _fixed_budget(preset: BladeConfig, settings: GenerationBenchmark) -> BladeConfig:
    """Return the model's preset with every layer and step sparse and the same number of blocks in every row."""
    return replace(
        preset,
        sparsity=settings.sparsity,
        pooled_tokens=settings.pooled_tokens,
        dense_steps=0,
        dense_layers=(),
        asa=replace(preset.asa, cumulative_mass=None),
    )


def _random(name: str, value: Any) -> Any:
    """Return a random input of the same shape; masks and sizes stay unchanged."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or name.endswith("mask"):
        return value
    return torch.full_like(value, 500.0) if name == "timestep" else torch.randn_like(value)


def _gib(size: int | None) -> float | None:
    return None if size is None else size / GIB


def _conclude(report: dict[str, Any]) -> None:
    """Add the figures that follow from the measurements: shares, bound, speedups and their limits."""
    # of one process, which has its share of the heads
    attention = report["layers"] * report["dense_attention_ms"][report["backend"]] / report["processes"]
    dense, density = report["pass_ms"]["dense"], report["density"]
    without_attention = dense - attention
    bound = without_attention + attention * density / REACHED_SPEED + report["parts_ms"]["block selection"]
    report["dense_attention_share"] = attention / dense
    report["bound_ms"] = ALLOWANCE * bound
    report["of_bound"] = report["pass_ms"]["sparse"] / bound
    reference = report["runs"][0]
    for run in report["runs"]:
        run["transformer_factor"] = reference["transformer_seconds"] / run["transformer_seconds"]
        run["factor"] = reference["seconds"] / run["seconds"]
        passes_seconds = run["passes"] * without_attention / 1e3
        run["limit"] = reference["seconds"] / (run["seconds"] - run["transformer_seconds"] + passes_seconds)


@contextmanager
def _parts_watched(
    transformer: nn.Module, applied: AppliedBlade, attentions: Any, watch: Stopwatch
) -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """Time the parts of passes with a stopwatch; yields the sparse layers' calls, with the arguments of the first."""
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    handles = []
    regions = {module: "norms and RoPE" for module in attentions}
    regions |= {module: "linear layers" for module in transformer.modules() if isinstance(module, LINEAR)}
    for module, name in regions.items():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: watch.enter(name)))
        handles.append(module.register_forward_hook(lambda *_: watch.leave()))
    family, attends = applied.family, [layer.attend for layer in applied.layers]

    def watched(layer: Any, attend: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append((layer, () if calls else arguments))
            with watch.region("attention"):
                return attend(*arguments, **options)

        return call

    applied.family = _WatchedFamily(family, watch)
    for layer, attend in zip(applied.layers, attends):
        layer.attend = watched(layer, attend)  # type: ignore[method-assign]  # until `del` uncovers the method
    try:
        yield calls
    finally:
        applied.family = family
        for layer in applied.layers:
            del layer.attend
        for handle in handles:
            handle.remove()


class _WatchedFamily:
    """A family adapter whose permutations are timed by a stopwatch."""

    def __init__(self, family: ModelFamily, watch: Stopwatch) -> None:
        self._family, self._watch = family, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def permute_inputs(self, *arguments: Any) -> Any:
        with self._watch.region("token permutation"):
            return self._family.permute_inputs(*arguments)

    def restore_output(self, *arguments: Any) -> Any:
        with self._watch.region("token permutation"):
            return self._family.restore_output(*arguments)
