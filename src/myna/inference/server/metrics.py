"""Metrics: what the server has done, as Prometheus reads it.

Owns the counters and their text form. Labels are model names, endpoints and statuses that the
server knows itself: nothing that a client makes up becomes a label.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from myna.inference.server.engine import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters since the start; changed and read in the event loop alone."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._prompt_tokens: Counter[str] = Counter()
        self._drawn_tokens: Counter[str] = Counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._first_seconds: defaultdict[str, float] = defaultdict(float)
        self._answered: Counter[str] = Counter()
        self._cancelled = 0

    def count_request(self, endpoint: str, status: int) -> None:
        """A request was answered."""
        self._requests[endpoint, status] += 1

    def count_answer(
        self, model: str, *, prompt_tokens: int, drawn_tokens: int, first: float, whole: float
    ) -> None:
        """A model answered; seconds to the first piece and to the end."""
        self._answered[model] += 1
        self._prompt_tokens[model] += prompt_tokens
        self._drawn_tokens[model] += drawn_tokens
        self._first_seconds[model] += first
        self._seconds[model] += whole

    def count_disconnect(self) -> None:
        """A client went away before its answer was whole."""
        self._cancelled += 1

    def as_text(self, load: Load) -> str:
        """Prometheus' text format, version 0.0.4."""
        return "".join(line + "\n" for line in self._lines(load))

    def _lines(self, load: Load) -> Iterator[str]:
        yield from _head("myna_requests_total", "counter", "Requests by endpoint and status.")
        for (endpoint, status), number in sorted(self._requests.items()):
            yield f'myna_requests_total{{endpoint="{endpoint}",status="{status}"}} {number}'
        sums: tuple[tuple[str, Mapping[str, float], str], ...] = (
            ("myna_answers_total", self._answered, "Requests that a model answered whole."),
            ("myna_prompt_tokens_total", self._prompt_tokens, "Tokens of prompts."),
            ("myna_completion_tokens_total", self._drawn_tokens, "Tokens of answers."),
            ("myna_first_piece_seconds_total", self._first_seconds, "Time to the first piece."),
            ("myna_answer_seconds_total", self._seconds, "Time to the end of the answer."),
        )
        for name, counter, text in sums:
            yield from _head(name, "counter", text)
            for model, value in sorted(counter.items()):
                yield f'{name}{{model="{model}"}} {value:.17g}'
        yield from _head("myna_disconnects_total", "counter", "Clients that went away.")
        yield f"myna_disconnects_total {self._cancelled}"
        yield from _head("myna_queue_length", "gauge", "Answers that wait for their turn.")
        yield f"myna_queue_length {load.waiting}"
        yield from _head("myna_running", "gauge", "Answers that are being computed.")
        yield f"myna_running {load.running}"


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"
