"""Train the students of the moving-shapes model again, for the comparison in docs/distillation.md.

    python scripts/distill_shapes.py search runs/students joint-4 dense-4   # every row's learning rate
    python scripts/distill_shapes.py train runs/students joint-4 --seed 1   # a student with the rate that was found
    python scripts/distill_shapes.py train runs/students joint-4-longer --seed 1 --rate 4e-4   # or with another
    python scripts/distill_shapes.py compare runs/students --shard 1/2      # all that are there, beside the teacher
    python scripts/distill_shapes.py ship runs/students                     # into the package

All rows but joint-4-longer have the same updates, and choose their learning rate from the same ones, by prompts of the
training captions. Search and training go on where they were stopped.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
import yaml

from blade.cli.command import keep_freed_memory, progress_line
from blade.cli.evaluate import main as evaluate
from blade.distillation.config import DistillationConfig, load_config
from blade.distillation.distill import VALIDATION, distill
from blade.distillation.validation import means
from blade.student_source import BUNDLED_STUDENTS, STUDENT_FILES, WEIGHT_NAME, bundled_student_path
from blade.video_io import write_files

RECIPE = "shapes"

FOUR = ("trajectories={folder}/trajectories-4",)
EIGHT = (
    "trajectory.steps=[8]",
    "trajectory.highest_time=998",
    "generator.substeps=2",
    "trajectories={folder}/trajectories-8",
)
"""The second of 8 times is above the highest that is trained at by default, and shorter steps need fewer substeps."""

ROWS: dict[str, tuple[str, ...]] = {
    "dense-8": (*EIGHT, "attention.method=dense"),
    "dense-4": (*FOUR, "attention.method=dense"),
    "joint-8": EIGHT,
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
"""Students by name, and what of each differs from the recipe: the jointly trained one in 4 steps at sparsity 0.8.
`adapted` has only learned to live with sparsity, at the teacher's own steps; `sparse-first-4` is distilled from it.
`joint-4-longer` goes on from `joint-4`, with as many updates of TDM as that had."""

RATES = (2e-4, 4e-4, 8e-4)
"""The student's learning rates that are tried; ODE initialization and the fake score take twice as much."""

SEARCH_UPDATES, SEARCH_ODE_UPDATES = 100, 85
"""Updates of each try, and those of ODE initialization among them: the same share as in the recipe."""

SEARCH_PROMPTS = 32
"""Videos that a try is judged by."""

FOUND = "rate.json"
"""Where a row's learning rate is kept."""

SHIPPED = {"joint-4": BUNDLED_STUDENTS[4], "joint-8": BUNDLED_STUDENTS[8]}
"""Rows whose students ship with the package, and their names there."""

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
    """Try every learning rate for some updates, and keep the one with the most real videos."""
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
                distill(config, on_progress=say)
            found = means(output / VALIDATION / f"{SEARCH_UPDATES:06d}")
            errors[rate] = found[f"realism_error_{config.trajectory.steps[0]}"]
            print(f"{row}, learning rate {rate:g}: {found}", flush=True)
        best = min(errors, key=lambda rate: errors[rate])
        values = {"rate": best, "realism_error": {f"{rate:g}": error for rate, error in errors.items()}}
        write_files({folder / "search" / row / FOUND: (json.dumps(values, indent=2) + "\n").encode()})
        print(f"{row}: {best:g}", flush=True)


@app.command()
def train(
    folder: Folder,
    rows: Annotated[list[str], typer.Argument(help="Names of rows.")],
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    rate: Annotated[float | None, typer.Option(help="Learning rate; by default the one that was found.")] = None,
) -> None:
    """Train students with the learning rates that were found."""
    for row in rows:
        own_rate = rate or json.loads((folder / "search" / row / FOUND).read_text(encoding="utf-8"))["rate"]
        config = _config(folder, row, own_rate, seed, f"output={folder / f'{row}-seed-{seed}'}")
        with progress_line() as say:
            print(distill(config, on_progress=say), flush=True)


def comparison(folder: Path, seeds: int) -> list[str]:
    """The runs of the comparison: the teacher, and the students that are there, as `blade-evaluate` takes them.

    Each student is sampled as it was trained, keeping the noise, and with noise that every step renews.
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
    return runs


@app.command()
def compare(
    folder: Folder,
    shard: Annotated[str, typer.Option(help="i/n, as of blade-evaluate.")] = "1/1",
    captions: Annotated[int, typer.Option(help="Held-out captions of one object, and as many of two.")] = 32,
    repeats: Annotated[int, typer.Option(help="Videos of each.")] = 4,
    seeds: Annotated[int, typer.Option(help="Trainings of a row at most.")] = 3,
    baseline: Annotated[str, typer.Option(help="Run that the others are compared with.")] = "teacher-50",
    run: Annotated[list[str] | None, typer.Option(help="Name of a run; repeatable. By default all.")] = None,
) -> None:
    """Make the same videos by the teacher and all students, and compare them."""
    runs = [one for one in comparison(folder, seeds) if not run or one.partition("=")[0] in run]
    options = ["--shapes", f"--single={captions}", f"--two={captions}", f"--repeats={repeats}", f"--shard={shard}"]
    options += [f"--baseline={baseline}", f"--output={folder / 'comparison'}", "--dtype=float32"]
    evaluate([*(f"--run={one}" for one in runs), *options])


@app.command()
def ship(folder: Folder, seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0) -> None:
    """Put the students of 4 and of 8 steps where the package has them, under their names there."""
    for row, name in SHIPPED.items():
        source, target = folder / f"{row}-seed-{seed}", bundled_student_path(name)
        contents: dict[Path, bytes] = {}
        for path in sorted(found for pattern in STUDENT_FILES for found in source.glob(pattern)):
            content = path.read_bytes()
            if path.suffix == ".yaml":
                content = _with_own_folders(content, f"outputs/{name}")
            elif path.suffix == ".md":
                content = _with_own_name(content.decode(), source.name, name).encode()
            contents[target / path.relative_to(source)] = content
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        write_files(contents)
        print(target)


def _with_own_name(card: str, old: str, new: str) -> str:
    """A student's card with the name that the package has it under, and with where its comparison is."""
    scores = "## What it scores\n\n"
    return (
        card.replace(f'load_lora_weights("{old}")', f'load_lora_weights("blade/assets/students/{new}")')
        .replace(old, new)
        .replace(
            scores, f"{scores}On captions that no training has seen, beside its teacher: `docs/distillation.md`.\n"
        )
    )


def _with_own_folders(content: bytes, output: str) -> bytes:
    """A training's configuration with everything in its own folder, wherever that was."""
    values: Mapping[str, object] = yaml.safe_load(content) | {
        "output": output,
        "embeddings": None,
        "trajectories": None,
    }
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True).encode()


if __name__ == "__main__":
    keep_freed_memory()
    app()
