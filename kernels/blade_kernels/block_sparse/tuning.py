"""Tuning of launch configurations: timing them on this machine's GPU for one size of heads and blocks."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blade_kernels.block_selection import random_blocks
from blade_kernels.block_sparse.launch_table import (
    BLOCK_SIZES,
    HEAD_SIZES,
    KERNELS,
    SHARED_MEMORY,
    Kernel,
    LaunchConfig,
    launch_config,
    measured_configs,
    trying,
)
from blade_kernels.block_sparse.operators import Arguments
from blade_kernels.block_sparse.triton_attention import backward, device_of, forward
from blade_kernels.crashes import DeviceCrashError, naming_crashes

WORTH = 0.98
"""Largest share of the shipped configuration's time at which another one replaces it."""

LARGEST_CHANGE = 2e-2
"""Largest root mean square difference from the shipped configuration's outputs, relative to theirs."""


@dataclass(frozen=True, kw_only=True)
class TuningCase:
    """The attention layer that configurations are timed on."""

    tokens: int = 32760
    """Length of the sequence."""
    heads: int = 12
    """Attention heads."""
    head_dim: int = 128
    """64 or 128."""
    block_size: int = 128
    """Tokens in a block, of queries and of keys alike: 16, 32, 64 or 128."""
    density: float = 0.2
    """Share of key blocks kept in each row, in (0, 1]."""
    dtype: torch.dtype = torch.bfloat16
    """bfloat16 or float16."""
    device: str = "cuda"
    """Device to measure on."""

    def __post_init__(self) -> None:
        for name in ("tokens", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.head_dim not in HEAD_SIZES:
            raise ValueError(f"`head_dim` must be one of {HEAD_SIZES}, got {self.head_dim}.")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(f"`block_size` must be one of {BLOCK_SIZES}, got {self.block_size}.")
        if not 0 < self.density <= 1:
            raise ValueError(f"`density` must be in (0, 1], got {self.density}.")
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"`dtype` must be torch.bfloat16 or torch.float16, got {self.dtype}.")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Result for one configuration of one kernel."""

    kernel: Kernel
    config: LaunchConfig
    shipped: bool
    """True for the shipped configuration."""
    ms: float | None
    """Median time of the forward or the whole backward pass; None if it failed."""
    problem: str | None = None
    """Reason of the failure."""


def candidates(kernel: Kernel, arch: str, head_size: int, block: int) -> Iterator[LaunchConfig]:
    """Yield the configurations whose loads in flight fit into shared memory.

    Args:
        kernel: name of the kernel.
        arch: as returned by `architecture`.
        head_size: 64 or 128.
        block: tokens in a block, of queries and of keys.
    """
    tiles = [size for size in BLOCK_SIZES if 32 <= size <= block] or [block]
    for block_m, block_n, warps, stages in itertools.product(tiles, tiles, (4, 8), (1, 2, 3, 4)):
        streamed, resident = (block_m, block_n) if kernel == "key_gradient" else (block_n, block_m)
        if 2 * head_size * (2 * stages * streamed + resident) > 1024 * SHARED_MEMORY[arch]:
            continue
        if warps == 8 and block_m * block_n <= 32 * 64:  # too little work for each warp
            continue
        yield LaunchConfig(
            block_m=block_m, block_n=block_n, num_warps=warps, num_stages=stages, tma=arch in ("90", "100")
        )


def tune(
    case: TuningCase,
    *,
    measure: Callable[[Callable[[], object]], float] | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Time every candidate of every kernel, the shipped configurations first.

    Args:
        case: the layer.
        measure: returns the time of a call in milliseconds; by default the median of CUDA events.
        on_trial: called after each trial.

    Returns:
        All trials; those that fail to compile, or whose outputs differ, have no time.

    Raises:
        DeviceCrashError: a configuration crashes the GPU, which then computes nothing more for this process.
    """
    device = torch.device(case.device)
    arch = device_of(device)[0]
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, case.tokens, case.heads, case.head_dim)
    q, k, v, grad_out = (torch.randn(shape, generator=generator, device=device).to(case.dtype) for _ in range(4))
    blocks, size = -(-case.tokens // case.block_size), (case.block_size, case.block_size)
    blocks_per_row = max(1, round(case.density * blocks))
    mask = random_blocks((1, case.heads, blocks, blocks), blocks_per_row, size, generator=generator, device=device)
    arguments = Arguments.of(q, k, v, mask, None, None, case.head_dim**-0.5)
    out, lse = forward(arguments)
    passes: dict[Kernel, Callable[[], tuple[Tensor, ...]]] = {
        "forward": lambda: forward(arguments)[:1],
        "query_gradient": lambda: backward(arguments, out, lse, grad_out, torch.zeros_like(lse))[:3],
        "key_gradient": lambda: backward(arguments, out, lse, grad_out, torch.zeros_like(lse))[:3],
    }
    trials = []
    for kernel in KERNELS:
        run, expected = passes[kernel], passes[kernel]()
        shipped = launch_config(kernel, arch, case.head_dim, size)
        others = [config for config in candidates(kernel, arch, case.head_dim, case.block_size) if config != shipped]
        for config in (shipped, *others):
            ms, problem = None, None
            try:
                with trying(kernel, config), naming_crashes(f"{kernel} with {config}", arguments.q.device):
                    change = max(map(_relative_change, run(), expected))
                    if change <= LARGEST_CHANGE:
                        ms = (measure or _event_ms)(run)
                    else:
                        problem = f"outputs differ by {change:.2g}"
            except DeviceCrashError:
                raise
            except Exception as error:  # Triton and the driver raise various errors for invalid configurations
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
            trials.append(Trial(kernel=kernel, config=config, shipped=config == shipped, ms=ms, problem=problem))
            if on_trial is not None:
                on_trial(trials[-1])
    return trials


def best(trials: list[Trial]) -> dict[Kernel, Trial]:
    """Pick the fastest trial of each kernel, or the shipped one if nothing is clearly faster."""
    fastest_trials: dict[Kernel, Trial] = {}
    for kernel in KERNELS:
        timed = [trial for trial in trials if trial.kernel == kernel and trial.ms is not None]
        if not timed:
            continue
        fastest = min(timed, key=lambda trial: trial.ms or 0.0)
        shipped = next((trial for trial in timed if trial.shipped), None)
        if shipped is not None and (fastest.ms or 0.0) > WORTH * (shipped.ms or 0.0):
            fastest = shipped
        fastest_trials[kernel] = fastest
    return fastest_trials


def save(chosen: dict[Kernel, Trial], case: TuningCase, path: Path) -> None:
    """Update this machine's file of measured configurations; entries for which the shipped one won are removed.

    Args:
        chosen: result of `best`.
        case: the layer that they were timed on.
        path: the file; replaced atomically.

    Raises:
        ValueError: the file exists and cannot be read.
        OSError: the file cannot be written.
    """
    table: dict[str, Any] = json.loads(json.dumps(measured_configs(path)))
    device_table = table.setdefault(device_of(torch.device(case.device))[1], {})
    for kernel, trial in chosen.items():
        rows = device_table.setdefault(kernel, {}).setdefault(str(case.head_dim), {})
        if trial.shipped:
            rows.pop(str(case.block_size), None)
        else:
            rows[str(case.block_size)] = asdict(trial.config)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    measured_configs.cache_clear()


def _relative_change(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.float() - expected.float()).square().mean().sqrt()
    return float(difference / expected.float().square().mean().sqrt())


def _event_ms(run: Callable[[], object]) -> float:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(5)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times: list[float] = [start.elapsed_time(end) for start, end in events]
    return round(statistics.median(times), 4)
