"""A step is left only where nothing is half changed."""

import pytest

from myna.training.stop import OutOfTime, StopRequest


def test_a_step_that_may_be_left_is_left_at_once() -> None:
    stop = StopRequest()
    with pytest.raises(OutOfTime), stop.may_be_left():
        stop.hurry()
    assert stop()


def test_elsewhere_it_waits_for_the_next_step_that_may() -> None:
    stop = StopRequest()
    stop.hurry()  # in the middle of an update
    assert stop()
    with pytest.raises(OutOfTime), stop.may_be_left():
        pytest.fail("the step began although there is no time")


def test_without_hurry_nothing_happens() -> None:
    stop = StopRequest()
    assert not stop()
    stop.requested = True
    with stop.may_be_left():
        pass
    assert stop()


def test_nothing_on_the_way_takes_it_for_an_error() -> None:
    assert not issubclass(OutOfTime, Exception)
