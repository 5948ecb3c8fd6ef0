"""Measurements of a card, best first, at the sizes of published models or, on a CPU, in small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from blade_kernels.block_sparse import IMPLEMENTATIONS
from blade_kernels.block_sparse.cute import architecture
from blade_kernels.block_sparse.cute_table import Kernel, kernels_of
from blade_kernels.block_sparse.quantized import PRECISIONS

from blade.benchmarks.attention import PASSES, AttentionBenchmark, run_attention_benchmark
from blade.benchmarks.card.checks import (
    check_attention,
    check_cute,
    check_eight_bits,
    check_norm_rope,
    check_selection,
)
from blade.benchmarks.card.quality import sparsities
from blade.benchmarks.card.suspects import SUSPECTS, LayerSize, call_suspect
from blade.benchmarks.layers import AttentionShape, model_shapes, reference_shape
from blade.families.data import ComparisonProtocol
from blade.families.registry import comparison_protocols, published_configurations
from blade.models.source import BUNDLED

Part = Literal["correctness", "attention", "generation", "distillation", "tuning"]

PARTS: tuple[Part, ...] = ("correctness", "attention", "generation", "distillation", "tuning")
"""Parts of the report."""

DENSITIES = (0.2, 0.1, 0.5, 0.3)
"""Shares of blocks at which attention is timed, that of the students' presets first."""

LONG = 40_000
"""Tokens from which on layers are timed with fewer calls: the slowest backend's training takes seconds there."""

URGENT = 3
"""Of the calls that may crash a card, how many come before anything is timed."""

MEASURED_PASSES = 6
"""Passes of a generation that are timed: three steps with guidance."""

VIDEO = ("model", "height", "width", "frames", "steps")
"""Fields of a comparison protocol that describe a video."""

CUTE_STEP = "CuTe kernel: "
"""How the names of steps begin that check a kernel of `blade_kernels.block_sparse.cute_table`."""

LIMIT = 120.0
"""Seconds after which a step counts as hung."""

Report = dict[str, Any]
OnPartial = Callable[[Report], None]


@dataclass(frozen=True)
class Step:
    """One thing that is measured."""

    name: str
    part: Part
    run: Callable[[torch.device, OnPartial], Report]
    """From the device, and a function that takes the result so far, to the result."""
    limit: float = LIMIT
    """Seconds after which it counts as hung."""


def card_steps(device: torch.device) -> list[Step]:
    """Return what is measured on a device, in this order."""
    small = device.type != "cuda"
    first = AttentionShape(tokens=250, heads=2, head_dim=16) if small else reference_shape()
    others = [] if small else sorted((shape for shape in model_shapes().values() if shape != first), key=_work)
    densities = DENSITIES[:1] if small else DENSITIES
    checks, suspects = _checks(small), [_suspect(name, small) for name in SUSPECTS]
    usual, unusual = _cute_kernels(device)
    return [
        *checks,
        *suspects[:URGENT],
        *usual,
        *(_attention(first, density, small) for density in densities),
        *([] if small else [_attention(first, densities[0], small, blocks="patterns")]),
        *(_attention(first, density, small, tried=True) for density in densities if usual),
        Step("generation", "generation", _generate, limit=300),
        *(_attention(shape, density, small) for shape in others for density in densities[:2]),
        *suspects[URGENT:],
        *unusual,
        Step("an update of a distillation", "distillation", _distill, limit=300),
        *(_attention(shape, density, small) for density in densities[2:] for shape in others),
        *(_attention(shape, density, small, tried=True) for shape in others for density in densities if usual),
        Step("tuning", "tuning", _tune, limit=900),
    ]


def _work(shape: AttentionShape) -> int:
    """Return what the work of a layer's dense attention is proportional to."""
    return shape.heads * shape.head_dim * shape.tokens**2


def _checks(small: bool) -> list[Step]:
    """Return the checks of all kernels."""

    def attention(implementation: str) -> Step:
        def run(device: torch.device, _: OnPartial) -> Report:
            return {"errors": check_attention(implementation, device, small=small)}

        return Step(f"attention by {implementation}", "correctness", run)

    def eight_bits(precision: str) -> Step:
        def run(device: torch.device, _: OnPartial) -> Report:
            return {"errors": check_eight_bits(precision, device)}

        return Step(f"attention in {precision}", "correctness", run)

    checked = [name for name in IMPLEMENTATIONS if name not in ("auto", "cute", "naive")]  # of CuTe, every kernel
    return [
        *map(attention, checked),
        *map(eight_bits, PRECISIONS[1:]),
        Step("selection", "correctness", lambda device, _: {"errors": check_selection(device)}),
        Step("norms and RoPE", "correctness", lambda device, _: {"errors": check_norm_rope(device)}),
    ]


def _cute_kernels(device: torch.device) -> tuple[list[Step], list[Step]]:
    """Return the checks of a card's CuTe kernels: of those for the presets' blocks, and of the others."""

    def check(kernel: Kernel) -> Step:
        return Step(CUTE_STEP + str(kernel), "correctness", lambda device, _: {"errors": check_cute(kernel, device)})

    known = kernels_of(architecture(device.type) or 0)
    usual = [kernel for kernel in known if (kernel.head_size, kernel.block_size) == (128, (128, 128))]
    return [check(kernel) for kernel in usual], [check(kernel) for kernel in known if kernel not in usual]


def _suspect(name: str, small: bool) -> Step:
    """Return a call that may crash a card, alone."""

    def run(device: torch.device, _: OnPartial) -> Report:
        size = LayerSize(tokens=538, heads=4, head_dim=16, block=16) if small else LayerSize()
        return {"size": asdict(size), "differences": call_suspect(name, device, size)}

    return Step(f"crash: {name}", "correctness", run)


def _attention(
    shape: AttentionShape, density: float, small: bool, blocks: str = "random", tried: bool = False
) -> Step:
    """Return the timing of one layer at one density: of what is tried alone, as it may crash, or of all others."""

    def run(device: torch.device, on_partial: OnPartial) -> Report:
        settings = AttentionBenchmark(
            shapes=(shape,),
            densities=(density,),
            passes=tuple(name for name in PASSES if name != "drawn"),
            blocks=blocks,
            tried=tried,
            block_size=32 if small else 128,
            dtype="float32" if small else "bfloat16",
            device=str(device),
            repeats=1 if small or shape.tokens >= LONG else 5,
        )
        return run_attention_benchmark(settings, on_case=on_partial)

    kind = ("" if blocks == "random" else f", {blocks}") + (", CuTe" if tried else "")
    return Step(f"{shape}, density {density}{kind}", "attention", run, limit=300 if shape.tokens >= LONG else LIMIT)


def _generate(device: torch.device, _: OnPartial) -> Report:
    """Time whole videos: of the smallest published model, or of the bundled one in small."""
    from blade.benchmarks.generation import GenerationBenchmark, run_generation_benchmark

    small: Report = {"height": 64, "width": 64, "frames": 9, "steps": 4, "student_steps": (2,), "sparsity": 0.5}
    small |= {"preset_sparsities": (0.5,)}
    large: Report = {name: getattr(_smallest(), name) for name in VIDEO} | {"preset_sparsities": sparsities()}
    settings = GenerationBenchmark(
        **(large if device.type == "cuda" else small),
        random_weights=True,
        measured_passes=MEASURED_PASSES if device.type == "cuda" else 2,
        repeats=1,
        device=str(device),
    )
    return run_generation_benchmark(settings)


def _smallest() -> ComparisonProtocol:
    """Return the protocol with the fewest pixels of those whose model is known without a network."""
    known = published_configurations()
    protocols = [protocol for protocol in comparison_protocols().values() if protocol.model in known]
    return min(protocols, key=lambda protocol: protocol.height * protocol.width * protocol.frames)


def _distill(device: torch.device, _: OnPartial) -> Report:
    """Time an update of a distillation of the same model, of one prompt."""
    from blade.distillation.recipes import load_config, recipe_names
    from blade.distillation.workflow import distill

    small = ["video.height=64", "video.width=64", "video.frames=9", "generator.ode_updates=0", "trajectory.steps=[2]"]
    large = ["run.accumulation=1"]
    overrides = [f"run.device={device}", "run.batch_size=1", *(large if device.type == "cuda" else small)]
    model = _smallest().model if device.type == "cuda" else BUNDLED
    recipe = next(name for name in recipe_names() if load_config(name).model == model)
    estimate = distill(load_config(recipe, overrides), dry_run=True, random_weights=True)
    return {"recipe": recipe, "overrides": overrides, **asdict(estimate)}


def _tune(device: torch.device, on_partial: OnPartial) -> Report:
    """Time launch configurations of the Triton kernels for Wan2.1-1.3B at 480p."""
    from blade_kernels.block_sparse.tuning import Trial, TuningCase, best, tune

    if device.type != "cuda":
        raise NotImplementedError("launch configurations are those of a CUDA GPU")
    shape = reference_shape()
    case = TuningCase(
        tokens=shape.tokens,
        heads=shape.heads,
        head_dim=shape.head_dim,
        block_size=128,
        density=DENSITIES[0],
        dtype=torch.bfloat16,
        device=str(device),
    )
    trials: list[Trial] = []

    def report() -> Report:
        return {
            "trials": [asdict(trial) for trial in trials],
            "best": {kernel: asdict(trial) for kernel, trial in best(trials).items()} if trials else {},
        }

    def on_trial(trial: Trial) -> None:
        trials.append(trial)
        on_partial(report())

    tune(case, on_trial=on_trial)
    return report()
