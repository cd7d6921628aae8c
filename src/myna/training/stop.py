"""Stopping: what a signal asks of the loop, and where the loop may be left.

Owns the request to stop at the next step boundary, and the moment after which even that is too
late: a step that is only being computed, with nothing changed yet, may then be left half done. Who
gets signals and how long there is, is the command line's.
"""

import contextlib
from collections.abc import Iterator


class OutOfTime(BaseException):
    """Raised into a step that may be left; no `except Exception` on the way swallows it."""


class StopRequest:
    """Nothing is asked at first."""

    def __init__(self) -> None:
        self.requested = False
        """Stop at the next step boundary."""
        self._hurry = False
        self._may_leave = False

    def __call__(self) -> bool:
        """Whether to stop at this boundary."""
        return self.requested

    def hurry(self) -> None:
        """There is no time for the boundary: leave the step as soon as nothing is half changed.

        To be called by a signal handler, in the main thread.
        """
        self.requested = self._hurry = True
        if self._may_leave:
            raise OutOfTime

    @contextlib.contextmanager
    def may_be_left(self) -> Iterator[None]:
        """A block that changes nothing that stays: `OutOfTime` is raised in it or at its start."""
        self._may_leave = True
        try:
            if self._hurry:
                raise OutOfTime
            yield
        finally:
            self._may_leave = False
