"""The limit's counts and formulas against hand-counted examples."""

from pathlib import Path

import pytest

from limit import Counts, Sizes, limit_flops, shapes_of_step, shared_counts, unshared_counts
from myna.data.conversation import Place
from myna.data.store import Example

PLACE = Place(Path("rows.json"), 1, 1)
SIZES = Sizes(
    hidden=4, layers=2, heads=2, kv_heads=1, head_dim=2, mlp=6, vocabulary=10, rank=1
)  # fmt: skip


def row(prompt: tuple[int, ...], completion: tuple[int, ...]) -> Example:
    return Example("", "", prompt, completion, PLACE, 1)


ROWS = [row((1, 5), (6, 7)), row((1, 5), (6, 8, 2)), row((9,), (3,))]
"""Computed once: 1 5 6 8 and 9. 6 predicts 7 and 8, 5 predicts 6 twice, 8 predicts 2, 9 predicts 3.
The last tokens 7, 2 and 3 predict nothing."""


def test_counts_of_a_tree_by_hand() -> None:
    assert shared_counts(ROWS, [0, 1, 2]) == Counts(
        positions=5,
        supervised=4,  # 5, 6, 8, 9
        context=1 + 2 + 3 + 4 + 1,
        supervised_context=2 + 3 + 4 + 1,
    )


def test_counts_of_separate_rows_by_hand() -> None:
    assert unshared_counts(ROWS, [0, 1, 2]) == Counts(
        positions=3 + 4 + 1,
        supervised=2 + 3 + 1,
        context=(1 + 2 + 3) + (1 + 2 + 3 + 4) + 1,
        supervised_context=(2 + 3) + (2 + 3 + 4) + 1,
    )


def test_rows_without_a_prompt_do_not_train_their_first_token() -> None:
    rows = [row((), (4, 5, 6))]
    expected = Counts(positions=2, supervised=2, context=3, supervised_context=3)
    assert shared_counts(rows, [0]) == unshared_counts(rows, [0]) == expected


def test_flops_by_hand() -> None:
    # q 4x4, k 4x2, v 4x2, o 4x4 and three of 4x6: 120 weights a layer.
    assert SIZES.weights() == 120
    # A and B of rank 1: (4+4) + (4+2) + (4+2) + (4+4) + 3 (4+6), in two layers.
    assert SIZES.adapter == 116
    counts = Counts(positions=5, supervised=4, context=11, supervised_context=10)
    base = 5 * 4 * 2 * 120
    first_layer = 5 * 2 * (16 + 8 + 8)
    last_layer = (5 - 4) * 4 * (16 + 16 + 72)
    head = 4 * 4 * 10 * 4
    adapter = 5 * 6 * 116
    attention = 12 * 4 * (11 + 10)  # six products of two FLOPs, 2 heads of 2
    assert (
        limit_flops(SIZES, counts) == base - first_layer - last_layer + head + adapter + attention
    )


def test_published_shape_has_the_published_number_of_weights() -> None:
    bluelm = Sizes(4096, 32, 32, 32, 128, 11_008, 100_008, 8)
    assert bluelm.layers * bluelm.weights() == 6_476_005_376
    assert bluelm.adapter == 19_988_480


def test_products_of_a_step_are_all_its_frozen_weights() -> None:
    shapes = shapes_of_step(SIZES, positions=5, supervised=4)
    *layers, head = shapes
    assert head == ("head", 4, 4, 10, 1)
    assert sum(inner * outer * times for _, _, inner, outer, times in layers) == 2 * 120
    assert [name for name, *_ in layers] == ["q+o", "k+v", "gate+up", "down"]


@pytest.mark.parametrize("counts", [Counts(7, 7, 28, 28), Counts(7, 1, 28, 7)])
def test_sharing_never_raises_the_limit(counts: Counts) -> None:
    more = Counts(counts.positions + 1, counts.supervised, counts.context + 8, 28)
    assert limit_flops(SIZES, counts) < limit_flops(SIZES, more)
