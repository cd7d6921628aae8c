import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data import statistics
from myna.data.conversation import Place
from myna.data.statistics import count_sharing, find_leaks, find_repeats
from myna.data.store import Example, Examples


def example(prompt: Any, completion: Any, *, row: int = 1, **extra: Any) -> Example:
    """Ids, or texts whose characters become ids."""
    texts = [part if isinstance(part, str) else "" for part in (prompt, completion)]
    ids = [
        tuple(map(ord, part)) if isinstance(part, str) else part for part in (prompt, completion)
    ]
    place = Place(Path(extra.pop("file", "rows.jsonl")), row, row)
    return Example(*texts, *ids, place, extra.pop("turn", 1), **extra)


def examples(*pairs: tuple[Any, Any]) -> Examples:
    return Examples.of(
        [example(prompt, answer, row=row) for row, (prompt, answer) in enumerate(pairs, 1)]
    )


def test_repeats_and_conflicts_counted_by_hand() -> None:
    found = find_repeats(
        examples(("a?", "yes"), ("b?", "no"), ("a?", "no"), ("a?", "yes"), ("b?", "no"))
    )
    assert found.first.tolist() == [0, 1, 2, 0, 1]
    assert found.is_duplicate.tolist() == [False, False, False, True, True]
    # Only a? has two answers; b? has one twice.
    assert found.other.tolist() == [2, -1, 0, 2, -1]
    assert found.conflicts == 1
    assert len(find_repeats(Examples.of([])).first) == 0


def test_plain_texts_behind_a_begin_token_contradict_nobody() -> None:
    rows = examples(((1,), "one"), ((1,), "two"), ((1,), "one"), ((), "one"), ((), "two"))
    found = find_repeats(rows)
    assert (found.conflicts, found.other.tolist()) == (0, [-1] * 5)
    assert found.first.tolist() == [0, 1, 0, 3, 4]
    texts = Examples.of([example("<", text) for text in ("One day.", "Two days.")])
    leaks = find_leaks(texts, Examples.of([example("<", "one  day."), example("<", "Never.")]))
    assert (leaks.similar_answer, leaks.total) == (1, 1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_repeats_are_those_of_comparing_all_with_all(pairs: list[tuple[int, int]]) -> None:
    found = find_repeats(examples(*(((prompt, 9), (answer,)) for prompt, answer in pairs)))
    assert found.first.tolist() == [pairs.index(pair) for pair in pairs]
    for (prompt, answer), other in zip(pairs, found.other.tolist(), strict=True):
        others = {a for p, a in pairs if p == prompt} - {answer}
        assert (other >= 0) == bool(others)
        if others:
            assert pairs[other][0] == prompt and pairs[other][1] in others
    answers = {prompt: {a for p, a in pairs if p == prompt} for prompt, _ in pairs}
    assert found.conflicts == sum(len(distinct) > 1 for distinct in answers.values())


def test_leaks_are_counted_once_under_the_strongest() -> None:
    trained = examples(
        ("Who are you?", "A bird."),
        ("How old?", "Ten."),
        ("Where do you live?", "In a tree at the sea."),
    )
    held_out = examples(
        ("who  are\nYOU?", "a bird."),  # question and answer
        ("WHO are you?", "Nobody."),  # question
        ("What is two times five?", "Ten."),  # answer
        ("Where is your nest?", "in a tree  at the sea."),  # similar answer
        ("What do you eat?", "Figs."),  # nothing
    )
    found = find_leaks(trained, held_out)
    assert (found.question_and_answer, found.question) == (1, 1)
    assert (found.answer, found.similar_answer) == (1, 1)
    assert (found.total, found.held_out) == (4, 5)
    assert find_leaks(trained, examples(("x", "y"))).total == 0


def test_what_two_rows_share_is_counted_by_hand() -> None:
    # One step: 1 2 3 is shared, and no row's last token is computed. 3 + (4 5) + (6) of 5 + 1 + 5.
    rows = examples(((1, 2, 3), (4, 5, 9)), ((1, 2, 3), (6, 9)))
    found = count_sharing(rows, batch_size=2, seed=0)
    assert (found.tokens, found.computed_tokens) == (11, 6)
    assert (found.steps, found.counted_steps, found.is_exact) == (1, 1, True)
    assert found.saved == pytest.approx(5 / 11)
    # A row for itself shares with nobody.
    assert count_sharing(rows, batch_size=1, seed=0).computed_tokens == 5 + 4


token_rows = st.lists(
    st.lists(st.integers(1, 3), min_size=2, max_size=6).map(tuple), min_size=1, max_size=24
)


@settings(deadline=None)
@given(token_rows, st.integers(1, 5), st.integers(0, 9))
def test_what_is_computed_is_the_distinct_beginnings_of_each_step(
    rows: list[tuple[int, ...]], batch_size: int, seed: int
) -> None:
    from myna.data.loader import rows_of_steps

    found = count_sharing(
        examples(*((row[:1], row[1:]) for row in rows)), batch_size=batch_size, seed=seed
    )
    steps = math.ceil(len(rows) / batch_size)
    drawn = rows_of_steps(len(rows), batch_size, seed=seed, first_step=1, last_step=steps)
    beginnings = sum(
        len({rows[index][:end] for index in step for end in range(1, len(rows[index]))})
        for _, _, step in drawn
    )
    assert (found.tokens, found.computed_tokens) == (sum(map(len, rows)), beginnings)


def test_of_a_long_epoch_some_steps_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SAMPLED_TOKENS", 40)
    rows = examples(*(((1, 2, 3, 4), (5, 9)) for _ in range(60)))
    found = count_sharing(rows, batch_size=2, seed=0)
    # 360 tokens are nine samples' worth: every ninth of 30 steps.
    assert (found.steps, found.counted_steps, found.is_exact) == (30, 4, False)
    # Any two rows are equal and share all five computed tokens: what is saved holds for all steps.
    assert (found.tokens, found.computed_tokens) == (360, 150)
