"""Batches: which rows make a step, and how they are laid out for the model.

Owns the order of rows (a pure function of seed and epoch), how often the rows of a weighted source
come, and the cut of a step into micro-batches of one fixed number of rows, padded on the right.
Supervision is a list of (position, target, weight) into the flattened batch, so that another layout
of the same rows can take its place.
"""

import hashlib
import math
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from myna.data.store import Example, Examples, mix


@dataclass(frozen=True)
class Batch:
    """Some rows of one step, computed at once (B rows, T tokens, S trained tokens)."""

    rows: tuple[int, ...]
    """Indices of the rows in the training set."""
    input_ids: Tensor
    """(B, T) int64, padded on the right."""
    attention_mask: Tensor
    """(B, T) int64, 1 where a token is real."""
    positions: Tensor
    """(S,) int64 into the flattened (B*T): where trained tokens are predicted, one before each."""
    targets: Tensor
    """(S,) int64, the trained tokens."""
    weights: Tensor
    """(S,) float32: what each of them counts in the loss."""
    tokens: int
    """Real tokens, padding not counted."""

    @property
    def computed_tokens(self) -> int:
        """Token positions that the model computes, padding included."""
        return self.input_ids.numel()

    @property
    def num_predictions(self) -> int:
        """S."""
        return len(self.targets)

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(
            self.rows,
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.positions.to(device),
            self.targets.to(device),
            self.weights.to(device),
            self.tokens,
        )


def num_targets(example: Example) -> int:
    """Trained tokens of a row: its completion, less a first token that nothing predicts."""
    return len(example.completion_ids) - (not example.prompt_ids)


def loss_weight(example: Example) -> float:
    """What a row counts in the loss: its trained tokens, each with the row's weight."""
    return example.weight * num_targets(example)


def targets_of_rows(examples: Examples) -> NDArray[np.int64]:
    """(N,) `num_targets` of every row."""
    targets: NDArray[np.int64] = examples.completion_lengths.astype(np.int64)
    targets -= examples.prompt_lengths == 0
    return targets


def loss_weights(examples: Examples) -> NDArray[np.float64]:
    """(N,) `loss_weight` of every row."""
    weights: NDArray[np.float64] = examples.weights.astype(np.float64)
    weights *= targets_of_rows(examples)
    return weights


class Draws:
    """How often each training row comes in an epoch, by the weight of the source it is from.

    A source of n rows and weight w gives round(w * n) rows to every epoch, one at least. They are
    taken one after the other from endless shuffles of the source, so that after any number of
    epochs two of its rows differ by one at most in how often they came: with a weight of 2 each is
    there twice, with 0.5 one half in the first epoch and the other half in the second.

    Args:
        sources: the row numbers of each source, and its weight.
    """

    def __init__(self, sources: Sequence[tuple[NDArray[np.int64], float]]) -> None:
        self._sources = [
            (rows, max(1, round(weight * len(rows)))) for rows, weight in sources if len(rows)
        ]
        self.num_rows = sum(count for _, count in self._sources)
        """Rows of one epoch, repeated ones counted as often as they come."""

    @classmethod
    def of(cls, examples: Examples) -> "Draws":
        """By the weights of the files that the rows are from."""
        weights = examples.file_weights
        if set(weights) == {1.0}:
            return cls.once(len(examples))
        file_of_row = examples.file_indices
        return cls([(np.flatnonzero(file_of_row == at), w) for at, w in enumerate(weights)])

    @classmethod
    def once(cls, num_rows: int) -> "Draws":
        """All rows, each once per epoch."""
        return cls([(np.arange(num_rows), 1.0)])

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The rows of an epoch, from 0, shuffled; a function of its arguments."""
        drawn = [
            rows[self._drawn(len(rows), count, f"{seed}:{number}", epoch)]
            for number, (rows, count) in enumerate(self._sources)
        ]
        chosen = np.concatenate(drawn)
        del drawn
        chosen.sort()
        order = array("q")  # 8 bytes a row, where a list has 36
        order.frombytes(chosen.view(np.uint8).data)
        del chosen
        random.Random(f"{seed}:{epoch}").shuffle(order)
        return np.frombuffer(order, np.int64)

    @staticmethod
    def _drawn(num_rows: int, count: int, seed: str, epoch: int) -> NDArray[np.int64]:
        """`count` places in a source of `num_rows` rows; whole shuffles need not be shuffled."""
        if count % num_rows == 0:
            return np.tile(np.arange(num_rows), count // num_rows)
        places = np.arange(epoch * count, (epoch + 1) * count)
        cycles, within = np.divmod(places, num_rows)
        for cycle in {int(cycles[0]), int(cycles[-1])}:
            here = cycles == cycle
            if np.count_nonzero(here) < num_rows:
                digest = hashlib.sha256(f"{seed}:{cycle}".encode()).digest()
                key = np.uint64(int.from_bytes(digest[:8], "little"))
                shuffled = np.argsort(mix(np.arange(num_rows, dtype=np.uint64) ^ key))
                within[here] = shuffled[within[here]]
        return within


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Optimizer steps in one pass over `num_rows` rows; the last takes the rows left over."""
    return math.ceil(num_rows / batch_size)


def num_steps(num_rows: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimizer steps of a whole run, with `num_rows` rows in an epoch."""
    steps = math.ceil(epochs * steps_per_epoch(num_rows, batch_size))
    return steps if max_steps is None else min(steps, max_steps)


def rows_of_steps(
    rows: int | Draws, batch_size: int, *, seed: int, first_step: int, last_step: int
) -> Iterator[tuple[int, float, list[int]]]:
    """(step, epoch reached after it, row indices) for steps `first_step` to `last_step`, from 1.

    Each epoch is one shuffle by (seed, epoch); a resumed run gets the same rows. A number for
    `rows` means so many, each once per epoch.
    """
    draws = Draws.once(rows) if isinstance(rows, int) else rows
    per_epoch = steps_per_epoch(draws.num_rows, batch_size)
    epoch, order = -1, np.empty(0, np.int64)
    for step in range(first_step, last_step + 1):
        if (step - 1) // per_epoch != epoch:
            epoch = (step - 1) // per_epoch
            order = draws.order(seed, epoch)
        start = (step - 1) % per_epoch * batch_size
        yield step, step / per_epoch, order[start : start + batch_size].tolist()


def padded_batches(
    examples: Sequence[Example], rows: Sequence[int], *, micro_batch_size: int, pad_id: int
) -> list[Batch]:
    """The rows of one step in their order, `micro_batch_size` at a time."""
    return [
        _pad(examples, tuple(rows[start : start + micro_batch_size]), pad_id)
        for start in range(0, len(rows), micro_batch_size)
    ]


def _pad(examples: Sequence[Example], rows: tuple[int, ...], pad_id: int) -> Batch:
    chosen = [examples[row] for row in rows]
    lengths = [len(example.prompt_ids) + len(example.completion_ids) for example in chosen]
    width = max(lengths)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
    positions: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for line, (example, length) in enumerate(zip(chosen, lengths, strict=True)):
        ids = [*example.prompt_ids, *example.completion_ids]
        input_ids[line, :length] = torch.tensor(ids, dtype=torch.int64)
        attention_mask[line, :length] = 1
        # The token at t is predicted from t - 1; the first of a row is predicted from nothing.
        first = max(len(example.prompt_ids), 1)
        positions.extend(range(line * width + first - 1, line * width + length - 1))
        targets.extend(ids[first:])
        weights.extend([example.weight] * len(ids[first:]))
    return Batch(
        rows,
        input_ids,
        attention_mask,
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(targets, dtype=torch.int64),
        torch.tensor(weights, dtype=torch.float32),
        sum(lengths),
    )
