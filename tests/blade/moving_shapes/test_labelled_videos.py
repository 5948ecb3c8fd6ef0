"""The scorer against the eye, on 100 generated videos in `labelled/`.

They are of the model in 30 steps and of its students of 4 and 8 steps, as these were when the labels were made, half
of them of prompts held out from training; their colours are stored at full resolution. Each was judged from nine of
its frames, before any verdict of the scorer that counts objects was seen: `right` if it shows what the prompt says,
size and speed aside, and `extra` if it shows an object too many, or a piece of one. One label was changed later: in
091 the purple ball moves right at first, which nine frames hardly show.
"""

import json
from pathlib import Path

import pytest

from blade.media.video import read_mp4
from blade.moving_shapes.scoring import Score, score

FOLDER = Path(__file__).with_name("labelled")
LABELS = [json.loads(line) for line in (FOLDER / "labels.jsonl").read_text().splitlines()]

LEAST_AGREEMENT = 97
UNMEASURED = ("size", "speed")
"""Attributes that the eye cannot measure."""


def is_right(scored: Score) -> bool:
    marks = [right for judged in scored.objects for name, right in judged.attributes.items() if name not in UNMEASURED]
    return scored.count and scored.background is not False and all(marks)


@pytest.fixture(scope="module")
def scores() -> list[Score]:
    return [score(read_mp4(FOLDER / label["file"]), label["prompt"]) for label in LABELS]


@pytest.mark.slow
def test_the_scorer_agrees_with_the_eye(scores):
    assert len(LABELS) == 100 and 20 < sum(label["right"] for label in LABELS) < 80
    differ = [label["file"] for label, scored in zip(LABELS, scores) if is_right(scored) != label["right"]]
    assert len(LABELS) - len(differ) >= LEAST_AGREEMENT, differ


@pytest.mark.slow
def test_no_video_with_an_object_too_many_passes(scores):
    extra = [(label, scored) for label, scored in zip(LABELS, scores) if label["extra"]]
    assert len(extra) >= 10
    assert not [label["file"] for label, scored in extra if is_right(scored) or scored.all_attributes]
