"""Train the bundled shapes model again: python scripts/train_shapes.py runs/shapes blade/assets/shapes."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from blade.moving_shapes.training.decoder import DecoderTraining
from blade.moving_shapes.training.shapes_model import train_shapes_model
from blade.moving_shapes.training.transformer import TransformerTraining
from blade.moving_shapes.training.vae import VAETraining


def main(
    run: Annotated[Path, typer.Argument(help="Folder of checkpoints, log and encoded videos; resumes what is there.")],
    output: Annotated[Path, typer.Argument(help="Folder that the finished model is written to.")],
    device: Annotated[str, typer.Option(help="Where to train.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, videos and noise.")] = 0,
    start_from: Annotated[
        Path | None, typer.Option(help="A model folder written by this script, whose weights are trained on.")
    ] = None,
    compile_blocks: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the blocks.")] = True,
    autocast: Annotated[bool, typer.Option(help="Compute in bfloat16 where that is safe.")] = False,
) -> None:
    """Train VAE, text encoder and transformer of the shapes model."""
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
