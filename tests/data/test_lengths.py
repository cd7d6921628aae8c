from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from chat_families import CHATML, make_tokenizer, talk
from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data.dataset import Dataset, Tally, encode_dataset
from myna.data.encode import Encoder, OverLength
from myna.data.formats import Rows
from myna.data.lengths import (
    Bar,
    LengthChoice,
    RowLengths,
    _rank,
    length_bars,
    length_percentiles,
    suggest_lengths,
)
from myna.data.templates import choose_template
from myna.errors import DataError


def rows_of(*rows: tuple[int, int]) -> RowLengths:
    """From (length, tokens) of each row."""
    counts: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    for length, all_tokens in rows:
        counts[length] += 1
        tokens[length] += all_tokens
    return RowLengths.of(counts, tokens)


MANY = rows_of(*[(50, 50)] * 980, *[(80, 80)] * 15, *[(200, 200)] * 4, (7000, 7000))


def test_percentiles_by_nearest_rank() -> None:
    expected = {"p50": 50, "p90": 90, "p99": 99, "max": 100}
    assert length_percentiles(np.arange(100, 0, -1)) == expected
    assert length_percentiles([7]) == {"p50": 7, "p90": 7, "p99": 7, "max": 7}
    # Half of three rows are two: nothing is interpolated.
    assert length_percentiles([1, 2, 9])["p50"] == 2


@settings(deadline=None)
@given(st.integers(1, 400), st.floats(0.01, 1))
def test_a_nearest_rank_never_falls_short_nor_goes_too_far(count: int, share: float) -> None:
    rank = _rank(share, count)
    assert 0 <= rank < count
    assert rank + 1 >= share * count - 1e-6
    assert rank == 0 or rank < share * count


def test_bars_counted_by_hand() -> None:
    bars = length_bars([10, 10, 10, 10, 19, 20, 109])
    assert bars[0] == Bar(10, 19, 5) and bars[1] == Bar(20, 29, 1) and bars[9] == Bar(100, 109, 1)
    assert [bar.count for bar in bars[2:9]] == [0] * 7
    assert length_bars([3, 4, 4]) == [Bar(3, 3, 1), Bar(4, 4, 2)]


def test_a_long_tail_has_a_bar_of_its_own() -> None:
    bars = length_bars([10] * 500 + [27] * 499 + [9000])
    assert (bars[0], bars[-2], bars[-1]) == (Bar(10, 11, 500), Bar(26, 27, 499), Bar(28, 9000, 1))


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.integers(1, 60), st.integers(1, 5000)), min_size=1, max_size=60),
    st.sampled_from([1, 200]),
)
def test_every_length_is_in_one_bar(lengths: list[int], times: int) -> None:
    lengths = [min(lengths)] * times + lengths  # with and without a long tail
    bars = length_bars(lengths)
    assert 1 <= len(bars) <= 10
    for bar, following in pairwise(bars):
        assert following.low == bar.high + 1
    for bar in bars:
        assert bar.low <= bar.high
        assert bar.count == sum(bar.low <= length <= bar.high for length in lengths)
    assert sum(bar.count for bar in bars) == len(lengths)


def test_lengths_that_keep_all_or_99_percent() -> None:
    assert MANY.choices() == [
        LengthChoice(7000, 1000, 1.0, 58000, 1.0),
        LengthChoice(80, 995, 0.995, 50200, 50200 / 58000),
    ]
    assert [choice.max_length for choice in rows_of((9, 9)).choices()] == [9]
    assert rows_of().choices() == []


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=250))
def test_the_lengths_suggested_are_the_shortest_that_keep_so_many(
    rows: list[tuple[int, int]],
) -> None:
    rows = [(length, length + more) for length, more in rows]
    first, *more = rows_of(*rows).choices()
    assert (first.max_length, first.rows, first.time) == (max(rows)[0], len(rows), 1.0)
    second = more[0] if more else first
    fitting = [tokens for length, tokens in rows if length <= second.max_length]
    assert len(fitting) == second.rows >= 0.99 * len(rows)
    assert sum(fitting) == second.tokens
    assert second.time == pytest.approx(sum(fitting) / sum(tokens for _, tokens in rows))
    assert sum(length < second.max_length for length, _ in rows) < 0.99 * len(rows)


def test_what_a_length_keeps() -> None:
    assert MANY.kept_by(60) == LengthChoice(60, 980, 0.98, 49000, 49000 / 58000)
    assert MANY.kept_by(49).rows == 0


def test_the_words_for_rows_that_are_too_long() -> None:
    assert suggest_lengths(MANY, 64) == (
        "The longest has 7000 tokens: set max_length to 7000, or over_length to drop or "
        "truncate_prompt.\n"
        "  Dropping keeps 980 of 1,000 rows (98.0%) and takes 84% of the time of all; with "
        "max_length 80 it keeps 995 (99.5%) and takes 87% (by tokens; attention not counted)."
    )
    # 99 % fit already, so no other length is told.
    assert suggest_lengths(MANY, 100).endswith(
        "Dropping keeps 995 of 1,000 rows (99.5%) and takes 87% of the time of all (by tokens; "
        "attention not counted)."
    )
    assert suggest_lengths(MANY, 64, is_models=True).startswith(
        "The longest has 7000 tokens, and 64 are the most that the model was made for: shorten the "
        "rows, or set over_length to drop or truncate_prompt.\n"
        "  Dropping keeps 980 of 1,000 rows (98.0%) and takes 84% of the time of all (by tokens"
    )


def encoded(max_length: int | None, over_length: OverLength, *, lines: int = 4) -> Dataset:
    """A short row, one of two answers, one with a long question and one with a long answer."""
    tokenizer = make_tokenizer("byte", CHATML, eos_token="<|im_end|>")
    encoder = Encoder(
        tokenizer,
        choose_template(tokenizer, None),
        stop_ids=[tokenizer.eos_token_id],
        max_length=max_length,
        over_length=over_length,
    )
    yes = ("assistant", "yes")
    conversations = (
        talk(("user", "hello"), yes, line=1),
        talk(("user", "hello"), yes, ("user", "what " * 9), yes, line=2),
        talk(("user", "hello " * 60), yes, line=3),
        talk(("user", "hello"), ("assistant", "answer " * 80), line=4),
    )
    return encode_dataset(encoder, Rows(conversations[:lines], (), "hash"))


def test_rows_are_as_long_as_they_came_in_whatever_becomes_of_them() -> None:
    whole = encoded(None, "error")
    lengths = whole.examples.lengths.tolist()
    rows = [lengths[0], max(lengths[1:3]), lengths[3], lengths[4]]
    tokens = [lengths[0], sum(lengths[1:3]), lengths[3], lengths[4]]
    assert whole.row_lengths.lengths.tolist() == sorted(rows)
    assert sum(whole.row_lengths.tokens.tolist()) == sum(lengths) == sum(tokens)
    limit = max(rows[:2])
    policies: list[OverLength] = ["drop", "truncate_prompt"]
    for policy in policies:
        cut = encoded(limit, policy)
        assert sum(cut.accounting.refused.values()) == (2 if policy == "drop" else 1)
        for name in ("lengths", "rows", "tokens"):
            same = getattr(cut.row_lengths, name) == getattr(whole.row_lengths, name)
            assert same.all(), (policy, name)


def test_a_row_with_a_later_answer_that_is_longer_still_is_as_long_as_that() -> None:
    # The first answer is over the limit already; the length advised must let the second in too.
    _, first, second = encoded(None, "error", lines=2).examples.lengths.tolist()
    assert first < second
    with pytest.raises(DataError) as caught:
        encoded(first - 1, "error", lines=2)
    assert f"set max_length to {second}, or over_length" in str(caught.value)


def test_dropped_rows_keep_their_reasons() -> None:
    limit = max(encoded(None, "error", lines=2).examples.lengths)
    data = encoded(limit, "drop")
    assert [fault.place.line for fault in data.refusals] == [3, 4]
    assert all(f"and max_length is {limit}." in fault.finding for fault in data.refusals)


def test_tallies_of_parts_add_up_and_survive_json() -> None:
    import json

    fault = {"kind": "k", "file": "f", "line": 1, "row": 1, "finding": "x.", "mend": ""}
    one = Tally(rows_by_length=Counter({"7": 2}), tokens_by_length=Counter({"7": 14}))
    other = Tally(
        rows_by_length=Counter({"7": 1, "9": 1}),
        tokens_by_length=Counter({"7": 8, "9": 9}),
        refusals=[fault] * 1200,
    )
    one.add(other)
    read = Tally.from_json(json.loads(json.dumps(one.to_json())))
    assert (read, len(read.refusals)) == (one, 1000)
    assert read.row_lengths.kept_by(8) == LengthChoice(8, 3, 0.75, 22, 22 / 31)
