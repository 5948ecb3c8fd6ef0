"""Loading a pipeline with everything that a request asks for but BLADE itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from blade.generation.request import GenerationRequest, read_config
from blade.generation.resolve import resolve_request
from blade.models.acceleration import (
    choose_offload,
    compile_blocks,
    enable_cache,
    enable_tiling,
    load_loras,
    merge_loras,
    place,
    quantize,
)
from blade.models.conditions import pipeline_for
from blade.models.devices import resolve_device, resolve_dtype
from blade.models.loading import load_pipeline
from blade.students.loading import load_student


def prepare_pipeline(request: GenerationRequest) -> tuple[Any, GenerationRequest]:
    """Load a pipeline with all that a request asks for but BLADE itself, and fill the request in.

    Args:
        request: what is to be made.

    Returns:
        The pipeline, on its device, and the resolved request.

    Raises:
        ValueError: for a request that cannot be met.
        ModelError: if there is no such model, or it cannot be used.
    """
    device = resolve_device(request.device)
    dtype = resolve_dtype(request.dtype, device)
    offload = request.offload
    if offload != "none" and device.type == "cpu":
        raise ValueError(f"`offload` must be none on the CPU, where weights are already, got {offload!r}.")
    if request.config is not None and request.attention != "dense":
        request = replace(request, config=None, blade_config=read_config(request.config))
    if offload == "auto":
        offload = _fitting_offload(request)
    pipe = load_pipeline(request.model, revision=request.revision, device=None, dtype=dtype)
    pipe = pipeline_for(pipe, request.condition)
    load_loras(pipe, request.loras)
    if request.student is not None:
        weight = 1.0 if request.student_weight is None else request.student_weight
        load_student(pipe, request.student, scheduler=request.scheduler, weight=weight, noise_kept=request.noise_kept)
    resolved = replace(resolve_request(request, pipe), offload=offload, device=str(device))
    merge_loras(pipe)
    if request.quantize is not None:
        quantize(pipe, request.quantize)
    if request.cache is not None:
        enable_cache(pipe, request.cache)
    if request.compile:
        compile_blocks(pipe)
    if request.vae_tiling:
        enable_tiling(pipe)
    place(pipe, device, offload)
    return pipe, resolved


def _fitting_offload(request: GenerationRequest) -> str:
    from blade.generation.plan import plan_run

    plan = plan_run(request)
    assert plan.device_gib is not None
    return choose_offload(plan.weights_gib, plan.activations_gib, plan.device_gib)
