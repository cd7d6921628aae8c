"""Who is next: models in turn, and the oldest within a model."""

from dataclasses import dataclass

from myna.inference.server.turns import Turns


@dataclass(frozen=True)
class One:
    model: str
    number: int
    kind: str = "greedy"


def fill(*ones: One) -> Turns[One]:
    turns: Turns[One] = Turns()
    for one in ones:
        turns.add(one)
    return turns


def drain(turns: Turns[One], count: int) -> list[list[One]]:
    """The batches that are computed one after the other."""
    batches = []
    while (first := turns.next()) is not None:
        batches.append(turns.take(first, count))
    return batches


def test_models_take_turns_however_much_one_of_them_asks() -> None:
    many = [One("a", number) for number in range(7)]
    few = [One("b", 0), One("c", 0), One("b", 1)]
    batches = drain(fill(*many, *few), 3)
    assert [(batch[0].model, [one.number for one in batch]) for batch in batches] == [
        ("a", [0, 1, 2]),
        ("b", [0, 1]),
        ("c", [0]),
        ("a", [3, 4, 5]),
        ("a", [6]),
    ]


def test_a_batch_is_of_one_kind_and_the_oldest_decides_which() -> None:
    ones = [One("a", 0, "seed"), One("a", 1), One("a", 2, "seed2"), One("a", 3)]
    batches = drain(fill(*ones), 8)
    assert [[one.number for one in batch] for batch in batches] == [[0], [1, 3], [2]]


def test_others_wait_only_where_they_cannot_be_computed_together() -> None:
    first = One("a", 0)
    turns = fill(first, One("a", 1))
    assert not turns.others_wait(first)
    turns.add(One("a", 2, "sampled"))
    assert turns.others_wait(first)
    turns = fill(first, One("b", 0))
    assert turns.others_wait(first)


def test_what_does_not_fit_waits_on_in_its_place() -> None:
    turns = fill(*(One("a", number) for number in range(4)))
    first = turns.next()
    assert first is not None
    taken = turns.take(first, 8, lambda one: one.number % 2 == 0)
    assert [one.number for one in taken] == [0, 2]
    assert [one.number for batch in drain(turns, 8) for one in batch] == [1, 3]


def test_one_that_leaves_is_not_computed() -> None:
    turns = fill(One("a", 0), One("b", 0))
    assert turns.remove(One("a", 0)) and not turns.remove(One("a", 0))
    assert len(turns) == 1
    assert drain(turns, 8) == [[One("b", 0)]]
    assert turns.next() is None
