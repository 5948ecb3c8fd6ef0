"""Time the default generation with larger transformers of random weights: python scripts/time_shapes.py."""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from safetensors.torch import save_file

from blade.cli.command import run_script
from blade.common.machine import describe_machine
from blade.common.tables import markdown_table
from blade.distillation.config import WeightsConfig
from blade.generation.prepare import prepare_model
from blade.generation.request import DEFAULT_STUDENT_STEPS, GenerationRequest
from blade.generation.run import run_request
from blade.models.loading import load_pipeline
from blade.models.source import bundled_model_path
from blade.moving_shapes.bundled import BUNDLED_DEFAULTS
from blade.moving_shapes.training.components import LARGER_SIZE, TransformerSize, build_pipeline, build_transformer
from blade.students.source import BUNDLED_STUDENTS, WEIGHT_NAME, bundled_student_path

PROMPT = "a red ball moving right"


def write_random_model(folder: Path, size: TransformerSize) -> GenerationRequest:
    """Write the bundled model with random weights in a transformer of a size, and a student of it.

    Returns:
        The request that generates with both as the default command does with the bundled ones.
    """
    bundled = load_pipeline(bundled_model_path(), "the bundled model", torch.float32)
    transformer = build_transformer(size)
    build_pipeline(bundled.vae, bundled.text_encoder, transformer).save_pretrained(folder / "model")
    student = Path(shutil.copytree(bundled_student_path(BUNDLED_STUDENTS[DEFAULT_STUDENT_STEPS]), folder / "student"))
    weights = WeightsConfig()
    lora = {}
    for name, module in transformer.named_modules():
        if name.endswith(tuple(f".{target}" for target in weights.targets)):
            for part, shape in (("A", (weights.rank, module.in_features)), ("B", (module.out_features, weights.rank))):
                lora[f"transformer.{name}.lora_{part}.weight"] = 0.01 * torch.randn(shape).half()
    save_file(lora, student / WEIGHT_NAME)
    return GenerationRequest(
        prompt=PROMPT,
        model=str(folder / "model"),
        student=str(student),
        device="cpu",
        height=BUNDLED_DEFAULTS["height"],
        width=BUNDLED_DEFAULTS["width"],
        frames=BUNDLED_DEFAULTS["frames"],
    )


def main(
    sizes: Annotated[
        list[str] | None, typer.Option("--size", help="Layers x heads x FFN width; the planned size by default.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Generations of each size; they take turns.")] = 7,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Print the seconds of a generation in 8 steps by size, beside those of the bundled size."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    chosen = [TransformerSize(), *(map(TransformerSize.parse, sizes) if sizes else [LARGER_SIZE])]
    taken: list[list[tuple[float, float, float]]] = [[] for _ in chosen]
    with tempfile.TemporaryDirectory() as folder:
        prepared: list[Any] = [
            prepare_model(write_random_model(Path(folder) / str(number), size)) for number, size in enumerate(chosen)
        ]
        for repeat in range(repeats + 1):  # the first warms up
            for number, (model, request) in enumerate(prepared):
                began = time.process_time()
                made = run_request(model, request)
                figures = (made.seconds, made.seconds_denoising, time.process_time() - began)
                print(f"{chosen[number]}: {made.seconds:.2f} s", file=sys.stderr, flush=True)
                if repeat:
                    taken[number].append(figures)
        weights = [sum(p.numel() for p in model.pipe.transformer.parameters()) for model, _ in prepared]
    medians = [[statistics.median(values) for values in zip(*figures, strict=True)] for figures in taken]
    rows = []
    for size, count, (whole, denoising, cpu) in zip(chosen, weights, medians, strict=True):
        figures = (count / 1e6, whole, denoising, whole / medians[0][0], cpu, cpu / medians[0][2])
        rows.append([str(size), *(f"{figure:.2f}" for figure in figures)])
    headings = ["transformer", "million weights", "seconds", "denoising", "factor", "CPU seconds", "factor of them"]
    print("\n".join(markdown_table(headings, rows)))
    print(f"Medians of {repeats}; {describe_machine(torch.device('cpu'))}; load {psutil.getloadavg()[0]:.1f}.")


if __name__ == "__main__":
    run_script(main)
