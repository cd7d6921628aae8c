"""Loss on held-out rows, as the training step defines it.

Owns one number: the mean loss per trained token over given rows, without dropout and without
drawing a random number.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from myna.data.encode import Example
from myna.data.loader import Batch, padded_batches
from myna.distributed.group import ALONE, Group


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the batch's trained tokens, in float32; a scalar with gradient."""
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits
    # (B, T, V) -> (S, V): softmax only where a token is trained.
    chosen = logits.flatten(0, 1)[batch.positions].float()
    return nn.functional.cross_entropy(chosen, batch.targets, reduction="sum")


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    micro_batch_size: int,
    pad_id: int,
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
    for batch in padded_batches(examples, order, micro_batch_size=micro_batch_size, pad_id=pad_id):
        sums[0] += summed_loss(model, batch.to(device)).item()
        sums[1] += len(batch.targets)
    model.train(was_training)
    loss, tokens = group.add(sums).tolist()
    return loss / tokens, int(tokens)
