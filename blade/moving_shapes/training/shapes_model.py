"""The whole training of the shapes model, from nothing to a folder in Diffusers format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import WanPipeline

from blade.common.files import replaced_whole

from .decoder import DecoderTraining, needs_wider_decoder, train_decoder
from .transformer import TransformerTraining, train_transformer
from .vae import VAETraining, train_vae

MODEL_CARD = Path(__file__).with_name("model_card.md")
LOG = "training_log.jsonl"


def train_shapes_model(
    run: Path,
    output: Path,
    *,
    vae: VAETraining | None = None,
    decoder: DecoderTraining | None = None,
    transformer: TransformerTraining | None = None,
    device: str = "cpu",
    start_from: Path | None = None,
) -> None:
    """Train the shapes model, or go on after a kill, and save it as a `WanPipeline` with its log and card.

    Args:
        run: Folder of checkpoints, log and encoded videos.
        output: Folder of the finished model; replaced as a whole once training has ended.
        vae: How the VAE is trained.
        decoder: How its wider decoder is trained.
        transformer: How text encoder and transformer are trained.
        device: Where to train.
        start_from: Folder of a model that this function has written. Its VAE is kept, but for a decoder that is
            still the narrow one; text encoder and transformer go on from its weights, at the step after the last one
            in its log.

    Raises:
        ValueError: If `start_from` has been trained for all of the steps already.
    """
    decoder, transformer = decoder or DecoderTraining(), transformer or TransformerTraining()
    if start_from is None:
        trained_vae = train_vae(run, vae or VAETraining(), device)
        trained_vae = train_decoder(run, trained_vae, decoder, device)
        model = train_transformer(run, trained_vae, transformer, device)
    else:
        pipe = WanPipeline.from_pretrained(start_from).to(device)
        trained_vae = pipe.vae.eval().requires_grad_(False)
        if not (run / "log.jsonl").exists():
            run.mkdir(parents=True, exist_ok=True)
            shutil.copy(start_from / LOG, run / "log.jsonl")
        if needs_wider_decoder(trained_vae):
            trained_vae = train_decoder(run, trained_vae, decoder, device)
        model = train_transformer(run, trained_vae, transformer, device, (pipe, _steps_trained(start_from / LOG)))
    pipe = model.to("cpu").pipeline(trained_vae.to("cpu"))
    pipe.to(torch.float32)
    pipe.vae.to(torch.float16)  # to save space: `from_pretrained` makes it float32 again
    with replaced_whole(output) as temporary:
        pipe.save_pretrained(temporary)
        shutil.copy(run / "log.jsonl", temporary / LOG)
        shutil.copy(MODEL_CARD, temporary / "README.md")


def _steps_trained(log: Path) -> int:
    """Steps of the transformer that a log records."""
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return max((record["step"] for record in records if record["stage"] == "transformer"), default=0)
