"""Making and measuring the videos of an evaluation: one record a video, in as many processes as there are shards.

A folder holds the records, the videos, and the frames of dense runs, with which the other runs of the same steps and
guidance are compared.
"""

from __future__ import annotations

import gc
import io
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from blade.common.files import write_files
from blade.evaluation.plan import EvaluationPlan
from blade.evaluation.prompts import EvaluationPrompt
from blade.evaluation.records import Record, append_record, read_records
from blade.evaluation.runs import RunSettings
from blade.evaluation.videos import video_path
from blade.generation.record import make_record
from blade.generation.request import ResolvedRequest
from blade.generation.run import Generation, run_request
from blade.media.video import encode_mp4
from blade.metrics.distribution import feature_count, latent_statistics
from blade.metrics.similarity import lpips, motion, psnr, psnr_by_frame, ssim_by_frame
from blade.models.acceleration import merge_loras
from blade.models.devices import resolve_dtype
from blade.models.loading import load_model
from blade.moving_shapes.captions import parse_caption
from blade.moving_shapes.realism import realism_error
from blade.moving_shapes.scoring import score
from blade.students.loading import load_student

KEPT_FIELDS = ("model", "device", "dtype", "blade_config", "fps", "machine", "versions")
"""Fields of a generation's record that an evaluation's record has too."""


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
        found = []
        if "all_attributes" in record:
            found.append("all right" if record["all_attributes"] else "not all right")
            found.append(f"realism error {record['realism_error']:.3f}")
        if record["psnr"] is not None:
            found.append(f"PSNR {record['psnr']:.2f}")
        found.append(f"{record['seconds']:.1f} s ({self.seconds_left / 60:.0f} min left)")
        where = f"{self.done}/{self.total} {record['run']['name']}, seed {record['seed']}, {record['prompt']}"
        return f"{where}: {', '.join(found)}"


def evaluate_videos(plan: EvaluationPlan, on_video: Callable[[Progress], None] | None = None) -> None:
    """Make and measure every video of this shard that has no record yet.

    A process that is killed loses the video that it was making, and no other.

    Args:
        plan: What to evaluate.
        on_video: Called after each video.

    Raises:
        ValueError: If the folder holds records of the same names but other settings or another model.
        OutputError: If a file cannot be written.
    """
    evaluation = plan.evaluation
    done, own = set(read_records(plan)), evaluation.own_prompts
    # dense first: the others are compared with it
    runs = sorted(evaluation.runs, key=lambda run: not run.is_dense)
    missing = [(prompt, run) for prompt in own for run in runs if (run.name, *prompt.key) not in done]
    # one student after the other, as loading one takes time
    missing.sort(key=lambda pair: (pair[1].student or "", pair[1].noise_kept or 0.0))
    if not missing:
        return
    worker = _Worker(plan, missing[0][1])
    evaluation.folder.mkdir(parents=True, exist_ok=True)
    total, began = len(own) * len(runs), time.monotonic()
    for made, (prompt, run) in enumerate(missing, start=1):
        record = worker.make(prompt, run)
        append_record(evaluation.folder / "records-{}-of-{}.jsonl".format(*evaluation.shard), record)
        if on_video is not None:
            left = (time.monotonic() - began) / made * (len(missing) - made)
            on_video(Progress(done=total - len(missing) + made, total=total, seconds_left=left, record=record))


class _Worker:
    """A loaded model or student, and the reference frames in the folder."""

    def __init__(self, plan: EvaluationPlan, first: RunSettings) -> None:
        self.plan, self.evaluation = plan, plan.evaluation
        self.reference_motion = dict[Path, float]()
        self.device = torch.device(self._first_request.device)
        self._load(first)
        # encoding takes time and memory, and distances of distributions take more videos than features
        self.enough_for_distances = len(plan.evaluation.prompts) > feature_count(self.model)

    @property
    def _first_request(self) -> ResolvedRequest:
        """The request of a run; model, device and dtype are the same in all."""
        return next(iter(self.plan.requests.values()))

    def _load(self, run: RunSettings) -> None:
        """Load a run's model, and its student into the weights, so that it takes the time of a generation."""
        began, first = time.perf_counter(), self._first_request
        self.model: Any = None  # which leaves the memory before the next one comes
        gc.collect()
        self.model = load_model(
            self.evaluation.model,
            revision=first.revision,
            device=self.device,
            dtype=resolve_dtype(first.dtype, self.device),
        )
        if run.student is not None:
            load_student(self.model.pipe, run.student, noise_kept=run.noise_kept)
            merge_loras(self.model)
        self.loaded = (run.student, run.noise_kept)
        self.seconds_loading = time.perf_counter() - began
        self.model.pipe.set_progress_bar_config(disable=True)

    def make(self, prompt: EvaluationPrompt, run: RunSettings) -> Record:
        """Make a video, write it and measure it."""
        request, generation = self._generate(prompt, run)
        video, on_device = generation.video, generation.video.to(self.device)
        moves = motion(on_device)
        record: Record = {
            "run": run.to_dict(),
            "prompt": prompt.text,
            "seed": prompt.seed,
            "fingerprint": self.plan.fingerprint,
            "student_fingerprint": self.plan.student_fingerprints.get(run.name),
            **self.plan.size,
            "features": latent_statistics(self.model, video) if self.enough_for_distances else None,
            "motion": moves,
            "layer_density": generation.layer_density,
            "run_density": generation.run_density,
            "seconds": generation.seconds,
            "seconds_denoising": generation.seconds_denoising,
        }
        if run.is_dense:
            self._save_reference(prompt, run, video)
        record |= self._likeness(prompt, run, on_device, moves)
        if self.evaluation.of_shapes:
            record |= _scores(video, prompt.text)
        made = make_record(request, generation, seconds_loading=self.seconds_loading)
        record |= {name: made[name] for name in KEPT_FIELDS}
        path = video_path(self.evaluation.folder, run.name, prompt)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_files({path: encode_mp4(video, made["fps"])})
        return record | {"date": datetime.now(UTC).isoformat(timespec="seconds")}

    def _likeness(
        self, prompt: EvaluationPrompt, run: RunSettings, video: torch.Tensor, moves: float
    ) -> dict[str, Any]:
        """How close a video is to its dense reference; all None without one."""
        names = ("psnr", "ssim", "lpips", "motion_ratio", "psnr_by_frame", "ssim_by_frame")
        reference_run = self.evaluation.reference_of(run)
        if reference_run is None:
            return dict.fromkeys(names)
        reference, path = self._reference(prompt, reference_run), self._reference_path(prompt, reference_run)
        if path not in self.reference_motion:
            self.reference_motion[path] = motion(reference)
        similarities, reference_moves = ssim_by_frame(video, reference), self.reference_motion[path]
        return {
            "psnr": psnr(video, reference),
            "ssim": fmean(similarities),
            "lpips": lpips(video, reference),
            "motion_ratio": moves / reference_moves if reference_moves > 0 else None,
            "psnr_by_frame": psnr_by_frame(video, reference),
            "ssim_by_frame": similarities,
        }

    def _generate(self, prompt: EvaluationPrompt, run: RunSettings) -> tuple[ResolvedRequest, Generation]:
        request = replace(self.plan.requests[run.name], prompt=prompt.text, seed=prompt.seed)
        if (run.student, run.noise_kept) != self.loaded:
            self._load(run)
        return request, run_request(self.model, request)

    def _reference_path(self, prompt: EvaluationPrompt, run: RunSettings) -> Path:
        return self.evaluation.folder / "references" / run.name / f"{prompt.stem}.npz"

    def _reference(self, prompt: EvaluationPrompt, run: RunSettings) -> torch.Tensor:
        path = self._reference_path(prompt, run)
        if not path.exists():
            self._save_reference(prompt, run, self._generate(prompt, run)[1].video)
        with np.load(path) as archive:
            return torch.from_numpy(archive["frames"]).to(self.device).float() / 255

    def _save_reference(self, prompt: EvaluationPrompt, run: RunSettings, video: torch.Tensor) -> None:
        path = self._reference_path(prompt, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, frames=(255 * video.clamp(0, 1)).round().to(torch.uint8).numpy())
        write_files({path: buffer.getvalue()})


def _scores(video: torch.Tensor, text: str) -> dict[str, Any]:
    """What the moving-shapes scorer sees, if the prompt is one of its captions; else nothing."""
    try:
        parse_caption(text)
    except ValueError:
        return {}
    shown = score(video, text)
    return {
        "attributes": [scored.attributes for scored in shown.objects],
        "background": shown.background,
        "basics": shown.basics,
        "all_attributes": shown.all_attributes,
        "realism_error": realism_error(video, text),
    }
