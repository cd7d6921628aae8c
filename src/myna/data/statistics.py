"""Statistics: what can be counted over encoded rows, from their lengths, hashes and ids in bulk.

Owns the counts that `myna data` shows: lengths, repeats and conflicts, what leaks into held-out
rows, what shared beginnings save, and which `max_length` would keep how many rows. Single rows that
deserve a look are `oddities.py`'s, drawing is `preview.py`'s and `page.py`'s. Nothing here makes an
object per row, so that a million rows are counted in seconds; N is the number of answers.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from myna.data.dataset import Accounting, Dataset
from myna.data.held_out import split_held_out
from myna.data.lengths import Bar, LengthChoice, length_bars, length_percentiles
from myna.data.oddities import Oddity, find_oddities
from myna.data.store import Examples, changes
from myna.data.tree import count_tokens

SAMPLED_TOKENS = 4_000_000
"""Tokens whose sharing is counted; of a longer epoch, steps at equal distances are taken."""


@dataclass(frozen=True)
class Repeats:
    """Answers that stand more than once, and prompts that have several answers."""

    first: NDArray[np.int64]
    """(N,) number of the first answer with the same prompt and completion, often its own."""
    other: NDArray[np.int64]
    """(N,) number of an answer that differs under the same prompt; -1 where there is none."""
    conflicts: int
    """Distinct prompts with more than one distinct answer."""

    @property
    def is_duplicate(self) -> NDArray[np.bool_]:
        """(N,) whether an earlier answer is the same, prompt and completion."""
        found: NDArray[np.bool_] = self.first != np.arange(len(self.first))
        return found

    @property
    def in_conflict(self) -> NDArray[np.bool_]:
        """(N,) whether the same prompt has another answer elsewhere."""
        found: NDArray[np.bool_] = self.other >= 0
        return found


@dataclass(frozen=True, slots=True)
class Leaks:
    """Held-out answers that training has seen; each is counted once, under the first that fits.

    Texts are alike here if they are equal but for case and white space.
    """

    held_out: int
    """Held-out answers."""
    question_and_answer: int
    """An alike prompt with an alike answer stands in training."""
    question: int
    """An alike prompt stands in training, with another answer."""
    answer: int
    """The same answer stands in training, behind another prompt."""
    similar_answer: int
    """An alike answer stands in training, behind another prompt."""

    @property
    def total(self) -> int:
        """Held-out answers that leaked in any way."""
        return self.question_and_answer + self.question + self.answer + self.similar_answer


@dataclass(frozen=True, slots=True)
class Sharing:
    """What the first epoch computes: each beginning that rows of a step share, once."""

    tokens: int
    """Tokens of the rows of the epoch."""
    computed_tokens: int
    """Token positions left to compute, each step one tree (a step cut into packs shares less). From
    the steps that were counted, in proportion."""
    counted_steps: int
    """Steps that were counted: all, or a sample at equal distances."""
    steps: int
    """Steps of the epoch."""
    batch_size: int
    """Rows per step."""

    @property
    def is_exact(self) -> bool:
        """Whether every step was counted."""
        return self.counted_steps == self.steps

    @property
    def saved(self) -> float:
        """Share of the tokens that need not be computed."""
        return 1 - self.computed_tokens / self.tokens


@dataclass(frozen=True)
class Statistics:
    """Everything `myna data` shows beside the rows themselves."""

    accounting: Accounting
    answers: int
    """N."""
    length: Mapping[str, int]
    """p50, p90, p99 and max of the tokens per answer with its context."""
    bars: tuple[Bar, ...]
    weights: tuple[float, float] | None
    """The least and the greatest weight of an answer in the loss; None where all are 1."""
    repeats: Repeats
    leaks: Leaks | None
    """None: nothing is held out."""
    sharing: Sharing
    max_length: int | None
    """The limit that the rows were encoded under."""
    choices: tuple[LengthChoice, ...]
    """The `max_length` that keeps all rows, then, if it is another, the one that keeps 99 %."""
    oddities: tuple[Oddity, ...]

    def to_json(self) -> dict[str, Any]:
        """As `myna data --json` has them, without the rows."""
        held_out = None
        if self.leaks is not None:
            leaked = asdict(self.leaks)
            held_out = {"answers": leaked.pop("held_out"), "leaked": leaked}
        return {
            **self.accounting.to_json(),
            "length": dict(self.length),
            "answers": self.answers,
            "histogram": [asdict(bar) for bar in self.bars],
            "weights": self.weights,
            "duplicates": int(self.repeats.is_duplicate.sum()),
            "conflicts": {
                "prompts": self.repeats.conflicts,
                "answers": int(self.repeats.in_conflict.sum()),
            },
            "held_out": held_out,
            "sharing": asdict(self.sharing),
            "max_length": {
                "in_use": self.max_length,
                "choices": [asdict(choice) for choice in self.choices],
            },
            "odd": [asdict(oddity) for oddity in self.oddities],
        }


def count_everything(
    dataset: Dataset, *, held_out: float, seed: int, batch_size: int, max_length: int | None
) -> Statistics:
    """All statistics of a data set; the arguments are those of the run that would train it."""
    examples = dataset.examples
    lengths = examples.lengths
    trained, kept_apart = split_held_out(examples, held_out, seed)
    low, high = float(examples.weights.min()), float(examples.weights.max())
    return Statistics(
        accounting=dataset.accounting,
        answers=len(examples),
        length=length_percentiles(lengths),
        bars=tuple(length_bars(lengths)),
        weights=None if low == high == 1 else (low, high),
        repeats=find_repeats(examples),
        leaks=find_leaks(trained, kept_apart) if held_out else None,
        sharing=count_sharing(trained, batch_size=batch_size, seed=seed),
        max_length=max_length,
        choices=tuple(dataset.row_lengths.choices()),
        oddities=find_oddities(dataset),
    )


def find_repeats(examples: Examples) -> Repeats:
    """Repeats and conflicts, by the hashes of prompt and completion.

    Rows of plain text, whose prompt is a begin token at most, contradict nobody.
    """
    prompts, completions = examples.prompt_hashes, examples.completion_hashes
    if not len(prompts):
        return Repeats(np.empty(0, np.int64), np.empty(0, np.int64), 0)
    order = np.lexsort((completions, prompts))  # stable: the first of equal pairs stays the first
    new_prompt = changes(prompts[order])
    new_pair = new_prompt | changes(completions[order])
    # Of each distinct pair: its first answer, the pairs of its prompt, and the next of those.
    pair_of = np.cumsum(new_pair) - 1
    pair_first = order[new_pair]
    starts = np.flatnonzero(new_prompt[new_pair])
    sizes = np.diff(starts, append=len(pair_first))
    follows = np.arange(1, len(pair_first) + 1)
    follows[starts + sizes - 1] = starts
    asks = examples.prompt_lengths[order[new_prompt]] > 1
    in_conflict = (sizes > 1) & asks
    pair_other = np.where(np.repeat(in_conflict, sizes), pair_first[follows], -1)
    first, other = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    first[order] = pair_first[pair_of]
    other[order] = pair_other[pair_of]
    return Repeats(first, other, int(in_conflict.sum()))


def find_leaks(trained: Examples, held_out: Examples) -> Leaks:
    """Which held-out answers training has seen, given the split.

    A split is by distinct prompt, so the very same prompt never stands on both sides; one that
    differs in case or white space may, and so may an answer. Of plain text, whose prompt is a begin
    token at most, only the text counts.
    """
    wanted = [
        (_fold(prompt) if asks else "", _fold(answer))
        for asks, (prompt, answer) in zip(
            (held_out.prompt_lengths > 1).tolist(), held_out.texts(), strict=True
        )
    ]
    prompts = {prompt for prompt, _ in wanted} - {""}
    answers = {answer for _, answer in wanted}
    seen_pairs: set[tuple[str, str]] = set()
    seen_prompts: set[str] = set()
    seen_answers: set[str] = set()
    for prompt, answer in trained.texts():
        prompt, answer = _fold(prompt), _fold(answer)
        if answer in answers:
            seen_answers.add(answer)
        if prompt in prompts:
            seen_prompts.add(prompt)
            if answer in answers:
                seen_pairs.add((prompt, answer))
    exact = np.isin(held_out.completion_hashes, trained.completion_hashes).tolist()
    counts = [0, 0, 0, 0]
    for (prompt, answer), is_exact in zip(wanted, exact, strict=True):
        found = (
            (prompt, answer) in seen_pairs,
            prompt in seen_prompts,
            is_exact,
            answer in seen_answers,
        )
        if True in found:
            counts[found.index(True)] += 1
    return Leaks(len(held_out), *counts)


def count_sharing(examples: Examples, *, batch_size: int, seed: int) -> Sharing:
    """Real and computed tokens over the steps of the first epoch, or over a sample of them."""
    from myna.data.loader import Draws, rows_of_steps, steps_per_epoch  # loads torch

    draws = Draws.of(examples)
    steps = steps_per_epoch(draws.num_rows, batch_size)
    tokens = int(examples.lengths[draws.order(seed, 0)].sum(dtype=np.int64))
    distance = max(math.ceil(tokens / SAMPLED_TOKENS), 1)
    drawn = rows_of_steps(draws, batch_size, seed=seed, first_step=1, last_step=steps)
    real = computed = counted = 0
    for _, _, rows in islice(drawn, 0, None, distance):
        ids = [row.prompt_ids + row.completion_ids for row in map(examples.__getitem__, rows)]
        real += sum(map(len, ids))
        computed += count_tokens(ids)
        counted += 1
    return Sharing(tokens, round(computed * tokens / real), counted, steps, batch_size)


def _fold(text: str) -> str:
    return " ".join(text.casefold().split())
