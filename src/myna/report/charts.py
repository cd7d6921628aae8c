"""Curves over the steps of a run, as SVG for a page.

Owns the drawing: lines stretch with the page while letters and line widths keep their size, so that
a chart can be read on a telephone. A reading appears where the pointer rests; there is no script.
What is drawn is `html.py`'s.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from myna.data.web_page import text
from myna.report.curves import Point, decades, envelope, spread, ticks

READINGS = 60
"""Places along a chart where the pointer finds numbers."""

LOGARITHMIC_FROM = 50.0
"""A chart that may has a logarithmic scale where its highest value is so many times its lowest."""

_SIDE = 1000
"""Width and height of the drawing in its own units."""

STYLE = """
:root { --held: #b5382a; --grid: #eceae4; }
@media (prefers-color-scheme: dark) { :root { --held: #ff8d7c; --grid: #2c2e32; } }
.chart { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem 1.1rem .6rem .6rem; min-width: 0; }
.chart figcaption { display: flex; flex-wrap: wrap; gap: .1rem .9rem; align-items: baseline;
  padding-left: .5rem; font-size: .84rem; color: var(--soft); }
.chart figcaption b { color: var(--ink); font-weight: 600; font-size: .93rem; margin-right: auto; }
.key::before { content: ""; display: inline-block; width: 1.1rem; height: 0; margin-right: .35rem;
  vertical-align: .25em; border-top: 2.5px solid var(--accent); }
.key.each::before { border-top-width: 1.5px; opacity: .45; }
.key.held-out::before { border-color: var(--held); }
.plot { display: grid; grid-template: 10.5rem 1.5rem / 3.6rem minmax(0, 1fr); margin-top: .6rem;
  font-size: .75rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.tall .plot { grid-template-rows: 17rem 1.5rem; }
.plot .y, .plot .x { position: relative; }
.plot .x { grid-column: 2; }
.plot .y span { position: absolute; right: .5rem; transform: translateY(-50%); }
.plot .x span { position: absolute; top: .3rem; transform: translateX(-50%); white-space: nowrap; }
.chart svg { display: block; width: 100%; height: 100%; overflow: visible; }
.chart path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round;
  stroke-linecap: round; }
.chart .grid { stroke: var(--grid); stroke-width: 1; }
.chart .epoch { stroke: var(--line); stroke-width: 1; stroke-dasharray: 2 4; }
.chart .line { stroke: var(--accent); stroke-width: 2; }
.chart .line.each { stroke-width: 1; opacity: .45; }
.chart .line.held-out { stroke: var(--held); }
.chart .dots { stroke: var(--accent); stroke-width: 6; }
.chart .dots.held-out { stroke: var(--held); stroke-width: 7; }
.chart rect { fill: transparent; }
.chart .here { stroke: var(--soft); stroke-width: 1; opacity: 0; }
.chart g:hover .here { opacity: 1; }
"""


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    """Step and value, in the order of the steps."""
    kind: Literal["each", "trend", "held-out"]


@dataclass(frozen=True)
class Chart:
    """Some curves over the same steps."""

    title: str
    curves: Sequence[Curve]
    number: Callable[[float], str] = "{:.4g}".format
    """How a value is written in a reading."""
    tick: Callable[[float], str] = "{:.4g}".format
    """How a value is written at the axis."""
    from_zero: bool = False
    """The axis begins at zero, however far away the values are."""
    epochs: Sequence[float] = ()
    """Steps at which an epoch ends."""
    may_be_logarithmic: bool = False
    """Use such a scale, and say so, where a linear one would show a flat line."""
    is_tall: bool = False


def draw(chart: Chart) -> str:
    """The chart as HTML; nothing where there is nothing to draw."""
    curves = [curve for curve in chart.curves if curve.points]
    if not curves:
        return ""
    frame = _frame(chart, curves)
    title = f"{chart.title}, log scale" if frame.is_logarithmic else chart.title
    keys = ""
    if len(curves) > 1:
        keys = "".join(f'<span class="key {c.kind}">{text(c.name)}</span>' for c in curves)
    return (
        f'<figure class="chart{" tall" if chart.is_tall else ""}">'
        f"<figcaption><b>{text(title)}</b>{keys}</figcaption>\n"
        f'<div class="plot"><div class="y">{_labels(chart, frame)}</div>\n'
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(title)}, by step">\n'
        + "\n".join(
            [
                *(_grid(tick, frame) for tick in frame.ticks),
                *(_upright("epoch", step, frame) for step in chart.epochs),
                *(part for curve in curves for part in _line(curve, frame)),
                *_readings(chart, curves, frame),
            ]
        )
        + f'\n</svg>\n<div class="x">{_steps(frame)}</div></div></figure>'
    )


@dataclass(frozen=True)
class _Frame:
    """Where values lie in the drawing."""

    first: float
    last: float
    ticks: Sequence[float]
    is_logarithmic: bool = False

    def x(self, step: float) -> float:
        """From the left."""
        width = self.last - self.first
        return _SIDE * (step - self.first) / width if width else _SIDE / 2

    def y(self, value: float) -> float:
        """From the top."""
        low, high = self.ticks[0], self.ticks[-1]
        if self.is_logarithmic:
            low, value, high = map(math.log10, (low, value, high))
        return _SIDE * (high - value) / (high - low)


def _frame(chart: Chart, curves: Sequence[Curve]) -> _Frame:
    steps = [step for curve in curves for step, _ in curve.points]
    values = [value for curve in curves for _, value in curve.points]
    low, high = min(values), max(values)
    first, last = min(steps), max(steps)
    if chart.may_be_logarithmic and low > 0 and high > LOGARITHMIC_FROM * low:
        return _Frame(first, last, decades(low, high), is_logarithmic=True)
    if chart.from_zero or 0 < low < high / 2:
        low = min(low, 0.0)
    return _Frame(first, last, ticks(low, high, 5 if chart.is_tall else 4))


def _labels(chart: Chart, frame: _Frame) -> str:
    return "".join(
        f'<span style="top:{frame.y(tick) / _SIDE:.2%}">{text(chart.tick(tick))}</span>'
        for tick in frame.ticks
    )


def _steps(frame: _Frame) -> str:
    inside = [
        step
        for step in ticks(frame.first, frame.last, 5)
        if frame.first <= step <= frame.last and step == int(step)
    ]
    return "".join(
        f'<span style="left:{frame.x(step) / _SIDE:.2%}">{step:,.0f}</span>'
        for step in inside or [frame.first]
    )


def _grid(value: float, frame: _Frame) -> str:
    return f'<path class="grid" d="M0 {frame.y(value):.1f}h{_SIDE}"/>'


def _upright(kind: str, step: float, frame: _Frame) -> str:
    return f'<path class="{kind}" d="M{frame.x(step):.1f} 0v{_SIDE}"/>'


def _line(curve: Curve, frame: _Frame) -> Iterable[str]:
    places = [(frame.x(step), frame.y(value)) for step, value in envelope(curve.points)]
    joined = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    yield f'<path class="line {curve.kind}" d="M{joined}"/>'
    # A line of no length with round ends is a dot, and round however the drawing is stretched.
    if len(places) == 1 or (curve.kind == "held-out" and len(places) <= READINGS):
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
        yield f'<path class="dots {curve.kind}" d="{dots}"/>'


def _readings(chart: Chart, curves: Sequence[Curve], frame: _Frame) -> Iterable[str]:
    """Strips from left to right, each with the values at the step in its middle."""
    known = [([step for step, _ in curve.points], curve) for curve in curves]
    steps = sorted({step for found, _ in known for step in found})
    chosen = [steps[at] for at in spread(len(steps), READINGS)]
    middles = [(a + b) / 2 for a, b in pairwise(chosen)]
    for step, left, right in zip(
        chosen, [frame.first, *middles], [*middles, frame.last], strict=True
    ):
        said = [f"step {step:,.0f}"]
        for found, curve in known:
            if at := bisect_right(found, step):
                said.append(f"{curve.name} {chart.number(curve.points[at - 1][1])}")
        x, end = (frame.x(left), frame.x(right)) if right > left else (0, _SIDE)
        yield (
            f'<g><title>{text(", ".join(said))}</title><rect x="{x:.1f}" y="0" '
            f'width="{end - x:.1f}" height="{_SIDE}"/>{_upright("here", step, frame)}</g>'
        )
