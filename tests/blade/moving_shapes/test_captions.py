import numpy as np
import pytest

from blade.moving_shapes.captions import (
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    SHAPES,
    Caption,
    ObjectCaption,
    parse_caption,
    sample_caption,
    unknown_words,
)


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_combinations_are_drawn_only_on_request(objects, held_out):
    rng = np.random.default_rng(0)
    for _ in range(1000):
        for described in sample_caption(rng, objects=objects, held_out=held_out).objects:
            assert (described.combination in HELD_OUT) == held_out


def test_every_word_occurs_outside_held_out_combinations():
    for n, words in enumerate((COLOURS, SHAPES, DIRECTIONS)):
        for word in words:
            others = [c for c in HELD_OUT if c[n] == word]
            assert len(others) < len(COLOURS) * len(SHAPES) * len(DIRECTIONS) / len(words) / 2


@pytest.mark.parametrize("objects", [1, 2])
def test_captions_survive_text_and_back(objects):
    rng = np.random.default_rng(1)
    for _ in range(300):
        caption = sample_caption(rng, objects=objects)
        assert parse_caption(str(caption)) == caption
        assert unknown_words(str(caption)) == []


def test_full_caption_is_read():
    text = "A small striped red ball moving right fast, and a blue square moving up over a checkered background."
    assert parse_caption(text) == Caption(
        objects=(
            ObjectCaption(colour="red", shape="ball", direction="right", size="small", fill="striped", speed="fast"),
            ObjectCaption(colour="blue", shape="square", direction="up"),
        ),
        background="checkered",
    )


@pytest.mark.parametrize("text", ["", "a cat", "a red ball", "a red ball moving right and", "a ball red moving right"])
def test_other_sentences_are_refused(text):
    with pytest.raises(ValueError, match="must read like"):
        parse_caption(text)


def test_two_objects_must_differ_in_colour():
    with pytest.raises(ValueError, match="differ in colour"):
        parse_caption("a red ball moving right and a red square moving up")


def test_unknown_words_are_listed_once_in_order():
    assert unknown_words("A dancing red cat, dancing left with a hat") == ["dancing", "cat", "with", "hat"]
