import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myna.data.conversation import Place
from myna.data.held_out import split_held_out
from myna.data.store import Example, Examples
from myna.errors import ConfigError


def examples(
    prompts: Sequence[tuple[int, ...]], rows: Sequence[int] | None = None
) -> list[Example]:
    numbers = rows or range(1, len(prompts) + 1)
    return [
        Example("", "", prompt, (index, 2), Place(Path("a.jsonl"), row, row), 1)
        for index, (prompt, row) in enumerate(zip(prompts, numbers, strict=True))
    ]


def test_zero_holds_nothing_out() -> None:
    data = examples([(1,), (2,)])
    trained, held = split_held_out(data, 0, 42)
    assert list(trained) == data and len(held) == 0


@pytest.mark.parametrize(("held_out", "count"), [(0.1, 10), (7, 7), (0.001, 1), (99, 99)])
def test_share_or_number_each_side_in_order(held_out: float, count: int) -> None:
    data = examples([(index,) for index in range(100)])
    trained, held = split_held_out(data, held_out, 42)
    assert len(held) == count and len(trained) == 100 - count
    for side in (trained, held):
        assert [example.place.row for example in side] == sorted(e.place.row for e in side)
    assert {e.place.row for e in [*trained, *held]} == set(range(1, 101))


def test_a_prompt_is_never_on_both_sides() -> None:
    """112 of the tutorial's 3,729 records repeat another: a random split leaks."""
    data = examples([(index % 30,) for index in range(300)])
    trained, held = split_held_out(data, 0.2, 42)
    assert len(held) == 60
    assert not {e.prompt_ids for e in trained} & {e.prompt_ids for e in held}


def test_turns_of_a_conversation_stay_together() -> None:
    # Two turns a row; rows 1 and 2 have their first prompt in common.
    data = examples(
        [(9,), (9, 1), (9,), (9, 2), (5,), (5, 1), (6,), (6, 1)], [1, 1, 2, 2, 3, 3, 4, 4]
    )
    for seed in range(10):
        trained, held = split_held_out(data, 4, seed)
        sides = [{e.place.row for e in trained}, {e.place.row for e in held}]
        assert not sides[0] & sides[1]
        assert {1, 2} <= sides[0] or {1, 2} <= sides[1]


def test_the_seed_decides_and_the_order_of_rows_does_not() -> None:
    data = examples([(index,) for index in range(100)])
    held = {e.prompt_ids for e in split_held_out(data, 0.2, 42)[1]}
    assert {e.prompt_ids for e in split_held_out(data[::-1], 0.2, 42)[1]} == held
    assert {e.prompt_ids for e in split_held_out(data, 0.2, 43)[1]} != held


@pytest.mark.parametrize("held_out", [2, 5, 0.99])
def test_a_split_that_leaves_nothing_is_refused(held_out: float) -> None:
    with pytest.raises(ConfigError) as error:
        split_held_out(examples([(1,), (1,)]), held_out, 42)
    assert str(error.value) == (
        f"held_out is {held_out:g}, and the data has 2 examples in 1 groups without a prompt in "
        "common; expected a number that leaves some on both sides.\n"
        "  Choose another held_out, or 0 to hold nothing out."
    )


def test_plain_texts_are_told_apart_by_what_they_say() -> None:
    """Their prompts are all the start token, or nothing."""
    for start in ((), (1,)):
        texts = [
            Example("", "", start, (5 + number // 2, 6, 2), Place(Path("a.txt"), n, n), 0)
            for n, number in enumerate(range(20))
        ]
        trained, held_out = split_held_out(texts, 0.3, seed=4)
        assert len(held_out) == 6  # three texts, each there twice
        assert {e.completion_ids for e in trained}.isdisjoint(e.completion_ids for e in held_out)
        assert {e.completion_ids for e in held_out} != {(5, 6, 2), (6, 6, 2), (7, 6, 2)}


LINKS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=2, max_size=40)


@given(LINKS, st.integers(1, 39), st.integers(0, 3))
def test_groups_are_those_of_a_search_through_the_links(
    links: list[tuple[int, int]], wanted: int, seed: int
) -> None:
    """(prompt, row) of each example; whoever shares one with another stands on its side."""
    data = examples([(prompt,) for prompt, _ in links], [row for _, row in links])
    group = list(range(len(links)))
    for _ in links:  # a chain is no longer than that
        for one, (prompt, row) in enumerate(links):
            linked = [at for at, each in enumerate(links) if each[0] == prompt or each[1] == row]
            group[one] = min(group[at] for at in linked)
    try:
        trained, held = split_held_out(data, wanted, seed)
    except ConfigError as error:
        assert f"in {len(set(group))} groups" in str(error)
        return
    assert 0 < len(held) <= wanted and len(trained) + len(held) == len(links)
    number = {example.completion_ids: at for at, example in enumerate(data)}
    sides = [{group[number[e.completion_ids]] for e in side} for side in (trained, held)]
    assert not sides[0] & sides[1]
    # Nothing more would have fitted: every group left out is larger than what room remained.
    room = wanted - len(held)
    assert all(group.count(each) > room for each in sides[0])


def test_millions_of_rows_are_split_in_few_bytes_each() -> None:
    count = 50_000
    data = Examples.of(examples([(index,) for index in range(count)]))
    tracemalloc.start()
    trained, held = split_held_out(data, 100, 42)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(trained), len(held)) == (count - 100, 100)
    assert peak < 45 * count
