"""Loading a model with everything that a request asks for but BLADE itself."""

from __future__ import annotations

from dataclasses import replace

from blade.families.transformers import Transformer
from blade.generation.plan import plan_run
from blade.generation.request import GenerationRequest, ResolvedRequest, check_known, read_config
from blade.generation.resolve import resolve_request
from blade.models.acceleration import check_quantizable, choose_offload, place
from blade.models.caches import enable_cache
from blade.models.conditions import model_for
from blade.models.decoder_weights import decoder_dtype, load_tiny_decoder
from blade.models.devices import resolve_device, resolve_dtype
from blade.models.loaded import LoadedModel
from blade.models.loading import load_empty_model, load_model
from blade.models.loras import load_loras, merge_loras
from blade.models.parallel import Team, check_splits
from blade.models.tiny_decoder import TinyDecoder
from blade.models.transformer_files import check_stored, load_transformers
from blade.students.loading import load_student


def prepare_model(request: GenerationRequest, team: Team | None = None) -> tuple[LoadedModel, ResolvedRequest]:
    """Load a model with everything that a request asks for but BLADE itself, and fill the request in.

    Args:
        request: the request.
        team: the processes that make each video together; each of them calls this. None: one does.

    Returns:
        The model, on its device, and the resolved request.

    Raises:
        ValueError: for a request that cannot be met.
        ModelError: if there is no such model, or it cannot be used.
    """
    check_known(request)
    device = resolve_device(request.device) if team is None else team.device
    dtype = resolve_dtype(request.dtype, device)
    if team is not None:
        for transformer in load_empty_model(
            request.model, revision=request.revision, dtype=dtype
        ).transformers.values():
            check_splits(transformer)
    offload = request.offload
    if offload != "none" and device.type == "cpu":
        raise ValueError(f"`offload` must be none on the CPU, where weights are already, got {offload!r}.")
    check_quantizable(request.quantize, device)
    if request.config is not None and request.attention != "dense":
        request = replace(request, config=None, blade_config=read_config(request.config))
    if offload == "auto":
        plan = plan_run(request)
        assert plan.device_gib is not None  # a CUDA device, as nothing else offloads
        offload = choose_offload(plan.weights_gib, plan.activations_gib, plan.device_gib)
    decoder: TinyDecoder | None = None
    transformers: dict[str, Transformer] = {}
    if (request.decoder_weights or request.transformer) is not None:  # before the model, whose weights are large
        empty = load_empty_model(request.model, revision=request.revision, dtype=dtype)
        if request.decoder_weights is not None:
            decoder = load_tiny_decoder(empty, request.decoder_weights)
        if request.transformer is not None:
            transformers = load_transformers(empty, request.transformer, dtype=dtype, device=device)
            check_stored(transformers, quantize=request.quantize, offload=offload)
    model = load_model(request.model, revision=request.revision, device=None, dtype=dtype, components=transformers)
    model = replace(model_for(model, request.condition), decoder=decoder, team=team)
    model.changes.update(load_loras(model, request.loras))
    if request.student is not None:
        weight = 1.0 if request.student_weight is None else request.student_weight
        student = load_student(
            model.pipe, request.student, scheduler=request.scheduler, weight=weight, noise_kept=request.noise_kept
        )
        model.changes[student.source] = student.reach
        if transformers and model.transformers.items() != transformers.items():
            raise ValueError(
                f"`student` {student.source} is a whole transformer, which would take the place of `transformer` "
                f"{request.transformer}; leave one of the two out."
            )
    resolved = replace(resolve_request(request, model), offload=offload, device=str(device))
    merge_loras(model)
    request.prepare(model)
    if request.cache is not None:
        guidance = model.family.guidance_takes_two_passes and resolved.guidance_scale > 1
        enable_cache(model, request.cache, steps=resolved.steps, guidance=guidance)
    place(model, device, offload)
    if decoder is not None:
        decoder.to(device, decoder_dtype(dtype, device))
    return model, resolved
