"""Loss on held-out rows, as the training step defines it.

Owns one number: the mean loss per trained token, weighted as in training, without dropout and
without drawing a random number, as two sums over given rows or of each row.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from myna.data.loader import loss_weight, loss_weights
from myna.data.store import Example, Examples
from myna.distributed.group import ALONE, Group
from myna.training.computation import Computation

ROWS_AT_ONCE = 16
"""Held-out rows that are cut into pieces together."""


@torch.no_grad()
def held_out_sums(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    computation: Computation,
    device: torch.device,
    group: Group = ALONE,
) -> Tensor:
    """(2,) float32: summed loss and summed weights of this process's share of `examples`.

    Added over all processes of `group`, their quotient is the loss. `model` keeps its mode.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, device=device)
    # By length, so that little is padded; the sum does not depend on the order of rows.
    examples = Examples.of(examples)
    weights = loss_weights(examples)
    order = np.argsort(examples.prompt_lengths, kind="stable").tolist()
    order = order[group.rank :: group.size]
    try:
        for start in range(0, len(order), ROWS_AT_ONCE):
            rows = order[start : start + ROWS_AT_ONCE]
            for piece in computation.pieces(examples, rows):
                sums[0] += computation.summed_loss(model, piece)
            sums[1] += float(weights[rows].sum())
    finally:
        model.train(was_training)
    return sums


@torch.no_grad()
def row_sums(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    computation: Computation,
    on_row: Callable[[], None] = lambda: None,
) -> list[tuple[float, float]]:
    """Summed loss and summed weights of every example, in order, each computed alone.

    Over all examples their quotient is the loss of `held_out_sums`. `on_row` is called after each.
    """
    was_training = model.training
    model.eval()
    found = []
    try:
        for row in range(len(examples)):
            pieces = computation.pieces(examples, [row])
            loss = sum(float(computation.summed_loss(model, piece)) for piece in pieces)
            found.append((loss, loss_weight(examples[row])))
            on_row()
    finally:
        model.train(was_training)
    return found
