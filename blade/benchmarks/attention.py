"""Benchmark of block-sparse attention against the fastest dense attention, at given sizes and densities."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_selection import sampled_importance, select_blocks
from blade_kernels.block_sparse import resolve_implementation
from blade_kernels.block_sparse.launch_table import architecture
from blade_kernels.crashes import DeviceCrashError, naming_crashes
from blade_kernels.triton_support import missing_triton
from torch import Tensor
from torch.nn import functional

from blade.attention.pattern_plan import PatternPlan
from blade.benchmarks.candidates import Attend, Candidate, absent_candidates, candidates_for, recorded_packages
from blade.benchmarks.layers import AttentionShape
from blade.benchmarks.patterns import PATTERN_KINDS, benchmark_patterns
from blade.common.machine import describe_machine, describe_versions
from blade.metrics.timing import time_short_calls
from blade.models.devices import DTYPES

PACKAGES = ("blade-video", "torch", "triton")
"""Packages whose versions are recorded, in addition to those of the candidates."""

ERROR_BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 3e-3}
"""Largest error of BLADE's implementations, relative to the exact output's root mean square."""

EXPECTED = (RuntimeError, ImportError, TypeError, ValueError)
"""What peers raise where they lack a feature."""

PASSES = {
    "drawn": "drawing random blocks, building the mask, and the forward pass",
    "forward": "the forward pass, with the mask given",
    "training": "the forward and the backward pass, with the mask given",
    "selection": "the choice of blocks from queries and keys, and building the mask",
    "whole": "the choice of blocks, building the mask, and the forward pass",
}
"""Passes that can be timed, each compared with the fastest dense attention."""

BLOCKS = ("random", "patterns")
"""Choices of the kept blocks: independent ones in every head and row, or those of a table of head patterns."""

PROBE_TOKENS = 16
"""Tokens in 128 that are sampled for the choice of blocks."""

ROTATED_INPUTS = 2
"""Number of different inputs that a CUDA measurement cycles through."""


@dataclass(frozen=True, kw_only=True)
class AttentionBenchmark:
    """Options of the attention benchmark."""

    shapes: tuple[AttentionShape, ...] = (AttentionShape(tokens=8192),)
    """Sizes of the layer."""
    densities: tuple[float, ...] = (0.15,)
    """Shares of the key blocks that the rows keep, in (0, 1]. Each row rounds its number of blocks down or up at
    random, so that the mean is the share, and keeps at least one."""
    passes: tuple[str, ...] = ("drawn",)
    """Passes to time, names of `PASSES`."""
    blocks: str = "random"
    """One of `BLOCKS`."""
    tried: bool | None = None
    """Of sparse candidates, measure those that are `tried` alone, or the others alone; None measures all."""
    block_size: int = 128
    """Tokens in a block, both of queries and of keys."""
    dtype: str = "float32"
    """Type of queries, keys and values."""
    device: str = "cpu"
    """The device to measure on."""
    threads: int | None = None
    """Threads on the CPU. None: PyTorch's own number."""
    repeats: int = 5
    """Measured calls, of which the median counts; a warm-up call comes first."""
    seed: int = 0
    """Seed of the inputs and of the blocks."""

    def __post_init__(self) -> None:
        for name in ("block_size", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.shapes:
            raise ValueError("`shapes` must hold at least one size.")
        if not self.densities or not all(0 < density <= 1 for density in self.densities):
            raise ValueError(f"`densities` must be in (0, 1], got {self.densities}.")
        if not self.passes or not set(self.passes) <= set(PASSES):
            raise ValueError(f"`passes` must be some of {', '.join(PASSES)}, got {', '.join(self.passes) or 'none'}.")
        if self.blocks not in BLOCKS:
            raise ValueError(f"`blocks` must be one of {', '.join(BLOCKS)}, got {self.blocks!r}.")
        if self.blocks == "patterns" and any(shape.grid is None for shape in self.shapes):
            raise ValueError("`shapes` must be of models where `blocks` is patterns, which need to know the frames.")
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"`threads` must be at least 1 or None, got {self.threads}.")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"`device` must exist, got {self.device!r} and no CUDA device is available.")


def run_attention_benchmark(
    settings: AttentionBenchmark,
    *,
    command: str | None = None,
    on_case: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure dense and block-sparse attention, and that of other packages if they are installed.

    The blocks are drawn at random, independently in every head and row, or are those of a table of head patterns. An
    implementation of BLADE whose output is wrong is an error, not a result; a peer's error is reported with its times.

    Args:
        settings: the options.
        command: the command line to record.
        on_case: called with the report so far after every size and density, so that none is lost.

    Returns:
        Plain JSON values: `settings`, `machine`, `versions`, `date`, `command`; `absent`, the reasons why peers are
        not measured; and `cases`, one for each size and density. On CUDA also `matrix_peak_tflops`, the measured peak
        of matrix multiplication, and `cubins`, facts about the compiled Triton kernels of these sizes. A case has, by
        name of candidate, `ms`, a time for every pass; `error`, relative to the exact output; on CUDA `peak_mib`, the
        peak memory of every pass, including its inputs but not a given mask; `sparse`, the names of the block-sparse
        candidates; and `missing`, the reasons why some were not measured.

    Raises:
        RuntimeError: an implementation's output is wrong.
        DeviceCrashError: a candidate crashes the GPU, which then computes nothing more for this process.
    """
    device, cases = torch.device(settings.device), list[dict[str, Any]]()
    with _threads(settings.threads):
        machine = describe_machine(device)
        report: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "command": command,
            "machine": machine,
            "versions": describe_versions((*PACKAGES, *recorded_packages())),
            "settings": asdict(settings),
            "absent": dict[str, str](),
            "cases": cases,
        }
        if device.type == "cuda":
            report["matrix_peak_tflops"] = _matrix_peak(settings)
            report["cubins"] = _cubins(settings)
        for shape in settings.shapes:
            layer = _Layer(shape, settings)
            report["absent"] |= absent_candidates(layer.inputs[0][0], settings.block_size)
            for density in settings.densities:
                cases.append(layer.case(density))
                if on_case is not None:
                    on_case(report)
    return report


class _Layer:
    """Inputs of one size, and the times of dense attention on them."""

    def __init__(self, shape: AttentionShape, settings: AttentionBenchmark) -> None:
        self.shape, self.settings = shape, settings
        self.device = torch.device(settings.device)
        self.generator = torch.Generator(self.device).manual_seed(settings.seed)
        # queries, keys, values and the gradient of the output
        self.inputs = [
            [self._normal() for _ in range(4)] for _ in range(ROTATED_INPUTS if self.device.type == "cuda" else 1)
        ]
        self.blocks = -(-shape.tokens // settings.block_size)
        self.passes = ["training"] if "training" in settings.passes else []
        if set(settings.passes) - {"training"}:
            self.passes.insert(0, "forward")
        self._plans: dict[float, PatternPlan] = {}
        self.dense = _Results()
        q = self.inputs[0][0]
        for candidate in candidates_for(q, settings.block_size):
            if not candidate.sparse:
                self._measure(candidate, self.passes, self.draw(1.0), self.dense)

    def case(self, density: float) -> dict[str, Any]:
        """Measure everything at one density."""
        settings, (q, k, v, _) = self.settings, self.inputs[0]
        mask, results = self.draw(density), _Results(self.dense)
        sparse = [
            candidate
            for candidate in candidates_for(q, settings.block_size)
            if candidate.sparse and settings.tried in (None, candidate.tried)
        ]
        for candidate in sparse:
            if candidate.refuses is not None and (reason := candidate.refuses(q, k, v, mask)) is not None:
                results.missing[candidate.name] = reason
                continue
            passes = [name for name in settings.passes if name != "selection"]
            if not candidate.own:
                passes = [name for name in passes if name in ("forward", "training")]
            self._measure(candidate, passes, mask, results, density)
        if "selection" in settings.passes:
            count = self._block_count(density)
            choose: Callable[[Tensor, Tensor, Tensor], object] = lambda q, k, v: self._select(q, k, count)  # noqa: E731
            if settings.blocks == "patterns":
                choose = lambda q, k, v: self.draw(density)  # noqa: E731
            results.add("selection", "selection", *self._timed(choose))
        return {
            **asdict(self.shape),
            "density": density,
            "realised_density": float(mask.density(self.shape.tokens, self.shape.tokens)),
            "auto": resolve_implementation(q, k, v, mask),
            "sparse": [candidate.name for candidate in sparse if candidate.name in results.ms],
            "ms": results.ms,
            "peak_mib": results.peak_mib,
            "error": results.error,
            "missing": results.missing,
        }

    def draw(self, density: float) -> BlockMask:
        """Make a mask of random blocks, or of patterns."""
        if self.settings.blocks == "patterns" and density < 1:
            return self._plan(density).mask(self._pattern_ids())
        shape, size = (self.shape.batch, self.shape.heads, self.blocks, self.blocks), self.settings.block_size
        ranks = torch.rand(shape, generator=self.generator, device=self.device).argsort(-1).argsort(-1)
        rounding = torch.rand((*shape[:3], 1), generator=self.generator, device=self.device)
        counts = (density * self.blocks + rounding).floor().clamp(min=1)
        return BlockMask.from_dense(ranks < counts, (size, size), math.ceil(density * self.blocks))

    def _plan(self, density: float) -> PatternPlan:
        """Return the plan of the heads' patterns at a density."""
        if density not in self._plans:
            assert self.shape.grid is not None
            self._plans[density] = benchmark_patterns(
                self.shape.grid, self.shape.heads, density, self.settings.block_size, self.device
            )
        return self._plans[density]

    def _pattern_ids(self) -> Tensor:
        return torch.arange(self.shape.heads, device=self.device) % len(PATTERN_KINDS)

    def _measure(
        self, candidate: Candidate, passes: list[str], mask: BlockMask, results: _Results, density: float = 1.0
    ) -> None:
        """Check a candidate's output and time its passes, or note why it cannot compute them."""
        count = self._block_count(density)
        forwards: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
            "forward": lambda q, k, v: candidate.attend(q, k, v, mask),
            "drawn": lambda q, k, v: candidate.attend(q, k, v, self.draw(density)),
            "whole": lambda q, k, v: candidate.attend(q, k, v, self._select(q, k, count)),
        }
        if self.settings.blocks == "patterns" and density < 1:
            implementation, _, precision = candidate.name.partition(", ")
            plan = replace(self._plan(density), implementation=implementation, precision=precision or "full")
            rows = (self._pattern_ids(),)
            head_places = plan.head_places(rows)
            forwards["whole"] = lambda q, k, v: plan.attend(q, k, v, rows, places=head_places)[0]
        try:
            with torch.no_grad(), naming_crashes(f"`{candidate.name}`, density {density}", self.device):
                q, k, v = self._laid_out(candidate)[0][:3]
                results.error[candidate.name] = _relative_error(candidate.attend(q, k, v, mask), q, k, v, mask)
        except Exception as problem:
            if not candidate.tried and (candidate.own or not isinstance(problem, EXPECTED)):
                raise
            if isinstance(problem, DeviceCrashError):
                raise
            results.error.pop(candidate.name, None)
            results.missing[candidate.name] = str(problem).splitlines()[0]
            return
        bound = ERROR_BOUNDS[self.settings.dtype]
        error = results.error[candidate.name]
        if candidate.tried and not error <= bound:
            results.error.pop(candidate.name)
            results.missing[candidate.name] = f"its output is wrong: relative error {error:.2g}"
            return
        if candidate.own and not error <= bound:
            raise RuntimeError(
                f"the output of `{candidate.name}` is wrong: relative error {error:.2g}, density {density}."
            )
        for name in passes:
            with naming_crashes(f"`{candidate.name}`, {name}, density {density}", self.device):
                if name != "training":
                    results.add(candidate.name, name, *self._timed(forwards[name], candidate))
                elif candidate.has_backward(q):
                    with _deterministic(candidate.deterministic):
                        results.add(candidate.name, name, *self._timed_training(candidate.attend, mask, candidate))

    def _timed(
        self, function: Callable[[Tensor, Tensor, Tensor], object], candidate: Candidate | None = None
    ) -> tuple[float, float | None]:
        inputs, state = self._laid_out(candidate), self.generator.get_state()
        with torch.no_grad():
            times = _measured(lambda turn: function(*inputs[turn % len(inputs)][:3]), self.settings, inputs[0][:3])
        if self.device.type == "cuda":  # the number of calls varies there, which must not change later draws
            self.generator.set_state(state)
        return times

    def _timed_training(self, attend: Attend, mask: BlockMask, candidate: Candidate) -> tuple[float, float | None]:
        inputs = [[x.detach().requires_grad_() for x in tensors] for tensors in self._laid_out(candidate)]

        def train(turn: int) -> object:
            q, k, v, grad_out = inputs[turn % len(inputs)]
            return torch.autograd.grad(attend(q, k, v, mask), (q, k, v), grad_out.detach())

        return _measured(train, self.settings, inputs[0])

    def _laid_out(self, candidate: Candidate | None) -> list[list[Tensor]]:
        """Return the inputs in the memory layout that a candidate takes."""
        if candidate is None or not candidate.heads_first:
            return self.inputs
        return [[x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors] for tensors in self.inputs]

    def _normal(self) -> Tensor:
        shape = (self.shape.batch, self.shape.tokens, self.shape.heads, self.shape.head_dim)
        values = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return values.to(DTYPES[self.settings.dtype])

    def _block_count(self, density: float) -> int:
        return max(1, round(density * self.blocks))

    def _select(self, q: Tensor, k: Tensor, count: int) -> BlockMask:
        """Select the most important blocks by sampled tokens, the same number in every row."""
        size = self.settings.block_size
        probe = max(1, PROBE_TOKENS * size // 128)
        offsets = torch.arange(0, size, size // probe, device=q.device)[:probe].expand(q.shape[2], -1)
        importance = sampled_importance(q, k, offsets, offsets, (size, size))
        return select_blocks(importance, (size, size), max_blocks=count)


class _Results:
    """Times, memory and errors, by name of candidate."""

    def __init__(self, start: _Results | None = None) -> None:
        self.ms: dict[str, dict[str, float]] = dict(start.ms) if start else {}
        self.peak_mib: dict[str, dict[str, float]] = dict(start.peak_mib) if start else {}
        self.error: dict[str, float] = dict(start.error) if start else {}
        self.missing: dict[str, str] = dict(start.missing) if start else {}

    def add(self, name: str, pass_name: str, ms: float, peak_mib: float | None) -> None:
        self.ms.setdefault(name, {})[pass_name] = ms
        if peak_mib is not None:
            self.peak_mib.setdefault(name, {})[pass_name] = peak_mib


def _relative_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> float:
    """Return the largest relative root mean square error of the first, a middle and the last query block."""
    size, worst = mask.block_size[0], 0.0
    for block in {0, mask.query_blocks // 2, mask.query_blocks - 1}:
        rows = slice(block * size, (block + 1) * size)
        keep = mask.keep[:, :, block].repeat_interleave(mask.block_size[1], -1)[..., : k.shape[1]].unsqueeze(2)
        queries, keys, values = (x.double().transpose(1, 2) for x in (q[:, rows], k, v))
        exact = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=keep).transpose(1, 2)
        error = (out[:, rows].double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        worst = max(worst, float(error))
    return worst


def _measured(
    function: Callable[[int], object], settings: AttentionBenchmark, inputs: Sequence[Tensor]
) -> tuple[float, float | None]:
    """Time a function of the turn's number after a warm-up; return median milliseconds and, on CUDA, peak MiB."""
    function(0)
    other_bytes = 0
    if torch.device(settings.device).type == "cuda":
        other_bytes = torch.cuda.memory_allocated(settings.device) - sum(x.numel() * x.element_size() for x in inputs)
    measurement = time_short_calls(function, settings.device, settings.repeats)
    peak = None if measurement.peak_bytes is None else round((measurement.peak_bytes - other_bytes) / 2**20, 1)
    return round(measurement.median, 4), peak


def _matrix_peak(settings: AttentionBenchmark) -> float:
    """Measure the TFLOP/s of one large matrix product."""
    size = 8192
    left, right = (
        torch.randn(size, size, device=settings.device, dtype=torch.float32).to(DTYPES[settings.dtype])
        for _ in range(2)
    )
    ms, _ = _measured(lambda turn: left @ right, settings, (left, right))
    return round(2 * size**3 / ms / 1e9, 1)


def _cubins(settings: AttentionBenchmark) -> list[dict[str, Any]]:
    """Describe the compiled Triton kernels of these sizes; none for float32, which exists for tests only."""
    if settings.dtype == "float32" or missing_triton(settings.device) is not None:
        return []
    from blade_kernels.cubin import attention_variants, cubin_report

    arch = architecture(torch.cuda.get_device_capability(settings.device))
    sizes = {shape.head_dim for shape in settings.shapes}
    variants = [
        variant
        for variant in attention_variants(arch)
        if variant.constants["D"] in sizes and variant.constants["BQ"] == settings.block_size
    ]
    dtype = {"bfloat16": "bf16", "float16": "fp16"}[settings.dtype]
    return [asdict(cubin_report(variant, arch, dtype=dtype)) for variant in variants]


@contextmanager
def _deterministic(enabled: bool) -> Iterator[None]:
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled or previous)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with this number of threads inside a `with` block."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count or previous)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
