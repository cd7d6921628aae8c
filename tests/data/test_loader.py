"""Batches: the rows of each step, and where their trained tokens are predicted."""

from collections import Counter
from pathlib import Path

from myna.data.conversation import Place
from myna.data.encode import Example
from myna.data.loader import num_steps, padded_batches, rows_of_steps


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
