from __future__ import annotations

import pytest

from blade.evaluation.prompts import EvaluationPrompt, held_out_prompts, parse_seeds, prompts_with_seeds
from blade.moving_shapes.captions import HELD_OUT, parse_caption


def test_held_out_prompts_are_fixed_and_extend_each_other():
    prompts = held_out_prompts(64, 64)
    assert prompts == held_out_prompts(64, 64)
    assert set(held_out_prompts(5, 3)) < set(prompts)
    assert len({prompt.key for prompt in prompts}) == len({prompt.stem for prompt in prompts}) == 128
    for prompt in prompts:
        objects = parse_caption(prompt.text).objects
        assert len(objects) == {"single": 1, "two": 2}[prompt.group]
        assert all(described.combination in HELD_OUT for described in objects)


def test_no_prompt_is_refused():
    with pytest.raises(ValueError, match="not both 0"):
        held_out_prompts(0, 0)


def test_every_prompt_gets_every_seed():
    prompts = prompts_with_seeds(["a cat", "a dog"], (0, 7))
    assert [(prompt.text, prompt.seed) for prompt in prompts] == [
        ("a cat", 0),
        ("a cat", 7),
        ("a dog", 0),
        ("a dog", 7),
    ]
    assert {prompt.group for prompt in prompts} == {"all"}


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", (0,)), ("0-3,7", (0, 1, 2, 3, 7)), (" 5, 2-2,5", (2, 5)), (f"{2**63 - 1}", (2**63 - 1,))]
)
def test_seeds_are_read(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "such as"),
        ("1,", "such as"),
        ("-1", "such as"),
        ("3-1", "such as"),
        ("one", "such as"),
        (f"{2**63}", "2\\*\\*63 - 1"),
        ("0-99999999999", "at most 10,000"),
    ],
)
def test_bad_seeds_are_refused(text, message):
    with pytest.raises(ValueError, match=f"`seeds`.*{message}"):
        parse_seeds(text)


def test_names_of_files_are_readable_distinct_and_short():
    assert EvaluationPrompt(text="a red ball", seed=3).stem == "a-red-ball-3"
    texts = ["a red ball", "A red ball", "a red ball!", "../a red ball", "x" * 300, "x" * 301, "猫" * 200, "..."]
    stems = [EvaluationPrompt(text=text, seed=0).stem for text in texts]
    assert len(set(stems)) == len(texts)
    for stem in stems:
        assert len(stem.encode()) < 230 and "/" not in stem and not stem.startswith(".")
