"""Judging: base and adapter on the same rows, by loss, by their answers and by metrics.

Owns what is compared and the result, which is also a file that reports and model cards read. Both
sides are one model in memory, the base being that model with the adapter's layers switched off.
Also here: the judgement of a model while it is trained, which `cli` hands to the loop.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from myna.device import free_unused_memory, is_out_of_memory
from myna.errors import ConfigError, OutOfMemoryError
from myna.evaluation.forgetting import Forgetting
from myna.evaluation.losses import SIDES, Side, Sides, losses_of, side_of
from myna.evaluation.metrics import Judged, Metric
from myna.evaluation.rows import JudgedRow, after_thinking
from myna.inference.generate import Answer, Sampling
from myna.inference.speaker import Speaker
from myna.models.packed import own_attention

MOST_NEW_TOKENS, FEWEST_NEW_TOKENS = 256, 32
"""Bounds of the longest answer, unless told otherwise."""

BATCH_SIZE = 8
"""Rows answered at once, unless told otherwise."""

Advance = Callable[[], None]
"""Called after every loss and every answer."""


@dataclass(frozen=True)
class RowResult:
    """What was found on one row."""

    row: JudgedRow
    answers: Mapping[Side, Answer]
    """Empty for a plain text."""
    loss: Sides | None
    """Per trained token; None for a row without an answer."""
    metrics: Mapping[str, Sides]

    def to_json(self) -> dict[str, Any]:
        """As evaluation.json has it."""
        return {
            "place": self.row.place,
            "question": self.row.question,
            "reference": self.row.reference,
            **{side: self.answers[side].text if self.answers else None for side in SIDES},
            "loss": self.loss,
            "metrics": dict(self.metrics),
        }


@dataclass(frozen=True)
class Evaluation:
    """What was found on all rows."""

    data: str | None = None
    """What the rows are; None where there are none."""
    rows: tuple[RowResult, ...] = ()
    loss: Sides | None = None
    """Per trained token of all rows that have an answer; None where none has."""
    trained_tokens: int = 0
    metrics: Mapping[str, Sides] = field(default_factory=dict)
    scale: Mapping[str, int] = field(default_factory=dict)
    """Per metric, the worth of the best answer: 1 or 100."""
    forgetting: Forgetting | None = None
    tasks: Mapping[str, Mapping[str, Sides]] = field(default_factory=dict)
    """Per task of the harness its metrics."""

    @property
    def perplexity(self) -> Sides | None:
        """`exp` of the loss, kept below what a float holds."""
        if self.loss is None:
            return None
        return {side: math.exp(min(loss, 700.0)) for side, loss in self.loss.items()}

    def to_json(self) -> dict[str, Any]:
        """evaluation.json."""
        return {
            "data": self.data,
            "rows_judged": len(self.rows),
            "loss": self.loss,
            "perplexity": self.perplexity,
            "trained_tokens": self.trained_tokens,
            "metrics": dict(self.metrics),
            "scale": dict(self.scale),
            "forgetting": None if self.forgetting is None else self.forgetting.to_json(),
            "tasks": {name: dict(found) for name, found in self.tasks.items()},
            "rows": [row.to_json() for row in self.rows],
        }


def work(rows: Sequence[JudgedRow]) -> int:
    """How often `evaluate` calls `advance`."""
    return sum(2 * (row.example is not None) + 2 * bool(row.prompt_ids) for row in rows)


def usual_limit(rows: Sequence[JudgedRow]) -> int:
    """Tokens of the longest answer that is waited for: twice the longest of the rows' own.

    A base that was never taught to stop would always go on to the end, which takes long and tells
    nothing. The bounds are `FEWEST_NEW_TOKENS` and `MOST_NEW_TOKENS`; the upper one holds where a
    row has no answer.
    """
    asked = [row.example for row in rows if row.prompt_ids]
    lengths = [len(example.completion_ids) for example in asked if example is not None]
    if not lengths or len(lengths) < len(asked):
        return MOST_NEW_TOKENS
    return max(FEWEST_NEW_TOKENS, min(2 * max(lengths), MOST_NEW_TOKENS))


def evaluate(
    speaker: Speaker,
    rows: Sequence[JudgedRow],
    metrics: Sequence[Metric],
    *,
    data: str,
    sampling: Sampling | None = None,
    batch_size: int = BATCH_SIZE,
    advance: Advance = lambda: None,
) -> Evaluation:
    """Judge the adapter inside `speaker` beside its base.

    Answers are greedy, up to `usual_limit`, unless `sampling` says otherwise.

    Raises ConfigError for a metric that cannot judge these rows, NonFiniteError for a loss that is
    no number, and OutOfMemoryError where one answer at a time is too much.
    """
    check_metrics(metrics, rows)
    sampling = sampling or _usual(rows)
    examples = {number: row.example for number, row in enumerate(rows) if row.example is not None}
    losses = None
    if examples:
        losses = losses_of(
            speaker.model, list(examples.values()), pad_id=speaker.pad_id, on_row=advance
        )
    answers: dict[Side, dict[int, Answer]] = {}
    judged: dict[Side, dict[int, Judged]] = {}
    for side in SIDES:
        with side_of(speaker.model, side):
            answers[side] = answer_rows(speaker, rows, sampling, batch_size, advance)
        judged[side] = {n: _judged(rows[n], answer) for n, answer in answers[side].items()}
    worth = {
        metric.name: {
            side: {n: float(metric.judge(each)) for n, each in judged[side].items()}
            for side in SIDES
        }
        for metric in metrics
    }
    place_of = {number: at for at, number in enumerate(examples)}
    results = [
        RowResult(
            row,
            {side: answers[side][number] for side in SIDES if number in answers[side]},
            losses.of_row(place_of[number]) if losses and number in place_of else None,
            {
                name: {side: of_side[side][number] for side in SIDES}
                for name, of_side in worth.items()
                if row.prompt_ids
            },
        )
        for number, row in enumerate(rows)
    ]
    return Evaluation(
        data=data,
        rows=tuple(results),
        loss=losses.mean() if losses else None,
        trained_tokens=losses.tokens if losses else 0,
        metrics={
            metric.name: {side: float(metric.of_all(list(judged[side].values()))) for side in SIDES}
            for metric in metrics
            if judged["adapter"]
        },
        scale={metric.name: metric.scale for metric in metrics},
    )


def answer_rows(
    speaker: Speaker,
    rows: Sequence[JudgedRow],
    sampling: Sampling,
    batch_size: int,
    advance: Advance = lambda: None,
) -> dict[int, Answer]:
    """Answers to those of the rows that ask, by number and in their order.

    Where memory runs out, half as many are answered at once. Raises OutOfMemoryError for one alone.
    """
    found: dict[int, Answer] = {}
    left = [number for number, row in enumerate(rows) if row.prompt_ids]
    while left:
        prompts = [rows[number].prompt_ids for number in left]
        ran_out = False
        try:
            for at, answer in speaker.answer_all(prompts, sampling, batch_size=batch_size):
                found[left[at]] = answer
                advance()
        except (OutOfMemoryError, MemoryError, RuntimeError) as error:
            ran_out = isinstance(error, OutOfMemoryError) or is_out_of_memory(error)
            if not ran_out or batch_size == 1:
                raise
        if ran_out:
            batch_size = math.ceil(batch_size / 2)
            free_unused_memory(speaker.model.device.type, cycles=True)
        left = [number for number in left if number not in found]
    return dict(sorted(found.items()))


def check_metrics(metrics: Sequence[Metric], rows: Sequence[JudgedRow]) -> None:
    """Raise ConfigError for a metric that cannot judge `rows`, before anything is computed.

    Each judges the first row's own answer: a function with a fault is found at once.
    """
    asked = [row for row in rows if row.prompt_ids]
    if metrics and not asked:
        raise ConfigError(
            f"metric {metrics[0].name} judges answers, and the {len(rows):,} rows are plain text: "
            "none of them asks for one.\n  Leave the metrics out; there is a loss only."
        )
    for metric in metrics:
        metric.check_rows([(row.place, row.reference) for row in asked])
        for row in asked[:1]:
            text = after_thinking(row.reference or "")
            reference = None if row.reference is None else text
            metric.judge(Judged(text, reference, row.question, True, row.place))


class HeldOutJudge:
    """Scores of a model that is being trained, over the same rows every time.

    Takes no random number and leaves the model as it was: a run that is judged ends in the same
    bytes as one that is not.
    """

    def __init__(
        self,
        speaker: Speaker,
        rows: Sequence[JudgedRow],
        metrics: Sequence[Metric],
        *,
        sampling: Sampling | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        check_metrics(metrics, rows)
        self._speaker = speaker
        self._rows = rows
        self._metrics = metrics
        self._sampling = sampling or _usual(rows)
        self._batch_size = batch_size

    def __call__(self) -> dict[str, float]:
        """The worth of the answers by each metric."""
        with own_attention(self._speaker.model):
            answers = answer_rows(self._speaker, self._rows, self._sampling, self._batch_size)
        judged = [_judged(self._rows[number], answer) for number, answer in answers.items()]
        return {metric.name: float(metric.of_all(judged)) for metric in self._metrics}


def _usual(rows: Sequence[JudgedRow]) -> Sampling:
    return Sampling(usual_limit(rows), temperature=0.0)


def _judged(row: JudgedRow, answer: Answer) -> Judged:
    return Judged(
        answer=after_thinking(answer.text),
        reference=None if row.reference is None else after_thinking(row.reference),
        question=row.question,
        stopped=answer.stopped,
        place=row.place,
    )
