"""Retrain the bundled shapes model: python scripts/train_shapes.py runs/shapes blade/assets/shapes."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from blade.moving_shapes.training.decoder import DecoderTraining
from blade.moving_shapes.training.shapes_model import train_shapes_model
from blade.moving_shapes.training.transformer import TransformerTraining
from blade.moving_shapes.training.vae import VAETraining


def main(
    run: Annotated[
        Path, typer.Argument(help="Folder of checkpoints, log and encoded videos; training resumes from it.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write the finished model to.")],
    device: Annotated[str, typer.Option(help="Device to train on.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, videos and noise.")] = 0,
    start_from: Annotated[
        Path | None, typer.Option(help="Model folder written by this script, from which to start.")
    ] = None,
    compile_blocks: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the blocks.")] = True,
    autocast: Annotated[bool, typer.Option(help="Compute in bfloat16 where safe.")] = False,
) -> None:
    """Train the shapes model's VAE, text encoder and transformer."""
    if threads is not None:
        torch.set_num_threads(threads)
    train_shapes_model(
        run,
        output,
        vae=VAETraining(seed=seed),
        decoder=DecoderTraining(seed=seed, autocast=autocast),
        transformer=TransformerTraining(seed=seed, compile=compile_blocks, autocast=autocast),
        device=device,
        start_from=start_from,
    )


if __name__ == "__main__":
    typer.run(main)
