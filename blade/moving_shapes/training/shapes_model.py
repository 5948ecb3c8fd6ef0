"""The whole training of the shapes model, from nothing to a folder in Diffusers format."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from .transformer import TransformerTraining, train_transformer
from .vae import VAETraining, train_vae

MODEL_CARD = Path(__file__).with_name("model_card.md")


def train_shapes_model(
    run: Path,
    output: Path,
    *,
    vae: VAETraining | None = None,
    transformer: TransformerTraining | None = None,
    device: str = "cpu",
) -> None:
    """Train the shapes model, or go on after a kill, and save it as a `WanPipeline` with its log and card.

    Args:
        run: Folder of checkpoints, log and encoded videos.
        output: Folder of the finished model; replaced as a whole once training has ended.
        vae: How the VAE is trained.
        transformer: How text encoder and transformer are trained.
        device: Where to train.
    """
    trained_vae = train_vae(run, vae or VAETraining(), device)
    model = train_transformer(run, trained_vae, transformer or TransformerTraining(), device)
    pipe = model.to("cpu").pipeline(trained_vae.to("cpu"))
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.to(torch.float32).save_pretrained(temporary)
    shutil.copy(run / "log.jsonl", temporary / "training_log.jsonl")
    shutil.copy(MODEL_CARD, temporary / "README.md")
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)
