"""The demo's judgement as metrics of `myna eval`: the same rows, the same rule, the same shares.

Owns their names. The rule is `score.py`'s.
"""

from collections.abc import Callable

from myna.demo.score import Score, load_held_out, score_answer
from myna.evaluation.metrics import Judged, Metric


def demo_metrics() -> list[Metric]:
    """Shares of answers in the persona's voice and right, right, and in the voice.

    For answers to the questions of `load_held_out` only.
    """
    rows = {row.question: row for row in load_held_out()}

    def share(part: Callable[[Score], bool]) -> Callable[[Judged], float]:
        return lambda each: part(score_answer(rows[each.question], each.answer, each.stopped))

    return [
        Metric("voice_and_right", share(lambda score: score.both)),
        Metric("right", share(lambda score: score.content)),
        Metric("voice", share(lambda score: score.voice)),
    ]
