"""How fast block-sparse attention is beside the fastest dense attention, at given sequence lengths and densities."""

from __future__ import annotations

import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import block_sparse_attention, resolve_implementation
from torch.nn.attention import SDPBackend, sdpa_kernel

from blade.machine import describe_machine, describe_versions
from blade.video_io import write_files

IMPLEMENTATIONS = ("reference", "flex")
"""Implementations of block-sparse attention that are measured, where they can compute the case."""

PACKAGES = ("blade-video", "torch")
"""Packages whose versions are recorded."""

MATH_BYTES = 2**30
"""The dense backend that holds all logits is tried where they take no more than this."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ERROR_BOUNDS = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 3e-3}
"""Largest error, relative to the exact output's root mean square, with which times are reported."""


@dataclass(frozen=True, kw_only=True)
class AttentionBenchmark:
    """What to measure: the forward of one attention layer, float32 on the CPU unless told otherwise."""

    tokens: tuple[int, ...] = (8192,)
    """Lengths of the sequence."""
    densities: tuple[float, ...] = (0.15,)
    """Shares of the key blocks that the rows keep, in (0, 1]. A row keeps the next smaller or the next larger whole
    number, drawn so that the mean is the share, and one at the least."""
    heads: int = 2
    """Attention heads."""
    head_dim: int = 128
    """Numbers in one head of one token."""
    block_size: int = 128
    """Tokens in a block, of queries and of keys alike."""
    dtype: str = "float32"
    """Type of queries, keys and values."""
    device: str = "cpu"
    """Where to measure."""
    threads: int | None = None
    """Threads on the CPU. None: PyTorch's own number."""
    repeats: int = 5
    """Measured calls, of which the median counts; one more before them is not measured."""
    seed: int = 0
    """Of the inputs and of the blocks."""

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "block_size", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not self.tokens or min(self.tokens) < 1:
            raise ValueError(f"`tokens` must be lengths of at least 1, got {self.tokens}.")
        if not self.densities or not all(0 < density <= 1 for density in self.densities):
            raise ValueError(f"`densities` must be in (0, 1], got {self.densities}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"`threads` must be at least 1 or None, got {self.threads}.")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"`device` must be there, got {self.device!r} and no CUDA device is available.")


def run_attention_benchmark(
    settings: AttentionBenchmark,
    *,
    command: str | None = None,
    on_case: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure dense and block-sparse attention.

    Dense attention is the fastest of PyTorch's backends, with heads before or after tokens in memory. The blocks of
    the sparse one are drawn at random, independently in every head and row; drawing them and building the mask is part
    of what is timed. An implementation whose output is wrong is an error, not a result.

    Args:
        settings: what to measure.
        command: the command line to record.
        on_case: called with the result of every length and density as it is found.

    Returns:
        Plain JSON values: `settings`, `machine`, `versions`, `date`, `command` and `cases`, one for each length and
        density, with times in milliseconds.

    Raises:
        RuntimeError: an implementation's output is wrong.
    """
    device, values = torch.device(settings.device), asdict(settings)
    cases: list[dict[str, Any]] = []
    with _threads(settings.threads), torch.no_grad():
        machine = describe_machine(device)
        for tokens in settings.tokens:
            generator = torch.Generator(device).manual_seed(settings.seed)
            shape = (1, tokens, settings.heads, settings.head_dim)
            q, k, v = (
                torch.randn(shape, generator=generator, device=device).to(DTYPES[settings.dtype]) for _ in range(3)
            )
            dense = _fastest_dense(q, k, v, settings)
            for density in settings.densities:
                cases.append({"tokens": tokens, "density": density, **dense, **_sparse(q, k, v, density, settings)})
                if on_case is not None:
                    on_case(cases[-1])
    return {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "machine": machine,
        "versions": describe_versions(PACKAGES),
        "settings": {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
        "cases": cases,
    }


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of a report's table."""
    measured = [name for name in IMPLEMENTATIONS if any(f"{name}_ms" in case for case in report["cases"])]
    headings = ["tokens", "density", "dense ms", *(f"{name} ms (times as fast)" for name in measured), "auto takes"]
    rows = []
    for case in report["cases"]:
        cells = [f"{case['tokens']:,}", f"{case['realised_density']:.3f}", f"{case['dense_ms']:.1f}"]
        for name in measured:
            time_ms = case.get(f"{name}_ms")
            cells.append("" if time_ms is None else f"{time_ms:.1f} ({case['dense_ms'] / time_ms:.2f})")
        rows.append([*cells, case["auto"]])
    return headings, rows


def write_report(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write `attention.json`, `attention.md` and `attention.png`; all or none.

    Returns:
        The files' paths.

    Raises:
        ImportError: matplotlib is not installed.
        OutputError: a file can not be written.
    """
    from blade.evaluation.attention_plot import plot_report

    headings, rows = table(report)
    machine, settings = report["machine"], report["settings"]
    lines = [
        "# Attention, dense and block-sparse",
        "",
        f"{report['date']}, {machine['device']}, {machine['threads']} threads, torch {report['versions']['torch']}. "
        f"{settings['heads']} heads of {settings['head_dim']}, {settings['dtype']}, blocks of {settings['block_size']}"
        f" drawn at random in every head and row; forward, median of {settings['repeats']}, in milliseconds.",
        "",
        f"    {report['command']}",
        "",
        *("| " + " | ".join(cells) + " |" for cells in (headings, ["---:"] * len(headings), *rows)),
    ]
    files = {
        folder / "attention.json": (json.dumps(report, indent=2) + "\n").encode(),
        folder / "attention.md": ("\n".join(lines) + "\n").encode(),
        folder / "attention.png": plot_report(report),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_files(files)
    return list(files)


def _fastest_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, settings: AttentionBenchmark) -> dict[str, Any]:
    """Time of the fastest dense attention and what it was."""
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if q.shape[2] * q.shape[1] ** 2 * 4 <= MATH_BYTES:
        backends.append(SDPBackend.MATH)
    views = [x.transpose(1, 2) for x in (q, k, v)]
    layouts = {"tokens, heads": views, "heads, tokens": [x.contiguous() for x in views]}
    found: dict[str, float] = {}
    for backend in backends:
        for layout, tensors in layouts.items():
            with sdpa_kernel(backend):
                attend = torch.nn.functional.scaled_dot_product_attention
                try:
                    attend(*tensors)
                except RuntimeError:  # PyTorch's way to say that a backend does not take this device or type
                    continue
                found[f"{backend.name.lower()}, {layout}"] = _median_ms(lambda: attend(*tensors), settings)  # noqa: B023
    best = min(found, key=lambda name: found[name])
    return {"dense_ms": found[best], "dense_backend": best}


def _sparse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, density: float, settings: AttentionBenchmark
) -> dict[str, Any]:
    """Times of the implementations at one density, which `auto` takes, and the density that there was."""
    blocks = -(-q.shape[1] // settings.block_size)
    size = (settings.block_size, settings.block_size)
    generator = torch.Generator(q.device).manual_seed(settings.seed)

    def draw() -> BlockMask:
        shape = (q.shape[0], q.shape[2], blocks, blocks)
        places = torch.rand(shape, generator=generator, device=q.device).argsort(-1).argsort(-1)
        share = torch.rand((*shape[:3], 1), generator=generator, device=q.device)
        kept = (density * blocks + share).floor().clamp(min=1)
        return BlockMask.from_dense(places < kept, size, math.ceil(density * blocks))

    mask = draw()
    result: dict[str, Any] = {
        "realised_density": float(mask.density(q.shape[1], k.shape[1])),
        "auto": resolve_implementation(q, k, v, mask),
    }
    for name in IMPLEMENTATIONS:
        try:
            resolve_implementation(q, k, v, mask, implementation=name)
        except NotImplementedError as reason:
            result[f"{name}_missing"] = str(reason)
            continue
        started = time.perf_counter()
        out = block_sparse_attention(q, k, v, mask, implementation=name)
        result[f"{name}_first_call_s"] = round(time.perf_counter() - started, 3)
        error = _relative_error(out, q, k, v, mask)
        if not error <= ERROR_BOUNDS[settings.dtype]:
            raise RuntimeError(f"the output of `{name}` is wrong: relative error {error:.2g}, density {density}.")
        result[f"{name}_ms"] = _median_ms(
            lambda: block_sparse_attention(q, k, v, draw(), implementation=name),  # noqa: B023
            settings,
        )
    return result


def _relative_error(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> float:
    """Largest root mean square error of the first, a middle and the last query block, relative to what is right."""
    size, worst = mask.block_size[0], 0.0
    for block in {0, mask.query_blocks // 2, mask.query_blocks - 1}:
        rows = slice(block * size, (block + 1) * size)
        seen = mask.keep[:, :, block].repeat_interleave(mask.block_size[1], -1)[..., : k.shape[1]].unsqueeze(2)
        heads = [x.double().transpose(1, 2) for x in (q[:, rows], k, v)]
        exact = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(1, 2)
        error = (out[:, rows].double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        worst = max(worst, float(error))
    return worst


def _median_ms(function: Callable[[], object], settings: AttentionBenchmark) -> float:
    """Median time of a call in milliseconds, after one that does not count."""
    cuda = torch.device(settings.device).type == "cuda"
    times = []
    for _ in range(settings.repeats + 1):
        started = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize(settings.device)
        times.append((time.perf_counter() - started) * 1e3)
    return round(statistics.median(times[1:]), 4)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with this number of threads, then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
