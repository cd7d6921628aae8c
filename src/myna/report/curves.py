"""The numbers behind a curve: its trend, few points of the same shape, round values for an axis.

Owns what is computed of a series before it is drawn, so that `plots.py` and `charts.py` show the
same line. Draws nothing.
"""

import math
from collections.abc import Sequence

Point = tuple[float, float]
"""x and y."""

MOST = 600
"""Points of a line at most: as many as a page is wide."""


def trend(points: Sequence[Point]) -> list[Point]:
    """The mean of the values around a point, over about a twentieth of all; at most `MOST` of
    them."""
    reach = max(1, len(points) // 40)
    found = []
    for at in spread(len(points), MOST):
        window = points[max(0, at - reach) : at + reach + 1]
        found.append((points[at][0], math.fsum(y for _, y in window) / len(window)))
    return found


def envelope(points: Sequence[Point]) -> list[Point]:
    """The points; of more than `MOST` the lowest and the highest of each short span, in order.

    No peak is lost.
    """
    if len(points) <= MOST:
        return list(points)
    spans = MOST // 2
    found: list[Point] = []
    for number in range(spans):
        part = points[len(points) * number // spans : len(points) * (number + 1) // spans]
        found += sorted({min(part, key=_y), max(part, key=_y)})
    return found


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, even distances apart, the last one included."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


def ticks(low: float, high: float, parts: int) -> list[float]:
    """Round values around `low`..`high`, about `parts` steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        low, high = min(low, 0.0), max(high, 0.0)
    if high == low:
        high = low + 1.0
    rough = (high - low) / parts
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= 0.8 * rough)
    # Where a bound is a tick but for rounding, it is the tick.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten around `low`..`high`, both above 0: the axis of a logarithmic scale."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _y(point: Point) -> float:
    return point[1]
