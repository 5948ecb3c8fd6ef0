"""The whole training of the shapes model, from nothing to a folder in Diffusers format."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined

from blade.common.files import check_writable, read_json_lines, replaced_whole, write_files
from blade.common.leftovers import files_in
from blade.common.locks import file_locked, folder_locked
from blade.models.loading import load_pipeline
from blade.models.source import bundled_model_path

from .components import TransformerSize
from .decoder import DecoderTraining, needs_wider_decoder, train_decoder
from .timed import TimedTraining, train_in_time
from .transformer import TransformerTraining, train_transformer
from .vae import VAETraining, train_vae

MODEL_CARD = Path(__file__).with_name("model_card.md.jinja")
CARD = "README.md"
LOG = "training_log.jsonl"
SHARD_BYTES = 14_500_000
"""Most bytes of the tensors in a file of the transformer; with its header it stays below 15 MB."""


def train_shapes_model(
    run: Path,
    output: Path,
    *,
    vae: VAETraining | None = None,
    decoder: DecoderTraining | None = None,
    transformer: TransformerTraining | None = None,
    timed: TimedTraining | None = None,
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
        timed: How they are trained for a given time instead.
        device: Where to train.
        start_from: Folder of a model that this function has written. Its VAE is kept, but for a decoder that is
            still the narrow one; text encoder and transformer go on from its weights, at the step after the last one
            in its log.

    Raises:
        ValueError: If `start_from` has been trained for all of the steps already, or is missing with `timed`.
        InUseError: If another training uses the run's folder, or writes the same model.
        OutputError: If a file cannot be written, or the disk has too little room.
    """
    began = monotonic()
    if timed is not None and start_from is None:
        raise ValueError("`start_from` must be given with `timed`, which trains no VAE, got None.")
    with folder_locked(run, "run"), file_locked(output):
        _train(run, output, vae, decoder, transformer, timed, device, start_from, began)


def _train(
    run: Path,
    output: Path,
    vae: VAETraining | None,
    decoder: DecoderTraining | None,
    transformer: TransformerTraining | None,
    timed: TimedTraining | None,
    device: str,
    start_from: Path | None,
    began: float,
) -> None:
    """Train, in folders that no other process uses."""
    decoder, transformer = decoder or DecoderTraining(), transformer or TransformerTraining()
    check_writable(
        output / LOG if os.path.isdir(output) else output,
        run / "log.jsonl",
        needed=sum(path.stat().st_size for path in files_in(bundled_model_path())),
        purpose="the training",
    )
    if start_from is None:
        trained_vae = train_vae(run, vae or VAETraining(), device)
        trained_vae = train_decoder(run, trained_vae, decoder, device)
        model = train_transformer(run, trained_vae, transformer, device)
    else:
        pipe = load_pipeline(start_from, f"`start_from` {start_from}", torch.float32).to(device)
        trained_vae = pipe.vae.eval().requires_grad_(False)
        if not (run / "log.jsonl").exists():
            write_files({run / "log.jsonl": (start_from / LOG).read_bytes()})
        if needs_wider_decoder(trained_vae):
            trained_vae = train_decoder(run, trained_vae, decoder, device)
        start = (pipe, _steps_trained(start_from / LOG))
        if timed is None:
            model = train_transformer(run, trained_vae, transformer, device, start)
        else:
            model = train_in_time(run, trained_vae, timed, torch.device(device), start, began)
    pipe = model.to("cpu").pipeline(trained_vae.to("cpu"))
    pipe.to(torch.float32)
    pipe.vae.to(torch.float16)  # to save space: `from_pretrained` makes both float32 again
    if timed is not None:
        torch.nn.Module.to(pipe.transformer, torch.float16)
    with replaced_whole(output) as temporary:
        pipe.save_pretrained(temporary, max_shard_size=SHARD_BYTES)
        shutil.copy(run / "log.jsonl", temporary / LOG)
        write_card(temporary, model.size, timed)


def write_card(
    folder: Path, size: TransformerSize, timed: TimedTraining | None, scores: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write the model card.

    Args:
        folder: Folder of the model, with its log.
        size: Size of its transformer.
        timed: How it was trained, if for a given time.
        scores: Results on held-out captions, if any: `name`, `videos`, `right` and `steps` of every kind of caption.
    """
    template = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).from_string(
        MODEL_CARD.read_text("utf-8")
    )
    text = template.render(size=size, timed=timed, scores=scores, steps=_steps_trained(folder / LOG))
    write_files({folder / CARD: text.encode()})


def _steps_trained(log: Path) -> int:
    """Steps of the transformer that a log records."""
    return max((record["step"] for record in read_json_lines(log) if record["stage"] == "transformer"), default=0)
