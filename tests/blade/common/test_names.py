"""Names made from texts."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blade.common.names import (
    STEM_BYTES,
    check_no_input,
    cut_bytes,
    file_name,
    is_portable,
    literal_name,
)


def test_a_text_that_its_words_show_is_its_name() -> None:
    assert file_name("a red ball moving right") == "a-red-ball-moving-right"
    assert file_name("小猫 跑") == "小猫-跑"


@pytest.mark.parametrize(
    "texts",
    [
        ("hello", "Hello!", "Hello", "hello!", "hello ", "-hello"),
        ("a-cat", "a cat", "a  cat", "a\tcat"),
        tuple("a cat walks on the grass and then it " * 3 + end for end in ("sleeps", "eats", "runs")),
        ("猫" * 200, "猫" * 201, "猫" * 200 + "!"),
        ("é", unicodedata.normalize("NFD", "é")),
        ("?", "!", "", "video"),
        ("con", "con!", "nul", "com1"),
        ("\udcff", "\udcfe"),
    ],
    ids=["capitals", "blanks", "one beginning", "cut", "composed", "no letters", "devices", "no text at all"],
)
def test_different_texts_have_different_names(texts: tuple[str, ...]) -> None:
    names = [file_name(text) for text in texts]
    assert len({unicodedata.normalize("NFC", name).casefold() for name in names}) == len(texts)
    assert all(is_portable(name) for name in names)


@given(st.text(max_size=400))
def test_a_name_is_short_whole_and_portable(text: str) -> None:
    name = file_name(text)
    assert 0 < len(name.encode()) <= STEM_BYTES + 7
    assert is_portable(name) and "/" not in name and not name.startswith((".", "-"))
    # with the largest seed, the digits of settings, what is beside a video, and a temporary name
    longest = f".{name}-{2**63 - 1}-{'0' * 8}-compare.mp4.1234567.tmp"
    assert len(longest.encode()) <= 255  # of the usual file systems


def test_a_text_is_cut_between_characters() -> None:
    assert cut_bytes("猫猫", 5) == "猫"
    assert cut_bytes("abc", 2) == "ab"


def test_a_literal_name_has_what_every_system_allows() -> None:
    assert literal_name('what: a "cat"? yes/no\\', 200) == "what_ a _cat__ yes_no_"
    assert len(literal_name("猫" * 200, 240).encode()) == 240


@pytest.mark.parametrize("name", ["CON", "nul.txt", "com1", "LPT9.mp4", "a.", "a ", "a:b", "a?b", "lpt¹"])
def test_names_that_windows_has_not_are_known(name: str) -> None:
    assert not is_portable(name)
    assert is_portable(f"x{name.replace(':', '').replace('?', '')}x")


def test_an_input_is_seen_through_links(tmp_path: Path) -> None:
    video = tmp_path / "video.mp4"
    video.write_bytes(b"video")
    (tmp_path / "link.mp4").symlink_to(video)
    os.link(video, tmp_path / "hard.mp4")
    (tmp_path / "folder").symlink_to(tmp_path)
    for path in (video, tmp_path / "link.mp4", tmp_path / "hard.mp4", tmp_path / "folder" / "video.mp4"):
        with pytest.raises(ValueError, match=r"`output` must not replace an input, got .*, which is `video`"):
            check_no_input([tmp_path / "other.mp4", path], {video: "video"})
    check_no_input([tmp_path / "other.mp4"], {video: "video"})
