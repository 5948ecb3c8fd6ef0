"""Workflow of `blade-profile`: from prompts and a budget to a table of head patterns and its measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from blade.attention.budget import configured_budget
from blade.attention.config import CONFIG_NAME, BladeConfig
from blade.attention.pattern_plan import PatternPlan
from blade.attention.pattern_table import TABLE_NAME, uniform_table
from blade.common.files import check_writable
from blade.common.leftovers import files_in
from blade.common.locks import folder_locked
from blade.common.names import check_no_input
from blade.common.terminal import printable
from blade.generation.inputs import input_paths
from blade.generation.plan import resolve_without_weights
from blade.generation.request import ResolvedRequest, check_known
from blade.generation.team import lead, run_together
from blade.metrics.similarity import psnr, ssim
from blade.models.costs import forward_cost
from blade.models.loaded import LatentSize, LoadedModel
from blade.models.loading import load_empty_model
from blade.models.parallel import Team
from blade.profiling.adaptive_sparsity import AdaptiveChoice, adaptive_at_error
from blade.profiling.assignment import GreedyRule
from blade.profiling.candidates import default_candidates
from blade.profiling.costs import AttentionCosts
from blade.profiling.influence import generate_resumable, measure_influences
from blade.profiling.measure import MAP_SIZE
from blade.profiling.objectives import Budget
from blade.profiling.profile import PROFILE_NAME, AttentionProfile, ProfileSource
from blade.profiling.published import START_NAME, published_candidates, published_search
from blade.profiling.record_prompts import dense_video, record_profile, record_prompts
from blade.profiling.recording_plan import Recording
from blade.profiling.request import ProfileRequest
from blade.profiling.search import Choice, PatternSearch, check_groups

RECORDINGS_NAME = "recordings"
"""Folder of the recordings in the output folder, from which an interrupted run resumes."""

ADAPTIVE_NAME = "asa"
"""Folder in the output folder with the configuration of ASA that has the same error."""

ADAPTIVE_SPARSITIES = (0.5, 0.65, 0.8, 0.9)
"""Sparsities at which ASA is measured in addition to the patterns."""

REPORT_NAME = "report.html"
"""File name of the report."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """A prompt generated with the finished table, compared with dense attention on the same noise."""

    prompt: str
    """The prompt."""
    psnr: float
    """PSNR to dense attention, in dB."""
    ssim: float
    """SSIM to dense attention."""
    seconds_denoising: float
    """Denoising time of the sparse run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ProfileReport:
    """Result of a search; its `str` is a summary."""

    request: ProfileRequest
    """The request."""
    profile: AttentionProfile
    """The measurements."""
    search: PatternSearch
    """Errors and costs of the candidates."""
    choice: Choice
    """The chosen patterns."""
    config: BladeConfig
    """The configuration with the table."""
    rule: GreedyRule | None
    """Rule of the published method, with the threshold that was used; None with the other method."""
    adaptive: AdaptiveChoice | None
    """ASA at the same error; None with the published method."""
    verified: tuple[Verification, ...]
    """Comparisons of the finished table with dense attention."""
    device: torch.device
    """The device that the model ran on."""

    def __str__(self) -> str:
        choice, table, folder = self.choice, self.config.patterns, self.request.output
        assert table is not None
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in table.shares().items())
        costs = self.search.costs
        lines = [
            f"patterns    {shares}",
            f"density     {choice.density:.3f} of all query-key pairs; attention costs {choice.cost:.3f} of dense "
            f"({'timed here' if costs.measured else 'by operations'})",
            f"error       {choice.error:.4f} of the attention outputs' energy"
            + (f", at most {choice.gap:.2%} above the least" if choice.gap >= 5e-5 else ""),
        ]
        if costs.step_share is not None:
            faster = f"{costs.speedup(choice.cost):.2f} times faster"
            lines.append(f"step        {faster}: dense attention is {costs.step_share:.0%} of it")
        if self.rule is not None:
            lines.append(f"rule        lambda {self.rule.weight:g}, epsilon {self.rule.threshold:.4g}")
        for verification in self.verified:
            lines.append(
                f"verified    PSNR {verification.psnr:.2f} dB, SSIM {verification.ssim:.4f} to dense, denoising in "
                f"{verification.seconds_denoising:.1f} s: {verification.prompt}"
            )
        if self.adaptive is not None:
            condition = "at the same error" if self.adaptive.reached else "as far as it was measured"
            lines.append(
                f"asa         {condition}: sparsity {self.adaptive.config.sparsity:g}, run density "
                f"{self.adaptive.density:.3f} ({folder / ADAPTIVE_NAME})"
            )
        lines.append(f"written     {folder} (blade-generate --config {folder})")
        return "\n".join(map(printable, lines))


def profile_attention(
    request: ProfileRequest, on_progress: Callable[[str], None] | None = None, *, team: Team | None = None
) -> ProfileReport | None:
    """Profile a model's attention, choose a pattern for every head, and verify the result.

    Writes `attention_profile.safetensors`, `blade_config.json` and `pattern_table.json` into the request's folder, and
    ASA's configuration into `asa` there. An interrupted run resumes bit-exactly.

    Args:
        request: the request.
        on_progress: called with a line of text at every stage and step.
        team: the processes that make each video together, of which this is the first; the others call
            `blade.profiling.team.follow`. None: one does.

    Returns:
        The result; None in one of several processes, which only records.

    Raises:
        ValueError: for a request that cannot be met; an infeasible budget is found once the errors are measured.
        ModelError: if the model does not exist or cannot be used.
        InUseError: if another process profiles into the same folder.
        OutputError: if the folder cannot be written.
    """
    check_profile(request)
    with folder_locked(request.output, share=request.share):
        return _profiled(request, on_progress or (lambda line: None), team)


def check_profile(request: ProfileRequest) -> None:
    """Check, before the model is loaded, that it can draw the prompts, and that files can be written.

    Raises:
        ValueError: for a prompt that it cannot, or an output that is an input.
        OutputError: if a file cannot be written, or there is too little room for a prompt's passes.
    """
    for prompt in request.prompts:
        check_known(replace(request.generation, prompt=prompt))
    check_no_input([request.output], input_paths(request.generation))
    _check_output_files(request)


def load_recorder(request: ProfileRequest) -> Callable[[Path, tuple[int, int]], None]:
    """Load a request's model, and return what records a share of its prompts into a folder; see `record_prompts`.

    Raises:
        ValueError: for a request that cannot be met.
        ModelError: if the model does not exist or cannot be used.
    """
    model, requests, setup = _prepared(request)

    def record(folder: Path, share: tuple[int, int]) -> None:
        record_prompts(model, requests, setup.recording, setup.source, folder, share=share)

    return record


def _prepared(request: ProfileRequest, team: Team | None = None) -> tuple[LoadedModel, list[ResolvedRequest], _Setup]:
    """Load a request's model, and return it with a resolved request per prompt and the setup of the recording."""
    model, resolved = lead(replace(request.generation, prompt=request.prompts[0], attention="dense"), team)
    model.pipe.set_progress_bar_config(disable=True)
    requests = [
        replace(resolved, prompt=prompt, seed=resolved.seed + number) for number, prompt in enumerate(request.prompts)
    ]
    if request.groups is not None:
        check_groups(request.groups, resolved.steps)
    return model, requests, _Setup.of(request, resolved, model)


def _profiled(request: ProfileRequest, say: Callable[[str], None], team: Team | None) -> ProfileReport | None:
    """Profile, in a folder that no other process uses."""
    model, requests, setup = _prepared(request, team)
    folder = request.output / RECORDINGS_NAME
    if request.method == "published":
        return _published(request, model, requests, setup, folder, say)
    recorder = (model, requests, setup.recording, setup.source, folder, lambda step: say(str(step)))
    if request.share[1] > 1:
        record_prompts(*recorder, share=request.share)
        return None
    costs = setup.costs(model)
    assert request.budget is not None
    request.budget.foresee(costs)
    profile = record_profile(*recorder)
    search = PatternSearch(profile, groups=request.groups, costs=costs)
    choice = search.within(request.budget)
    if request.influence_prompts:
        by_step = PatternSearch(profile, costs=costs)
        preliminary = by_step.within(Budget(target_density=max(choice.density, by_step.least_density)))
        influence_requests = requests[: request.influence_prompts]
        influences = measure_influences(model, influence_requests, by_step, preliminary, folder, say)
        search = PatternSearch(profile, groups=request.groups, costs=costs, influences=influences)
        choice = search.within(request.budget)
    adaptive = adaptive_at_error(profile, choice.error, search.influences)
    adaptive.config.save_pretrained(request.output / ADAPTIVE_NAME)
    return _finished(request, model, requests, search, choice, adaptive, None, folder, say)


def _check_output_files(request: ProfileRequest) -> None:
    """Check that files can be written, and that there is room for a prompt's passes."""
    empty, resolved = resolve_without_weights(replace(request.generation, prompt=request.prompts[0]))
    latent = empty.latent_size(*resolved.size)
    forward = forward_cost(empty.transformer, latent)
    blocks = math.ceil(forward.grid.sequence_length / empty.preset.asa.block_size)
    map_and_columns = 8 * min(MAP_SIZE, blocks) ** 2 + 4 * blocks
    # the passes of a prompt are kept until its last
    needed = resolved.steps * (
        forward.layers * forward.heads * map_and_columns + 2 * empty.empty_latent(latent).numel()
    )
    folder, recordings = request.output, request.output / RECORDINGS_NAME
    needed -= sum(path.stat().st_size for path in files_in(recordings))
    names = (PROFILE_NAME, CONFIG_NAME, TABLE_NAME, REPORT_NAME)
    check_writable(
        *(folder / name for name in names),
        folder / ADAPTIVE_NAME / CONFIG_NAME,
        recordings / "prompt-000.safetensors",
        needed=max(needed, 0),
        purpose="the recording",
    )


def _published(
    request: ProfileRequest,
    model: LoadedModel,
    requests: Sequence[ResolvedRequest],
    setup: _Setup,
    folder: Path,
    say: Callable[[str], None],
) -> ProfileReport:
    result = published_search(
        model,
        requests,
        setup.recording,
        setup.source,
        folder / "published",
        rule=request.rule,
        target_density=None if request.budget is None else request.budget.value,
        groups=request.groups,
        on_step=lambda name, step: say(f"{name}: {step}"),
    )
    search = PatternSearch(result.profile, groups=request.groups, costs=setup.costs(model))
    choice = replace(result.choice, cost=search.by_rule(result.rule).cost)
    return _finished(request, model, requests, search, choice, None, result.rule, folder, say)


def _finished(
    request: ProfileRequest,
    model: LoadedModel,
    requests: Sequence[ResolvedRequest],
    search: PatternSearch,
    choice: Choice,
    adaptive: AdaptiveChoice | None,
    rule: GreedyRule | None,
    folder: Path,
    say: Callable[[str], None],
) -> ProfileReport:
    """Write the profile and the table, and verify the table."""
    config = BladeConfig(attention="patterns", patterns=search.table(choice, calibrated=rule is None))
    search.profile.save(request.output / PROFILE_NAME)
    config.save_pretrained(request.output)
    verified = []
    recordings = folder if rule is None else folder / "published" / START_NAME
    for number, verified_request in enumerate(requests[: request.verify_prompts]):
        say(f"verifying the table: {verified_request.prompt}")
        generation = generate_resumable(model, verified_request, config, folder / "verified")
        dense = _dense(model, verified_request, recordings, number)
        verified.append(
            Verification(
                prompt=verified_request.prompt,
                psnr=psnr(generation.video, dense),
                ssim=ssim(generation.video, dense),
                seconds_denoising=generation.seconds_denoising,
            )
        )
    return ProfileReport(
        request=request,
        profile=search.profile,
        search=search,
        choice=choice,
        config=config,
        rule=rule,
        adaptive=adaptive,
        verified=tuple(verified),
        device=model.device,
    )


def _dense(model: LoadedModel, request: ResolvedRequest, recordings: Path, number: int) -> torch.Tensor:
    """Return the dense video of a prompt: the recorded one if it exists."""
    try:
        return torch.from_numpy(dense_video(recordings, number)).float() / 255
    except FileNotFoundError:
        return run_together(model, request.dense()).video


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """The recording, the origin of the profile, and the plan of the candidates."""

    recording: Recording
    source: ProfileSource
    plan: PatternPlan
    """Plan of a table whose patterns are the candidates."""
    latent: LatentSize
    """Frames, height and width of the latent."""
    request: ProfileRequest

    @classmethod
    def of(cls, request: ProfileRequest, resolved: ResolvedRequest, model: LoadedModel) -> _Setup:
        latent, preset = model.latent_size(*resolved.size), model.preset
        size, order = preset.asa.block_size, "raster"
        grid = model.token_grid(latent)
        device = torch.device(resolved.device)
        published = request.method == "published"
        if published:
            candidates = published_candidates(grid, size, order, device=device)
        else:
            candidates = default_candidates(grid, size, order, own_orders=request.own_orders, device=device)
        adaptive = () if published else tuple(replace(preset, sparsity=sparsity) for sparsity in ADAPTIVE_SPARSITIES)
        table = uniform_table(candidates[0], 1, 1, block_size=size, token_order=order)
        config = BladeConfig(attention="patterns", patterns=replace(table, patterns=candidates))
        plan = PatternPlan.of(config, grid, device)
        recording = Recording(
            candidates=candidates,
            block_size=size,
            token_order=order,
            sampled_blocks=request.sampled_blocks,
            adaptive=adaptive,
            calibrated=not published,
        )
        source = ProfileSource(
            model=resolved.model,
            prompts=request.prompts,
            seeds=tuple(resolved.seed + number for number in range(len(request.prompts))),
            steps=resolved.steps,
            guidance_scale=resolved.guidance_scale,
            video=(resolved.frames, resolved.height, resolved.width),
            grid=grid,
            block_size=size,
            token_order=order,
            candidates=candidates,
            densities=tuple(1.0 if density is None else density for density in plan.densities),
            adaptive=adaptive,
            adaptive_densities=tuple(configured_budget(config, grid).density for config in adaptive),
        )
        return cls(recording=recording, source=source, plan=plan, latent=latent, request=request)

    def costs(self, model: LoadedModel) -> AttentionCosts:
        """Return the costs of the candidates, timed if requested."""
        on_cuda = self.plan.masks.device.type == "cuda"
        if self.request.costs == "time" or (self.request.costs == "auto" and on_cuda):
            return AttentionCosts.timed(model, self.plan, self.latent)
        generation = self.request.generation
        empty = load_empty_model(generation.model, revision=generation.revision)
        forward = forward_cost(empty.transformer, self.latent)
        return AttentionCosts.of_operations(self.source.densities, forward)
