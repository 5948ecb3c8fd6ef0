"""Count the memory of a distillation's networks: distillation_memory.py docs/results/distillation-memory.

The bundled model is instantiated and its tensors counted; the tensors of large models are counted on the meta device.
"""

import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import WanTransformer3DModel

from blade.cli.command import run_script
from blade.common.machine import GIB, describe_versions
from blade.common.tables import check_table, markdown_table, write_table
from blade.distillation.roles import TRAINED, Lora, adapter_roles, separate_roles
from blade.models.loading import load_model

BUNDLED = "moving shapes"

MODELS: dict[str, tuple[Callable[[], torch.nn.Module], torch.dtype]] = {
    BUNDLED: (lambda: load_model().pipe.transformer, torch.float32),
    "Wan2.1-T2V-1.3B": (
        lambda: WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30),
        torch.bfloat16,
    ),
    "Wan2.1-T2V-14B": (WanTransformer3DModel, torch.bfloat16),
}
"""Transformer, and the dtype of its frozen weights."""

KINDS = ("LoRAs, one base", "all weights, three networks")


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Sum the bytes of tensors, counting shared storage once; on the meta device every tensor counts."""
    sizes = {tensor.data_ptr() or id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(sizes.values())


def _count(make: Callable[[], torch.nn.Module], dtype: torch.dtype, kind: str, rank: int) -> dict[str, Any]:
    """Create the networks, take an optimizer step with zero gradients, and count the memory."""
    transformer = make().to(dtype)
    base = _bytes(transformer.parameters())
    if kind == KINDS[0]:
        roles = adapter_roles(transformer, Lora(rank=rank, alpha=rank), ())
    else:
        roles = separate_roles(transformer, ())
    trained = [weight for role in TRAINED for weight in roles.named_parameters(role).values()]
    trained_ids = {id(weight) for weight in trained}
    parameters = (weight for network in roles.distinct() for weight in network.transformer.parameters())
    frozen = [weight for weight in parameters if id(weight) not in trained_ids]
    optimizer = torch.optim.AdamW(trained)
    for weight in trained:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "base_bytes": base,
        "frozen_bytes": _bytes(frozen),
        "trained_weights": sum(weight.numel() for weight in trained),
        "trained_bytes": _bytes([*trained, *(weight.grad for weight in trained if weight.grad is not None), *states]),
    }


def main(output: Annotated[Path, typer.Argument(help="Folder of the results.")], rank: int = 64) -> None:
    """Count with LoRAs as roles, and with three networks."""
    check_table(output, "memory")
    rows, records = [], []
    for name, (make, dtype) in MODELS.items():
        for kind in KINDS:
            with torch.device("cpu" if name == BUNDLED else "meta"):
                counted = _count(make, dtype, kind, rank)
            whole = counted["frozen_bytes"] + counted["trained_bytes"]
            records.append({"model": name, "trained": kind, **counted, "bytes": whole})
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
        title="Memory of a distillation's networks",
        note="Weights, gradients and AdamW states of student, fake score and teacher, with LoRAs of rank "
        f"{rank} or all weights trained; trained weights are float32, frozen ones bfloat16 (moving shapes: float32). "
        "The bundled model was instantiated, the others were counted on the meta device. Activations, text encoder "
        "and VAE are not included.",
        lines=lines,
        values={
            "command": shlex.join(["python", *sys.argv]),
            "versions": describe_versions(("torch", "diffusers", "peft")),
            "rank": rank,
            "models": records,
        },
    )


if __name__ == "__main__":
    run_script(main)
