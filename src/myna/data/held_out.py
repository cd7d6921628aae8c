"""Held-out rows: a split in which no prompt stands on both sides.

Owns which examples are kept from training for evaluation, as a pure function of their ids and a
seed. When and how they are evaluated is left to training.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from myna.data.store import Array, Example, Examples, changes, mix
from myna.errors import ConfigError


def split_held_out(
    examples: Iterable[Example], held_out: float, seed: int
) -> tuple[Examples, Examples]:
    """(trained, held out), each in the order of `examples`.

    Args:
        examples: all examples.
        held_out: a share below 1, or a number of examples. At most so many are taken, whole groups
            only: examples with the same prompt, and all turns of one conversation, stay together.
            A plain text, which has no prompt, is its own.
        seed: another seed, another split.

    Raises:
        ConfigError: nothing would be left on one of the sides.
    """
    examples = Examples.of(examples)
    if held_out == 0:
        return examples, examples.select([])
    wanted = int(held_out) if held_out >= 1 else max(1, round(held_out * len(examples)))
    questions = np.where(examples.turns == 0, examples.completion_hashes, examples.prompt_hashes)
    group = _groups(examples, questions)
    sizes = np.bincount(group)
    order = np.argsort(_least(group, mix(questions ^ _key(seed))), kind="stable")
    chosen = np.zeros(len(sizes), np.bool_)
    left = wanted
    for number in order:  # not as a list of millions, of which few are looked at
        if sizes[number] <= left:
            chosen[number] = True
            left -= int(sizes[number])
            if not left:
                break
    is_held = chosen[group]
    if not is_held.any() or is_held.all():
        raise ConfigError(
            f"held_out is {held_out:g}, and the data has {len(examples)} examples in {len(sizes)} "
            "groups without a prompt in common; expected a number that leaves some on both sides.\n"
            "  Choose another held_out, or 0 to hold nothing out."
        )
    return examples.select(np.flatnonzero(~is_held)), examples.select(np.flatnonzero(is_held))


def _groups(examples: Examples, questions: NDArray[np.uint64]) -> Array:
    """(N,) the number of each example's group: linked by questions, and by rows of the files."""
    rows = examples.file_indices.astype(np.int64) << 32 | examples.rows
    keys = [_numbered(rows), _numbered(questions)]
    del rows
    # The least number of an example known to be in the group.
    label: Array = np.arange(len(examples), dtype=keys[0].dtype)
    while True:
        before = label
        for key in keys:
            label = _least(key, label)[key]
        label = label[label]
        if np.array_equal(label, before):
            del keys, before
            return _numbered(label)


def _numbered(values: Array) -> Array:
    """Equal values get equal numbers, from 0, in the order of the values.

    As by `np.unique`, in half the memory: of millions of rows, this is where a run needs most.
    """
    order = np.argsort(values)
    is_new = changes(values[order])
    ranks = np.cumsum(is_new, dtype=np.min_scalar_type(len(values)))
    ranks -= 1
    numbers = np.empty_like(ranks)
    numbers[order] = ranks
    return numbers


def _least(group: Array, values: Array) -> Array:
    """The least value of each group."""
    least = np.full(int(group.max()) + 1, values.max(), values.dtype)
    np.minimum.at(least, group, values)
    return least


def _key(seed: int) -> np.uint64:
    digest = hashlib.sha256(f"held out:{seed}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))
