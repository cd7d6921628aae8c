"""Packs: every trained token in its own context exactly once, whatever the budget."""

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data.conversation import Place
from myna.data.loader import num_targets
from myna.data.packing import Pack, filled, pack_step, packed_tokens
from myna.data.store import Example

Ids = tuple[int, ...]
Predictions = Counter[tuple[Ids, int]]
"""How often each (context, target) is trained."""


def row(prompt: Ids, completion: Ids) -> Example:
    return Example("", "", prompt, completion, Place(Path("f"), 1, 1), 1)


TOKENS = st.lists(st.integers(0, 2), max_size=6).map(tuple)
ANSWERS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)
FLAT = st.lists(st.builds(row, TOKENS, ANSWERS), min_size=1, max_size=8)


@st.composite
def forests(draw: st.DrawFn) -> list[Example]:
    """Rows that grow out of one another: a part of an earlier row, then tokens of their own."""
    rows: list[Example] = []
    for _ in range(draw(st.integers(1, 9))):
        start: Ids = ()
        if rows and draw(st.booleans()):
            other = draw(st.sampled_from(rows))
            whole = other.prompt_ids + other.completion_ids
            start = whole[: draw(st.integers(0, len(whole)))]
        rows.append(row(start + draw(TOKENS), draw(ANSWERS)))
    return rows


def ids_of(example: Example) -> Ids:
    return example.prompt_ids + example.completion_ids


def predictions_of(example: Example) -> Predictions:
    """What a row trains when it is computed alone."""
    ids = ids_of(example)
    first = len(example.prompt_ids)
    return Counter((ids[:at], ids[at]) for at in range(first, len(ids)) if at > 0)


def contexts(pack: Pack) -> list[Ids]:
    """For each token of a pack, what its attention may see: its branch up to and with it."""
    offsets, parents = pack.segment_offsets.tolist(), pack.parents.tolist()
    ends: list[Ids] = []
    found: list[Ids] = []
    for segment, parent in enumerate(parents):
        assert -1 <= parent < segment
        context = ends[parent] if parent >= 0 else ()
        assert offsets[segment] < offsets[segment + 1]
        for token in pack.input_ids[offsets[segment] : offsets[segment + 1]].tolist():
            context += (token,)
            found.append(context)
        ends.append(context)
    assert offsets == [] or (offsets[0], offsets[-1]) == (0, len(found))
    return found


def predictions_in(pack: Pack) -> Predictions:
    seen = contexts(pack)
    positions, targets = pack.positions.tolist(), pack.targets.tolist()
    pairs = list(zip(positions, targets, strict=True))
    assert len(set(pairs)) == len(pairs), "equal pairs are merged"
    found: Predictions = Counter()
    for position, target, weight in zip(positions, targets, pack.weights.tolist(), strict=True):
        found[seen[position], target] += weight
    return found


def check(examples: list[Example], rows: list[int], budget: int | None) -> list[Pack]:
    """The packs, after all that must hold of them whatever the rows and the budget."""
    packs = pack_step(examples, rows, token_budget=budget)
    if not packs:
        assert all(len(ids_of(examples[number])) <= 1 for number in rows)
        return packs
    assert Counter(number for pack in packs for number in pack.rows) == Counter(rows)
    for pack in packs:
        members = [examples[number] for number in pack.rows]
        distinct = {ids_of(m)[:n] for m in members for n in range(1, len(ids_of(m)))}
        seen = contexts(pack)
        assert len(seen) == len(distinct) and set(seen) == distinct
        assert pack.position_ids.tolist() == [len(context) - 1 for context in seen]
        expected: Predictions = sum(map(predictions_of, members), Counter())
        assert predictions_in(pack) == expected
        assert pack.real_tokens == sum(len(ids_of(member)) for member in members)
        longest = max(len(ids_of(member)) - 1 for member in members)
        assert pack.computed_tokens == len(pack.input_ids) == len(seen)
        if budget is not None and pack.computed_tokens > budget:
            assert pack.computed_tokens == longest, "over the budget without need"
        for tensor in (pack.input_ids, pack.position_ids, pack.segment_offsets, pack.parents):
            assert tensor.dtype == torch.int64
        assert pack.positions.dtype == pack.targets.dtype == torch.int64
        assert pack.weights.dtype == torch.float32
    trained = sum(num_targets(examples[number]) for number in rows)
    assert sum(pack.weights.sum().item() for pack in packs) == trained
    sizes = [pack.computed_tokens for pack in packs]
    assert sizes == sorted(sizes, reverse=True)
    return packs


def test_one_pack_counted_by_hand() -> None:
    examples = [
        row((1, 2, 3), (4, 9)),
        row((1, 2, 5), (6, 9)),
        row((7,), (8,)),
        row((1, 2, 3), (9,)),  # a second answer to the first prompt
    ]
    (pack,) = check(examples, [3, 0, 2, 1], None)
    assert pack.rows == (3, 0, 2, 1)
    # 1 2 ─┬─ 3 4
    #      └─ 5 6    and 7 beside it
    assert pack.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 2, 3, 0]
    assert pack.segment_offsets.tolist() == [0, 2, 4, 6, 7]
    assert pack.parents.tolist() == [-1, 0, 0, -1]
    # Token 3 (at 2) is followed by two answers: two targets at one position.
    assert sorted(zip(pack.positions.tolist(), pack.targets.tolist(), strict=True)) == [
        (2, 4), (2, 9), (3, 9), (4, 6), (5, 9), (6, 8),
    ]  # fmt: skip
    assert pack.weights.tolist() == [1.0] * 6
    assert (pack.real_tokens, pack.computed_tokens) == (16, 7)
    assert packed_tokens(examples, [3, 0, 2, 1]) == 7


def test_identical_rows_add_their_weights() -> None:
    examples = [row((1, 2), (3, 4)), row((1, 2), (3, 4)), row((1,), (2, 3, 5))]
    (pack,) = check(examples, [0, 1, 2], None)
    assert pack.input_ids.tolist() == [1, 2, 3]
    found = zip(pack.positions.tolist(), pack.targets.tolist(), pack.weights.tolist(), strict=True)
    assert sorted(found) == [(0, 2, 1.0), (1, 3, 3.0), (2, 4, 2.0), (2, 5, 1.0)]
    (twice,) = check(examples, [2, 2], None)  # one row named twice counts twice
    assert twice.rows == (2, 2) and twice.weights.tolist() == [2.0] * 3


def test_a_row_that_begins_another_computes_nothing_more() -> None:
    examples = [row((1, 2), (3,)), row((1, 2, 3, 4), (5, 6))]  # two turns of one conversation
    (pack,) = check(examples, [0, 1], 5)
    assert pack.input_ids.tolist() == [1, 2, 3, 4, 5] and pack.parents.tolist() == [-1]
    assert sorted(zip(pack.positions.tolist(), pack.targets.tolist(), strict=True)) == [
        (1, 3), (3, 5), (4, 6),
    ]  # fmt: skip


def test_a_row_without_prompt_loses_its_first_token() -> None:
    (pack,) = check([row((), (5, 6, 2)), row((), (5,))], [0, 1], None)
    assert pack.input_ids.tolist() == [5, 6]
    assert pack.positions.tolist() == [0, 1] and pack.targets.tolist() == [6, 2]
    assert pack.rows == (0, 1) and pack.real_tokens == 4


def test_rows_of_one_token_alone_make_no_pack() -> None:
    assert pack_step([row((), (5,))], [0], token_budget=None) == []
    assert pack_step([row((), (5,))], [0], token_budget=3) == []
    assert pack_step([], [], token_budget=3) == []
    assert packed_tokens([row((), (5,))], [0]) == 0


def test_a_row_over_the_budget_has_its_own_pack_and_is_not_split() -> None:
    examples = [row((1, 2), (3, 4)), row(tuple(range(20)), (7, 9)), row((1, 5), (6,))]
    long, rest = check(examples, [0, 1, 2], 5)
    assert long.rows == (1,) and long.computed_tokens == 21
    assert rest.rows == (0, 2) and rest.computed_tokens == 4
    # A budget of one token: every path alone.
    assert [pack.rows for pack in check(examples, [0, 1, 2], 1)] == [(1,), (0,), (2,)]


def test_a_long_row_does_not_part_its_neighbours() -> None:
    # In order of ids the long row stands between the two that share four tokens.
    examples = [
        row((1, 1, 1, 1), (2, 9)),
        row((1, 1, 1, 1), (3,) * 20),
        row((1, 1, 1, 1), (4, 9)),
    ]
    long, both = check(examples, [0, 1, 2], 6)
    assert long.rows == (1,) and both.rows == (0, 2) and both.computed_tokens == 6


def test_the_cut_falls_where_little_is_shared() -> None:
    def answers(system: Ids, user: Ids, count: int) -> list[Example]:
        return [row(system + user, (100 + answer, 1)) for answer in range(count)]

    system = tuple(range(10))
    examples = answers(system, (20,) * 30, 4) + answers(system, (21,) * 30, 4)
    # One tree of 10 + 2 x (30 + 4) = 78. A cut by user prompt costs the system prompt again.
    (whole,) = check(examples, list(range(8)), 78)
    first, second = check(examples, [0, 4, 1, 5, 2, 6, 3, 7], 77)
    assert first.computed_tokens == second.computed_tokens == 44
    assert {first.rows, second.rows} == {(0, 1, 2, 3), (4, 5, 6, 7)}
    assert whole.computed_tokens == packed_tokens(examples, list(range(8))) == 78


def test_what_a_pack_shares_with_a_row_is_what_its_nearest_row_does() -> None:
    # The two rows that begin with 1 2 0 1 share that, and the first row only the 1; counting the
    # farther row of a pack instead of the nearest one leads to a cut of 13 tokens.
    examples = [
        row(ids[:-1], ids[-1:])
        for ids in ((1, 1, 1, 1, 0), (0, 2), (1, 2, 0, 1, 0, 0, 2), (1, 2, 0, 1, 2), (2, 1, 2))
    ]
    first, second = check(examples, list(range(5)), 9)
    assert (first.rows, second.rows) == ((0, 2, 3), (1, 4))
    assert first.computed_tokens + second.computed_tokens == 12


def test_rows_that_share_nothing_are_packed_by_their_lengths() -> None:
    lengths = [60, 40, 30, 70, 50, 20, 30]  # 3 x 100 in one way only, whatever order they stand in
    examples = [row((number,), (99,) * length) for number, length in enumerate(lengths)]
    packs = check(examples, list(range(7)), 100)
    assert [pack.computed_tokens for pack in packs] == [100, 100, 100]


@settings(max_examples=250, deadline=None)
@given(st.one_of(FLAT, forests()), st.integers(1, 40))
def test_any_forest_under_any_budget(examples: list[Example], budget: int) -> None:
    rows = list(range(len(examples)))
    whole = check(examples, rows, None)
    packs = check(examples, rows, budget)
    assert sum(pack.computed_tokens for pack in whole) == packed_tokens(examples, rows)
    # Cutting never computes more than rows one by one, nor leaves two packs that fit in one.
    alone = sum(max(len(ids_of(example)) - 1, 0) for example in examples)
    assert sum(pack.computed_tokens for pack in packs) <= alone
    assert len(packs) == 1 or all(
        packed_tokens(examples, [*one.rows, *other.rows]) > budget
        for at, one in enumerate(packs)
        for other in packs[:at]
    )


@settings(max_examples=60, deadline=None)
@given(forests())
def test_budgets_of_every_size(examples: list[Example]) -> None:
    rows = list(range(len(examples)))
    needed = packed_tokens(examples, rows)
    counts = [len(check(examples, rows, budget)) for budget in range(1, needed + 2)]
    assert not counts or counts[-1] == (1 if needed else 0)
    if needed:
        assert counts[needed - 1] == 1  # exactly enough is enough


def few_packs(weights: list[int], budget: int) -> int:
    """The least number of bins, by trying all partitions."""

    def place(at: int, bins: list[int]) -> int:
        if at == len(weights):
            return len(bins)
        tries = [
            place(at + 1, [*bins[:n], bins[n] + weights[at], *bins[n + 1 :]])
            for n in range(len(bins))
            if bins[n] + weights[at] <= budget
        ]
        return min([*tries, place(at + 1, [*bins, weights[at]])])

    return place(0, [])


def test_about_as_few_packs_as_there_can_be() -> None:
    numbers, one_more = random.Random(0), 0
    for _ in range(150):
        lengths = [numbers.randint(2, 30) for _ in range(numbers.randint(3, 7))]
        examples = [row((number,), (99,) * n) for number, n in enumerate(lengths)]
        budget = numbers.randint(max(lengths), sum(lengths))
        found = len(check(examples, list(range(len(lengths))), budget))
        one_more += found - few_packs(lengths, budget)
        assert found <= few_packs(lengths, budget) + 1
    assert one_more <= 5


def same(one: Pack, other: Pack) -> bool:
    return all(
        torch.equal(value, vars(other)[name])
        if isinstance(value, torch.Tensor)
        else value == vars(other)[name]
        for name, value in vars(one).items()
    )


def test_packs_are_a_function_of_the_arguments() -> None:
    numbers = random.Random(1)
    examples = [
        row((1, 2, numbers.randint(3, 5)), tuple(numbers.choices(range(9), k=6))) for _ in range(40)
    ]
    rows = numbers.sample(range(40), 24)
    for budget in (None, 20, 60):
        first = pack_step(examples, rows, token_budget=budget)
        random.seed(2)  # nothing is drawn
        second = pack_step(list(examples), tuple(rows), token_budget=budget)
        assert len(first) == len(second)
        assert all(same(one, other) for one, other in zip(first, second, strict=True))


def test_pack_on_another_device_is_the_same_pack() -> None:
    (pack,) = pack_step([row((1, 2), (3, 4))], [0], token_budget=None)
    assert same(pack.to(torch.device("cpu")), pack)
    meta = pack.to(torch.device("meta"))
    tensors = [value for value in vars(meta).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7 and all(tensor.is_meta for tensor in tensors)


@pytest.mark.parametrize("multiple", [1, 4, 128])
@given(FLAT)
def test_idle_tokens_fill_a_pack_up_and_change_nothing_else(
    multiple: int, examples: list[Example]
) -> None:
    for pack in pack_step(examples, range(len(examples)), token_budget=None):
        whole = filled(pack, multiple)
        idle = whole.computed_tokens - pack.computed_tokens
        assert whole.computed_tokens == len(whole.input_ids) == len(whole.position_ids)
        assert whole.computed_tokens % multiple == 0 and 0 <= idle < multiple
        assert predictions_in(whole) == predictions_in(pack)  # contexts and targets, hence the loss
        assert contexts(whole)[: pack.computed_tokens] == contexts(pack)
        assert whole.position_ids[pack.computed_tokens :].tolist() == list(range(idle))
        assert whole.rows == pack.rows and whole.real_tokens == pack.real_tokens


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_of_nothing_is_a_bug_of_the_caller(budget: int) -> None:
    with pytest.raises(AssertionError, match=f"a budget of {budget} tokens"):
        pack_step([row((1,), (2,))], [0], token_budget=budget)
