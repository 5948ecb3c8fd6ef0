"""Count what a distillation keeps in memory for its networks: distillation_memory.py docs/results/distillation-memory.

The bundled model is made and counted, tensor by tensor; large ones are counted alike without being made.
"""

import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import WanTransformer3DModel

from blade.common.machine import GIB, describe_versions
from blade.common.tables import markdown_table, write_table
from blade.distillation.roles import TRAINED, Lora, adapter_roles, separate_roles
from blade.models.loading import load_model

MADE = "moving shapes"

MODELS: dict[str, tuple[Callable[[], torch.nn.Module], torch.dtype]] = {
    MADE: (lambda: load_model().pipe.transformer, torch.float32),
    "Wan2.1-T2V-1.3B": (
        lambda: WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30),
        torch.bfloat16,
    ),
    "Wan2.1-T2V-14B": (WanTransformer3DModel, torch.bfloat16),
}
"""Transformer, and the type that its frozen weights are kept in."""

KINDS = ("LoRAs, one base", "all weights, three networks")


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, those that share their storage once; without memory, each tensor once."""
    seen = {tensor.data_ptr() or id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(seen.values())


def _count(make: Callable[[], torch.nn.Module], dtype: torch.dtype, kind: str, rank: int) -> dict[str, Any]:
    """Make the networks, take a step of their optimizer with gradients of zero, and count what is there."""
    transformer = make().to(dtype)
    base = _bytes(transformer.parameters())
    if kind == KINDS[0]:
        roles = adapter_roles(transformer, Lora(rank=rank, alpha=rank), ())
    else:
        roles = separate_roles(transformer, ())
    trained = [one for role in TRAINED for one in roles.named_parameters(role).values()]
    own = {id(one) for one in trained}
    frozen = [one for network in roles.distinct() for one in network.transformer.parameters() if id(one) not in own]
    optimizer = torch.optim.AdamW(trained)
    for one in trained:
        one.grad = torch.zeros_like(one)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "base_bytes": base,
        "frozen_bytes": _bytes(frozen),
        "trained_weights": sum(one.numel() for one in trained),
        "trained_bytes": _bytes([*trained, *(one.grad for one in trained if one.grad is not None), *states]),
    }


def main(output: Annotated[Path, typer.Argument(help="Folder of the results.")], rank: int = 64) -> None:
    """Count, with LoRAs as roles and with three networks."""
    rows, found = [], []
    for name, (make, dtype) in MODELS.items():
        for kind in KINDS:
            with torch.device("cpu" if name == MADE else "meta"):
                counted = _count(make, dtype, kind, rank)
            whole = counted["frozen_bytes"] + counted["trained_bytes"]
            found.append({"model": name, "trained": kind, **counted, "bytes": whole})
            frozen = counted["frozen_bytes"]
            copied = whole - frozen + 3 * counted["base_bytes"] if kind == KINDS[0] else whole
            sizes = [counted["base_bytes"], frozen, counted["trained_bytes"], whole, copied]
            copies = f"{frozen / counted['base_bytes']:.2f}"
            cells = [f"{size / GIB:.3f}" for size in sizes]
            rows.append([name, kind, f"{counted['trained_weights']:,}", *cells[:2], copies, *cells[2:]])
    headings = ["model", "trained", "weights trained", "base, GiB", "frozen, GiB", "in bases"]
    headings += ["trained with gradients and Adam, GiB", "in all, GiB", "with a base for each role, GiB"]
    lines = markdown_table(headings, rows)
    print("\n".join(lines))
    write_table(
        output,
        "memory",
        title="What the networks of a distillation take",
        note="Weights, gradients and states of AdamW of student, fake score and teacher, with LoRAs of rank "
        f"{rank} or all weights trained; what is trained is float32, what is frozen bfloat16 (of shapes: float32). "
        "The bundled model was made and its tensors counted, the others' tensors counted without being made. "
        "Activations, text encoder and VAE come on top.",
        lines=lines,
        values={
            "command": shlex.join(["python", *sys.argv]),
            "versions": describe_versions(("torch", "diffusers", "peft")),
            "rank": rank,
            "models": found,
        },
    )


if __name__ == "__main__":
    typer.run(main)
