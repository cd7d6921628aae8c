"""What is drawn is what was measured: means by hand, peaks kept, round axes."""

import pytest

from myna.report.curves import MOST, decades, envelope, spread, ticks, trend


def test_the_trend_is_the_mean_of_the_neighbours() -> None:
    points = [(step, float(step**2)) for step in range(1, 201)]
    found = dict(trend(points))  # of 200 points, five on each side
    assert found[100] == pytest.approx(sum(step**2 for step in range(95, 106)) / 11)
    assert found[1] == pytest.approx(sum(step**2 for step in range(1, 7)) / 6)
    assert trend([]) == [] and trend([(7.0, 3.0)]) == [(7.0, 3.0)]


def test_a_value_beyond_all_measure_leaves_no_trace_after_it() -> None:
    points = [(float(step), 1e30 if step == 100 else 0.5) for step in range(400)]
    assert dict(trend(points))[399.0] == 0.5


def test_of_many_points_few_are_drawn_and_no_peak_is_lost() -> None:
    points = [(float(step), 1.0) for step in range(50_000)]
    points[31_234] = (31_234.0, 9.0)
    points[3] = (3.0, -4.0)
    drawn = envelope(points)
    assert len(drawn) <= MOST and drawn == sorted(drawn)
    assert {(31_234.0, 9.0), (3.0, -4.0)} <= set(drawn) and drawn[0][0] < 200
    assert envelope(points[:MOST]) == points[:MOST]
    assert len(trend(points)) == MOST


def test_chosen_numbers_reach_from_the_first_to_the_last() -> None:
    assert spread(3, 5) == [0, 1, 2]
    assert spread(101, 5) == [0, 25, 50, 75, 100]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.13, 0.87, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 0.0002, [0, 0.00005, 0.0001, 0.00015, 0.0002]),
        (0, 10.6, [0, 2, 4, 6, 8, 10, 12]),
        (3, 3, [0, 0.5, 1, 1.5, 2, 2.5, 3]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-2, -2, [-2, -1.5, -1, -0.5, 0]),
    ],
)
def test_axes_have_round_numbers_around_the_values(
    low: float, high: float, expected: list[float]
) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)


def test_a_logarithmic_axis_has_powers_of_ten() -> None:
    assert decades(0.002, 9.0) == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert decades(1.0, 1.0) == pytest.approx([1, 10])
