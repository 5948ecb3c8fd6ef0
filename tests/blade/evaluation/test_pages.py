from __future__ import annotations

import base64
import copy
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import PurePosixPath
from urllib.parse import unquote

import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image

from blade.evaluation.pages import Player, html, markdown, write_report
from blade.evaluation.plan import plan_evaluation
from blade.evaluation.report import make_report
from blade.evaluation.videos import POSTER_WIDTH, lay_out_videos
from blade.evaluation.worker import evaluate_videos
from blade.media.video import mp4_frames


class Page(HTMLParser):
    """What a page loads, its cells, and whether its tags are closed in order."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(f"{tag} {sorted(name for name, _ in attributes)}")
        self.sources += [value for name, value in attributes if name in ("src", "href", "poster", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def player(path: str) -> Player:
    return Player(path=PurePosixPath(path), poster=b"jpeg")


@pytest.fixture
def written(evaluation):
    """The folder of a finished evaluation, and its report."""
    plan = plan_evaluation(replace(evaluation, prompts=evaluation.prompts[:1]))
    evaluate_videos(plan)
    report = make_report(plan, "blade-evaluate --run '<b>'")
    paths = write_report(report, evaluation.folder, lay_out_videos(plan))
    return {path.name: path for path in paths}, report


def test_files_say_the_same(written):
    paths, report = written
    assert json.loads(paths["report.json"].read_text()) == report
    page = paths["report.md"].read_text()
    assert page == markdown(report)
    assert "## Single-object prompts" in page and "    blade-evaluate --run '<b>'" in page
    if "report.png" in paths:
        assert paths["report.png"].read_bytes().startswith(b"\x89PNG")


def test_page_stands_by_itself(written):
    paths, _ = written
    text = paths["report.html"].read_text()
    page = Page(text)
    assert not page.open
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
    embedded = [source for source in page.sources if source.startswith("data:image/png;base64,")]
    others = [source for source in page.sources if not source.startswith("data:")]
    assert len(embedded) == len([name for name in paths if name.endswith(".png")]) + 1
    assert len(others) == 1 and (paths["report.html"].parent / unquote(others[0])).is_file()
    assert "prefers-color-scheme: dark" in text and "&lt;b&gt;" in text and "<b>" not in text
    (prompt,) = {record["prompt"] for record in map(json.loads, open_records(paths))}
    assert text.count(prompt) >= 2


def test_pictures_come_before_tables(written):
    paths, _ = written
    tags = [tag.split()[0] for tag in Page(paths["report.html"].read_text(encoding="utf-8")).tags]
    assert {"img", "table", "video"} <= set(tags)
    assert max(place for place, tag in enumerate(tags) if tag == "img") < tags.index("table") < tags.index("video")


def test_a_player_shows_the_first_frame_and_loads_nothing_before_it_plays(written):
    paths, _ = written
    (video,) = re.findall("<video[^>]*>", paths["report.html"].read_text(encoding="utf-8"))
    assert 'preload="none"' in video
    (poster,) = re.findall('poster="data:image/jpeg;base64,([^"]*)"', video)
    content = base64.b64decode(poster)
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    first = next(mp4_frames(paths["report.html"].parent / unquote(re.findall('src="([^"]*)"', video)[0])))
    height, width = first.shape[-2:]
    shown = min(width, POSTER_WIDTH)
    assert len(content) < 50_000 and picture.size == (shown, round(height * shown / width))
    resized = Image.fromarray(first.permute(1, 2, 0).numpy()).resize(picture.size, Image.Resampling.BOX)
    assert abs(np.asarray(picture, float) - np.asarray(resized, float)).mean() < 4


def open_records(paths):
    (path,) = paths["report.json"].parent.glob("records-*.jsonl")
    return path.read_text().splitlines()


def test_page_shows_every_run_and_its_numbers(written):
    paths, report = written
    cells = Page(paths["report.html"].read_text()).cells
    for run in report["runs"]:
        assert run["name"] in cells
    estimate = next(run for run in report["runs"] if run["name"] == "asa")["groups"]["single"]["psnr"]
    assert f"{estimate['mean']:.2f}" in cells
    assert estimate["low"] is None  # of so few videos


def test_an_interval_stands_beside_its_mean(written):
    report = copy.deepcopy(written[1])
    run = next(run for run in report["runs"] if run["name"] == "asa")
    run["groups"]["single"]["psnr"] = {"mean": 30.5, "low": 29.25, "high": 31.75, "videos": 8}
    page = html(report, pictures={}, videos={})
    assert "30.50 (29.25 to 31.75)" in Page(page).cells and '<span class="interval">(29.25 to 31.75)</span>' in page


def test_names_of_videos_are_quoted(written):
    _, report = written
    page = Page(html(report, pictures={}, videos={"a #1": player("compare/a #1 50%.mp4")}))
    assert "compare/a%20%231%2050%25.mp4" in page.sources


def test_without_anything_to_draw_there_is_no_picture(written, evaluation, monkeypatch):
    paths, report = written
    for path in paths.values():
        path.unlink()
    evaluation_plot = pytest.importorskip("blade.evaluation.plot", exc_type=ImportError)
    monkeypatch.setattr(evaluation_plot, "plot_report", lambda report: None)
    plan = plan_evaluation(replace(evaluation, prompts=evaluation.prompts[:1]))
    names = [path.name for path in write_report(report, evaluation.folder, lay_out_videos(plan))]
    assert names == ["report.json", "report.md", "report.html"]


HOSTILE = "a/<script>alert(1)</script>[b](https://example.com)](javascript:alert(1)) `x` | \"onload='y'\n\n# b"


def test_what_others_have_named_is_text_in_both_pages(written):
    _, report = written
    machine = report["machines"][0] | {"device": HOSTILE}
    hostile = report | {"model": HOSTILE, "command": f"blade-evaluate --prompt {HOSTILE}", "machines": [machine]}
    clean, page = (
        Page(html(values, pictures={HOSTILE: b"x"}, videos={HOSTILE: player(f"compare/{name}.mp4")}))
        for values, name in ((report, "a"), (hostile, HOSTILE))
    )
    assert not page.open and page.tags == clean.tags and len(page.sources) == len(clean.sources)
    assert not any(":" in source for source in page.sources if not source.startswith("data:"))
    found, usual = (
        [
            part
            for token in MarkdownIt("commonmark").enable("table").parse(text)
            for part in (token, *(token.children or []))
        ]
        for text in (markdown(hostile), markdown(report))
    )
    assert not {"html_block", "html_inline", "link_open", "image", "code_inline"} & {token.type for token in found}
    for kind in ("heading_open", "code_block", "td_open", "paragraph_open"):
        assert sum(token.type == kind for token in found) == sum(token.type == kind for token in usual)
    assert any("](javascript:alert(1))" in token.content for token in found)
