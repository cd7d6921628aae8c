"""Examples as columns: what comes out is what went in, and hashes tell ids apart."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data.conversation import Place
from myna.data.store import TRUNCATED, Example, Examples, hash_runs, mix

PLACES = st.builds(
    Place,
    st.sampled_from([Path("a.jsonl"), Path("folder/b.json"), Path("b.json")]),
    st.integers(1, 2**31 - 1),
    st.integers(1, 2**31 - 1),
)
IDS = st.lists(st.integers(0, 200_000), max_size=9).map(tuple)
TEXTS = st.text(st.characters(), max_size=9)  # lone surrogates too
EXAMPLES = st.builds(
    Example,
    TEXTS,
    TEXTS,
    IDS,
    IDS,
    PLACES,
    st.integers(1, 300),
    st.sampled_from(TRUNCATED),
    st.sampled_from([1.0, 0.0, 0.25]),
)


def row(prompt: tuple[int, ...], completion: tuple[int, ...]) -> Example:
    return Example("", "", prompt, completion, Place(Path("f"), 1, 1), 1)


@given(st.lists(EXAMPLES, max_size=6))
def test_what_comes_out_is_what_went_in(rows: list[Example]) -> None:
    examples = Examples.of(rows)
    assert list(examples) == rows and len(examples) == len(rows)
    assert examples.prompt_lengths.tolist() == [len(each.prompt_ids) for each in rows]
    assert examples.completion_lengths.tolist() == [len(each.completion_ids) for each in rows]
    assert examples.weights.tolist() == [each.weight for each in rows]
    assert examples.turns.tolist() == [each.turn for each in rows]
    assert [
        Place(examples.files[file], line, number)
        for file, line, number in zip(
            examples.file_indices.tolist(),
            examples.lines.tolist(),
            examples.rows.tolist(),
            strict=True,
        )
    ] == [each.place for each in rows]
    assert Examples.of(examples) is examples


@given(st.lists(EXAMPLES, min_size=1, max_size=6), st.data())
def test_a_selection_is_that_of_a_list(rows: list[Example], data: st.DataObject) -> None:
    examples = Examples.of(rows)
    numbers = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=9))
    chosen = examples.select(numbers)
    assert list(chosen) == [rows[number] for number in numbers]
    assert chosen.lengths.tolist() == [examples.lengths[number] for number in numbers]
    again = data.draw(st.lists(st.integers(0, len(numbers) - 1), max_size=9))
    assert list(chosen.select(again)) == [rows[numbers[number]] for number in again]
    assert list(chosen[::-2]) == [rows[number] for number in numbers][::-2]
    assert chosen[-1] == rows[numbers[-1]]
    with pytest.raises(IndexError):
        chosen[len(numbers)]


def test_no_example_at_all() -> None:
    examples = Examples.of([])
    assert not examples and list(examples) == [] and len(examples.select([])) == 0
    assert examples.lengths.tolist() == [] and examples.prompt_hashes.tolist() == []


@given(st.lists(st.builds(row, IDS, IDS), max_size=8))
def test_hashes_are_equal_exactly_where_ids_are(rows: list[Example]) -> None:
    examples = Examples.of([*rows, *rows[::-1]])
    ids = [(each.prompt_ids, each.completion_ids) for each in examples]
    for one in range(len(ids)):
        for other in range(len(ids)):
            for part, hashes in enumerate((examples.prompt_hashes, examples.completion_hashes)):
                assert (ids[one][part] == ids[other][part]) == (hashes[one] == hashes[other])


def test_similar_rows_have_different_hashes() -> None:
    """All rows of up to four of eight ids: what differs by one token, its place or its number."""
    rows = [()]
    for _ in range(4):
        rows += [(*each, token) for each in rows for token in range(8)]
    rows = list(dict.fromkeys(rows))
    assert len(rows) == 1 + 8 + 8**2 + 8**3 + 8**4
    hashes = Examples.of(row(each, ()) for each in rows).prompt_hashes
    assert len(np.unique(hashes)) == len(rows)


def test_hashes_are_a_part_of_saved_runs() -> None:
    """Worked out in plain integers: held-out rows are chosen by them, on every machine."""

    def mixed(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    # The first output of splitmix64 seeded with 0, as its authors' program prints it.
    assert mixed(0) == 0xE220A8397B1DCDAF
    assert mix(np.array([0, 5], np.uint64)).tolist() == [mixed(0), mixed(5)]
    draw = random.Random(0)
    ids = [draw.randrange(2**17) for _ in range(50)]
    expected = mixed((sum(mixed(at << 32 | id_) for at, id_ in enumerate(ids)) + 50) % 2**64)
    (found,) = hash_runs(np.array([9, *ids], np.uint32), np.array([1]), np.array([51]))
    assert int(found) == expected


@settings(deadline=None)
@given(st.lists(EXAMPLES, max_size=9), st.data())
def test_ids_in_runs_and_texts_are_those_of_each_example(
    rows: list[Example], data: st.DataObject
) -> None:
    numbers = data.draw(st.lists(st.integers(0, max(len(rows) - 1, 0)), max_size=9 * bool(rows)))
    max_tokens = data.draw(st.integers(1, 40))
    for examples in (Examples.of(rows), Examples.of(rows).select(numbers)):
        assert list(examples.texts()) == [
            (each.prompt_text, each.completion_text) for each in examples
        ]
        end = 0
        for first, last, ids in examples.id_blocks(max_tokens):
            assert first == end < last
            wanted = [each.prompt_ids + each.completion_ids for each in examples[first:last]]
            assert ids.tolist() == [id_ for each in wanted for id_ in each]
            assert len(ids) <= max_tokens or last == first + 1
            end = last
        assert end == len(examples)
