"""Batches: the rows of each step, and where their trained tokens are predicted."""

import random
from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from myna.data.conversation import Place
from myna.data.loader import Draws, num_steps, padded_batches, rows_of_steps
from myna.data.store import Example, Examples


def row(prompt: tuple[int, ...], completion: tuple[int, ...]) -> Example:
    return Example("", "", prompt, completion, Place(Path("f"), 1, 1), 1)


def test_every_row_once_per_epoch_and_the_rest_in_the_last_step() -> None:
    steps = list(rows_of_steps(10, 4, seed=1, first_step=1, last_step=6))
    assert [len(rows) for _, _, rows in steps] == [4, 4, 2, 4, 4, 2]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(index for _, _, rows in epoch for index in rows) == list(range(10))
    assert [rows for _, _, rows in steps[:3]] != [rows for _, _, rows in steps[3:]]


def test_order_depends_on_the_seed_alone_and_any_step_can_be_first() -> None:
    whole = list(rows_of_steps(10, 4, seed=1, first_step=1, last_step=9))
    assert list(rows_of_steps(10, 4, seed=1, first_step=5, last_step=9)) == whole[4:]
    assert list(rows_of_steps(10, 4, seed=2, first_step=1, last_step=9)) != whole


def test_every_row_comes_first_equally_often() -> None:
    first = Counter(
        next(rows_of_steps(5, 5, seed=seed, first_step=1, last_step=1))[2][0]
        for seed in range(2000)
    )
    # 400 each are expected; 5 standard deviations are 89.
    assert all(abs(first[index] - 400) < 89 for index in range(5))


def test_steps_of_the_reference_job() -> None:
    assert num_steps(3729, 16, 3, None) == 702  # 3 x ceil(3729 / 16)
    assert num_steps(3729, 16, 3, 100) == 100
    assert num_steps(3729, 16, 0.5, None) == 117
    assert num_steps(1, 16, 3, None) == 3


def test_padding_positions_and_targets_counted_by_hand() -> None:
    examples = [row((1, 10, 11), (12, 2)), row((1,), (20, 21, 22, 2)), row((1, 30), (2,))]
    first, second = padded_batches(examples, [1, 0, 2], micro_batch_size=2, pad_id=9)
    assert first.rows == (1, 0) and second.rows == (2,)
    assert first.input_ids.tolist() == [[1, 20, 21, 22, 2], [1, 10, 11, 12, 2]]
    assert second.input_ids.tolist() == [[1, 30, 2]]
    # Row 1 is predicted from its positions 0..3, row 0 (second line, offset 5) from 2 and 3.
    assert first.positions.tolist() == [0, 1, 2, 3, 7, 8]
    assert first.targets.tolist() == [20, 21, 22, 2, 12, 2]
    assert second.positions.tolist() == [1] and second.targets.tolist() == [2]
    assert (first.tokens, second.tokens) == (10, 3)


def test_padding_is_masked_and_a_row_without_prompt_loses_its_first_token() -> None:
    examples = [row((), (5, 6, 2)), row((1,), (2,))]
    (batch,) = padded_batches(examples, [0, 1], micro_batch_size=8, pad_id=2)  # pad = eos
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.input_ids.tolist() == [[5, 6, 2], [1, 2, 2]]
    assert batch.positions.tolist() == [0, 1, 3] and batch.targets.tolist() == [6, 2, 2]


def weighted(**sources: tuple[int, float]) -> Examples:
    """Rows of several files, so many of each with such a weight."""
    rows = [
        Example("", "", (1,), (2,), Place(Path(name), at + 1, at + 1), 1)
        for name, (number, _) in sources.items()
        for at in range(number)
    ]
    examples = Examples.of(rows)
    return Examples(
        examples._columns, examples.files, file_weights=[weight for _, weight in sources.values()]
    )


def epochs(draws: Draws, number: int, seed: int = 1) -> list[list[int]]:
    return [draws.order(seed, epoch).tolist() for epoch in range(number)]


def test_a_weight_of_two_is_twice_and_of_a_half_is_another_half_each_time() -> None:
    draws = Draws.of(weighted(a=(4, 2.0), b=(6, 0.5), c=(3, 1.0)))
    assert draws.num_rows == 8 + 3 + 3
    first, second = epochs(draws, 2)
    for epoch in (first, second):
        assert len(epoch) == 14
        assert sorted(row for row in epoch if row < 4) == [0, 0, 1, 1, 2, 2, 3, 3]
        assert sorted(row for row in epoch if row >= 10) == [10, 11, 12]
    halves = [{row for row in epoch if 4 <= row < 10} for epoch in (first, second)]
    assert [len(half) for half in halves] == [3, 3] and halves[0] | halves[1] == set(range(4, 10))
    assert first != second and epochs(draws, 2, seed=2) != [first, second]


@given(st.integers(1, 30), st.floats(0.05, 4), st.integers(1, 7))
def test_rows_of_a_source_come_equally_often(number: int, weight: float, passes: int) -> None:
    draws = Draws.of(weighted(a=(number, weight), b=(2, 1.0)))
    drawn = [[row for row in epoch if row < number] for epoch in epochs(draws, passes)]
    assert {len(epoch) for epoch in drawn} == {max(1, round(weight * number))}
    often = Counter(row for epoch in drawn for row in epoch)
    counts = [often[row] for row in range(number)]
    assert max(counts) - min(counts) <= 1


def test_steps_of_weighted_rows_can_begin_anywhere() -> None:
    draws = Draws.of(weighted(a=(9, 0.5), b=(5, 2.0)))  # 4 + 10 rows, so 4 steps of 4
    whole = list(rows_of_steps(draws, 4, seed=3, first_step=1, last_step=12))
    assert [len(rows) for _, _, rows in whole] == [4, 4, 4, 2] * 3
    assert [epoch for _, epoch, _ in whole[3::4]] == [1.0, 2.0, 3.0]
    for first in range(1, 13):
        part = rows_of_steps(draws, 4, seed=3, first_step=first, last_step=12)
        assert list(part) == whole[first - 1 :]


def test_a_source_whose_rows_are_all_held_out_is_not_drawn() -> None:
    examples = weighted(a=(4, 1.0), b=(3, 2.0)).select([0, 1, 2])
    assert sorted(Draws.of(examples).order(1, 0).tolist()) == [0, 1, 2]


def test_the_order_of_unweighted_rows_is_pythons_shuffle() -> None:
    """A run that was begun by an earlier release goes on with the same rows."""
    expected = list(range(50))
    random.Random("42:3").shuffle(expected)
    assert Draws.once(50).order(42, 3).tolist() == expected
