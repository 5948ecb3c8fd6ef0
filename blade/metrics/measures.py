"""Measures of videos as declarations, and the videos that they look at.

A measure is declared once. The evaluation's records, report, tables, plot, page and command, and the comparison with
dense attention that `blade-generate --compare` makes, follow from the declarations in `blade.metrics.registry`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch

from blade.metrics.estimates import Marks, Result, Values
from blade.models.loaded import LoadedModel
from blade.moving_shapes.captions import Caption

Value = TypeVar("Value")

VideoKey = tuple[str, int]
"""Prompt and seed of a video."""

Better = Literal["up", "down"]
"""Direction in which a measure improves."""

Scope = Literal["video", "prompt", "set"]
"""Videos of which a measure has one value: one, those of one prompt, or those of a run in a group of prompts."""

NEEDS = ("reference", "caption")
"""Inputs that a measure may need: the same video with dense attention, or a moving-shapes caption."""

LEAST_REPEATED = 2
"""Prompts with several videos from which on measures per prompt have values: a caption may come twice by chance."""


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoSample:
    """A generated video, with what its measures may look at."""

    video: torch.Tensor
    """(frames, 3, height, width), float32 in [0, 1], on the device that generated it."""
    prompt: str
    """The text that it was generated from."""
    model: LoadedModel | None = None
    """The model that generated it."""
    evaluated: int = 1
    """Number of videos that each run of the evaluation makes."""
    reference: VideoSample | None = None
    """The dense video of the same prompt, seed and settings, if there is one."""
    caption: Caption | None = None
    """The prompt as a caption of the moving-shapes world, if it is one and the model shows that world."""
    cache: dict[Hashable, Any] = field(default_factory=dict)
    """Results of `once`."""

    @property
    def reference_video(self) -> torch.Tensor:
        """The reference's frames, for measures that need one."""
        if self.reference is None:
            raise ValueError("`needs` must hold reference where a measure looks at the reference.")
        return self.reference.video

    def once(self, compute: Callable[[VideoSample], Value]) -> Value:
        """Compute what several measures share, the first time alone."""
        if compute not in self.cache:
            self.cache[compute] = compute(self)
        value: Value = self.cache[compute]
        return value


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoSet:
    """The measured videos of one run in one group of prompts."""

    records: Mapping[VideoKey, Mapping[str, Any]]
    """Their records, in the order of the prompts."""
    paths: Mapping[VideoKey, Path]
    """Their MP4 files, which may have been deleted."""
    reference: VideoSet | None = None
    """The reference run's videos in the same group; None for the reference run itself."""

    def recorded(self, key: str) -> dict[VideoKey, Any]:
        """Return what is recorded under a key, of the videos that have it: older records may lack it."""
        return {video: record[key] for video, record in self.records.items() if record.get(key) is not None}

    def repeated(self) -> dict[VideoKey, list[Path]]:
        """Return the files of each prompt that has several videos, by the key of the first; empty if few have."""
        keys = defaultdict(list)
        for text, seed in self.records:
            keys[text].append((text, seed))
        several = [of_prompt for of_prompt in keys.values() if len(of_prompt) > 1]
        if len(several) < LEAST_REPEATED:
            return {}
        paths = {of_prompt[0]: [self.paths[key] for key in of_prompt] for of_prompt in several}
        return {key: files for key, files in paths.items() if all(file.is_file() for file in files)}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The panel of a plot that shows a measure."""

    label: str
    """Label of the axis; that lower is better is added."""
    low: float | None = None
    """Lower end of the axis; None leaves it to the values."""
    high: float | None = None
    """Upper end of the axis; None leaves it to the values."""
    place: int = 0
    """Panels of lower places are further up."""
    group: str | None = None
    """Panels of one group are drawn together or not at all; None is for one that stands alone."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A measure of videos: what it computes, and how it is shown."""

    name: str
    """Key in records and reports, and value of `blade-evaluate --measure`: lower-case letters, digits, underscores."""
    heading: str
    """Heading of its column."""
    format: str = "{:.3f}"
    """Format of its values, such as `{:.1%}`."""
    better: Better | None = None
    """Direction in which it improves, if it has one."""
    per: Scope = "video"
    """Videos of which it has one value."""
    needs: tuple[str, ...] = ()
    """Names of `NEEDS`. Without a reference, None is recorded; without a caption, nothing."""
    compute: Callable[[Any], Any] | None = None
    """Per video: takes a `VideoSample`, and returns a JSON value, which is recorded, or None; of bools the share is
    reported. Per prompt: takes the MP4 files of one prompt's videos, and returns a number. Per set: takes a
    `VideoSet`, and returns a `Result` or None. Without it, the measure reads what every record has, such as times, and
    is reported in any case."""
    observe: Callable[[VideoSample], Any] | None = None
    """Per prompt or set: what is recorded of each video, for `compute`."""
    by_frame: Callable[[VideoSample], list[float]] | None = None
    """Value of each frame, recorded under the name with `_by_frame` behind it, and averaged over videos."""
    key: str | None = None
    """Key under which a video's record has it; None takes the name. Measures may share one."""
    read: Callable[[Any], float | None] = float
    """Takes what is recorded of a video, and returns its value."""
    extra: str | None = None
    """Optional package without which there is no value; the extra of the same name brings it."""
    detail: str = ""
    """Note on the heading, such as the unit, in a few words."""
    note: str = ""
    """Explanation, as a paragraph below the tables that show it; `{reference}` stands for the reference run's name."""
    brief: bool = True
    """Show it in a terminal too."""
    interval: bool = True
    """Show its confidence interval beside it."""
    compared: bool = True
    """Report differences to the baseline."""
    comparison: bool = False
    """Show it where a single video is compared with its reference."""
    progress: Callable[[Any], str] | None = None
    """Takes what is recorded of a new video, and returns what the command says of it."""
    panel: Panel | None = None
    """Its panel of the plot, if it is drawn."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"`name` must be of lower-case letters, digits and underscores, got {self.name!r}.")
        for name, values in (("better", (None, *get_args(Better))), ("per", get_args(Scope))):
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` of `{self.name}` must be one of {values}, got {getattr(self, name)!r}.")
        if not set(self.needs) <= set(NEEDS):
            raise ValueError(f"`needs` of `{self.name}` must be of {', '.join(NEEDS)}, got {self.needs}.")
        if self.per != "video" and self.compute is None:
            raise ValueError(f"`compute` of `{self.name}` must be given, as it is measured per {self.per}.")
        if self.comparison and (self.per != "video" or self.compute is None or "caption" in self.needs):
            raise ValueError(f"`comparison` of `{self.name}` must be False, as two videos alone do not determine it.")
        try:
            self.format.format(1.0)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"`format` of `{self.name}` must fit a number, got {self.format!r}: {error}.") from error

    @property
    def record_key(self) -> str:
        """Key under which a video's record has it."""
        return self.key or self.name

    def shown(self, value: float, *, signed: bool = False) -> str:
        """Return a value as text."""
        return (self.format.replace(":", ":+") if signed else self.format).format(value)

    @property
    def recorders(self) -> dict[str, Callable[[VideoSample], Any]]:
        """Functions that compute what is recorded of a video, by key of the record."""
        of_video = self.compute if self.per == "video" else self.observe
        computed = {self.record_key: of_video, f"{self.name}_by_frame": self.by_frame}
        return {key: compute for key, compute in computed.items() if compute is not None}

    def recorded(self, sample: VideoSample) -> dict[str, Any]:
        """Compute what is recorded of a video, by key of the record."""
        if "caption" in self.needs and sample.caption is None:
            return {}
        missing = "reference" in self.needs and sample.reference is None
        return {key: None if missing else compute(sample) for key, compute in self.recorders.items()}

    def result(self, videos: VideoSet) -> Result | None:
        """Return what the measure comes to over videos, None if none has a value."""
        if self.per == "video":
            recorded = videos.recorded(self.record_key)
            if recorded and all(isinstance(mark, bool) for mark in recorded.values()):
                return Marks(recorded)
            of_each = {video: self.read(value) for video, value in recorded.items()}
            values = {video: value for video, value in of_each.items() if value is not None}
            return Values(values) if values else None
        assert self.compute is not None
        if self.per == "prompt":
            values = {key: self.compute(files) for key, files in videos.repeated().items()}
            return Values(values) if values else None
        result: Result | None = self.compute(videos)
        return result


def record_video(measures: Iterable[Measure], sample: VideoSample) -> dict[str, Any]:
    """Compute what measures record of a video, by key of the record; what several share is computed once."""
    record: dict[str, Any] = {}
    for measure in measures:
        if measure.record_key not in record:
            record |= measure.recorded(sample)
    return record
