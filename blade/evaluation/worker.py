"""Generation and measurement of an evaluation's videos: one record per video, one process per shard.

A folder holds the records, the videos, and the frames of dense runs, with which the other runs of the same steps and
guidance are compared.
"""

from __future__ import annotations

import gc
import io
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from blade_kernels.crashes import DeviceCrashError, naming_crashes

from blade.common.errors import first_line
from blade.common.files import OutputError, append_json_line, check_writable, write_files
from blade.common.locks import folder_locked
from blade.common.terminal import logger
from blade.evaluation.output_files import check_output_files, records_path, reference_path
from blade.evaluation.plan import EvaluationPlan
from blade.evaluation.prompts import EvaluationPrompt
from blade.evaluation.records import Record, read_records
from blade.evaluation.runs import RunSettings
from blade.evaluation.videos import video_path
from blade.generation.record import make_record
from blade.generation.request import ResolvedRequest
from blade.generation.run import Generation, run_request
from blade.media.video import encode_mp4
from blade.metrics.measures import VideoSample, record_video
from blade.metrics.registry import measures
from blade.models.dense_kernel import watch_dense_kernel
from blade.models.devices import resolve_dtype
from blade.models.loading import load_model
from blade.models.loras import load_loras, merge_loras
from blade.moving_shapes.captions import Caption, parse_caption
from blade.students.loading import load_student

KEPT_FIELDS = ("model", "device", "dtype", "vae_tiling", "blade_config", "fps", "machine", "versions")
"""Fields of a generation's record that are copied into an evaluation's record."""

OWN_FIELDS = (
    "run",
    "prompt",
    "seed",
    "fingerprint",
    "student_fingerprint",
    "lora_fingerprint",
    "dense_kernel",
    "date",
)
"""Fields of an evaluation's record beside those that are copied, and the size of its videos."""

COSTS = ("layer_density", "run_density", "seconds", "seconds_denoising")
"""Attributes of a generation that are copied into an evaluation's record."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a shard, after each video."""

    done: int
    """Finished videos of this shard."""
    total: int
    """Videos of this shard."""
    seconds_left: float
    record: Record
    """Record of the latest video."""

    def __str__(self) -> str:
        record = self.record
        # similarity to dense comes after measures of the video itself
        ordered = sorted(measures().values(), key=lambda measure: "reference" in measure.needs)
        figures = [
            measure.progress(record[measure.record_key])
            for measure in ordered
            if measure.progress is not None and record.get(measure.record_key) is not None
        ]
        figures.append(f"{record['seconds']:.1f} s ({self.seconds_left / 60:.0f} min left)")
        video = f"{self.done}/{self.total} {record['run']['name']}, seed {record['seed']}, {record['prompt']}"
        return f"{video}: {', '.join(figures)}"


class VideoMaker(Protocol):
    """Makes the videos of an evaluation: a `VideoWorker`, or whoever shares them out."""

    def make_missing(
        self, runs: Iterable[RunSettings], on_video: Callable[[Progress], None] | None = None
    ) -> dict[str, Exception]:
        """Make and measure every video of runs that has no record yet; see `VideoWorker.make_missing`."""


def evaluate_videos(
    plan: EvaluationPlan,
    on_video: Callable[[Progress], None] | None = None,
    maker: Callable[[EvaluationPlan], VideoMaker] | None = None,
) -> dict[str, Exception]:
    """Make and measure every video of this shard that has no record yet; see `VideoWorker.make_missing`.

    Args:
        plan: The evaluation.
        on_video: Called after each video.
        maker: Returns what makes the videos; None takes a `VideoWorker`.

    Raises:
        InUseError: If another process makes videos of this shard, or of others by another number of shards.
    """
    with folder_locked(plan.evaluation.folder, share=plan.evaluation.shard):
        return (maker or VideoWorker)(plan).make_missing(plan.evaluation.runs, on_video)


def missing_videos(plan: EvaluationPlan, runs: Iterable[RunSettings]) -> list[tuple[EvaluationPrompt, RunSettings]]:
    """Return the videos of runs, of this shard, that have no record yet, in the order in which they are made.

    Raises:
        ValueError: If the folder holds records of the same names with other settings or another model.
    """
    done = set(read_records(plan))
    # dense runs first: the others are compared with them
    runs = sorted(runs, key=lambda run: not run.is_dense)
    missing = [(prompt, run) for prompt in plan.evaluation.own_prompts for run in runs]
    missing = [(prompt, run) for prompt, run in missing if (run.name, *prompt.key) not in done]
    # grouped by student and LoRA, since loading one takes time
    return sorted(missing, key=lambda pair: _loading_order(pair[1]))


def _loading_order(run: RunSettings) -> tuple[str, str, float]:
    return run.lora or "", run.student or "", run.noise_kept or 0.0


class VideoWorker:
    """A model or student, loaded for the first video and kept, and the reference frames in the folder."""

    def __init__(self, plan: EvaluationPlan) -> None:
        """Make a worker; nothing is loaded yet.

        Raises:
            ValueError: If a measure writes what every record has.
        """
        self.plan, self.evaluation = plan, plan.evaluation
        self.measures = plan.evaluation.chosen_measures
        fields = {*OWN_FIELDS, *COSTS, *KEPT_FIELDS, *plan.size}
        for key in (key for measure in self.measures for key in measure.recorders if key in fields):
            raise ValueError(f"`measures` must not write `{key}`, which every record has.")
        self.compares = any("reference" in measure.needs for measure in self.measures)
        self.reference_caches = defaultdict[Path, dict[Hashable, Any]](dict)
        self.device = torch.device(self._first_request.device)
        self.model: Any = None
        self.loaded: tuple[str | None, float | None, str | None] | None = None
        self.seconds_loading = 0.0

    def make_missing(
        self, runs: Iterable[RunSettings], on_video: Callable[[Progress], None] | None = None
    ) -> dict[str, Exception]:
        """Make and measure every video of runs, of this shard, that has no record yet.

        A killed process loses only the video that it was making. A run that fails loses its remaining videos, and the
        others go on.

        Args:
            runs: Runs of the plan.
            on_video: Called after each video.

        Returns:
            The errors of the runs that failed, by name.

        Raises:
            ValueError: If the folder holds records of the same names with other settings or another model.
            OutputError: If a file cannot be written.
        """
        path = records_path(self.evaluation.folder, self.evaluation.shard)
        check_writable(path)
        runs = list(runs)
        missing = missing_videos(self.plan, runs)
        failed: dict[str, Exception] = {}
        if not missing:
            return failed
        check_output_files(self.plan, missing, compares=self.compares)
        total, began = len(self.evaluation.own_prompts) * len(runs), time.monotonic()
        for finished, (prompt, run) in enumerate(missing, start=1):
            if run.name in failed:
                continue
            try:
                with naming_crashes(f"run `{run.name}`", self.device):
                    record = self.make(prompt, run)
            except (OutputError, DeviceCrashError):
                raise  # of which the other runs would die too
            except Exception as error:  # whatever a run does to the model; the others have nothing to do with it
                failed[run.name] = error
                _let_go(error)
                self.forget()
                logger.warning(f"run `{run.name}` failed, and its remaining videos are left out: {first_line(error)}")
                continue
            append_json_line(path, record)
            if on_video is not None:
                remaining = len(missing) - finished
                seconds_left = (time.monotonic() - began) / finished * remaining
                on_video(Progress(done=total - remaining, total=total, seconds_left=seconds_left, record=record))
        return failed

    @property
    def _first_request(self) -> ResolvedRequest:
        """The request of the first run; model, device and dtype are the same in all."""
        return next(iter(self.plan.requests.values()))

    def _load(self, run: RunSettings) -> None:
        """Load a run's model and merge its LoRA and student into the weights, so that they do not slow it."""
        began, first = time.perf_counter(), self._first_request
        self.model = None  # frees its memory before the next one is loaded
        gc.collect()
        self.model = load_model(
            self.evaluation.model,
            revision=first.revision,
            device=self.device,
            dtype=resolve_dtype(first.dtype, self.device),
        )
        self.model.changes.update(load_loras(self.model, self.plan.requests[run.name].loras))
        if run.student is not None:
            student = load_student(self.model.pipe, run.student, noise_kept=run.noise_kept)
            self.model.changes[student.source] = student.reach
        merge_loras(self.model)
        first.prepare(self.model)
        self.loaded = (run.student, run.noise_kept, run.lora)
        self.seconds_loading = time.perf_counter() - began
        self.model.pipe.set_progress_bar_config(disable=True)

    def write_to(self, folder: Path) -> None:
        """Take another folder for what is made from now on."""
        self.evaluation = replace(self.evaluation, folder=folder)
        self.reference_caches.clear()

    def forget(self) -> None:
        """Let go of the model, which a run that failed may have left half done."""
        self.model = self.loaded = None

    def make(self, prompt: EvaluationPrompt, run: RunSettings) -> Record:
        """Generate a video, measure it and write it."""
        if (run.student, run.noise_kept, run.lora) != self.loaded:
            self._load(run)
        with watch_dense_kernel(self.model) if run.is_dense else nullcontext() as kernel:
            request, generation = self._generate(prompt, run)
        video = generation.video
        if run.is_dense and self.compares:
            self._save_reference(prompt, run, video)
        sample = VideoSample(
            video=video.to(self.device),
            prompt=prompt.text,
            model=self.model,
            evaluated=len(self.evaluation.prompts),
            reference=self._reference(prompt, run),
            caption=_caption(prompt.text) if self.evaluation.of_shapes else None,
        )
        generation_record = make_record(request, generation, seconds_loading=self.seconds_loading)
        record: Record = {
            "run": run.to_dict(),
            "prompt": prompt.text,
            "seed": prompt.seed,
            "fingerprint": self.plan.fingerprint,
            "student_fingerprint": self.plan.student_fingerprints.get(run.name),
            "lora_fingerprint": self.plan.lora_fingerprints.get(run.name),
            **self.plan.size,
            **{name: getattr(generation, name) for name in COSTS},
            **{name: generation_record[name] for name in KEPT_FIELDS},
            "dense_kernel": None if kernel is None else str(kernel),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        measured = record_video(self.measures, sample)
        path = video_path(self.evaluation.folder, run.name, prompt)
        write_files({path: encode_mp4(video, generation_record["fps"], generation.sound)})
        return record | measured

    def _generate(self, prompt: EvaluationPrompt, run: RunSettings) -> tuple[ResolvedRequest, Generation]:
        request = replace(self.plan.requests[run.name], prompt=prompt.text, seed=prompt.seed)
        return request, run_request(self.model, request)

    def _reference_path(self, prompt: EvaluationPrompt, run: RunSettings) -> Path:
        return reference_path(self.evaluation.folder, run.name, prompt)

    def _reference(self, prompt: EvaluationPrompt, run: RunSettings) -> VideoSample | None:
        """Return the dense video that a sparse one is measured against; None if there is none."""
        reference_run = self.evaluation.reference_of(run) if self.compares else None
        if reference_run is None:
            return None
        path = self._reference_path(prompt, reference_run)
        if not path.exists():
            self._save_reference(prompt, reference_run, self._generate(prompt, reference_run)[1].video)
        with np.load(path) as archive:
            video = torch.from_numpy(archive["frames"]).to(self.device).float() / 255
        return VideoSample(video=video, prompt=prompt.text, cache=self.reference_caches[path])

    def _save_reference(self, prompt: EvaluationPrompt, run: RunSettings, video: torch.Tensor) -> None:
        path = self._reference_path(prompt, run)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, frames=(255 * video.clamp(0, 1)).round().to(torch.uint8).numpy())
        write_files({path: buffer.getvalue()})


def _let_go(error: BaseException | None) -> None:
    """Free what the functions that an error went through worked on, such as latents; its traceback stays."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


def _caption(text: str) -> Caption | None:
    """Parse a prompt as a caption of moving shapes; None if it is not one."""
    try:
        return parse_caption(text)
    except ValueError:
        return None
