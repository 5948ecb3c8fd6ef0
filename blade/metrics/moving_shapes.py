"""Measures of videos of the moving-shapes world: the caption's attributes that a video shows, and its realism."""

from __future__ import annotations

from collections.abc import Callable

from blade.metrics.measures import Measure, Panel, VideoSample
from blade.moving_shapes.realism import realism_error
from blade.moving_shapes.scoring import Score, score

ATTRIBUTES = ("colour", "shape", "direction", "size", "fill", "speed")
"""Attributes that the scorer judges of every object."""

OfObjects = list[dict[str, bool]]
"""Of each object of a video, the attributes that its caption names, and if they are right."""


def _score(sample: VideoSample) -> Score:
    return score(sample.video.cpu(), sample.prompt)


def _attributes(sample: VideoSample) -> OfObjects:
    return [scored.attributes for scored in sample.once(_score).objects]


def _share_of_objects(attribute: str) -> Callable[[OfObjects], float | None]:
    def share(objects: OfObjects) -> float | None:
        marks = [attributes[attribute] for attributes in objects if attribute in attributes]
        return sum(marks) / len(marks) if marks else None

    return share


NOTE = (
    "Colour to background: share of the objects or videos whose caption names it that show it. Count: share of videos "
    "that show the described objects and no others. Basics: those of them in which every object has its colour, shape "
    "and direction; all: everything that the caption says."
)

MEASURES = (
    *(
        Measure(
            name=attribute,
            heading=attribute,
            format="{:.1%}",
            better="up",
            needs=("caption",),
            key="attributes",
            compute=_attributes,
            read=_share_of_objects(attribute),
            brief=False,
            interval=False,
            compared=False,
        )
        for attribute in ATTRIBUTES
    ),
    Measure(
        name="background",
        heading="background",
        format="{:.1%}",
        better="up",
        needs=("caption",),
        compute=lambda sample: sample.once(_score).background,
        brief=False,
        interval=False,
        compared=False,
    ),
    Measure(
        name="count",
        heading="count",
        format="{:.1%}",
        better="up",
        needs=("caption",),
        compute=lambda sample: sample.once(_score).count,
    ),
    Measure(
        name="basics",
        heading="basics",
        format="{:.1%}",
        better="up",
        needs=("caption",),
        compute=lambda sample: sample.once(_score).basics,
        note=NOTE,
    ),
    Measure(
        name="all_attributes",
        heading="all",
        format="{:.1%}",
        better="up",
        needs=("caption",),
        compute=lambda sample: sample.once(_score).all_attributes,
        progress=lambda right: "all right" if right else "not all right",
        panel=Panel(label="share of videos with everything right", low=-0.03, high=1.03, place=1, group="scores"),
    ),
    Measure(
        name="realism_error",
        heading="realism error",
        format="{:.3f}",
        better="down",
        needs=("caption",),
        compute=lambda sample: realism_error(sample.video.cpu(), sample.prompt),
        progress="realism error {:.3f}".format,
        panel=Panel(label="realism error", low=0, group="scores"),
    ),
)
"""Measures of moving shapes. An attribute counts by object, the others by video."""
