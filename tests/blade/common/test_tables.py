"""Names and prompts of any origin are text in Markdown, and nothing else."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from blade.common.tables import markdown_block, markdown_code, markdown_table, markdown_text

HOSTILE = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "[click](https://example.com)",
    "](https://example.com)",
    "![x](https://example.com/x.png)",
    "](javascript:alert(1))",
    r"\[click](https://example.com)",
    r"\\[click](https://example.com)",
    "<https://example.com>",
    "`code` and ``more`",
    "a | b | c",
    r"a \| b",
    "[x]: javascript:alert(1)",
    "```",
)
BROKEN = ("a\n\n<script>alert(1)</script>", "a\n| b | c |", "a\r\n# heading", "a\n```\n<b>", "a\x1b[31m")
READER = MarkdownIt("commonmark").enable("table")


def parts(text: str) -> list[tuple[str, str]]:
    """Return the kinds and contents of all parts of a Markdown page, those within lines among them."""
    tokens = [part for token in READER.parse(text) for part in (token, *(token.children or []))]
    return [(token.type, token.content) for token in tokens]


@pytest.mark.parametrize("text", [*HOSTILE, *BROKEN])
def test_text_is_shown_as_it_is(text: str) -> None:
    found = parts(f"Model {markdown_text(text)}.")
    assert {kind for kind, _ in found} <= {"paragraph_open", "inline", "text", "paragraph_close", "text_special"}
    shown = "".join(content for kind, content in found if kind in ("text", "text_special"))
    if text in HOSTILE:
        assert shown == f"Model {text}."


@pytest.mark.parametrize("text", [*HOSTILE, *BROKEN])
def test_cells_keep_to_their_columns(text: str) -> None:
    found = parts("\n".join(markdown_table(["run", text], [[text, "1"], ["b", text]])))
    kinds = [kind for kind, _ in found]
    assert kinds.count("td_open") == 4 and kinds.count("th_open") == 2 and kinds.count("tr_open") == 3
    assert not {"html_inline", "link_open", "image", "code_inline", "html_block"} & set(kinds)


@pytest.mark.parametrize("text", [*HOSTILE, *BROKEN])
def test_code_is_shown_as_it_is(text: str) -> None:
    found = parts(f"Made by {markdown_code(text)} here.")
    assert [kind for kind, _ in found] == [
        "paragraph_open", "inline", "text", "code_inline", "text", "paragraph_close",
    ]  # fmt: skip
    if text in HOSTILE:
        assert found[3][1] == text


@pytest.mark.parametrize("text", [*HOSTILE, *BROKEN])
def test_a_command_is_a_block_of_code(text: str) -> None:
    found = parts(f"Made by\n\n{markdown_block(text)}\n\nhere.")
    assert [kind for kind, _ in found if kind != "inline"] == [
        "paragraph_open", "text", "paragraph_close", "code_block", "paragraph_open", "text", "paragraph_close",
    ]  # fmt: skip
