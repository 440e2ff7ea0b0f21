"""The charts of a report, parsed as XML."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from flux2_core.output import curves
from flux2_core.output.curves import Curve


def parsed(svg):
    return ElementTree.fromstring(svg)


def vertices(svg, place=0):
    path = [e for e in parsed(svg).iter("path") if "curve" in e.get("class")][place].get("d")
    return [(pen, float(x), float(y)) for pen, x, y in re.findall(r"([ML])([\d.]+) ([\d.]+)", path)]


def test_a_curve_runs_left_to_right_and_larger_is_higher():
    """Steps map to x and values to y, inside the drawing."""
    drawn = vertices(curves.chart("Loss", [Curve("loss", [(0, 3.0), (50, 1.0), (100, 2.0)])]))
    assert [x for _, x, _ in drawn] == sorted(x for _, x, _ in drawn)
    (_, _, three), (_, _, one), (_, _, two) = drawn
    assert three < two < one
    assert (two - three) == pytest.approx(one - two, abs=0.2)
    assert all(0 <= x <= curves.WIDTH and 0 <= y <= curves.HEIGHT for _, x, y in drawn)


def test_a_gap_breaks_the_line():
    """NaN in the records is a gap in the curve, not a zero."""
    points = curves.series(
        [{"step": 1, "loss": 1}, {"step": 2, "loss": None}, {"step": 3, "loss": float("nan")}], "loss"
    )
    assert points == [(1, 1.0), (2, None), (3, None)]
    drawn = vertices(curves.chart("Loss", [Curve("loss", [*points, (4, 2.0)])]))
    assert [pen for pen, _, _ in drawn] == ["M", "M"]


def test_thinning_keeps_every_spike():
    """50,000 steps become a drawing of at most 600 points that still touches the smallest and the largest value."""
    points = [(step, 1.0) for step in range(50_000)]
    points[31_415] = (31_415, 9.0)
    points[27_182] = (27_182, -5.0)
    svg = curves.chart("Loss", [Curve("loss", points)])
    drawn = vertices(svg)
    assert len(drawn) <= curves.MOST_POINTS
    plain = vertices(curves.chart("Loss", [Curve("loss", [(0, 1.0), (27_182, -5.0), (31_415, 9.0), (49_999, 1.0)])]))
    assert min(y for *_, y in drawn) == min(y for *_, y in plain)
    assert max(y for *_, y in drawn) == max(y for *_, y in plain)


def test_smoothing_has_no_pull_toward_zero():
    """A constant stays that constant from the first step on; noise is averaged."""
    assert [value for _, value in curves.smoothed([(n, 2.0) for n in range(9)], span=5)] == pytest.approx([2.0] * 9)
    noisy = [(n, float(n % 2)) for n in range(200)]
    assert curves.smoothed(noisy, span=40)[-1][1] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    "values", [[0.0], [5.0, 5.0], [1e-4, 1e-4], [0.0, 1e-9], [-3.0, 1e7], [1e-300, 2e-300]], ids=str
)
def test_any_range_has_ticks(values):
    """One point, a constant, tiny and huge values are drawn with at least two ticks."""
    svg = curves.chart("x", [Curve("x", list(enumerate(values)))])
    ticks = [e.text for e in parsed(svg).iter("text") if e.get("class") == "tick" and e.get("text-anchor") == "end"]
    assert len(set(ticks)) >= 2


def test_names_are_escaped_and_nothing_is_nothing():
    """Names cannot become markup; a chart without values is left out."""
    svg = curves.chart("<b>", [Curve("a<i>&", [(0, 1.0), (1, 2.0)]), Curve("b", [(0, 1.0)], "dots")])
    assert parsed(svg).get("aria-label") == "<b>: a<i>&, b"
    assert curves.chart("empty", [Curve("x", [(0, None)])]) == ""


@pytest.mark.parametrize("values", [(0.00173, 0.00183), (1.01e-4, 1.1e-4), (0.0, 1.0), (-1.25e-7, 1e-7), (0, 999_999)])
def test_every_label_has_room(values):
    """A label ends left of its rule, and at 7 px a digit it begins inside the drawing (0.00175 lost a digit)."""
    svg = parsed(curves.chart("Learning rate", [Curve("x", list(enumerate(values)))]))
    labels = [e for e in svg.iter("text") if e.get("class") == "tick" and e.get("text-anchor") == "end"]
    rule = min(float(e.get("d")[1:].split()[0]) for e in svg.iter("path") if e.get("class") == "rule")
    assert all(7 * len(e.text) <= float(e.get("x")) < rule for e in labels)
