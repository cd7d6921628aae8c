"""Loss on held-out rows, as the training step defines it.

Owns one number: the mean loss per trained token over given rows, without dropout and without
drawing a random number.
"""

from collections.abc import Sequence

import torch
from torch import nn

from myna.data.encode import Example
from myna.data.loader import num_targets
from myna.distributed.group import ALONE, Group
from myna.training.computation import Computation

ROWS_AT_ONCE = 16
"""Held-out rows that are cut into pieces together."""


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    computation: Computation,
    device: torch.device,
    group: Group = ALONE,
) -> tuple[float, int]:
    """Mean loss per trained token over `examples`, and the number of those tokens.

    Every process of `group` computes its share of the rows and gets the same answer.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, device=device)  # loss, trained tokens
    # By length, so that little is padded; the sum does not depend on the order of rows.
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].prompt_ids))
    order = order[group.rank :: group.size]
    for start in range(0, len(order), ROWS_AT_ONCE):
        rows = order[start : start + ROWS_AT_ONCE]
        sums[0] += sum(
            computation.summed_loss(model, piece) for piece in computation.pieces(examples, rows)
        )
        sums[1] += sum(num_targets(examples[row]) for row in rows)
    model.train(was_training)
    loss, tokens = group.add(sums).tolist()
    return loss / tokens, int(tokens)
