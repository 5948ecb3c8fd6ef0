"""Properties of the compiled Triton kernels: registers, spills, shared memory and matrix instructions.

They are read off the cubins. Compiling needs Triton but no GPU, and the tools that read a cubin come with Triton's
wheel. Print the table of an architecture with `python -m blade_kernels.cubin 90`.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blade_kernels.block_selection.triton_launch import (
    CHUNK,
    COLUMNS,
    DIGITS,
    KEYS_TOGETHER,
    QUERIES_TOGETHER,
    scoring_options,
)
from blade_kernels.block_selection.triton_statistics_launch import ROWS_TOGETHER
from blade_kernels.block_sparse.launch_table import BLOCK_SIZES, HEAD_SIZES, Kernel, launch_config
from blade_kernels.block_sparse.triton_attention import DELTA_TILE, FLOAT8_KEYS, ROUNDED_TOKENS, TRANSPOSE_TILE
from blade_kernels.qk_norm_rope.operator import norm_rope_warps

ARCHITECTURES = ("80", "89", "90", "100", "120")
MATRIX_INSTRUCTIONS = {"80": "HMMA", "89": "HMMA", "90": "HGMMA", "100": "UTCHMMA", "120": "HMMA"}
"""Fastest matrix instruction of each architecture, by its name in the disassembly."""
INTEGER_INSTRUCTIONS = {"80": "IMMA", "89": "IMMA", "90": "IGMMA", "100": "UTCIMMA", "120": "IMMA"}
"""Fastest matrix instruction of each architecture for 8-bit integers."""
FLOAT8_INSTRUCTIONS = {"89": "QMMA", "90": "QGMMA", "100": "UTCQMMA", "120": "QMMA"}
"""Fastest matrix instruction of each architecture that has one for 8-bit floats."""
_COUNTED = (
    "HMMA",
    "HGMMA",
    "UTCHMMA",
    "IMMA",
    "IGMMA",
    "UTCIMMA",
    "QMMA",
    "QGMMA",
    "UTCQMMA",
    "UTMALDG",
    "LDGSTS",
    "LDL",
    "STL",
)
_TYPES = {
    "bool": "keep drawn forced forced_keys forced_queries",
    "int32": "counts indices order key_lengths lengths pooled_block starts rows offsets drawn_offsets query_offsets "
    "bits histogram state ties",
    "int64": "places",
    "float32": "lse lse2 delta grad_lse pooled_bias importance weight bias cos sin grad_weight grad_bias "
    "q_scale k_scale v_scale mean scales sums squares totals spread statistics",
    "half": "q k v out grad_out grad_q grad_k grad_v pooled_k pooled_v x grad_x exact_q gathered",
    "int8": "values",
    "number": "scale eps mass",
}
_KIND = {name: kind for kind, names in _TYPES.items() for name in names.split()}
_ATTENTION: tuple[tuple[Kernel, str, str, tuple[str, ...]], ...] = (
    # kernel in the launch table, function, tensors loaded through descriptors, compile-time options that are on
    ("forward", "forward_kernel", "k v", ("TAIL",)),
    ("forward", "forward_kernel", "k v", ("TAIL", "LENGTHS")),
    ("forward", "forward_kernel", "k v", ("TAIL", "POOLED", "DROPPED", "ORDERED")),
    ("forward", "forward_kernel", "k v", ("TAIL", "POOLED", "DROPPED", "ORDERED", "QUANTIZED")),
    ("forward", "forward_kernel", "k v", ("TAIL", "POOLED", "DROPPED", "ORDERED", "QUANTIZED", "FLOAT8")),
    ("forward", "forward_kernel", "k v", ("TAIL", "POOLED", "DROPPED", "ORDERED", "RESUMED")),
    ("query_gradient", "query_gradient_kernel", "k v", ("TAIL", "POOLED", "DROPPED", "ORDERED")),
    ("key_gradient", "key_gradient_kernel", "q grad_out", ()),
    ("key_gradient", "pooled_gradient_kernel", "q grad_out", ("DROPPED",)),
)
_ROW_FLAGS = ("POOLED", "DROPPED", "LENGTHS", "TAIL", "ORDERED", "QUANTIZED", "FLOAT8", "RESUMED")


@dataclass(frozen=True, kw_only=True)
class CubinReport:
    """Properties of one compiled kernel."""

    kernel: str
    arch: str
    case: str
    """Sizes and compile-time options."""
    num_warps: int
    registers: int
    """Registers of a thread."""
    stack_bytes: int
    """Local memory of a thread, which is where registers spill to."""
    shared_bytes: int
    """Shared memory of a program."""
    instructions: dict[str, int]
    """Number of occurrences of each counted instruction."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kernel with its compile-time arguments."""

    module: str
    kernel: str
    case: str
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 2
    described: dict[str, int] = field(default_factory=dict)
    """Tensors loaded through descriptors, with the tokens of their tiles."""
    float32: tuple[str, ...] = ()
    """Tensors that are float32 in this kernel and half precision in others."""
    int8: tuple[str, ...] = ()
    """Tensors that are 8-bit integers in this kernel and half precision in others."""
    float8: tuple[str, ...] = ()
    """Tensors that are 8-bit floats in this kernel and half precision in others."""


def attention_variants(arch: str) -> Iterator[Variant]:
    """Yield all shipped configurations of the attention kernels for an architecture, with their costliest options."""
    for head_size, block in itertools.product(HEAD_SIZES, BLOCK_SIZES):
        for kernel, name, described, flags in _ATTENTION:
            if "FLOAT8" in flags and (arch not in FLOAT8_INSTRUCTIONS or block < FLOAT8_KEYS):
                continue
            config = launch_config(kernel, arch, head_size, (block, block))
            tile = config.block_n if described == "k v" else config.block_m
            yield Variant(
                module=f"block_sparse.triton_{'forward' if kernel == 'forward' else 'backward'}",
                kernel=name,
                case=f"heads of {head_size}, blocks of {block}, tiles of {config.block_m}x{config.block_n}"
                + (", pooled" if "POOLED" in flags else ", key lengths" if "LENGTHS" in flags else "")
                + (", 8-bit floats" if "FLOAT8" in flags else ", 8 bits" if "QUANTIZED" in flags else "")
                + (" alone" if "RESUMED" in flags else ""),
                constants={
                    "D": head_size, "BQ": block, "BK": block, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
                    "TMA": config.tma, "UPCAST": False, **{flag: flag in flags for flag in _ROW_FLAGS},
                },
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                described=dict.fromkeys(described.split(), tile) if config.tma else {},
                float32=("grad_k", "grad_v") if name == "pooled_gradient_kernel" else (),
                int8=("q", "k") if "QUANTIZED" in flags else (),
                float8=("v",) if "FLOAT8" in flags else (),
            )  # fmt: skip


def other_variants(arch: str) -> Iterator[Variant]:
    """Yield the kernels around attention, at the sizes of Wan-14B, CogVideoX1.5 and HunyuanVideo."""
    yield Variant(
        module="block_sparse.triton_backward", kernel="delta_kernel", case="heads of 128", num_warps=4,
        constants={"D": 128, "BLOCK_M": DELTA_TILE},
    )  # fmt: skip
    yield Variant(
        module="block_sparse.triton_backward", kernel="transpose_kernel", case="any", num_warps=4,
        constants={"BLOCK_M": TRANSPOSE_TILE, "BLOCK_N": TRANSPOSE_TILE},
    )  # fmt: skip
    yield Variant(
        module="block_sparse.triton_quantize", kernel="quantize_kernel", case="heads of 128, blocks of 128",
        num_warps=4, constants={"D": 128, "BLOCK": 128, "MEAN": True, "LENGTHS": False},
    )  # fmt: skip
    if arch in FLOAT8_INSTRUCTIONS:
        yield Variant(
            module="block_sparse.triton_quantize", kernel="round_values_kernel", case="heads of 128", num_warps=4,
            constants={"D": 128, "BLOCK": ROUNDED_TOKENS, "LENGTHS": False, "UPCAST": False}, float8=("values",),
        )  # fmt: skip
    yield from _selection_variants(arch)
    for case, heads, size, norm in (
        ("40 heads of 128, RMS over all", 64, 128, 1),
        ("48 heads of 64, LayerNorm", 64, 64, 3),
        ("24 heads of 128, RMS", 32, 128, 2),
    ):
        for kernel in ("norm_rope_kernel", "norm_rope_backward_kernel"):
            yield Variant(
                module="qk_norm_rope.triton_kernels", kernel=kernel, case=case,
                num_warps=norm_rope_warps(heads, size, backward="backward" in kernel),
                constants={
                    "HEADS": heads, "D": size, "NORM": norm, "WEIGHT": True, "BIAS": norm == 3, "ROPE": True,
                    "PLACES": True,
                },
            )  # fmt: skip


def _selection_variants(arch: str) -> Iterator[Variant]:
    """Yield the kernels of block selection, with their costliest options."""
    folder, heads, wide = "block_selection", "heads of 128, blocks of 128", "1,024 key blocks"
    row = dict.fromkeys(("BY_MASS", "FORCED", "FORCED_KEYS", "FORCED_QUERIES", "LOCAL"), True) | {"WIDTH": 1024}
    for kernel in ("rank_kernel", "count_ties_kernel", "keep_kernel"):
        yield Variant(
            module=f"{folder}.triton_layer_budget", kernel=kernel, case=wide, num_warps=1,
            constants={**row, "CHUNK": CHUNK},
        )  # fmt: skip
    yield Variant(
        module=f"{folder}.triton_selection", kernel="select_kernel", case=wide, num_warps=1,
        constants={**row, "BQ": 128, "BK": 128},
    )  # fmt: skip
    for shift, values in DIGITS:
        constants = {"SHIFT": shift, "BINS": values, "CHUNK": CHUNK, "FIRST": values == 2048, "ROWS": 1024}
        for kernel in ("digit_histogram_kernel", "next_digit_kernel"):
            yield Variant(
                module=f"{folder}.triton_layer_budget", kernel=kernel, num_warps=4,
                case=f"{values} values, above {shift} bits", constants={**constants, "FORCED_QUERIES": True},
            )  # fmt: skip
    block = {"D": 128, "BLOCK": 128, "WIDTH": 128, "SAMPLES": 16, "SLOTS": 16, "LENGTHS": True, "SQUARES": True}
    for kernel in ("block_sums_kernel", "value_spread_kernel", "largest_offsets_kernel"):
        yield Variant(
            module=f"{folder}.triton_statistics", kernel=kernel, case=heads, num_warps=4,
            constants={**block, "ROWS": ROWS_TOGETHER},
        )  # fmt: skip
    sizes = {"D": 128, "BQ": 128, "BK": 128, "QUERIES": 16, "KEYS": 16, "LENGTHS": True, "BY_BLOCK": True}
    yield Variant(
        module=f"{folder}.triton_scoring", kernel="gather_keys_kernel", case=f"{heads}, 16 samples", num_warps=4,
        constants={**sizes, "TILE": KEYS_TOGETHER},
    )  # fmt: skip
    for statistic in ("max", "rms", "residual"):
        queries, (warps, stages) = QUERIES_TOGETHER[2], scoring_options(int(arch) // 10, 2)
        yield Variant(
            module=f"{folder}.triton_scoring", kernel="sampled_importance_kernel",
            num_warps=warps, num_stages=stages, case=f"heads of 128, 16 samples, {statistic}",
            constants={
                **sizes, "ROWS": queries // 16, "BLOCKS": KEYS_TOGETHER // 16, "COLUMNS": COLUMNS,
                "DENOMINATOR": True, "STATISTIC": statistic, "UPCAST": False,
            },
        )  # fmt: skip


def cubin_report(variant: Variant, arch: str, *, dtype: str = "bf16") -> CubinReport:
    """Compile one kernel for an architecture and read its cubin.

    Args:
        variant: the kernel and its compile-time arguments.
        arch: one of `ARCHITECTURES`.
        dtype: Triton's name for the dtype of queries, keys and values.

    Raises:
        RuntimeError: Triton's interpreter is on, which compiles nothing.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"blade_kernels.{variant.module}"), variant.kernel)
    if not isinstance(function, triton.JITFunction):
        raise RuntimeError("nothing is compiled while TRITON_INTERPRET=1 is set.")
    names = function.arg_names
    constants = {(names.index(name),): value for name, value in variant.constants.items() if name in names}
    pointers = {
        "bool": "*i1",
        "int32": "*i32",
        "int64": "*i64",
        "float32": "*fp32",
        "half": f"*{dtype}",
        "int8": "*i8",
        "float8": "*fp8e4nv",
        "number": "fp32",
    }
    types, attributes = {}, {}
    for index, name in enumerate(names):
        if (index,) in constants:
            types[name] = "constexpr"
        elif name in variant.described:
            described = "i8" if name in variant.int8 else "fp8e4nv" if name in variant.float8 else dtype
            types[name] = f"tensordesc<{described}[1,1,{variant.described[name]},{variant.constants['D']}]>"
        else:
            kind = next(
                (kind for kind in ("float32", "int8", "float8") if name in getattr(variant, kind)), _KIND.get(name)
            )
            types[name] = "i32" if kind is None else pointers[kind]
            # tensors and their strides are aligned, but not strides that count rows of a mask
            if types[name].startswith("*") or re.fullmatch(r"(?!mask|places).*_(batch|token|head)", name):
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(function, types, constants, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=options)
    usage, code = _read(compiled.asm["cubin"], Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    counted = {name: len(re.findall(rf"\b{name}\b", code)) for name in _COUNTED}
    return CubinReport(
        kernel=variant.kernel,
        arch=arch,
        case=variant.case,
        num_warps=variant.num_warps,
        registers=_number(r"REG:(\d+)", usage),
        stack_bytes=_number(r"STACK:(\d+)", usage),
        shared_bytes=compiled.metadata.shared,
        instructions={name: count for name, count in counted.items() if count},
    )


def cubin_reports(arch: str) -> Iterator[CubinReport]:
    """Compile everything shipped for an architecture; see `cubin_report`."""
    for variant in itertools.chain(attention_variants(arch), other_variants(arch)):
        yield cubin_report(variant, arch)


def table(reports: list[CubinReport]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of a table of reports."""
    headings = ["kernel", "sm", "case", "warps", "registers", "stack bytes", "shared KiB", "instructions"]
    rows = [
        [
            report.kernel.removesuffix("_kernel"),
            report.arch,
            report.case,
            str(report.num_warps),
            str(report.registers),
            str(report.stack_bytes),
            f"{report.shared_bytes / 1024:.0f}",
            ", ".join(f"{count} {name}" for name, count in report.instructions.items()),
        ]
        for report in reports
    ]
    return headings, rows


def _read(cubin: bytes, tools: Path) -> tuple[str, str]:
    """Return a cubin's resource usage and its disassembly, as printed by CUDA's tools."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        commands = ([str(tools / "cuobjdump"), "-res-usage", str(path)], [str(tools / "nvdisasm"), "-c", str(path)])
        usage, code = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands
        )
    return usage, code


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the tool's output has no {pattern!r}: {text[:200]}")
    return int(match[1])


def main() -> None:
    """Print the table of an architecture, or its reports as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arch", choices=ARCHITECTURES)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    arguments = parser.parse_args()
    if arguments.json:
        for report in cubin_reports(arguments.arch):
            print(json.dumps(asdict(report)), flush=True)
        return
    headings, rows = table(list(cubin_reports(arguments.arch)))
    widths = [max(len(row[column]) for row in [headings, *rows]) for column in range(len(headings))]
    for row in [headings, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


if __name__ == "__main__":
    main()
