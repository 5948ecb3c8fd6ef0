"""Compare the error of attention's output by the types in which it multiplies.

python scripts/compare_precisions.py docs/results/precisions
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from attention_heads import SYNTHETIC, Heads, captured_heads, synthetic_heads
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import block_sparse_attention
from compare_selectors import PROMPTS
from torch import Tensor

from blade.cli.command import run_script
from blade.common.machine import describe_versions
from blade.common.tables import check_table, markdown_table, write_table
from blade.metrics.estimates import mean_of_worst

BLOCKS = (16, 32, 64, 128)
"""Tokens in a block, which share a scale."""


def in_eight_bits(q: Tensor, k: Tensor, v: Tensor, block: int, precision: str) -> Tensor:
    """Return `block_sparse_attention`'s output over all blocks in "int8" or "fp8": (1, S, H, D)."""
    blocks = -(-q.shape[1] // block)
    mask = BlockMask.from_dense(torch.ones(1, 1, blocks, blocks, dtype=torch.bool), (block, block))
    implementation = "cpu" if precision == "int8" else "naive"
    return block_sparse_attention(q, k, v, mask, implementation=implementation, precision=precision)


def in_bfloat16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention's output from inputs in bfloat16, computed in float32: (1, S, H, D)."""
    return exact(*(x.bfloat16().float() for x in (q, k, v)))


def as_published(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None, *, float8: bool = False) -> Tensor:
    """Return SageAttention's output (arXiv 2410.02367), in float32: (B, S, H, D).

    Queries in blocks of 128 tokens and keys, without their mean, in blocks of 64 are 8-bit integers; weights and
    values are float16 or, as in the 8-bit kernel of SageAttention2 (arXiv 2411.10958), 8-bit floats: weights of 0 to 1
    times 448, values by channel.

    Args:
        q: (B, S, H, D).
        k: (B, T, H, D).
        v: (B, T, H, D).
        keep: (B, H, S, T) bool, which pairs are computed; None: all.
        float8: weights and values are 8-bit floats.
    """
    logits = torch.einsum("bshd,bthd->bhst", _rounded(q, 128), _rounded(k - k.mean(1, keepdim=True), 64))
    logits = logits * q.shape[-1] ** -0.5
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    total, heads = weights.sum(-1, keepdim=True), v.transpose(1, 2)
    if float8:
        scales = heads.abs().amax(2, keepdim=True) / 448
        weights = (weights * 448).to(torch.float8_e4m3fn).float() / 448
        heads = (heads / scales).to(torch.float8_e4m3fn).float() * scales
    else:
        weights, heads = weights.half().float(), heads.half().float()
    return (weights @ heads / total).transpose(1, 2)


def _rounded(x: Tensor, block: int) -> Tensor:
    """Return tokens rounded to 8-bit integers by block and head."""
    parts = x.split(block, 1)
    scales = [part.abs().amax((1, 3), keepdim=True) / 127 for part in parts]
    return torch.cat([(part / scale).round() * scale for part, scale in zip(parts, scales, strict=True)], 1)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention's output: (1, S, H, D)."""
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)


METHODS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "inputs in bfloat16": in_bfloat16,
    **{
        f"{precision}, blocks of {block}": partial(in_eight_bits, block=block, precision=precision)
        for precision in ("int8", "fp8")
        for block in BLOCKS
    },
    "SageAttention, as published": as_published,
    "SageAttention2 with 8-bit floats, as published": partial(as_published, float8=True),
}
"""Compared ways of computing attention, by name."""


def errors(heads: Heads, method: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[float]:
    """Return the relative error of each head's output against float64."""
    inputs = [x.transpose(0, 1)[None].contiguous() for x in (heads.q, heads.k, heads.v)]
    right, found = exact(*(x.double() for x in inputs)), method(*inputs).double()
    squares = [x.square().sum((0, 1, 3)) for x in (found - right, right)]
    return (squares[0] / squares[1]).sqrt().tolist()


def measure(groups: dict[str, Sequence[Heads]]) -> dict[str, dict[str, list[float]]]:
    """Return the errors of all heads, by method and group."""
    return {
        name: {group: [error for one in heads for error in errors(one, method)] for group, heads in groups.items()}
        for name, method in METHODS.items()
    }


def shown(found: Sequence[float]) -> str:
    """Return errors as their mean and that of the worst tenth."""
    return f"{sum(found) / len(found):.4f} / {-mean_of_worst(-error for error in found):.4f}"


def main(
    output: Annotated[Path, typer.Argument(help="Folder for precisions.json and precisions.md.")],
    prompts: Annotated[int, typer.Option(help="Captions to capture from, of three.")] = 2,
    steps: Annotated[int, typer.Option(help="Denoising steps of the generations.")] = 30,
    tokens: Annotated[int, typer.Option(help="Tokens of synthetic heads.")] = 4096,
) -> None:
    """Capture heads, measure, and write the table."""
    check_table(output, "precisions")
    at = (steps // 2 - 1, steps - 4) if steps > 8 else (steps - 1,)
    groups: dict[str, Sequence[Heads]] = {
        "the bundled model": captured_heads(PROMPTS[:prompts], block=16, token_order="gilbert", steps=steps, at=at),
        **{f"synthetic, {kind}": [synthetic_heads(kind, tokens=tokens)] for kind in SYNTHETIC},
    }
    with torch.no_grad():
        found = measure(groups)
    values: dict[str, Any] = {
        "command": shlex.join(["python", "scripts/compare_precisions.py", *sys.argv[1:]]),
        "versions": describe_versions(("blade-video", "torch")),
        "errors": found,
    }
    rows = [[name, *map(shown, by_group.values())] for name, by_group in found.items()]
    lines = markdown_table(["computed in", *groups], rows)
    note = "Relative error of attention's output against float64: mean / worst tenth of the heads, all blocks kept."
    write_table(output, "precisions", title="Precisions", note=note, lines=lines, values=values)
    print("\n".join(lines))


if __name__ == "__main__":
    run_script(main)
