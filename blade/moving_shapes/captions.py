"""The caption grammar of the moving-shapes world.

    caption    = object ["and" object] ["over a" background "background"]
    object     = "a" [size] [fill] colour shape "moving" direction [speed]

For example "a small striped red ball moving right fast over a checkered background". Whatever a caption leaves out is
plain (solid fill, dark background), except for size and speed, which then vary from video to video.
"""

from __future__ import annotations

import dataclasses
import difflib
import re

import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("ball", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")
SIZES = ("small", "large")
FILLS = ("striped",)
SPEEDS = ("slowly", "fast")
BACKGROUNDS = ("checkered", "striped")
OPTIONAL = 0.3
"""Probability that a caption which is drawn names one of the last four."""
FUNCTION_WORDS = ("a", "moving", "and", "over", "background")

VOCABULARY = tuple(
    dict.fromkeys(FUNCTION_WORDS + COLOURS + SHAPES + DIRECTIONS + SIZES + FILLS + SPEEDS + BACKGROUNDS)
)
"""Every word of the grammar, once."""

LIKENESS = 0.7
"""Least likeness of two words, by `difflib`, at which one is taken for a slip of the other: "going" for "moving"."""

HELD_OUT = frozenset(
    {
        ("red", "ball", "left"),
        ("red", "square", "up"),
        ("green", "square", "right"),
        ("green", "triangle", "down"),
        ("blue", "triangle", "up"),
        ("blue", "ball", "left"),
        ("yellow", "ball", "down"),
        ("yellow", "square", "right"),
        ("purple", "square", "right"),
        ("purple", "triangle", "down"),
        ("white", "triangle", "up"),
        ("white", "ball", "left"),
    }
)
"""Combinations of (colour, shape, direction) that no training caption names. Each word occurs in some other one."""

_OBJECT = re.compile(
    rf"a (?:(?P<size>{'|'.join(SIZES)}) )?(?:(?P<fill>{'|'.join(FILLS)}) )?(?P<colour>{'|'.join(COLOURS)}) "
    rf"(?P<shape>{'|'.join(SHAPES)}) moving (?P<direction>{'|'.join(DIRECTIONS)})(?: (?P<speed>{'|'.join(SPEEDS)}))?"
)
_BACKGROUND = re.compile(rf" over a (?P<background>{'|'.join(BACKGROUNDS)}) background$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectCaption:
    """One object of a caption."""

    colour: str
    shape: str
    direction: str
    size: str | None = None
    """One of `SIZES`, or None where the caption names none."""
    fill: str | None = None
    """One of `FILLS`, or None for a solid fill."""
    speed: str | None = None
    """One of `SPEEDS`, or None where the caption names none."""

    @property
    def combination(self) -> tuple[str, str, str]:
        """(colour, shape, direction), the key of `HELD_OUT`."""
        return (self.colour, self.shape, self.direction)

    def __str__(self) -> str:
        words = ["a", self.size, self.fill, self.colour, self.shape, "moving", self.direction, self.speed]
        return " ".join(word for word in words if word)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Caption:
    """One or two objects, the first in front, and the background."""

    objects: tuple[ObjectCaption, ...]
    background: str | None = None
    """One of `BACKGROUNDS`, or None for plain dark."""

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2):
            raise ValueError(f"`objects` must hold one or two objects, got {len(self.objects)}.")
        if len(self.objects) == 2 and self.objects[0].colour == self.objects[1].colour:
            raise ValueError(f"`objects` must differ in colour, got two that are {self.objects[0].colour}.")

    def __str__(self) -> str:
        text = " and ".join(str(described) for described in self.objects)
        return f"{text} over a {self.background} background" if self.background else text


def parse_caption(text: str) -> Caption:
    """Read a caption back into its parts; case, punctuation and repeated spaces do not matter.

    Raises:
        ValueError: If the text is not a sentence of the grammar.
    """
    normalised = " ".join(_words(text))
    background = _BACKGROUND.search(normalised)
    objects_text = normalised[: background.start()] if background else normalised
    matches = [_OBJECT.fullmatch(part) for part in objects_text.split(" and ")]
    if not all(matches):
        raise ValueError(
            f'`text` must read like "a red ball moving right" or "a small striped red ball moving right fast and a '
            f'blue square moving up over a checkered background", got "{text}".'
        )
    return Caption(
        objects=tuple(ObjectCaption(**match.groupdict()) for match in matches if match),
        background=background["background"] if background else None,
    )


def unknown_words(text: str) -> list[str]:
    """The words of `text` that the grammar does not have, in order, each once."""
    return [word for word in dict.fromkeys(_words(text)) if word not in VOCABULARY]


def near_word(word: str) -> str | None:
    """Return the word of the grammar that is written most like another one; None if none is."""
    return next(iter(difflib.get_close_matches(word.lower(), VOCABULARY, n=1, cutoff=LIKENESS)), None)


def names_shape(text: str) -> bool:
    """Return whether a text has a word for a shape of the grammar."""
    return any(word in SHAPES for word in _words(text))


def sample_caption(
    rng: np.random.Generator, *, objects: int, held_out: bool = False, striped: float = OPTIONAL
) -> Caption:
    """Draw a caption; optional attributes are named with probability `OPTIONAL` each.

    Args:
        rng: Source of randomness.
        objects: How many objects, 1 or 2.
        held_out: Draw every object's (colour, shape, direction) from `HELD_OUT`; otherwise never from it.
        striped: Probability that an object's stripes are named.
    """
    drawn: list[ObjectCaption] = []
    while len(drawn) < objects:
        described = _sample_object(rng, held_out, striped)
        if described.colour not in [other.colour for other in drawn]:
            drawn.append(described)
    return Caption(objects=tuple(drawn), background=_sometimes(rng, BACKGROUNDS))


def _sample_object(rng: np.random.Generator, held_out: bool, striped: float) -> ObjectCaption:
    while True:
        combination = (_choice(rng, COLOURS), _choice(rng, SHAPES), _choice(rng, DIRECTIONS))
        if (combination in HELD_OUT) == held_out:
            break
    colour, shape, direction = combination
    return ObjectCaption(
        colour=colour,
        shape=shape,
        direction=direction,
        size=_sometimes(rng, SIZES),
        fill=_sometimes(rng, FILLS, striped),
        speed=_sometimes(rng, SPEEDS),
    )


def _choice(rng: np.random.Generator, words: tuple[str, ...]) -> str:
    return words[int(rng.integers(len(words)))]


def _sometimes(rng: np.random.Generator, words: tuple[str, ...], probability: float = OPTIONAL) -> str | None:
    return _choice(rng, words) if rng.random() < probability else None


def _words(text: str) -> list[str]:
    return re.sub(r"[^\w]+", " ", text.lower()).split()
