"""Held-out rows: a split in which no prompt stands on both sides.

Owns which examples are kept from training for evaluation, as a pure function of their ids and a
seed. When and how they are evaluated is left to training.
"""

import hashlib
from collections.abc import Sequence

from myna.data.encode import Example
from myna.errors import ConfigError


def split_held_out(
    examples: Sequence[Example], held_out: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(trained, held out), each in the order of `examples`.

    Args:
        examples: all examples.
        held_out: a share below 1, or a number of examples. At most so many are taken, whole groups
            only: examples with the same prompt, and all turns of one conversation, stay together.
        seed: another seed, another split.

    Raises:
        ConfigError: nothing would be left on one of the sides.
    """
    if held_out == 0:
        return list(examples), []
    wanted = int(held_out) if held_out >= 1 else max(1, round(held_out * len(examples)))
    groups = sorted(_groups(examples), key=lambda group: _rank(examples[group[0]], seed))
    chosen: set[int] = set()
    for group in groups:
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    if not chosen or len(chosen) == len(examples):
        raise ConfigError(
            f"held_out is {held_out:g}, and the data has {len(examples)} examples in {len(groups)} "
            "groups without a prompt in common; expected a number that leaves some on both sides.\n"
            "  Choose another held_out, or 0 to hold nothing out."
        )
    trained = [example for index, example in enumerate(examples) if index not in chosen]
    return trained, [examples[index] for index in sorted(chosen)]


def _groups(examples: Sequence[Example]) -> list[list[int]]:
    """Indices that belong together, by prompt or by row (union-find)."""
    parent = list(range(len(examples)))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[object, int] = {}
    for index, example in enumerate(examples):
        for key in (_question(example), (example.place.file, example.place.row)):
            other = first.setdefault(key, index)
            parent[find(index)] = find(other)
    groups: dict[int, list[int]] = {}
    for index in range(len(examples)):
        groups.setdefault(find(index), []).append(index)
    return list(groups.values())


def _question(example: Example) -> tuple[int, ...]:
    """The prompt; of a plain text, which has none, the text."""
    return example.completion_ids if example.turn == 0 else example.prompt_ids


def _rank(example: Example, seed: int) -> bytes:
    text = f"{seed}:{','.join(map(str, _question(example)))}"
    return hashlib.sha256(text.encode()).digest()
