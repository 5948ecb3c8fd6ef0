"""What the report's file holds, without a browser."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from report_example import PROMPTS, report_example

from blade.common.files import OutputError
from blade.profiling import report
from blade.profiling.report import Candidate, render_report, write_report


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text in them."""

    def __init__(self, text):
        """Read a page."""
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self._open = [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        """Remember it."""
        self.elements.append((tag, dict(attributes)))
        self._open.append((tag, dict(attributes).get("id")))
        self.text.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        """Leave it."""
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        """Add it to the text of the element that is open."""
        if self._open:
            self.text[self._open[-1][0]][-1] += data


def drawn(text):
    """What the script draws: the values, and the arrays among them."""
    (block,) = re.findall(r'<script type="application/json" id="report-data">(.*?)</script>', text, re.S)
    values = json.loads(block)
    types = {"uint8": "u1", "uint16": "<u2", "float32": "<f4"}
    arrays = {
        name: None
        if array is None
        else np.frombuffer(base64.b64decode(array["data"]), types[array["type"]]).reshape(array["shape"])
        for name, array in values.pop("arrays").items()
    }
    return values, arrays


@pytest.fixture(scope="module")
def data():
    return report_example()


@pytest.fixture(scope="module")
def text(data):
    return render_report(data)


def test_it_asks_for_nothing_from_elsewhere(text):
    page = Page(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"https?:|@import|url\(|\bimport\b|fetch\(|XMLHttpRequest|WebSocket", text)
    (policy,) = [one["content"] for tag, one in page.elements if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "http" not in policy


def test_arrays_come_back_as_they_were(data, text):
    values, arrays = drawn(text)
    names = ("assignment", "head_error", "explained", "maps", "masks", "curve", "published_curve", "recall")
    for name in (*names, "prompt_disagreement", "prompt_regret"):
        np.testing.assert_array_equal(arrays[name], getattr(data, name), err_msg=name)
    vertical = np.array([one.kind == "vertical" for one in data.candidates])[data.assignment]
    np.testing.assert_array_equal(arrays["stripes"], data.stripes[vertical])
    assert values["group_starts"] == list(data.group_starts) and values["chosen"] == list(data.chosen)
    assert [one["name"] for one in values["candidates"]] == [one.name for one in data.candidates]


def test_text_stays_text(data):
    nasty = "\"><script>alert(1)</script>'{{ 7 * 7 }}&amp;"
    candidates = (Candidate(name=nasty, kind="full", density=1.0, cost=1.0), *data.candidates[1:])
    changes = {
        "title": nasty,
        "command": nasty,
        "notes": (nasty,),
        "machine": {nasty: nasty},
        "candidates": candidates,
    }
    text = render_report(replace(data, orders=(nasty, *data.orders[1:]), **changes))
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert page.text["h1"] == [nasty] and page.text["title"] == [nasty] and page.text["pre"] == [nasty]
    assert [one for one in page.text["li"] if one in PROMPTS] == list(PROMPTS)
    assert drawn(text)[0]["candidates"][0]["name"] == nasty
    assert '<meta charset="utf-8">' in text and PROMPTS[-1] in text


def test_what_was_not_measured_is_said(data):
    nothing = {"stripes": None, "published_curve": None, "verified": None, "recall": None}
    text = render_report(replace(data, **nothing, explained_kinds=(), explained=np.zeros((0, 6, 50), np.float32)))
    for sentence in ("ASA was not looked at", "not measured", "no such patterns were among the candidates"):
        assert sentence in text
    arrays = drawn(text)[1]
    assert arrays["stripes"] is None and arrays["published_curve"] is None and arrays["recall"] is None
    assert "with one prompt" in render_report(replace(data, prompts=("a ball",)))


def test_a_perfect_likeness_can_be_shown(data):
    text = render_report(replace(data, verified={"psnr_db": float("inf"), "error": 0.0}))
    assert "inf dB" in text and drawn(text)[0]["verified"] == {"error": 0.0}


def test_shares_count_every_step(data):
    kinds = [one.kind for one in data.candidates]
    by_step = data.assignment[np.arange(50) // 5]
    for kind, share in data.kind_shares().items():
        assert share == pytest.approx(np.isin(by_step, [n for n, one in enumerate(kinds) if one == kind]).mean())
    assert sum(data.kind_shares().values()) == pytest.approx(1)
    uneven = replace(data, group_starts=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9))
    lengths = [1] * 9 + [41]
    assert uneven.cost() == pytest.approx(
        np.average(np.array([one.cost for one in data.candidates])[data.assignment].mean((1, 2)), weights=lengths)
    )


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("assignment", np.zeros((10, 6), int), r"the shape \(10, any, any\), got \(10, 6\)"),
        ("assignment", np.zeros((10, 6, 3)), "hold whole numbers, got float64"),
        ("assignment", np.full((10, 6, 3), 19), "of the 19 candidates, from 0, got 19 to 19"),
        ("head_error", np.zeros((10, 3, 6), np.float32), r"the shape \(10, 6, 3\), got \(10, 3, 6\)"),
        ("head_error", np.full((10, 6, 3), np.nan), "be finite, got nan"),
        ("explained", np.zeros((4, 6, 49), np.float32), r"\(4, 6, 50\), got \(4, 6, 49\)"),
        ("explained_kinds", ("diagonal", "stripe"), "one of .* got 'stripe'"),
        ("maps", np.zeros((4, 6, 3, 36, 35), np.uint8), r"\(any, 6, 3, 35, 35\), got"),
        ("maps", np.zeros((4, 6, 3, 36, 36), np.float32), "hold uint8, got float32"),
        ("masks", np.zeros((18, 36, 36), np.uint8), r"\(19, 36, 36\), got"),
        ("stripes", np.zeros((10, 6, 3, 30), np.uint8), r"\(10, 6, 3, 36\), got"),
        ("curve", np.zeros((0, 2), np.float32), r"\(any, 2\), got \(0, 2\)"),
        ("published_curve", np.zeros(4, np.float32), r"\(any, 2\), got \(4,\)"),
        ("recall", np.zeros((6, 50), np.float32), r"\(6, 50, 2\), got"),
        ("prompt_disagreement", np.zeros((3, 6), np.float32), r"\(6, 3\), got"),
        ("prompt_regret", np.zeros((6, 3, 1), np.float32), r"\(6, 3\), got"),
        ("group_starts", (0, 5, 50), "rising steps from 0 below 50"),
        ("chosen", (0.3, float("nan")), "a density and an error"),
        ("order_densities", (("diagonal", (0.1,)),), "4 densities a pattern, one an order, got 1 for 'diagonal'"),
        ("branches", 0, "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(data, name, value, said):
    with pytest.raises(ValueError, match=f"`{name}` must .*{said}"):
        replace(data, **{name: value})


def test_a_candidate_has_a_kind_and_a_density():
    with pytest.raises(ValueError, match="`kind` must be one of"):
        Candidate(name="x", kind="stripe", density=0.1, cost=0.1)
    with pytest.raises(ValueError, match="`density` must be from 0 to 1, got nan"):
        Candidate(name="asa", kind="asa", density=float("nan"), cost=0.1)


def test_large_maps_are_made_coarser(data, monkeypatch):
    most = 60_000
    monkeypatch.setattr(report, "MOST_BYTES", most)
    arrays = drawn(render_report(data))[1]
    assert sum(array.nbytes for array in arrays.values()) <= most
    cells = arrays["maps"].shape[-1]
    assert arrays["maps"].shape == (4, 6, 3, cells, cells) and cells < 36
    assert arrays["masks"].shape == (19, cells, cells) and arrays["stripes"].shape[1] == cells
    # weights are averaged, not their square roots
    factor = 36 // cells
    weights = np.square(data.maps[0, 0, 0], dtype=float).reshape(cells, factor, cells, factor).mean((1, 3))
    np.testing.assert_allclose(arrays["maps"][0, 0, 0], 255 * np.sqrt(weights / weights.max()), atol=0.51)
    assert (arrays["masks"][0] == 255).all() and (arrays["masks"][1] == 0).all()


def test_neighbours_that_do_not_come_out_even_are_averaged_too():
    np.testing.assert_array_equal(report._averaged(np.array([[1, 3, 5, 7, 9]]), 2, -1), [[2, 6, 9]])


def test_it_is_written_whole_or_not_at_all(data, text, tmp_path):
    write_report(data, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(data, tmp_path / "report.html" / "report.html")


def test_what_others_have_named_is_text(data, text):
    hostile = "<script>alert(1)</script></script><!--](javascript:x) `x` | \"onload='y' {{ data }} \\u003c\n\u2028"
    named = replace(
        data,
        title=hostile, model=hostile, command=hostile, video=hostile, grid=hostile, budget=hostile, date=hostile,
        notes=(hostile,) * len(data.notes),
        prompts=(hostile,) * len(data.prompts),
        machine={name: hostile for name in data.machine},
        versions={name: hostile for name in data.versions},
        candidates=tuple(replace(candidate, name=hostile) for candidate in data.candidates),
    )  # fmt: skip
    written = render_report(named)
    elements = [(tag, sorted(attributes)) for tag, attributes in Page(written).elements]
    assert elements == [(tag, sorted(attributes)) for tag, attributes in Page(text).elements]
    assert drawn(written)[0]["candidates"][0]["name"] == hostile
    assert hostile in Page(written).text["li"]
