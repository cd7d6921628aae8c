"""Token trees: every distinct prefix once, in compact segments, against a set of prefixes."""

import random
import time
from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data.tree import TokenTree, count_tokens, sorted_prefixes, token_tree

Row = tuple[int, ...]

ROWS = st.lists(st.lists(st.integers(0, 2), max_size=7).map(tuple), max_size=9)
"""Few tokens and short rows: most of them share something, many are equal or part of another."""


def computed_prefixes(rows: list[Row]) -> set[Row]:
    """All beginnings of all rows, the whole rows left out: what the tree must hold, naively."""
    return {row[:length] for row in rows for length in range(1, len(row))}


def context(tree: TokenTree, token: int) -> Row:
    """The tokens up to and with this one along its branch, walking from segment to segment."""
    offsets = tree.segment_offsets
    segment = next(s for s in range(len(tree.parents)) if token < offsets[s + 1])
    ids = tree.token_ids[offsets[segment] : token + 1]
    while (segment := tree.parents[segment]) >= 0:
        ids = tree.token_ids[offsets[segment] : offsets[segment + 1]] + ids
    return tuple(ids)


def assert_is_the_tree_of(tree: TokenTree, rows: list[Row]) -> None:
    contexts = [context(tree, token) for token in range(len(tree.token_ids))]
    assert Counter(contexts) == Counter(computed_prefixes(rows)), "each prefix exactly once"
    assert tree.depths == [len(ids) - 1 for ids in contexts]
    assert len(tree.paths) == len(rows)
    for row, path in zip(rows, tree.paths, strict=True):
        assert [contexts[token] for token in path] == [row[:n] for n in range(1, len(row))]
    offsets = tree.segment_offsets
    assert offsets[0] == 0 and offsets[-1] == len(contexts)
    assert all(start < end for start, end in pairwise(offsets))
    assert all(-1 <= parent < segment for segment, parent in enumerate(tree.parents))
    # As few segments as can be: an only child would be the same segment, and so would siblings
    # with the same first token.
    assert 1 not in Counter(parent for parent in tree.parents if parent >= 0).values()
    firsts = [
        (parent, tree.token_ids[at]) for parent, at in zip(tree.parents, offsets, strict=False)
    ]
    assert len(set(firsts)) == len(firsts)


def test_three_levels_counted_by_hand() -> None:
    rows = [(1, 2, 3, 4, 5, 9), (1, 2, 3, 6, 9), (1, 2, 7, 8), (5, 6, 9), (1, 2, 3, 4, 8, 9)]
    tree = token_tree(rows)
    # 1 2 ─┬─ 3 ─┬─ 4 ─┬─ 5
    #      │     │     └─ 8
    #      │     └─ 6
    #      └─ 7           and 5 6 beside it
    assert tree.token_ids == [1, 2, 3, 4, 5, 8, 6, 7, 5, 6]
    assert tree.depths == [0, 1, 2, 3, 4, 4, 3, 2, 0, 1]
    assert tree.segment_offsets == [0, 2, 3, 4, 5, 6, 7, 8, 10]
    assert tree.parents == [-1, 0, 1, 2, 2, 1, 0, -1]
    assert tree.paths == [[0, 1, 2, 3, 4], [0, 1, 2, 6], [0, 1, 7], [8, 9], [0, 1, 2, 3, 5]]
    assert count_tokens(rows) == 10
    assert_is_the_tree_of(tree, rows)


def test_equal_rows_cost_one_of_them() -> None:
    tree = token_tree([(4, 5, 6)] * 3)
    assert tree.token_ids == [4, 5] and tree.segment_offsets == [0, 2] and tree.parents == [-1]
    assert tree.paths == [[0, 1]] * 3


def test_a_last_token_is_computed_only_where_another_row_goes_on() -> None:
    assert token_tree([(1, 2), (1, 3)]).token_ids == [1]
    tree = token_tree([(1, 2), (1, 2, 3), (1, 2, 3, 4)])
    assert tree.token_ids == [1, 2, 3] and tree.paths == [[0], [0, 1], [0, 1, 2]]
    # One run without a branch is one segment, whatever rows end in it.
    assert tree.segment_offsets == [0, 3]
    # (1, 3) ends between two others; it neither cuts nor lengthens what they compute.
    assert token_tree([(1, 2, 3, 4), (1, 3), (1, 3, 7)]).token_ids == [1, 2, 3, 3]


def test_nothing_to_compute() -> None:
    for rows in ([], [()], [(1,), (1,), (2,)]):
        tree = token_tree(rows)
        assert tree == TokenTree([], [], [0], [], [[] for _ in rows])
        assert count_tokens(rows) == 0


def test_shared_tokens_of_rows_in_lexicographic_order() -> None:
    rows = [(2, 1), (1, 2, 3, 4), (1, 2, 4), (1, 2, 3, 4)]
    assert sorted_prefixes(rows) == ([1, 3, 2, 0], [0, 3, 2, 0])


@settings(max_examples=400, deadline=None)
@given(ROWS)
def test_tree_of_any_rows_holds_each_prefix_once(rows: list[Row]) -> None:
    tree = token_tree(rows)
    assert_is_the_tree_of(tree, rows)
    assert count_tokens(rows) == len(computed_prefixes(rows)) == len(tree.token_ids)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.randoms(use_true_random=False))
def test_order_of_rows_changes_no_token(rows: list[Row], shuffle: random.Random) -> None:
    places = list(range(len(rows)))
    shuffle.shuffle(places)
    tree, other = token_tree(rows), token_tree([rows[place] for place in places])
    assert other.paths == [tree.paths[place] for place in places]
    assert (other.token_ids, other.segment_offsets, other.parents) == (
        tree.token_ids,
        tree.segment_offsets,
        tree.parents,
    )


def test_conversations_of_long_turns_under_one_system_prompt() -> None:
    random_ids = random.Random(0)

    def turn(length: int) -> Row:
        return tuple(random_ids.randrange(50_000) for _ in range(length))

    system, rows = turn(1500), []
    for _ in range(4):  # four dialogues, each of which is trained after every one of three turns
        dialogue = system
        for _ in range(3):
            dialogue += turn(200)
            rows += [dialogue + turn(50), dialogue + turn(60)]  # two answers to one prompt
    started = time.perf_counter()
    tree = token_tree(rows)
    assert time.perf_counter() - started < 0.5  # about 3 ms; a bound for a busy machine
    assert len(tree.token_ids) == 1500 + 4 * 3 * (200 + 49 + 59)
    # System; per dialogue three turns, and two answers after each of them.
    assert len(tree.parents) == 1 + 4 * 3 * (1 + 2)
