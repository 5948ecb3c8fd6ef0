"""Retrain the bundled shapes model: python scripts/train_shapes.py runs/shapes blade/assets/shapes.

With --minutes it trains a larger transformer on the bundled VAE for that time, such as a few minutes of a GPU, and
then scores the result beside the bundled model:

    python scripts/train_shapes.py runs/larger larger --minutes 5 --device cuda
"""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from blade.cli.command import run_script
from blade.common.leftovers import files_in
from blade.common.tables import markdown_table
from blade.evaluation.held_out import GroupScore, score_held_out
from blade.evaluation.prompts import held_out_prompts
from blade.models.devices import resolve_device
from blade.models.loading import load_pipeline
from blade.models.source import bundled_model_path
from blade.moving_shapes.bundled import BUNDLED_DEFAULTS
from blade.moving_shapes.training.components import LARGER_SIZE, TransformerSize
from blade.moving_shapes.training.decoder import DecoderTraining
from blade.moving_shapes.training.shapes_model import train_shapes_model, write_card
from blade.moving_shapes.training.timed import TimedTraining
from blade.moving_shapes.training.transformer import TransformerTraining
from blade.moving_shapes.training.vae import VAETraining

CPU_BATCH, CPU_PROMPTS, CPU_STEPS = 4, 1, 4
"""Videos a step of training, prompts of each kind, and steps of a generation, in a trial on a CPU."""


def compare(
    folders: dict[str, Path], prompts: int, steps: int, device: torch.device
) -> dict[str, tuple[GroupScore, ...]]:
    """Score models on held-out captions, and print their counts.

    Args:
        folders: Models by name.
        prompts: Number of captions with one object, and with two.
        steps: Steps of a generation.
        device: Where to generate.
    """
    rows, scores = [], {}
    for name, folder in folders.items():
        began = time.monotonic()
        pipe = load_pipeline(folder, f"model {folder}", torch.float32).to(device)
        scores[name] = score_held_out(pipe, held_out_prompts(prompts, prompts), steps=steps)
        for it in scores[name]:
            counts = [f"{count}/{it.videos}" for count in (it.basics, it.all_attributes)]
            rows.append([name, it.group, *counts, f"{it.fraction:.3f}", f"{time.monotonic() - began:.0f}"])
    headings = ["model", "objects", "basics right", "all right", "share of attributes", "seconds of all its videos"]
    print("\n".join(markdown_table(headings, rows)), flush=True)
    return scores


def train_for(
    run: Path, output: Path, config: TimedTraining, start_from: Path, device: torch.device, prompts: int
) -> None:
    """Train for a given time, then score the model and the bundled one, and note the result on the model's card."""
    began = time.monotonic()
    train_shapes_model(run, output, timed=config, device=str(device), start_from=start_from)
    size = sum(path.stat().st_size for path in files_in(output, "*.safetensors"))
    print(f"{output} written after {time.monotonic() - began:.1f} s, {size / 1e6:.1f} MB of weights", flush=True)
    if prompts:
        steps = CPU_STEPS if device.type == "cpu" else BUNDLED_DEFAULTS["steps"]
        scores = compare({"bundled": bundled_model_path(), "trained": output}, prompts, int(steps), device)["trained"]
        names = {"single": "one object", "two": "two objects"}
        rows = [{"name": names[it.group], "videos": it.videos, "right": it.basics, "steps": steps} for it in scores]
        write_card(output, config.size, config, rows)


def main(
    run: Annotated[
        Path, typer.Argument(help="Folder of checkpoints, log and encoded videos; training resumes from it.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write the finished model to.")],
    device: Annotated[str, typer.Option(help="Device to train on.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="CPU threads; all cores by default.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, videos and noise.")] = 0,
    start_from: Annotated[
        Path | None,
        typer.Option(help="Model folder written by this script, from which to start; bundled with --minutes."),
    ] = None,
    compile_blocks: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the blocks; not on a CPU with --minutes.")
    ] = None,
    autocast: Annotated[
        bool | None, typer.Option(help="Compute in bfloat16 where safe; on CUDA with --minutes by default.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Train a larger transformer for this time, its writing included.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="With --minutes: layers x heads x FFN width, such as 8x5x960.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="With --minutes: videos a step; 128, on a CPU 4, by default.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(help="With --minutes: captions of each kind scored afterwards; 16, on a CPU 1.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train the shapes model's VAE, text encoder and transformer."""
    if threads is not None:
        torch.set_num_threads(threads)
    resolved = resolve_device(device)
    on_gpu = resolved.type == "cuda"
    if minutes is None:
        train_shapes_model(
            run,
            output,
            vae=VAETraining(seed=seed),
            decoder=DecoderTraining(seed=seed, autocast=bool(autocast)),
            transformer=TransformerTraining(seed=seed, compile=compile_blocks is not False, autocast=bool(autocast)),
            device=device,
            start_from=start_from,
        )
        return
    config = TimedTraining(
        minutes=minutes,
        seed=seed,
        size=LARGER_SIZE if size is None else TransformerSize.parse(size),
        batch_size=batch_size or (TimedTraining.batch_size if on_gpu else CPU_BATCH),
        compile=on_gpu if compile_blocks is None else compile_blocks,
        autocast=on_gpu if autocast is None else autocast,
    )
    scored = (16 if on_gpu else CPU_PROMPTS) if prompts is None else prompts
    train_for(run, output, config, start_from or bundled_model_path(), resolved, scored)


if __name__ == "__main__":
    run_script(main)
