"""Reproduce the students of the moving-shapes model for the comparison in docs/distillation.md.

    python scripts/distill_shapes.py search runs/students joint-4 dense-4   # learning rate of each row
    python scripts/distill_shapes.py train runs/students joint-4 --seed 1   # a student with the best rate
    python scripts/distill_shapes.py train runs/students joint-4-longer --seed 1 --rate 4e-4   # or with a given one
    python scripts/distill_shapes.py average runs/students joint-4          # mean of a row's training runs
    python scripts/distill_shapes.py compare runs/students --shard 1/2      # existing students with the teacher
    python scripts/distill_shapes.py ship runs/students                     # copy into the package

All rows but joint-4-longer have the same number of updates and the same candidate learning rates, compared on prompts
from the training captions. Search and training resume where they were interrupted.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from safetensors.torch import load_file, save

from blade.cli.command import run_script
from blade.cli.evaluate import main as evaluate
from blade.cli.progress import progress_line
from blade.common.allocator import keep_freed_memory
from blade.common.files import write_files
from blade.distillation.config import DistillationConfig
from blade.distillation.recipes import load_config
from blade.distillation.student_files import CARD_NAME, CONFIG_NAME
from blade.distillation.validation import means
from blade.distillation.workflow import VALIDATION, distill
from blade.students.source import BUNDLED_STUDENTS, WEIGHT_NAME, bundled_student_path, student_files

RECIPE = "shapes"

FOUR = ("trajectories={folder}/trajectories-4",)
EIGHT = (
    "trajectory.steps=[8]",
    "trajectory.highest_time=998",
    "generator.substeps=2",
    "trajectories={folder}/trajectories-8",
)
"""The second of 8 times exceeds the highest one trained by default, and shorter steps need fewer substeps."""

ROWS: dict[str, tuple[str, ...]] = {
    "dense-8": (*EIGHT, "attention.method=dense"),
    "dense-4": (*FOUR, "attention.method=dense"),
    "joint-8": (*EIGHT, "trajectory.sampling_noise_kept=0"),
    "joint-4": FOUR,
    "joint-4-sparser": (*FOUR, "attention.sparsity=0.9"),
    "joint-4-rank-8": (*FOUR, "weights.rank=8", "weights.alpha=8"),
    "adapted": (*EIGHT, "generator.objective=imitation", "generator.ode_updates=0"),
    "sparse-first-4": (*FOUR, "weights.start_from={folder}/adapted-seed-{seed}"),
    "joint-4-longer": (
        "weights.start_from={folder}/joint-4-seed-{seed}",
        "generator.ode_updates=0",
        "run.updates=100",
        "validation.every=50",
    ),
}
"""Overrides of the recipe for each student; the recipe trains jointly, in 4 steps at sparsity 0.8.
`adapted` is only adapted to sparsity, at the teacher's own steps; `sparse-first-4` is distilled from it.
`joint-4-longer` continues `joint-4`, with the same number of TDM updates."""

RATES = (2e-4, 4e-4, 8e-4)
"""Candidate learning rates of the student; ODE initialization and the fake score use twice the rate."""

SEARCH_UPDATES, SEARCH_ODE_UPDATES = 100, 85
"""Updates of each trial, and those of ODE initialization among them: the same share as in the recipe."""

SEARCH_PROMPTS = 32
"""Videos by which a trial is evaluated."""

RATE_FILE = "rate.json"
"""File of a row's best learning rate."""

AVERAGE = "average"
"""Suffix of a mean of training runs, in place of the seed."""

SHIPPED = {"joint-4-seed-0": BUNDLED_STUDENTS[4], "joint-8-seed-0": BUNDLED_STUDENTS[8]}
"""Students shipped with the package, and their names there."""

app = typer.Typer(add_completion=False, help=__doc__)
Folder = Annotated[Path, typer.Argument(help="Folder of all students.")]


def _config(folder: Path, row: str, rate: float, seed: int, *others: str) -> DistillationConfig:
    if row not in ROWS:
        raise typer.BadParameter(f"must be one of {', '.join(ROWS)}, got {row}.")
    settings = [
        *others,
        *(setting.format(folder=folder, seed=seed) for setting in ROWS[row]),
        f"generator.learning_rate={rate}",
        f"generator.ode_learning_rate={2 * rate}",
        f"fake.learning_rate={2 * rate}",
        f"run.seed={seed}",
        f"embeddings={folder / 'embeddings'}",
    ]
    return load_config(RECIPE, settings)


@app.command()
def search(folder: Folder, rows: Annotated[list[str], typer.Argument(help="Names of rows.")]) -> None:
    """Train briefly with each learning rate and save the one with the most realistic videos."""
    for row in rows:
        errors = {}
        for rate in RATES:
            output = folder / "search" / row / f"{rate:g}"
            settings = (
                f"output={output}",
                f"run.updates={SEARCH_UPDATES}",
                f"generator.ode_updates={SEARCH_ODE_UPDATES}",
                f"validation.every={SEARCH_UPDATES}",
                f"validation.count={SEARCH_PROMPTS}",
            )
            config = _config(folder, row, rate, 0, *settings)
            with progress_line() as say:
                distill(config, on_progress=say, on_update=say.log)
            scores = means(output / VALIDATION / f"{SEARCH_UPDATES:06d}")
            errors[rate] = scores[f"realism_error_{config.trajectory.steps[0]}"]
            print(f"{row}, learning rate {rate:g}: {scores}", flush=True)
        best = min(errors, key=lambda rate: errors[rate])
        values = {"rate": best, "realism_error": {f"{rate:g}": error for rate, error in errors.items()}}
        write_files({folder / "search" / row / RATE_FILE: (json.dumps(values, indent=2) + "\n").encode()})
        print(f"{row}: {best:g}", flush=True)


@app.command()
def train(
    folder: Folder,
    rows: Annotated[list[str], typer.Argument(help="Names of rows.")],
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    rate: Annotated[float | None, typer.Option(help="Learning rate; by default the result of the search.")] = None,
) -> None:
    """Train students with the learning rates from the search."""
    for row in rows:
        row_rate = rate or json.loads((folder / "search" / row / RATE_FILE).read_text(encoding="utf-8"))["rate"]
        config = _config(folder, row, row_rate, seed, f"output={folder / f'{row}-seed-{seed}'}")
        with progress_line() as say:
            report = distill(config, on_progress=say, on_update=say.log)
        print(report, flush=True)


def comparison(folder: Path, seeds: int) -> list[str]:
    """List the runs of the comparison, as `blade-evaluate` takes them: the teacher and all existing students.

    Each student is sampled as in training, keeping the noise, and also with noise renewed at every step.
    """

    def student(row: str, seed: int) -> Path:
        return folder / f"{row}-seed-{seed}"

    attention = {"0.8": student("joint-4", 0), "0.9": student("joint-4-sparser", 0)}
    runs = [f"teacher-{steps}=dense,steps={steps},guidance=2" for steps in (50, 8, 4)]
    runs += [f"teacher-{steps}-sparse=config={attention['0.8']},steps={steps},guidance=2" for steps in (8, 4)]
    for noise, kept in (("", 1), ("-renewed", 0)):
        for seed in range(seeds):
            for row in ROWS:
                if row == "adapted" or not (student(row, seed) / WEIGHT_NAME).exists():
                    continue
                sampled = f"{noise}-seed-{seed}=student={student(row, seed)},noise_kept={kept}"
                runs.append(f"{row}{sampled}")
                if row in ("dense-4", "dense-8"):
                    runs += [
                        f"{row}-afterwards-{sparsity}{sampled},config={source}"
                        for sparsity, source in attention.items()
                        if source.exists()
                    ]
    averages = [f"{row}-{AVERAGE}" for row in ROWS if (folder / f"{row}-{AVERAGE}" / WEIGHT_NAME).exists()]
    return runs + [f"{name}=student={folder / name},noise_kept=1" for name in averages]


@app.command()
def average(
    folder: Folder,
    row: Annotated[str, typer.Argument(help="Name of a row.")],
    seeds: Annotated[int, typer.Option(help="Number of training runs, with seeds from 0.")] = 3,
) -> None:
    """Average the LoRAs of a row's training runs into one student."""
    sources = [folder / f"{row}-seed-{seed}" for seed in range(seeds)]
    missing = [source.name for source in sources if not (source / WEIGHT_NAME).exists()]
    if missing:
        raise typer.BadParameter(f"needs a training run of every seed, but there is no {missing[0]}.")
    weights = [load_file(source / WEIGHT_NAME) for source in sources]
    config = load_config(str(sources[0] / CONFIG_NAME))
    mean, norm_share = mean_lora(weights, config.weights.rank)
    target = folder / f"{row}-{AVERAGE}"
    contents = {target / name: (sources[0] / name).read_bytes() for name in student_files(sources[0])}
    contents[target / WEIGHT_NAME] = save({name: weight.contiguous() for name, weight in mean.items()})
    card = contents[target / CARD_NAME].decode().replace(sources[0].name, target.name)
    contents[target / CARD_NAME] = _average_card(card, config.weights.rank, seeds).encode()
    write_files(contents)
    print(f"{target}: rank {config.weights.rank} holds {norm_share:.2%} of the mean's squared norm")


def mean_lora(loras: Sequence[Mapping[str, torch.Tensor]], rank: int) -> tuple[dict[str, torch.Tensor], float]:
    """Return the best approximation of the mean of LoRAs by a LoRA of a given rank.

    Args:
        loras: A (rank, columns) and B (rows, rank) of each layer, by Diffusers' keys.
        rank: rank of the result.

    Returns:
        The LoRA, in the dtype of the first, and its share of the mean's squared norm.
    """
    mean, held, whole = dict[str, torch.Tensor](), 0.0, 0.0
    for first in (name for name in loras[0] if ".lora_A." in name):
        second = first.replace(".lora_A.", ".lora_B.")
        down = torch.cat([lora[first].float() for lora in loras])
        up = torch.cat([lora[second].float() for lora in loras], dim=1) / len(loras)
        (up, up_factor), (down, down_factor) = torch.linalg.qr(up), torch.linalg.qr(down.T)
        left, values, right = torch.linalg.svd(up_factor @ down_factor.T)
        held, whole = held + float(values[:rank].square().sum()), whole + float(values.square().sum())
        root = values[:rank].sqrt()
        mean[first] = (root[:, None] * (right[:rank] @ down.T)).to(loras[0][first].dtype)
        mean[second] = (up @ left[:, :rank] * root).to(loras[0][second].dtype)
    return mean, held / whole


@app.command()
def compare(
    folder: Folder,
    shard: Annotated[str, typer.Option(help="i/n, as for blade-evaluate.")] = "1/1",
    captions: Annotated[int, typer.Option(help="Held-out captions of one object, and as many of two.")] = 32,
    repeats: Annotated[int, typer.Option(help="Videos of each caption.")] = 4,
    seeds: Annotated[int, typer.Option(help="Maximum number of training runs in a row.")] = 3,
    baseline: Annotated[str, typer.Option(help="Run to compare the others with.")] = "teacher-50",
    run: Annotated[list[str] | None, typer.Option(help="Name of a run; repeatable. All runs by default.")] = None,
) -> None:
    """Generate the same videos with the teacher and all students, and compare them."""
    runs = [spec for spec in comparison(folder, seeds) if not run or spec.partition("=")[0] in run]
    options = ["--shapes", f"--single={captions}", f"--two={captions}", f"--repeats={repeats}", f"--shard={shard}"]
    options += [f"--baseline={baseline}", f"--output={folder / 'comparison'}", "--dtype=float32"]
    evaluate([*(f"--run={spec}" for spec in runs), *options])


@app.command()
def ship(folder: Folder) -> None:
    """Copy the students of 4 and 8 steps into the package, under their names there."""
    for student, name in SHIPPED.items():
        source, target = folder / student, bundled_student_path(name)
        contents: dict[Path, bytes] = {}
        for path in (source / name for name in student_files(source)):
            content = path.read_bytes()
            if path.suffix == ".yaml":
                content = _with_default_folders(content, f"outputs/{name}")
            elif path.suffix == ".md":
                content = _with_package_name(content.decode(), source.name, name).encode()
            contents[target / path.relative_to(source)] = content
        write_files(contents)
        print(target)


def _average_card(card: str, rank: int, seeds: int) -> str:
    """Adapt the card of the first training run to the mean of several."""
    scores = card.index("In the training's last validation")
    changes = {
        card[scores : card.index("\n", scores)]: "Not measured by the trainings.",
        f"- Trained: a LoRA of rank {rank}.": f"- Trained: {seeds} LoRAs of rank {rank}, of the seeds from 0 on; "
        f"these weights are their mean, brought to rank {rank} by its singular values.",
        "makes it again.": "makes the first of them again.",
        "- Trained on": "- Each was trained on",
    }
    for old, new in changes.items():
        if card.count(old) != 1:
            raise ValueError(
                f"The card of the first training run must contain {old!r} once, got {card.count(old)} times."
            )
        card = card.replace(old, new)
    return card


def _with_package_name(card: str, old: str, new: str) -> str:
    """Rename a student's card to its name in the package, and add a link to the comparison."""
    scores = "## What it scores\n\n"
    return (
        card.replace(f'load_lora_weights("{old}")', f'load_lora_weights("blade/assets/students/{new}")')
        .replace(old, new)
        .replace(
            scores, f"{scores}On captions that no training has seen, beside its teacher: `docs/distillation.md`.\n"
        )
    )


def _with_default_folders(content: bytes, output: str) -> bytes:
    """Replace the folders in a training run's configuration by the default ones."""
    values: Mapping[str, object] = yaml.safe_load(content) | {
        "output": output,
        "embeddings": None,
        "trajectories": None,
    }
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).encode()


if __name__ == "__main__":
    keep_freed_memory()
    run_script(app)
