"""The operations and memory of a run, from configuration files alone: nothing is downloaded, nothing runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from blade.common.checks import check_number
from blade.common.machine import GIB
from blade.common.terminal import printable
from blade.generation.memory import MemoryPlan, plan_memory
from blade.generation.memory_stages import Stages
from blade.generation.parallel_plan import ParallelPlan, predict_parallel, rank_activations_gib
from blade.generation.parallel_traffic import PassShape, Traffic
from blade.generation.prediction import Prediction, predict
from blade.generation.request import GenerationRequest, ResolvedRequest, check_known
from blade.generation.resolve import describe_student, resolve_request
from blade.models.acceleration import LEAST_CAPABILITIES
from blade.models.cards import CardReport, DocumentedCard, find_card
from blade.models.conditions import model_for
from blade.models.costs import RunCost, count_flops, forward_cost, run_cost
from blade.models.decoder_weights import decoder_dtype, load_tiny_decoder, published_layout
from blade.models.devices import resolve_device, resolve_dtype
from blade.models.loaded import LatentSize, LoadedModel
from blade.models.loading import load_empty_model
from blade.models.loras import peek_loras
from blade.models.memory_use import peak_bytes, weight_bytes
from blade.models.parallel import check_splits
from blade.models.tiny_decoder import TinyDecoder, TinyDecoderLayout
from blade.models.transformer_files import load_transformers, replace_transformers
from blade.students.loading import read_student


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run before it is made; `print` it."""

    request: ResolvedRequest
    """The request, with the model's defaults filled in."""
    cost: RunCost
    """Of the transformer."""
    text_flops: float
    """Of encoding the prompt, and with guidance the negative one."""
    decoding_flops: float
    """Of the decoder: the VAE's own, or a tiny one."""
    weights_gib: dict[str, float]
    """Memory of the weights, by part of the pipeline."""
    activations_gib: dict[str, float]
    """Most memory beside the weights: of the transformer's forward pass, and of decoding."""
    device_gib: float | None
    """Memory of the CUDA device; None elsewhere."""
    prediction: Prediction | None = None
    """Seconds on a card, if one was named."""
    memory: MemoryPlan | None = None
    """Settings that fit a device, if its memory was named."""
    parallel: ParallelPlan | None = None
    """The same run made by several processes together, if that was asked for."""

    @property
    def flops(self) -> dict[str, float]:
        """Floating-point operations by part of the pipeline."""
        return {"text encoder": self.text_flops, "transformer": self.cost.total, "decoder": self.decoding_flops}

    @property
    def needed_gib(self) -> float:
        """All weights, and the activations of whichever part takes most."""
        return sum(self.weights_gib.values()) + max(self.activations_gib.values())

    @property
    def fits(self) -> bool | None:
        """True if the device holds it without offloading; None where there is no CUDA device."""
        return None if self.device_gib is None else self.needed_gib <= self.device_gib

    def __str__(self) -> str:
        request, cost, grid = self.request, self.cost, self.cost.forward.grid
        kind = request.blade_config.kind if request.blade_config else None
        text = f" and {grid.text_tokens:,} of text" if grid.text_tokens else ""
        skipped = f" (the first {request.skipped_steps} skipped)" if request.skipped_steps else ""
        lines = [
            f"video       {request.frames} frames of {request.width}x{request.height}, {request.steps} steps"
            f"{skipped}, guidance {request.guidance_scale:g}",
            *([] if request.transformer is None else [f"file        {request.transformer}"]),
            *([] if request.student is None else [f"student     {describe_student(request.student, kind)}"]),
            f"tokens      {grid.frames} x {grid.height} x {grid.width} = {grid.video_tokens:,}{text}, "
            f"in {cost.forward.layers} layers of {cost.forward.heads} heads",
            f"attention   {request.attention}"
            + (
                f": {cost.sparse_layers} layers in {cost.sparse_passes} of {cost.passes} passes at density "
                f"{cost.density:.3f}"
                if cost.sparse_passes
                else ""
            ),
            f"operations  {_count(sum(self.flops.values()))} "
            f"(dense {_count(cost.dense_total + self.text_flops + self.decoding_flops)}): {_counts(self.flops)}",
            f"transformer {_counts(cost.flops)}",
            f"weights     {sum(self.weights_gib.values()):.2f} GiB: "
            + ", ".join(f"{part} {gib:.2f}" for part, gib in self.weights_gib.items()),
            f"memory      {self.needed_gib:.2f} GiB with all parts on one device; beside the weights "
            + ", ".join(f"{part} {gib:.2f}" for part, gib in self.activations_gib.items()),
        ]
        if self.fits is not None:
            verdict = "it fits" if self.fits else "it does not fit: take --offload auto, or a smaller video"
            lines.append(f"device      {self.device_gib:.1f} GiB: {verdict}")
        if self.memory is not None:
            lines += str(self.memory).splitlines()
        if self.prediction is not None:
            lines.append(f"prediction  {self.prediction}")
        if self.parallel is not None:
            lines += str(self.parallel).splitlines()
        return "\n".join(map(printable, lines))


def resolve_without_weights(
    request: GenerationRequest, *, device: torch.device | None = None
) -> tuple[LoadedModel, ResolvedRequest]:
    """Return a request's model without its weights, and the request with the model's defaults filled in.

    Args:
        request: the request.
        device: a device of another machine, where it will run; None: the request's own, here.

    Raises:
        ValueError: for a request that cannot be met.
        ModelError: if there is no such model.
    """
    device = resolve_device(request.device) if device is None else device
    dtype = resolve_dtype(request.dtype, device)
    model = model_for(load_empty_model(request.model, revision=request.revision, dtype=dtype), request.condition)
    if request.transformer is not None:
        replace_transformers(model, load_transformers(model, request.transformer, dtype=dtype, device="meta"))
    if request.decoder_weights is not None:
        model = replace(model, decoder=load_tiny_decoder(model, request.decoder_weights))
    peek_loras(model, request.loras)
    student = None
    if request.student is not None:
        student = read_student(model.pipe, request.student, scheduler=request.scheduler, noise_kept=request.noise_kept)
    return model, replace(resolve_request(request, model, student=student), device=str(device))


def plan_run(
    request: GenerationRequest,
    *,
    card: str | None = None,
    memory_gib: float | None = None,
    parallel: int | None = None,
) -> RunPlan:
    """Work out the operations and the memory of a request.

    Args:
        request: the request.
        card: a GPU whose seconds to predict: its name, or the JSON of a `blade-bench gpu`; see
            `blade.models.cards.find_card`. A request that names no dtype then runs in the card's, bfloat16 by default.
        memory_gib: memory of a GPU that settings are to be found for; see `blade.generation.memory.plan_memory`. A
            request that names no dtype then runs in bfloat16.
        parallel: number of processes that make the video together, each on a card of its own.

    Raises:
        ValueError: for a request that cannot be met, a model whose operations cannot be counted, a card that is
            unknown or says nothing of such a run, more processes than heads, or a sequence that cannot be split.
        ModelError: if there is no such model.
    """
    check_known(request)
    known_card = None if card is None else find_card(card)
    if known_card is not None:
        _check_predictable(request)
        request = replace(request, dtype=request.dtype or known_card.default_dtype)
    if memory_gib is not None:
        check_number("memory", memory_gib, "above 0 and finite", lambda x: x > 0)
        if parallel is not None:
            raise ValueError(f"`memory` must not be given with `parallel`: it is of one device, got {memory_gib:g}.")
        request = replace(request, dtype=request.dtype or "bfloat16")
    model, resolved = resolve_without_weights(request)
    pipe, device = model.pipe, torch.device(resolved.device)
    problem = model.family.plan_problem(pipe)
    if problem is not None:
        raise ValueError(f"`dry_run` must not be given for a {type(pipe).__name__}: {problem}.")
    if parallel is not None:
        check_splits(model.transformer)
    latent = model.latent_size(*resolved.size)
    transformer, family = model.transformer, model.family
    guidance = resolved.guidance_scale > 1 and family.guidance_takes_two_passes
    forward = forward_cost(transformer, latent)
    cost = run_cost(
        forward,
        family.evaluations(resolved.steps),
        skipped_steps=resolved.skipped_steps,
        guidance=guidance,
        guidance_passes=family.guidance_passes,
        config=resolved.blade_config,
    )
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    batch = family.guidance_batch if guidance else 1
    inputs = family.example_inputs(transformer, latent, batch=batch)

    def forward_pass() -> None:
        with family.without_values():
            transformer(**inputs)

    text_tokens = inputs["encoder_hidden_states"].shape[1]
    encoders = {name: part for name, part in models.items() if name.startswith("text_encoder")}
    text_flops = sum(count_flops(partial(_encode, part, text_tokens)) for part in encoders.values())
    decoder = getattr(pipe.vae, "decoder", None)  # which gets equal tiles of large videos
    repeated = decoder if isinstance(decoder, nn.Module) else None
    decode, decoder_weights = _decoding(model, latent, decoder_dtype(transformer.dtype, device))
    plan = RunPlan(
        request=resolved,
        cost=cost,
        text_flops=text_flops * (2 if guidance else 1),
        decoding_flops=count_flops(decode, repeated),
        weights_gib={name: weight_bytes(part) / GIB for name, part in models.items()} | decoder_weights,
        activations_gib={
            "transformer": peak_bytes(forward_pass) / GIB,
            "decoding": peak_bytes(decode, repeated) / GIB,
        },
        device_gib=torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None,
    )
    if memory_gib is not None:
        stages = Stages(
            model=model,
            latent=latent,
            batch=batch,
            encoders={name: partial(_encode, part, text_tokens) for name, part in encoders.items()},
            decode=lambda: pipe.vae.decode(model.empty_latent(latent), return_dict=False),
            tiny=_tiny_decoding(model, latent),
        )
        plan = replace(plan, memory=plan_memory(stages, resolved, memory_gib))
    if known_card is not None:
        plan = replace(plan, prediction=_predict(plan, model, known_card))
    if parallel is not None:
        batches = (batch, *(1 for _ in range(family.guidance_passes - batch))) if guidance else (1,)
        shape = PassShape.of(
            model,
            latent,
            forward,
            steps=family.evaluations(resolved.steps),
            skipped_steps=resolved.skipped_steps,
            batches=batches,
        )
        plan = replace(plan, parallel=_plan_parallel(plan, shape, known_card, parallel))
    return plan


def _predict(plan: RunPlan, model: LoadedModel, card: DocumentedCard | CardReport) -> Prediction:
    """Predict the seconds of a run on a card.

    Raises:
        ValueError: if the card's figures are of other products.
    """
    precision = plan.request.precision
    if precision not in (None, "full"):
        raise ValueError(
            f'`card` must not be given with `precision` "{precision}": its figures are not of 8-bit products.'
        )
    dtype = model.transformer.dtype
    # the VAE runs in float32 everywhere
    decoding = torch.float32 if model.decoder is None else decoder_dtype(dtype, torch.device("cuda"))
    rates = card.rates(dtype, decoding, plan.cost.forward.grid.sequence_length, plan.cost.density)
    return predict(plan.cost, plan.text_flops, plan.decoding_flops, rates)


def _plan_parallel(
    plan: RunPlan, shape: PassShape, card: DocumentedCard | CardReport | None, ranks: int
) -> ParallelPlan:
    """Plan the same run for several processes.

    Args:
        plan: of one process.
        shape: of its forward passes.
        card: the card of each process, if it was named.
        ranks: number of processes.

    Raises:
        ValueError: see `Traffic.of`.
    """
    traffic = Traffic.of(plan.cost, plan.request.blade_config, shape, ranks)
    activations = rank_activations_gib(plan.activations_gib["transformer"], traffic.largest, shape)
    parallel = ParallelPlan(
        shape=shape,
        traffic=traffic,
        weights_gib=sum(plan.weights_gib.values()),
        activations_gib={**plan.activations_gib, "transformer": activations},
    )
    if card is None or plan.prediction is None:
        return parallel
    if card.link is None:
        return replace(parallel, unpredicted=f"nothing is known of what connects several of {card.name}")
    if plan.prediction.lacking:
        lacking = ", ".join(plan.prediction.lacking.values())
        return replace(parallel, unpredicted=f"the report has no speed of {lacking}")
    flops = plan.text_flops, plan.decoding_flops
    return replace(
        parallel, prediction=predict_parallel(plan.cost, *flops, plan.prediction.rates, card.link, parallel)
    )


def _check_predictable(request: GenerationRequest) -> None:
    """Refuse what makes a run faster than its operations tell.

    Raises:
        ValueError: naming the option.
    """
    if request.quantize in LEAST_CAPABILITIES:
        raise ValueError(
            f"`card` must not be given with `quantize` {request.quantize}: its figures are not of such products."
        )
    if request.cache is not None:
        raise ValueError(
            f"`card` must not be given with `cache` {request.cache}: what it leaves out depends on the video."
        )


def _decoding(
    model: LoadedModel, latent: LatentSize, dtype: torch.dtype
) -> tuple[Callable[[], object], dict[str, float]]:
    """Return what decodes a latent, on the meta device, and the GiB of the weights of a tiny decoder, if it does."""
    if model.decoder is None:
        sample = model.empty_latent(latent)
        return lambda: model.pipe.vae.decode(sample, return_dict=False), {}
    decoder, decode = _stream(model, latent, model.decoder.layout, dtype)
    return decode, {"tiny decoder": weight_bytes(decoder) / GIB}


def _stream(
    model: LoadedModel, latent: LatentSize, layout: TinyDecoderLayout, dtype: torch.dtype
) -> tuple[TinyDecoder, Callable[[], object]]:
    """Return a tiny decoder on the meta device, and what decodes a latent with it."""
    with torch.device("meta"):
        decoder = TinyDecoder(layout).to(dtype)
    sample = model.empty_latent(latent).to(dtype)

    def decode() -> None:
        for _ in decoder.stream(sample):
            pass

    return decoder, decode


def _tiny_decoding(model: LoadedModel, latent: LatentSize) -> tuple[TinyDecoder, Callable[[], object]] | None:
    """Return the tiny decoder that is given or published for a model, and what decodes with it on a GPU, if any."""
    layout = published_layout(model) if model.decoder is None else model.decoder.layout
    if layout is None:
        return None
    return _stream(model, latent, layout, decoder_dtype(model.transformer.dtype, torch.device("cuda")))


def _encode(encoder: nn.Module, tokens: int) -> object:
    """Run a text encoder on as many tokens as it is given, or has positions for."""
    tokens = min(tokens, getattr(encoder.config, "max_position_embeddings", tokens))
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    return getattr(encoder, "base_model", encoder)(input_ids=ids)  # without the head of a language model


def _count(flops: float) -> str:
    unit, size = next(
        ((unit, size) for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12)) if flops >= size / 10), ("GFLOP", 1e9)
    )
    return f"{flops / size:.2f} {unit}"


def _counts(flops: Mapping[str, float]) -> str:
    return ", ".join(f"{part} {_count(count)}" for part, count in flops.items() if count)
