"""Curves as inline SVG: what a training run's numbers look like, drawn without a plotting library.

Colours are CSS variables of the page, so that the same drawing serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flux2_core.escape import page

Point = tuple[float, float | None]  # (step, value); None is a gap
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 272, 54, 26, 58, 30  # of the drawing and its margins, in px
LETTER = 7.5  # width of a digit of a label, px; the left margin grows with the longest
MOST_POINTS = 600  # per curve; more are thinned to the smallest and largest of each bin


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    look: str = "line"
    """`line`, `faint` (a noisy original behind its smoothed line) or `dots` (few points, each marked)."""


def series(records: Iterable[Mapping[str, Any]], key: str) -> list[Point]:
    """The points of one number over the records that have it; null and NaN become gaps."""
    return [(float(record["step"]), _finite(record[key])) for record in records if key in record]


def smoothed(points: Sequence[Point], *, span: int) -> list[Point]:
    """Exponential mean over about `span` points without the pull toward zero at the start; gaps are passed over."""
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    result: list[Point] = []
    for step, value in points:
        if value is None:
            continue
        total, weight = keep * total + value, keep * weight + 1
        result.append((step, total / weight))
    return result


def chart(title: str, curves: Sequence[Curve], *, across: str = "step") -> str:
    """One chart as an `<svg>` element, or an empty string where no curve has a value; `across` names what x is."""
    stepwise = across == "step"
    values = [value for curve in curves for _, value in curve.points if value is not None]
    if not values:
        return ""
    steps = [step for curve in curves for step, _ in curve.points]
    high_x = max(max(steps), min(steps) + 1)
    low_x = 0.0 if min(steps) < high_x / 10 else min(steps)
    ticks_y = _ticks(min(values), max(values))
    low_y, high_y = min(ticks_y[0], min(values)), max(ticks_y[-1], max(values))
    left = max(LEFT, 16 + LETTER * max(len(_number(value)) for value in ticks_y))

    def x(step: float) -> float:
        return left + (step - low_x) / (high_x - low_x) * (WIDTH - left - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="0" y="16">{page(title)}</text>', *_legend(curves, last=stepwise)]
    for value in ticks_y:
        parts.append(f'<path class="rule" d="M{left} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{_number(value)}</text>'
        )
    for step in (tick for tick in _ticks(low_x, high_x, whole=stepwise) if low_x <= tick <= high_x):
        label = "step 0" if step == 0 and stepwise else _number(step)
        parts.append(f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - 10}" text-anchor="middle">{label}</text>')
    for number, curve in reversed(list(enumerate(curves))):  # the first one on top
        pixels = [(x(step), None if value is None else y(value)) for step, value in _thinned(curve.points)]
        parts += _line(curve, pixels, colour=0 if curve.look == "faint" else number)
    label = page(f"{title}: {', '.join(curve.name for curve in curves)}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _line(curve: Curve, pixels: Sequence[tuple[float, float | None]], *, colour: int) -> Iterator[str]:
    path, pen = "", "M"
    for px, py in pixels:
        if py is None:
            pen = "M"
            continue
        path += f"{pen}{px:.1f} {py:.1f}"
        pen = "L"
    yield f'<path class="curve {curve.look} c{colour}" d="{path}"/>'
    if curve.look == "dots" or len(pixels) == 1:
        for (step, value), (px, py) in zip(curve.points, pixels, strict=False):
            if py is not None and value is not None:
                tip = page(f"{curve.name}, step {step:g}: {value:.4g}")
                yield f'<circle class="dot c{colour}" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{tip}</title></circle>'


def _legend(curves: Sequence[Curve], *, last: bool) -> Iterator[str]:
    """Names and last values: of one curve at the right of the title, of several under it with their names."""
    texts: list[str] = []
    named = len(curves) > 1
    for number, curve in enumerate(curves):
        value = next((value for _, value in reversed(curve.points) if value is not None), None)
        if value is not None and curve.look != "faint":
            name = f"{curve.name} " if named or not last else ""
            space = ' dx="14"' if texts else ""
            texts.append(f'<tspan class="key c{number}"{space}>{page(name)}{_number(value) if last else ""}</tspan>')
    where = 'x="0" y="35"' if named else f'x="{WIDTH - RIGHT}" y="16" text-anchor="end"'
    yield f'<text class="legend" {where}>{"".join(texts)}</text>'


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(2 * len(points) / MOST_POINTS)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        chunk = points[start : start + size]
        values = [(value, step) for step, value in chunk if value is not None]
        if not values:
            kept.append((chunk[0][0], None))
            continue
        ends = {(step, value) for value, step in (min(values), max(values))}
        kept += sorted(ends, key=lambda point: point[0])
    return kept


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """About four round numbers that cover low..high."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    if whole:
        size = max(1, round(size))
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [number * size for number in range(first, last + 1)]


def _number(value: float) -> str:
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        mantissa, exponent = f"{value:.2e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
