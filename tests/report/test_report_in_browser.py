"""The report as somebody uses it: opened from disk in Chromium, by pointer and by keyboard."""

import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from report_example import PROMPTS, report_example

from blade.profiling.report import write_report

pytestmark = pytest.mark.browser

CHROMIUM = Path("/usr/bin/chromium")
OPTIONS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
"""The sandbox does not start for root; the others keep the browser itself from a network."""

PIXELS = """
(selector) => {
  const canvas = document.querySelector(`${selector} canvas`);
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return { rows: canvas.height, columns: canvas.width, values: Array.from(data) };
}
"""

LOW_CONTRAST = """
() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => numbers(colour).slice(0, 3).map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
  const beneath = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const { backgroundColor } = getComputedStyle(one);
      if ((numbers(backgroundColor)[3] ?? 1) > 0) return backgroundColor;
    }
  };
  const found = [];
  let seen = 0;
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    const text = texts.currentNode.textContent.trim();
    if (!text || element.closest("script, .plot svg, :disabled") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const colour = element instanceof SVGElement ? style.fill : style.color;
    const [dark, light] = [luminance(colour), luminance(beneath(element))].sort((one, other) => one - other);
    seen += 1;
    if ((light + 0.05) / (dark + 0.05) < 4.5) found.push(`${text}: ${colour} on ${beneath(element)}`);
  }
  return { seen, found };
}
"""


@pytest.fixture(scope="module")
def chromium():
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is missing; `make test-report` installs it")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing; `make test-report` installs it")
    with driver.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=OPTIONS.split())
        yield browser
        browser.close()


@pytest.fixture
def open_report(chromium, tmp_path):
    """A function that opens the report of some data. At the end: nothing went wrong, and nothing was asked for."""
    contexts, problems, requests = [], [], []

    def open_it(data, width=1280, scheme="light", **options):
        path = tmp_path / "report.html"
        write_report(data, path)
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert problems == []
    assert requests and all(url.startswith(("file:", "data:")) for url in requests)


@pytest.fixture(scope="module")
def data():
    return report_example()


def pixels(page, selector):
    """(rows, columns, 4) int, the colours of a heat map's cells."""
    read = page.evaluate(PIXELS, selector)
    return np.array(read["values"]).reshape(read["rows"], read["columns"], 4)


def colours(page, data):
    """(candidates, 3) int, the colour of each candidate's kind."""
    names = [one.kind for one in data.candidates]
    read = page.evaluate(
        "(names) => names.map((name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`))",
        names,
    )
    return np.array([[int(colour.strip()[place : place + 2], 16) for place in (1, 3, 5)] for colour in read])


def figures(page):
    """What the panel says of the shown head: name -> value."""
    terms = page.locator("#detail-figures dt").all_inner_texts()
    return dict(zip(terms, page.locator("#detail-figures dd").all_inner_texts()))


def percent(share):
    """A share as the report writes it."""
    return f"{float(f'{100 * share:.2g}'):g} %" if 100 * share < 9.95 else f"{100 * share:.0f} %"


def click_cell(page, selector, row, column):
    """Click the middle of a heat map's cell."""
    plot = page.locator(f"{selector} .plot")
    rows, columns = (int(plot.evaluate(f"(one) => one.style.getPropertyValue('--{x}')")) for x in ("rows", "columns"))
    box = plot.bounding_box()
    plot.click(position={"x": box["width"] * (column + 0.5) / columns, "y": box["height"] * (row + 0.5) / rows})


def assert_shows(page, data, layer, head, step):
    """The panel is about a head at a step: its figures, its attention and its mask."""
    group = int(np.searchsorted(data.group_starts, step, side="right")) - 1
    number = data.assignment[group, layer, head]
    candidate = data.candidates[number]
    assert page.locator("#detail-title").inner_text() == f"Layer {layer}, head {head}, step {step}"
    said = figures(page)
    assert said["Pattern"] == candidate.name
    assert float(said["Density"]) == pytest.approx(candidate.density, rel=5e-3)
    assert said["Error, of mean head energy"] == percent(float(data.head_error[group, layer, head]))
    assert said["Prompts that prefer another"] == percent(float(data.prompt_disagreement[layer, head]))
    assert said["Error saved by a choice for each"] == percent(float(data.prompt_regret[layer, head]))
    assert_drawn(pixels(page, "#attention-map"), data.maps[step * len(data.maps) // data.steps, layer, head])
    mask = data.masks[number]
    if candidate.kind == "vertical":
        mask = np.broadcast_to(data.stripes[group, layer, head], mask.shape)
    assert page.locator("#mask-none").is_visible() == (candidate.kind == "asa")
    assert page.locator("#mask").is_hidden() == (candidate.kind == "asa")
    if candidate.kind != "asa":
        assert_drawn(pixels(page, "#mask"), mask)


def assert_drawn(drawn, values):
    """Cells of one value have one colour, and those of a larger one are nearer to the end of the ramp."""
    assert drawn.shape[:2] == values.shape and (drawn[..., 3] == 255).all()
    lightness = drawn[..., :3].sum(-1)
    first = {int(value): lightness[values == value] for value in np.unique(values)}
    assert all(len(np.unique(found)) == 1 for found in first.values())
    by_value = [found[0] for _, found in sorted(first.items())]
    assert (np.diff(by_value) <= 0).all()
    assert by_value[0] - by_value[-1] >= 1.5 * float(np.ptp(values))


def test_the_slider_changes_the_heads_map(open_report, data):
    page = open_report(data)
    slider, kinds = page.locator("#step"), np.array([one.kind for one in data.candidates])

    def assert_step(step):
        group = data.assignment[step // 5]
        np.testing.assert_array_equal(pixels(page, "#head-map")[..., :3], colours(page, data)[group])
        assert page.locator("#step-text").inner_text().startswith(f"Step {step} of 0 to 49; steps {step // 5 * 5} to")
        for button in page.locator("#head-legend button").all():
            share = (kinds[group] == button.get_attribute("data-kind")).mean()
            assert button.locator("b").inner_text() == percent(share)
        assert_shows(page, data, 0, 0, step)

    assert_step(0)
    for step in (23, 24, 49):
        slider.fill(str(step))
        assert_step(step)
    slider.focus()
    slider.press("Home")
    for _ in range(6):
        slider.press("ArrowRight")
    assert_step(6)
    for button, step in (("after", 10), ("after", 15), ("before", 10), ("before", 5)):
        page.locator(f"#step-{button}").click()
        assert_step(step)


def test_a_click_shows_a_head_with_its_attention_and_its_mask(open_report, data):
    page, seen = open_report(data), set()
    for layer, head in np.ndindex(6, 3):
        click_cell(page, "#head-map", layer, head)
        assert_shows(page, data, layer, head, 0)
        seen.add(data.candidates[data.assignment[0, layer, head]].kind)
    assert {"vertical", "diagonal", "window"} <= seen
    click_cell(page, "#run-strip", 0, 37)
    assert_shows(page, data, 5, 2, 37)
    assert page.locator("#step").input_value() == "37"


def test_an_adaptive_head_has_no_fixed_mask(open_report, data):
    assignment = data.assignment.copy()
    assignment[:, 0, 0] = [one.kind for one in data.candidates].index("asa")
    changed = replace(data, assignment=assignment)
    page = open_report(changed)
    assert_shows(page, changed, 0, 0, 0)
    click_cell(page, "#head-map", 1, 0)
    assert page.locator("#mask").is_visible() and page.locator("#mask .plot").bounding_box()["height"] > 100


def test_heads_are_chosen_by_keyboard(open_report, data):
    page = open_report(data)
    page.locator("#step-after").focus()
    page.keyboard.press("Tab")
    plot = page.locator("#head-map .plot")
    assert plot.evaluate("(one) => one === document.activeElement")
    assert plot.evaluate("(one) => getComputedStyle(one).outlineStyle") == "solid"
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert_shows(page, data, 2, 1, 0)
    assert page.locator(".tooltip div").all_inner_texts()[:2] == [
        data.candidates[data.assignment[0, 2, 1]].name,
        "layer 2, head 1",
    ]
    page.keyboard.press("Escape")
    assert page.locator(".tooltip").is_hidden()
    for key in ("End", "ArrowRight", "ArrowUp", "ArrowUp", "ArrowUp"):  # stops at the edges
        page.keyboard.press(key)
    assert_shows(page, data, 0, 2, 0)
    for name, typed, shown in (("layer", "4", "4"), ("head", "7", "2"), ("layer", "-3", "0")):
        page.locator(f"#{name}").fill(typed)
        page.keyboard.press("Enter")
        assert page.locator(f"#{name}").input_value() == shown
    assert_shows(page, data, 0, 2, 0)


def test_the_head_that_depends_most_on_the_prompt_is_one_click_away(open_report, data):
    page = open_report(data)
    layer, head = np.unravel_index(data.prompt_regret.argmax(), data.prompt_regret.shape)
    row = page.locator("#most-dependent tbody tr").first
    assert row.locator("td").all_inner_texts() == [
        percent(float(data.prompt_disagreement[layer, head])),
        percent(float(data.prompt_regret[layer, head])),
    ]
    row.locator("button").click()
    assert_shows(page, data, layer, head, 0)
    for name in ("disagreement", "regret"):
        values = getattr(data, f"prompt_{name}")
        click_cell(page, f"#{name}-map", 3, 1)
        assert_shows(page, data, 3, 1, 0)
        plot = page.locator(f"#{name}-map .plot")
        assert plot.get_attribute("tabindex") == "0"
        assert page.locator(".tooltip div").first.inner_text() == percent(float(values[3, 1]))


def test_every_chart_tells_its_values(open_report, data):
    page = open_report(data)

    def read(selector, *keys):
        page.locator(f"{selector} [tabindex='0']").focus()
        for key in keys:
            page.keyboard.press(key)
        return page.locator(".tooltip div").all_inner_texts()

    page.locator("#step-before").focus()
    for number, kind in enumerate(data.explained_kinds):
        share = float(data.explained[number, 1, 2])
        chart = f"#explained > div:nth-child({number + 1})"
        assert read(chart, "ArrowDown", "ArrowRight", "ArrowRight") == [
            f"{kind}: {percent(share)}",
            "layer 1, step 2",
        ]
    held, best = (float(value) for value in data.recall[1, 0])
    assert read("#recall-map", "ArrowDown")[0] == f"recall {percent(held / best)}"
    assert read("#recall-lines")[2] in (percent(float(data.recall[:, 0, which].mean())) for which in (0, 1))
    name, density, error = read("#curve", "ArrowLeft")
    told, chart = page.locator(".tooltip").bounding_box(), page.locator("#curve").bounding_box()
    assert chart["y"] - 100 < told["y"] < chart["y"] + chart["height"]  # however far the page had to scroll
    assert name == "best assignment" and density == f"density {data.curve[0, 0]:.3g}"
    assert error == percent(float(data.curve[0, 1]))
    points = [read("#curve", "ArrowRight") for _ in range(40)]
    assert ["this table", "density 0.347", "2.6 %"] in points and [
        "this table, measured",
        "density 0.347",
        "3.1 %",
    ] in points
    root = int(data.maps[0, 0, 0, 0, 1]) / 255
    assert read("#attention-map", "ArrowRight")[1] == f"attention {percent(root**2)} of the strongest patch"
    assert read("#run-error", "ArrowRight")[1:] == ["step 1", percent(float(data.head_error[0, 0, 0]))]
    page.mouse.move(1, 1)
    assert page.locator("svg[tabindex] polyline").count() == 5


CROSSINGS = """
(selector) => {
  const svg = document.querySelector(`${selector} svg`);
  const texts = [...svg.querySelectorAll("text")].filter((one) => one.textContent);
  const boxes = texts.map((one) => one.getBoundingClientRect());
  const apart = (one, other) => one.right <= other.left || other.right <= one.left
    || one.bottom <= other.top || other.bottom <= one.top;
  const found = [];
  boxes.forEach((box, index) => boxes.slice(0, index).forEach((other, before) => {
    if (!apart(box, other)) found.push(`${texts[index].textContent} over ${texts[before].textContent}`);
  }));
  for (const line of svg.querySelectorAll("polyline")) {
    const place = svg.getBoundingClientRect();
    for (let part = 0; part < line.getTotalLength(); part += 2) {
      const { x, y } = line.getPointAtLength(part);
      const at = { left: x + place.left, right: x + place.left, top: y + place.top, bottom: y + place.top };
      boxes.forEach((box, index) => { if (!apart(box, at)) found.push(`${texts[index].textContent} over a line`); });
    }
  }
  const page = document.documentElement.clientWidth;
  const outside = boxes.map((box, index) => (box.left < 0 || box.right > page ? texts[index].textContent : null));
  return { texts: texts.length, found: [...new Set(found)], outside: outside.filter(Boolean) };
}
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_no_text_of_a_chart_lies_over_another_or_over_a_line(open_report, data, width):
    """With errors so small that their numbers are long, and a table that lies on the curve."""
    curve = data.curve * np.array([1, 1e-4], np.float32)
    small = replace(data, curve=curve, published_curve=curve * 1.7, chosen=(float(curve[7, 0]), float(curve[7, 1])))
    page = open_report(replace(small, verified={"density": small.chosen[0], "error": small.chosen[1] * 1.1}), width)
    for chart in ("#curve", "#run-error", "#recall-lines"):
        seen = page.evaluate(CROSSINGS, chart)
        assert seen["texts"] >= 5 and seen["found"] == [] and seen["outside"] == [], chart
    names = page.locator("#curve .legend li").all_inner_texts()
    assert names == ["best assignment", "published rule", "this table", "this table, measured"]


def test_queries_that_were_not_sampled_do_not_look_like_queries_that_attend_to_nothing(open_report, data):
    maps = data.maps.copy()
    maps[:, 0, 0, 5:9] = 0
    page = open_report(replace(data, maps=maps))
    drawn = pixels(page, "#attention-map")[..., 3]
    assert (drawn[5:9] == 0).all() and (np.delete(drawn, slice(5, 9), axis=0) == 255).all()
    assert "repeating-linear-gradient" in page.locator("#attention-map .plot").evaluate(
        "(one) => getComputedStyle(one).backgroundImage"
    )
    page.locator("#attention-map .plot").focus()
    for _ in range(6):
        page.keyboard.press("ArrowDown")
    assert page.locator(".tooltip div").all_inner_texts()[1] == "these queries were not sampled"
    assert "not sampled" in page.locator("#attention-scale").inner_text()


def test_one_kind_can_be_seen_alone(open_report, data):
    page = open_report(data)
    before = pixels(page, "#head-map")
    button = page.locator("#head-legend button[data-kind=vertical]")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    kinds = np.array([one.kind for one in data.candidates])[data.assignment[0]]
    changed = (pixels(page, "#head-map") != before).any(-1)
    np.testing.assert_array_equal(changed, kinds != "vertical")
    button.click()
    np.testing.assert_array_equal(pixels(page, "#head-map"), before)


def test_tables_hold_the_numbers(open_report, data):
    page = open_report(data)
    for row, (name, densities) in zip(page.locator("#order-densities tbody tr").all(), data.order_densities):
        assert row.locator("th").inner_text() == name
        assert row.locator("td").all_inner_texts() == [f"{density:.3f}" for density in densities]
        least = row.locator("td.least").all_inner_texts()
        assert least == [f"{min(densities):.3f}"]
    page.locator("summary", has_text="candidates").click()
    assert page.locator("#candidates tbody th").all_inner_texts() == [one.name for one in data.candidates]
    said = page.locator(".figures dd").all_inner_texts()
    assert said == ["0.347", percent(data.cost()), "2.6 %", "0.347", "3.1 %", "24.6 dB"]


def test_prompts_are_shown_as_they_were(open_report, data):
    page = open_report(data)
    page.locator("summary", has_text="How it was made").click()
    assert page.locator(".prompts li").all_inner_texts() == list(PROMPTS)
    assert page.locator("script").count() == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_can_be_read(open_report, data, width, scheme):
    page = open_report(data, width, scheme)
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = page.evaluate(
        "() => [...document.querySelectorAll('main *')].filter((one) => !one.closest('.scroll, svg') && "
        "one.getBoundingClientRect().right > innerWidth).map((one) => one.outerHTML.slice(0, 80))"
    )
    assert outside == []
    checked = page.evaluate(LOW_CONTRAST)
    assert checked["seen"] > 150 and checked["found"] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue = (int(value) for value in re.findall(r"\d+", background))
    assert min(red, green, blue) > 230 if scheme == "light" else max(red, green, blue) < 40


def test_charts_follow_the_theme_and_the_width(open_report, data):
    page = open_report(data)
    light = pixels(page, "#head-map"), pixels(page, "#attention-map")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("() => getComputedStyle(document.body).backgroundColor === 'rgb(16, 19, 24)'")
    np.testing.assert_array_equal(pixels(page, "#head-map")[..., :3], colours(page, data)[data.assignment[0]])
    assert (pixels(page, "#head-map") != light[0]).any() and (pixels(page, "#attention-map") != light[1]).any()
    page.set_viewport_size({"width": 390, "height": 900})
    page.wait_for_function("() => document.querySelector('#curve svg').viewBox.baseVal.width < 390")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_smallest_run_and_what_was_not_measured_can_be_shown(open_report):
    small = report_example(layers=1, heads=1, steps=1, group_steps=1, parts=1, frames=2, places=1)
    unknown = np.full_like(small.recall, np.nan)
    page = open_report(replace(small, recall=unknown, explained=small.explained * np.nan, chosen=(1.0, 0.0)))
    assert_shows(page, small, 0, 0, 0)
    assert (pixels(page, "#recall-map")[..., 3] == 0).all()
    nothing = {"recall": None, "stripes": None, "published_curve": None, "verified": None}
    flat = np.array([[0.3, 0.0]], np.float32)
    page = open_report(replace(small, curve=flat, explained_kinds=(), explained=small.explained[:0], **nothing))
    assert page.get_by_text("ASA was not looked at in this search.").is_visible()
    assert page.locator("#curve circle").count() == 1


def test_nothing_moves_for_those_who_do_not_want_it(open_report, data):
    page = open_report(data, reduced_motion="reduce")
    moving = "() => getComputedStyle(document.querySelector('.bars .track span')).transitionDuration"
    assert page.evaluate(moving) == "0s"
    assert open_report(data, reduced_motion="no-preference").evaluate(moving) != "0s"


def test_every_control_has_a_name(open_report, data):
    page = open_report(data)
    for role in ("slider", "spinbutton", "button", "application"):
        for one in page.get_by_role(role).all():
            snapshot = one.aria_snapshot()
            assert re.match(rf'- {role} "[A-Za-z]{{2}}', snapshot), snapshot


def test_a_large_model_stays_small_and_quick(open_report, tmp_path):
    kept = (0, 1, 2, 4, 6, 8, 10, 12, 14, 15, 16, 18)
    data = report_example(layers=40, heads=40, steps=50, group_steps=1, frames=12, kept_candidates=kept)
    page = open_report(data)
    assert (tmp_path / "report.html").stat().st_size < 12_000_000
    box = page.locator("#head-map .plot").bounding_box()
    assert box["width"] / 40 >= 8 and box["height"] / 40 >= 8
    begun = time.monotonic()
    click_cell(page, "#head-map", 31, 17)
    assert page.locator("#detail-title").inner_text() == "Layer 31, head 17, step 0"
    page.locator("#step").fill("42")
    np.testing.assert_array_equal(pixels(page, "#head-map")[..., :3], colours(page, data)[data.assignment[42]])
    assert figures(page)["Pattern"] == data.candidates[data.assignment[42, 31, 17]].name
    assert time.monotonic() - begun < 5
    page.set_viewport_size({"width": 390, "height": 900})
    page.wait_for_function("() => document.querySelector('#head-map .plot').offsetWidth < 390")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator("#head-map .plot").bounding_box()["width"] / 40 >= 6
