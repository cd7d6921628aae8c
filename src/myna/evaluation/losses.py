"""Losses of base and adapter, row by row, as training defines them.

Owns switching between the two in one model, and the refusal of a loss that is no number. What a
loss is belongs to `training`: the same cross-entropy over the same trained tokens, each with its
row's weight.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from myna.data.loader import num_targets
from myna.data.store import Example
from myna.errors import NonFiniteError
from myna.lora.inject import adapter_switched_off
from myna.training.computation import Padded
from myna.training.validate import row_sums

Side = Literal["base", "adapter"]
SIDES: tuple[Side, ...] = ("base", "adapter")
"""What is compared: the model without and with its adapter."""

Sides = dict[Side, float]
"""A number for each."""


@contextlib.contextmanager
def side_of(model: nn.Module, side: Side) -> Iterator[None]:
    """Inside the block `model` computes as the base alone, or as it is."""
    with adapter_switched_off(model) if side == "base" else contextlib.nullcontext():
        yield


@dataclass(frozen=True)
class Losses:
    """Loss of some rows by both sides."""

    sums: dict[Side, list[float]]
    """Per row the weighted cross-entropy, summed over its trained tokens."""
    weights: list[float]
    """Per row the weights of its trained tokens, summed."""
    tokens: int
    """Trained tokens of all rows."""

    def mean(self) -> Sides:
        """Per trained token over all rows: the held-out loss of training."""
        return {side: math.fsum(self.sums[side]) / math.fsum(self.weights) for side in SIDES}

    def of_row(self, row: int) -> Sides:
        """Per trained token of one row."""
        # A text of a single token, which nothing predicts, has no loss and no weight.
        return {side: self.sums[side][row] / (self.weights[row] or 1.0) for side in SIDES}


def losses_of(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    pad_id: int,
    on_row: Callable[[], None] = lambda: None,
) -> Losses:
    """Losses of `examples`, which all have a trained token, under the model's own attention.

    Raises NonFiniteError for a loss that is no number, naming the row.
    """
    device = next(model.parameters()).device
    # One row at a time, so that each has a loss of its own; nothing is padded then.
    computation = Padded(1, pad_id, torch.device(device))
    sums: dict[Side, list[float]] = {}
    weights: list[float] = []
    for side in SIDES:
        with side_of(model, side):
            found = row_sums(model, examples, computation=computation, on_row=on_row)
        sums[side] = [loss for loss, _ in found]
        weights = [weight for _, weight in found]
        for example, loss in zip(examples, sums[side], strict=True):
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"{example.place}: the loss of the {side} is {loss}.\n  The weights of the "
                    "base or of the adapter are broken, or dtype: float32 is needed."
                )
    return Losses(sums, weights, sum(map(num_targets, examples)))
