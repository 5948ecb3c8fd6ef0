"""Compare a cache, sparse attention and both on the bundled model, at equal operations.

python scripts/compare_caches.py docs/results/caches

Beside them stands the plainest way to save operations: fewer steps. Every video is compared with the dense one of 50
steps. The cache is Diffusers' FirstBlockCache, whose threshold is found beforehand from the dense video of the first
caption: the residuals of its first block say which passes a threshold would skip.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FirstBlockCacheConfig
from torch import Tensor, nn

from blade import BladeConfig, apply_blade, blade_summary, remove_blade
from blade.attention.selectors import find_selector
from blade.cli.command import run_command
from blade.common.files import append_json_line, read_json_lines
from blade.common.machine import describe_versions
from blade.common.tables import check_table, markdown_table, write_table
from blade.evaluation.prompts import EvaluationPrompt, held_out_prompts
from blade.generation.prepare import prepare_model
from blade.generation.request import GenerationRequest
from blade.generation.run import run_request
from blade.metrics.estimates import Estimate, bootstrap, paired_difference
from blade.metrics.similarity import psnr, ssim
from blade.models.costs import ForwardCost, forward_cost
from blade.moving_shapes.scoring import score

STEPS = 50
"""Steps of the dense video that all are compared with."""

LIGHTER, LIGHT = 0.55, 0.84
"""Operations of a run as shares of the dense one's; the second is what the shipped preset takes."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to save operations."""

    name: str
    """For the table."""
    share: float
    """Operations that it is to take, as a share of the dense run's."""
    steps: int = STEPS
    """Denoising steps."""
    sparsity: float | None = None
    """Sparsity of the preset's attention; None is dense."""
    cached: bool = False
    """True if a FirstBlockCache is enabled, set so that the run takes `share`."""

    @property
    def config(self) -> BladeConfig:
        """The attention."""
        if self.sparsity is None:
            return BladeConfig(attention="dense")
        return replace(BladeConfig.from_preset("shapes"), sparsity=self.sparsity)


DENSE = Method(name="dense", share=1.0)

METHODS = (
    Method(name="fewer steps", share=LIGHT, steps=round(LIGHT * STEPS)),
    Method(name="sparse (preset)", share=LIGHT, sparsity=0.7),
    Method(name="cache", share=LIGHT, cached=True),
    Method(name="cache, sparse (0.5)", share=LIGHT, sparsity=0.5, cached=True),
    Method(name="fewer steps", share=LIGHTER, steps=round(LIGHTER * STEPS)),
    Method(name="cache", share=LIGHTER, cached=True),
    Method(name="cache, sparse (preset)", share=LIGHTER, sparsity=0.7, cached=True),
)


class Operations:
    """Operations of a transformer's passes, counted by the modules that really ran."""

    def __init__(self, transformer: Any, forward: ForwardCost) -> None:
        """Begin at none.

        Args:
            transformer: the transformer, with BLADE applied, whose tally says what its self-attention computed.
            forward: a dense pass, for the products that have no weights.
        """
        self._transformer, self._forward, self._counted = transformer, forward, 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what runs in a `with` block."""
        handles = [
            module.register_forward_hook(self._add_product)
            for module in self._transformer.modules()
            if isinstance(module, nn.Linear | nn.Conv3d)
        ]
        handles += [block.attn2.register_forward_hook(self._add_other) for block in self._transformer.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def total(self) -> float:
        """Return the operations so far, those of self-attention and of choosing blocks among them."""
        config = blade_summary(self._transformer).transformers[0].config
        each = self._forward.flops["self-attention"] / self._forward.layers
        choice = 0.0
        if config.attention != "dense":
            tokens, details = self._forward.grid.sequence_length, config.asa
            selector = find_selector(details.selector)
            choice = selector.count_operations(tokens, self._forward.heads, self._forward.head_dim, details)
        counted = self._counted
        for layer in blade_summary(self._transformer).transformers[0].layers:
            counted += each * (layer.dense_calls + layer.sparse_calls * (layer.density or 0.0))
            counted += choice * layer.sparse_calls
        return counted

    def _add_product(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        weight = module.weight
        self._counted += 2 * weight.numel() * output.numel() / weight.shape[0]

    def _add_other(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._counted += self._forward.flops["other attention"] / self._forward.layers


@contextmanager
def first_residuals(transformer: Any) -> Iterator[list[Tensor]]:
    """Collect what the first block adds in every pass: (B, S, C) each."""
    residuals: list[Tensor] = []
    block = transformer.blocks[0]
    handle = block.register_forward_hook(lambda module, inputs, output: residuals.append(output - inputs[0]))
    try:
        yield residuals
    finally:
        handle.remove()


def skipped_passes(residuals: Sequence[Tensor], threshold: float) -> list[bool]:
    """Return which passes of one prompt, cond or uncond, a FirstBlockCache of a threshold skips after its first block.

    Args:
        residuals: of the first block, by step.
        threshold: see `FirstBlockCacheConfig`.
    """
    skipped, kept = [], None
    for residual in residuals:
        skip = kept is not None and float((residual - kept).abs().mean() / kept.abs().mean()) <= threshold
        skipped.append(skip)
        kept = kept if skip else residual
    return skipped


def find_threshold(residuals: Sequence[Tensor], method: Method, forward: ForwardCost) -> float:
    """Return the threshold with which a run takes a share of the dense one's operations, by bisection.

    Args:
        residuals: of the first block in the dense run, the passes of guidance in turn.
        method: the method, with its share and sparsity.
        forward: a dense pass.
    """
    passes = residuals[0::2], residuals[1::2]
    dense = forward.total / forward.layers
    sparse = dense
    if method.sparsity is not None:
        sparse -= method.sparsity * forward.flops["self-attention"] / forward.layers
        details = method.config.asa
        selector = find_selector(details.selector)
        tokens = forward.grid.sequence_length
        sparse += selector.count_operations(tokens, forward.heads, forward.head_dim, details)
    begins = method.config.dense_step_count(STEPS)

    def share(threshold: float) -> float:
        taken = 0.0
        for of_pass in passes:
            for step, skip in enumerate(skipped_passes(of_pass, threshold)):
                rest = dense if step < begins else sparse
                taken += dense + (0.0 if skip else (forward.layers - 1) * rest)  # layer 0 is dense in the preset
        return taken / (2 * STEPS * forward.total)

    low, high = 0.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > method.share else (low, middle)
    return high


def main(
    output: Annotated[Path, typer.Argument(help="Folder for caches.json and caches.md.")],
    prompts: Annotated[int, typer.Option(help="Captions, half of them of two objects.")] = 8,
    checkpoint: Annotated[Path, typer.Option(help="Finished videos, for a run that resumes.")] = Path(
        "outputs/compare_caches.jsonl"
    ),
    tables_only: Annotated[bool, typer.Option(help="Tabulate the captions that are finished.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Make every video by every method, and tabulate how near they are to dense, and what they show."""
    check_table(output, "caches")
    chosen = held_out_prompts(single=prompts - prompts // 2, two=prompts // 2)
    records = {(one["prompt"], one["method"], one["share"]): one for one in read_json_lines(checkpoint)}
    for prompt in chosen:
        missing = [method for method in METHODS if (prompt.text, method.name, method.share) not in records]
        if not missing or tables_only:
            continue
        for record in compare(prompt, missing, thresholds_of(records)):
            append_json_line(checkpoint, record)
            records[record["prompt"], record["method"], record["share"]] = record
            near = "" if record["psnr"] is None else f"{record['psnr']:.2f} dB"
            print(f"{record['method']:24} {record['flops']:.3f} {near:9} {prompt.text}", flush=True)
    finished = [one for one in chosen if all((one.text, it.name, it.share) in records for it in (DENSE, *METHODS))]
    if not finished:
        raise ValueError(f"`checkpoint` must hold all videos of a caption, got none in {checkpoint}.")
    command = shlex.join(["python", "scripts/compare_caches.py", *sys.argv[1:]])
    versions = describe_versions(("blade-video", "torch", "diffusers"))
    texts = [prompt.text for prompt in finished]
    two = sum(prompt.group == "two" for prompt in finished)
    values = {
        "command": command,
        "versions": versions,
        "steps": STEPS,
        "videos": [records[key] for key in records if key[0] in texts],
    }
    note = (
        f"The bundled model, {len(texts)} captions that no training saw, {two} of them of two objects, each with one "
        f"seed; PSNR and SSIM to the dense video of {STEPS} steps, with 95 % bootstrap intervals. Operations are of "
        "the transformer, counted by what really ran, as shares of the dense run's. Right: named attributes that the "
        "video shows. The cache is FirstBlockCache, its threshold found from the first caption's dense video."
    )
    write_table(
        output, "caches", title="Cache, sparse attention, both", note=note, lines=table(records, texts), values=values
    )


def thresholds_of(records: dict[Any, dict[str, Any]]) -> dict[tuple[str, float], float]:
    """Return the thresholds that the finished videos were made with, by method and share."""
    return {
        (method, share): one["threshold"]
        for (_, method, share), one in records.items()
        if one["threshold"] is not None
    }


def compare(
    prompt: EvaluationPrompt, methods: Sequence[Method], thresholds: dict[tuple[str, float], float]
) -> Iterator[dict[str, Any]]:
    """Make the dense video of a caption and those of the methods, and yield a record of each.

    Args:
        prompt: the caption and seed.
        methods: the methods.
        thresholds: of the caches by method and share; filled where they are not known yet.
    """
    request = GenerationRequest(prompt=prompt.text, seed=prompt.seed, steps=STEPS, attention="dense")
    model, resolved = prepare_model(request)
    model.pipe.set_progress_bar_config(disable=True)
    transformer, pipe = model.transformer, model.pipe
    with torch.device("meta"):
        empty = type(transformer).from_config(transformer.config)
    forward = forward_cost(empty, model.latent_size(resolved.height, resolved.width, resolved.frames))

    def make(method: Method, threshold: float | None) -> tuple[Tensor, float]:
        apply_blade(pipe, method.config)
        operations = Operations(transformer, forward)
        if threshold is not None:
            transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        try:
            with operations.counting():
                settled = replace(resolved, steps=method.steps)
                video = run_request(model, settled, attention=nullcontext()).video
            return video, operations.total()
        finally:
            if threshold is not None:
                transformer.disable_cache()
            remove_blade(pipe)

    with first_residuals(transformer) as residuals:
        reference, dense = make(DENSE, None)
    expected = 2 * STEPS * forward.total
    if abs(dense / expected - 1) > 1e-3:
        raise ValueError(f"`Operations` must count what PyTorch does, {expected:.4g}, got {dense:.4g}.")
    yield record(prompt, DENSE, None, reference, reference, 1.0)
    for method in methods:
        key = method.name, method.share
        if method.cached and key not in thresholds:
            thresholds[key] = find_threshold(residuals, method, forward)
        threshold = thresholds[key] if method.cached else None
        video, flops = make(method, threshold)
        yield record(prompt, method, threshold, video, reference, flops / dense)


def record(
    prompt: EvaluationPrompt, method: Method, threshold: float | None, video: Tensor, reference: Tensor, share: float
) -> dict[str, Any]:
    """Return plain values of a video."""
    shown = score(video, prompt.text)
    return {
        "prompt": prompt.text,
        "seed": prompt.seed,
        "method": method.name,
        "share": method.share,
        "steps": method.steps,
        "sparsity": method.sparsity,
        "threshold": threshold,
        "flops": share,
        "psnr": None if video is reference else psnr(video, reference),
        "ssim": None if video is reference else ssim(video, reference),
        "right": shown.fraction,
        "all_attributes": shown.all_attributes,
    }


def table(records: dict[Any, dict[str, Any]], texts: Sequence[str]) -> list[str]:
    """Return a row for every method, of the captions that all methods have finished."""
    rows = []
    for method in (DENSE, *METHODS):
        found = [records[text, method.name, method.share] for text in texts]
        settings = [f"{method.steps} steps"]
        if method.cached:
            settings.append(f"threshold {found[0]['threshold']:.3f}")
        near = ["", "", ""]
        if method is not DENSE:
            near = [
                _interval(found, "psnr", "{:.1f}"),
                _interval(found, "ssim", "{:.3f}"),
                _difference(records, method, texts),
            ]
        share = sum(one["flops"] for one in found) / len(found)
        right = sum(one["right"] for one in found) / len(found)
        complete = sum(one["all_attributes"] for one in found)
        rows.append(
            [method.name, ", ".join(settings), f"{share:.3f}", *near, f"{right:.1%}", f"{complete} of {len(found)}"]
        )
    headings = ["method", "settings", "operations", "PSNR, dB", "SSIM", "PSNR to fewer steps", "right", "all right"]
    return markdown_table(headings, rows)


def _interval(found: Sequence[dict[str, Any]], name: str, shown: str) -> str:
    return _shown(bootstrap([one[name] for one in found]), shown)


def _shown(estimate: Estimate, shown: str) -> str:
    """Return a mean with its interval, where there are enough videos for one."""
    mean = shown.format(estimate.mean)
    return mean if estimate.low is None else f"{mean} ({shown.format(estimate.low)} to {shown.format(estimate.high)})"


def _difference(records: dict[Any, dict[str, Any]], method: Method, texts: Sequence[str]) -> str:
    """Return the paired difference in PSNR to fewer steps of the same operations."""
    if method.name == "fewer steps":
        return ""
    difference = paired_difference(
        {(text, 0): records[text, method.name, method.share]["psnr"] for text in texts},
        {(text, 0): records[text, "fewer steps", method.share]["psnr"] for text in texts},
    )
    assert difference is not None
    return _shown(difference, "{:+.1f}")


if __name__ == "__main__":
    run_command(main)
