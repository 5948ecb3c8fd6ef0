"""Evaluating a moving-shapes model: one record a video, resumable, in as many processes as there are cores.

Every prompt is generated with every run's settings and the same noise. A folder holds the records, as JSON lines, and
the frames of dense runs, with which sparse runs of the same steps and guidance are compared.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blade.config import BladeConfig
from blade.evaluation.metrics import motion, psnr, ssim
from blade.evaluation.shapes_settings import RunSettings, ShapesPrompt, held_out_prompts
from blade.generation import Generation, generate
from blade.generation_record import make_record
from blade.generation_request import BUNDLED_DEFAULTS, GenerationRequest, resolve_request
from blade.models import BUNDLED, bundled_model_path, load_pipeline, main_transformer, resolve_device, resolve_dtype
from blade.moving_shapes.realism import realism_error
from blade.moving_shapes.scoring import score
from blade.video_io import write_files

Record = dict[str, Any]
"""What was measured of one video, and everything needed to make it again: plain JSON values."""


@dataclass(frozen=True, kw_only=True)
class ShapesEvaluation:
    """What to evaluate, and where."""

    runs: tuple[RunSettings, ...]
    """In the order of the report."""
    folder: Path
    """Where records and reference frames are, and what is there already is not made again."""
    model: str = BUNDLED
    """`BUNDLED`, a folder in Diffusers format, or a Hub id."""
    single: int = 64
    """How many prompts with one object."""
    two: int = 64
    """How many prompts with two objects."""
    shard: tuple[int, int] = (1, 1)
    """(i, n): take every n-th prompt, from the i-th, so that n processes share the work."""
    size: dict[str, int] = field(
        default_factory=lambda: {name: int(BUNDLED_DEFAULTS[name]) for name in ("height", "width", "frames")}
    )
    """Height and width in pixels, and frames."""
    device: str | None = None
    """See `blade.models.resolve_device`."""
    dtype: str | None = None
    """See `blade.models.resolve_dtype`."""

    def __post_init__(self) -> None:
        names = [run.name for run in self.runs]
        if not names:
            raise ValueError("`runs` must hold at least one run.")
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"`runs` must have different names, got {twice[0]!r} twice.")
        number, of = self.shard
        if not 1 <= number <= of:
            raise ValueError(f"`shard` must be i/n with 1 <= i <= n, got {number}/{of}.")
        held_out_prompts(self.single, self.two)  # which checks the numbers

    @property
    def prompts(self) -> tuple[ShapesPrompt, ...]:
        """All prompts, of every shard."""
        return held_out_prompts(self.single, self.two)

    @property
    def own_prompts(self) -> tuple[ShapesPrompt, ...]:
        """The prompts of this shard."""
        number, of = self.shard
        return self.prompts[number - 1 :: of]

    def reference_of(self, run: RunSettings) -> RunSettings | None:
        """The dense run that a sparse one is compared with, if it is part of the evaluation."""
        if run.is_dense:
            return None
        return next((other for other in self.runs if other.is_reference_of(run)), None)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a shard has come, after each video."""

    done: int
    """Videos that exist, of this shard."""
    total: int
    """Videos of this shard."""
    seconds_left: float
    record: Record
    """The latest video's."""

    def __str__(self) -> str:
        record = self.record
        return (
            f"{self.done}/{self.total} {record['run']['name']}, seed {record['seed']}, {record['prompt']}: "
            f"{'all right' if record['all_attributes'] else 'not all right'}, "
            f"realism error {record['realism_error']:.3f}, {record['seconds']:.1f} s "
            f"({self.seconds_left / 60:.0f} min left)"
        )


def evaluate_shapes(evaluation: ShapesEvaluation, on_video: Callable[[Progress], None] | None = None) -> None:
    """Make and measure every video of this shard that has no record yet.

    A process that is killed loses the video that it was making, and no other.

    Args:
        evaluation: What to evaluate.
        on_video: Called after each video.

    Raises:
        ValueError: If the folder holds records of the same names but other settings or another model.
        OutputError: If a file cannot be written.
    """
    fingerprint = model_fingerprint(evaluation.model)
    done = set(read_records(evaluation, fingerprint))
    own = evaluation.own_prompts
    # dense first: the others are compared with it
    runs = sorted(evaluation.runs, key=lambda run: not run.is_dense)
    missing = [(prompt, run) for prompt in own for run in runs if (run.name, *prompt.key) not in done]
    if not missing:
        return
    worker = _Worker(evaluation, fingerprint)
    evaluation.folder.mkdir(parents=True, exist_ok=True)
    total, began = len(own) * len(runs), time.monotonic()
    for made, (prompt, run) in enumerate(missing, start=1):
        record = worker.make(prompt, run)
        _append(evaluation.folder / "records-{}-of-{}.jsonl".format(*evaluation.shard), record)
        if on_video is not None:
            left = (time.monotonic() - began) / made * (len(missing) - made)
            on_video(Progress(done=total - len(missing) + made, total=total, seconds_left=left, record=record))


def read_records(evaluation: ShapesEvaluation, fingerprint: str | None) -> dict[tuple[str, int, int], Record]:
    """The records of an evaluation's videos that exist, of all shards, by run, objects and seed.

    Args:
        evaluation: What was evaluated.
        fingerprint: The model's, by `model_fingerprint`.

    Raises:
        ValueError: If a record is of other settings or another model than the evaluation's.
    """
    prompts = {prompt.key: prompt for prompt in evaluation.prompts}
    runs = {run.name: run for run in evaluation.runs}
    records: dict[tuple[str, int, int], Record] = {}
    for path in sorted(evaluation.folder.glob("records-*.jsonl")):
        for record in _read_lines(path):
            key = (record["objects"], record["seed"])
            run = runs.get(record["run"]["name"])
            if run is None or key not in prompts:
                continue
            expected = {
                "run": run.to_dict(),
                "prompt": prompts[key].text,
                "fingerprint": fingerprint,
                **evaluation.size,
            }
            for name, value in expected.items():
                if record[name] != value:
                    raise ValueError(
                        f"{path} holds run `{run.name}` with another `{name}`, {record[name]!r} instead of {value!r}; "
                        "take another name or another folder."
                    )
            records.setdefault((run.name, *key), record)
    return records


def model_fingerprint(model: str) -> str | None:
    """16 hexadecimal digits that change with the weights; None for a model that is not in a folder here."""
    folder = bundled_model_path() if model == BUNDLED else Path(model).expanduser()
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


class _Worker:
    """A loaded model, and the reference frames in the folder."""

    def __init__(self, evaluation: ShapesEvaluation, fingerprint: str | None) -> None:
        from blade.attention.family import find_family

        self.evaluation, self.fingerprint = evaluation, fingerprint
        device = resolve_device(evaluation.device)
        began = time.perf_counter()
        self.pipe = load_pipeline(evaluation.model, device=device, dtype=resolve_dtype(evaluation.dtype, device))
        self.seconds_loading = time.perf_counter() - began
        self.pipe.set_progress_bar_config(disable=True)
        transformer = main_transformer(self.pipe)
        self.preset = BladeConfig.from_preset(find_family(transformer).preset_name(transformer))

    def make(self, prompt: ShapesPrompt, run: RunSettings) -> Record:
        """Make a video and measure it."""
        request, generation = self._generate(prompt, run)
        video = generation.video
        shown = score(video, prompt.text)
        record: Record = {
            "run": run.to_dict(),
            "prompt": prompt.text,
            "objects": prompt.objects,
            "seed": prompt.seed,
            "fingerprint": self.fingerprint,
            **self.evaluation.size,
            "attributes": [scored.attributes for scored in shown.objects],
            "background": shown.background,
            "basics": shown.basics,
            "all_attributes": shown.all_attributes,
            "realism_error": realism_error(video, prompt.text),
            "motion": motion(video),
            "psnr": None,
            "ssim": None,
            "motion_ratio": None,
            "layer_density": generation.layer_density,
            "run_density": generation.run_density,
            "seconds": generation.seconds,
            "seconds_denoising": generation.seconds_denoising,
        }
        if run.is_dense:
            self._save_reference(prompt, run, video)
        reference_run = self.evaluation.reference_of(run)
        if reference_run is not None:
            reference = self._reference(prompt, reference_run)
            moves = motion(reference)
            record |= {
                "psnr": psnr(video, reference),
                "ssim": ssim(video, reference),
                "motion_ratio": record["motion"] / moves if moves > 0 else None,
            }
        made = make_record(request, generation, seconds_loading=self.seconds_loading)
        kept = ("model", "device", "dtype", "blade_config", "machine", "versions")
        return record | {name: made[name] for name in kept} | {"date": datetime.now(UTC).isoformat(timespec="seconds")}

    def _generate(self, prompt: ShapesPrompt, run: RunSettings) -> tuple[GenerationRequest, Generation]:
        config, size = run.blade_config(self.preset), self.evaluation.size
        request = GenerationRequest(
            prompt=prompt.text,
            negative_prompt="",
            model=self.evaluation.model,
            attention="dense" if config is None else None,
            blade_config=config,
            steps=run.steps,
            guidance_scale=run.guidance,
            seed=prompt.seed,
            height=size["height"],
            width=size["width"],
            frames=size["frames"],
        )
        request = resolve_request(request, self.pipe)
        return request, generate(self.pipe, request)

    def _reference_path(self, prompt: ShapesPrompt, run: RunSettings) -> Path:
        settings = f"steps{run.steps}-guidance{run.guidance:g}"
        return self.evaluation.folder / "references" / settings / f"{prompt.objects}-{prompt.seed}.npz"

    def _reference(self, prompt: ShapesPrompt, run: RunSettings) -> torch.Tensor:
        path = self._reference_path(prompt, run)
        if not path.exists():
            self._save_reference(prompt, run, self._generate(prompt, run)[1].video)
        with np.load(path) as archive:
            return torch.from_numpy(archive["frames"]).float() / 255

    def _save_reference(self, prompt: ShapesPrompt, run: RunSettings, video: torch.Tensor) -> None:
        path = self._reference_path(prompt, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, frames=(255 * video.clamp(0, 1)).round().to(torch.uint8).numpy())
        write_files({path: buffer.getvalue()})


def _append(path: Path, record: Record) -> None:
    """Add a line, after taking away what a killed process left of one."""
    with path.open("a+b") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _read_lines(path: Path) -> list[Record]:
    """The complete lines of a file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
