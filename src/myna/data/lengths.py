"""Lengths: how long rows are, and which `max_length` would keep how many of them at what cost.

Owns percentiles, histogram bars and the lengths that are suggested, on the screen and in the error
about rows that are too long. What happens to such rows is `encode.py`'s.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

BARS = 10
"""Bars of a histogram at most."""

PERCENTILES = (50, 90, 99)

LONG_TAIL = 3
"""Where the longest example is over so many times p99, the last bar takes all beyond p99."""

KEPT = 0.99
"""Share of the rows that the shorter `max_length` suggested keeps."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram: how many examples have `low` to `high` tokens, both included."""

    low: int
    high: int
    count: int


@dataclass(frozen=True, slots=True)
class LengthChoice:
    """What a `max_length` keeps and costs, rows beyond it dropped."""

    max_length: int
    rows: int
    """Rows that fit."""
    share: float
    """Their share of all rows."""
    tokens: int
    """Tokens of these rows: those of an epoch, before sharing."""
    time: float
    """Time of an epoch against one with all rows, by the tokens alone. Attention, whose work grows
    with the square of the length, is not counted."""


@dataclass(frozen=True)
class RowLengths:
    """How many rows there are of each length, K of them, shortest first.

    A row is as long as its longest answer with context, before anything was taken out of it. Rows
    refused for their length count, those refused for anything else do not.
    """

    lengths: NDArray[np.int64]
    """(K,) different lengths in tokens."""
    rows: NDArray[np.int64]
    """(K,) rows of this length."""
    tokens: NDArray[np.int64]
    """(K,) tokens of all answers of these rows, each with its context."""

    @classmethod
    def of(cls, rows: Mapping[int, int], tokens: Mapping[int, int]) -> "RowLengths":
        """From rows and tokens by length."""
        lengths = sorted(rows)
        return cls(
            np.array(lengths, np.int64),
            np.array([rows[length] for length in lengths], np.int64),
            np.array([tokens[length] for length in lengths], np.int64),
        )

    def kept_by(self, max_length: int) -> LengthChoice:
        """What this `max_length` keeps."""
        end = int(np.searchsorted(self.lengths, max_length, side="right"))
        rows, tokens = int(self.rows[:end].sum()), int(self.tokens[:end].sum())
        return LengthChoice(
            max_length,
            rows,
            rows / int(self.rows.sum()),
            tokens,
            tokens / int(self.tokens.sum()),
        )

    def choices(self) -> list[LengthChoice]:
        """The shortest that keeps all rows, and, if it is another, that which keeps `KEPT`."""
        if not len(self.lengths):
            return []
        running = np.cumsum(self.rows)
        wanted = [int(running[-1]), _rank(KEPT, int(running[-1])) + 1]
        found = [int(self.lengths[np.searchsorted(running, rows)]) for rows in wanted]
        return [self.kept_by(length) for length in dict.fromkeys(found)]


def suggest_lengths(rows: RowLengths, max_length: int, *, is_models: bool = False) -> str:
    """How rows that are longer than `max_length` are mended, in sentences.

    Args:
        rows: all rows, at least one longer than `max_length`.
        max_length: the limit that was in use.
        is_models: it is the model's own.
    """
    longest = rows.choices()[0].max_length
    everything, now = rows.kept_by(longest), rows.kept_by(max_length)
    if is_models:
        first = (
            f"The longest has {longest} tokens, and {max_length} are the most that the model was "
            "made for: shorten the rows, or set over_length to drop or truncate_prompt."
        )
    else:
        first = (
            f"The longest has {longest} tokens: set max_length to {longest}, or over_length to "
            "drop or truncate_prompt."
        )
    second = (
        f"Dropping keeps {now.rows:,} of {everything.rows:,} rows ({now.share:.1%}) and takes "
        f"{now.time:.0%} of the time of all"
    )
    for choice in rows.choices()[1:]:
        if choice.max_length > max_length and not is_models:
            second += (
                f"; with max_length {choice.max_length} it keeps {choice.rows:,} "
                f"({choice.share:.1%}) and takes {choice.time:.0%}"
            )
    return f"{first}\n  {second} (by tokens; attention not counted)."


def length_percentiles(lengths: ArrayLike) -> dict[str, int]:
    """p50, p90, p99 (nearest rank) and max of N lengths, at least one."""
    ordered = np.sort(lengths)
    ranks = {f"p{p}": int(ordered[_rank(p / 100, len(ordered))]) for p in PERCENTILES}
    return {**ranks, "max": int(ordered[-1])}


def length_bars(lengths: ArrayLike) -> list[Bar]:
    """At most `BARS` bars of equal width from the shortest of N examples to the longest.

    A long tail would leave one bar for nearly all rows: beyond p99 it is a bar of its own.
    """
    ordered = np.sort(lengths)
    shortest, longest = int(ordered[0]), int(ordered[-1])
    p99 = int(ordered[_rank(0.99, len(ordered))])
    has_tail = longest > LONG_TAIL * p99
    end, bars = (p99, BARS - 1) if has_tail else (longest, BARS)
    width = math.ceil((end - shortest + 1) / bars)
    lows = list(range(shortest, end + 1, width))
    highs = [low + width - 1 for low in lows]
    if has_tail:
        highs[-1] = end
        lows.append(end + 1)
        highs.append(longest)
    counts = np.diff(np.searchsorted(ordered, [*lows, longest + 1])).tolist()
    return [Bar(*bar) for bar in zip(lows, highs, counts, strict=True)]


def _rank(share: float, count: int) -> int:
    """Index of the nearest rank: at least `share` of `count` ordered values stand up to there."""
    # Rounded, since 0.99 * 100 is a little more than 99 in binary fractions.
    return max(math.ceil(round(share * count, 6)) - 1, 0)
