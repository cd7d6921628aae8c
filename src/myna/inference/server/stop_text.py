"""Stop texts: where in a stream of text an answer ends.

Owns finding the first of several texts in pieces as they arrive, and holding back what may be the
beginning of one. Ids that end an answer are the model's own business.
"""

from collections.abc import Sequence


class StopText:
    """Watches the pieces of one answer for the texts that end it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False
        """Whether one of them came."""

    def push(self, piece: str) -> str:
        """What is certain to belong to the answer by then; empty after a stop text was found."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back and became no stop text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends in."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
