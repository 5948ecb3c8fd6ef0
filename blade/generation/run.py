"""One generation: the video of a resolved request and its cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from blade.attention.applied import applied_to
from blade.attention.apply import use_blade
from blade.attention.config import BladeConfig
from blade.attention.summary import BladeSummary, blade_summary
from blade.common.errors import first_line
from blade.generation.finite import NonFiniteError, watch_finite
from blade.generation.request import ResolvedRequest
from blade.media.sound import Sound
from blade.models.acceleration import advise
from blade.models.adapters import Reach
from blade.models.conditions import cover, read_frames, read_image
from blade.models.loaded import LoadedModel
from blade.models.modular import call_modular, is_modular
from blade.students.scheduler import set_flow_shift


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A finished video and its cost."""

    video: torch.Tensor
    """(frames, 3, H, W), float32 on the CPU, in [0, 1]."""
    sound: Sound | None = None
    """The sound, of models that make one."""
    seconds_text: float
    """From the start to the transformer's first forward pass: text encoding."""
    seconds_denoising: float
    """From there to the end of the last step."""
    seconds_decoding: float
    """From there to the finished frames."""
    processes: int = 1
    """Processes that made it together."""
    summary: BladeSummary | None
    """Densities as realised; None if the run was dense."""
    changes: Mapping[str, Reach]
    """Number of modules that LoRAs and a student change in each transformer, by their sources."""
    layer_density: float | None = field(init=False)
    """Mean density over sparse layers and steps; None if there was none."""
    run_density: float = field(init=False)
    """Mean density over all layers and steps."""

    def __post_init__(self) -> None:
        layer = self.summary.layer_density if self.summary else None
        run = self.summary.run_density if self.summary else None
        object.__setattr__(self, "layer_density", layer)
        object.__setattr__(self, "run_density", 1.0 if run is None else run)

    @property
    def seconds(self) -> float:
        """Seconds in all."""
        return self.seconds_text + self.seconds_denoising + self.seconds_decoding


def run_request(
    model: LoadedModel, request: ResolvedRequest, *, attention: AbstractContextManager[Any] | None = None
) -> Generation:
    """Make a video.

    Args:
        model: the loaded model.
        request: a request that `resolve_request` returned.
        attention: a context that decides about attention while the pipeline runs, instead of the request's
            configuration; the result has no summary then.

    Raises:
        NonFiniteError: if the latents turned infinite or not-a-number; names the step and the first layer. Nothing is
            decoded then.
        ValueError: if BLADE cannot be applied to this model, or it does not take what the request says.
        MemoryError: if the device has too little memory; says what would need less.
    """
    if (request.decoder == "tiny") != (model.decoder is not None):
        raise ValueError(f"`decoder` must be the one that the model was loaded with, got {request.decoder!r}.")
    pipe, arguments = model.pipe, call_arguments(model, request)
    prepare_sampler(model, request)
    config, team = request.blade_config, model.team
    if config is None and (team or any(applied_to(transformer) for transformer in model.transformers.values())):
        config = BladeConfig(attention="dense")  # a student brings its own, and BLADE splits dense attention too
    sparse: AbstractContextManager[Any] = (
        nullcontext() if config is None else use_blade(pipe, config, dense_steps=config.dense_steps)
    )
    with ExitStack() as stack:
        stack.enter_context(sparse if attention is None else attention)
        if team is not None:
            stack.enter_context(team.splitting(model.transformers.values()))
        clock = stack.enter_context(_stage_clock(model))
        watch = stack.enter_context(watch_finite(pipe))

        def on_step_end(pipe: Any, step: int, timestep: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            inputs = watch.on_step_end(pipe, step, timestep, inputs)
            clock.step_ended()
            return inputs

        if "callback_on_step_end" in model.parameters:
            arguments["callback_on_step_end"] = on_step_end
        else:
            stack.enter_context(_watch_scheduler(pipe, on_step_end))
        try:
            output = call_modular(pipe, arguments) if is_modular(pipe) else pipe(**arguments)
            frames = output.frames[0]
            video = frames.float().cpu() if model.decoder is None else model.decoder.decode(frames)
        except torch.OutOfMemoryError as error:
            advice = advise(
                request.offload,
                quantized=request.quantize is not None,
                tiled=request.vae_tiling or request.decoder == "tiny",
                decoding=clock.steps == model.family.evaluations(request.steps) - request.skipped_steps,
            )
            raise MemoryError(f"The device's memory does not hold this run ({first_line(error)}). {advice}") from error
        clock.finished()
        summary = None if request.blade_config is None or attention is not None else blade_summary(pipe)
    if not video.isfinite().all():
        raise NonFiniteError("Non-finite values in the decoded video, made by the decoder; the latents were finite.")
    return Generation(
        video=video,
        sound=_read_sound(model, output),
        seconds_text=clock.denoising - clock.start,
        seconds_denoising=clock.decoding - clock.denoising,
        seconds_decoding=clock.end - clock.decoding,
        processes=1 if team is None else team.count,
        summary=summary,
        changes=dict(model.changes),
    )


def _read_sound(model: LoadedModel, output: Any) -> Sound | None:
    """Return the sound in a pipeline's output, if the model makes one.

    Raises:
        NonFiniteError: if it holds non-finite samples.
    """
    rate = model.family.sound_rate(model.pipe)
    if rate is None:
        return None
    samples = torch.as_tensor(output.audio[0]).float().cpu()
    if not samples.isfinite().all():
        raise NonFiniteError("Non-finite values in the decoded sound; the latents were finite.")
    return Sound(samples, rate)


def call_arguments(model: LoadedModel, request: ResolvedRequest) -> dict[str, Any]:
    """Return the arguments of a pipeline's call; those that a request leaves open stay the pipeline's own."""
    size = (request.height, request.width)
    arguments: dict[str, Any] = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "height": request.height,
        "width": request.width,
        "num_frames": request.frames,
        "frame_rate": request.fps,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "guidance_scale_2": request.guidance_scale_2,
        "strength": request.strength,
        **model.family.call_options(model.pipe, request),
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": "pt" if request.decoder == "full" else "latent",
    }
    for name in ("image", "last_image"):
        if (path := getattr(request, name)) is not None:
            arguments[name] = cover(read_image(path, name), *size)
    if request.video is not None:
        frames = read_frames(request.video, request.frames, request.fps)
        arguments["video"] = [cover(frame, *size) for frame in frames]
    parameters = model.parameters
    for name in ("last_image", "guidance_scale_2"):
        if arguments.get(name) is not None and name not in parameters:
            raise ValueError(f"`{name}` must not be given: a {type(model.pipe).__name__} does not take it.")
    return {name: value for name, value in arguments.items() if value is not None and name in parameters}


def prepare_sampler(model: LoadedModel, request: ResolvedRequest) -> None:
    """Set what is no argument of a pipeline's call: the scheduler's shift, and a guider's scale."""
    pipe = model.pipe
    if request.flow_shift is not None:
        pipe.scheduler = set_flow_shift(pipe.scheduler, request.flow_shift)
    guider = getattr(pipe, "guider", None)
    if guider is not None and "guidance_scale" not in model.parameters:
        pipe.guider = guider.new(guidance_scale=request.guidance_scale)


@contextmanager
def _watch_scheduler(pipe: Any, on_step_end: Callable[..., Any]) -> Iterator[None]:
    """Call a callback of Diffusers' kind after every step of the scheduler, for pipelines that take none."""
    scheduler, taken = pipe.scheduler, 0
    step = scheduler.step

    def watched(model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        result = step(model_output, timestep, *args, **kwargs)
        on_step_end(pipe, taken, timestep, {"latents": result[0]})
        taken += 1
        return result

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step


class _StageClock:
    """Times at which a pipeline's stages began, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = self.denoising = self.decoding = self.end = self._now()
        self.steps = 0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def denoising_began(self) -> None:
        self.denoising = self.decoding = self._now()

    def step_ended(self) -> None:
        self.decoding = self._now()
        self.steps += 1

    def finished(self) -> None:
        self.end = self._now()


@contextmanager
def _stage_clock(model: LoadedModel) -> Iterator[_StageClock]:
    """Time a pipeline's run: the first forward pass of a transformer ends text encoding, the last step denoising."""
    clock = _StageClock(model.device)

    def first_forward(module: Any, args: Any) -> None:
        clock.denoising_began()
        while handles:
            handles.pop().remove()

    handles = [one.register_forward_pre_hook(first_forward) for one in model.transformers.values()]
    try:
        yield clock
    finally:
        for handle in handles:
            handle.remove()
