"""The report's colours can be told apart by everybody, in both themes."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from blade.attention.patterns import KINDS
from blade.profiling import report

SIGHT = {
    "usual": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
"""What is seen of linear RGB. Source: Machado, Oliveira and Fernandes 2009, severity 1."""

APART = 0.1
"""Least distance in Oklab between two kinds; 0.02 is just noticeable side by side."""


def themes():
    """Of each theme, its variables."""
    style = Path(report.__file__).with_name("report.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[^;]+);", block)) for block in re.findall(r":root {(.*?)}", style, re.S)
    )
    return {"light": light, "dark": dark}


def linear(colour):
    """Linear RGB of a colour such as #2e3cae."""
    values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def oklab(values):
    """Oklab coordinates of linear RGB. Source: Ottosson 2020."""
    cones = [[0.41222, 0.53633, 0.05145], [0.21190, 0.68070, 0.10740], [0.08830, 0.28172, 0.62998]]
    axes = [[0.21045, 0.79362, -0.00407], [1.97800, -2.42859, 0.45060], [0.02590, 0.78277, -0.80868]]
    return np.array(axes) @ np.cbrt(np.array(cones) @ np.clip(values, 0, 1))


def contrast(one, other):
    """Contrast ratio of two colours. Source: WCAG 2.2."""
    dark, light = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_kinds_are_told_apart(theme, sight):
    seen = {kind: oklab(np.array(SIGHT[sight]) @ linear(themes()[theme][kind])) for kind in KINDS}
    for one, other in itertools.combinations(KINDS, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > APART, (one, other)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everything_stands_out_from_what_is_beneath(theme):
    colours = themes()[theme]
    for beneath in ("page", "card"):
        for name in ("ink", "muted", "accent"):
            assert contrast(colours[name], colours[beneath]) >= 4.5, (name, beneath)
    for kind in KINDS:  # skipped heads are to be faint
        least = 2.0 if kind == "skip" else 3.0
        assert contrast(colours[kind], colours["card"]) >= least, kind


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_ramp_rises_evenly(theme):
    lightness = [oklab(linear(stop))[0] for stop in themes()[theme]["ramp"].split(", ")]
    steps = np.diff(lightness) * (-1 if theme == "light" else 1)
    assert (steps > 0.08).all() and steps.max() < 2.5 * steps.min()
