"""How the rows of a step are computed: as packs of shared prefixes, or as padded micro-batches.

Owns the cut of a step's rows into pieces and the summed loss of a piece; both ways give the same
loss and gradients. Which of them a model can have is found out at the start of a run.
"""

import contextlib
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from myna.data.conversation import Place
from myna.data.encode import Example
from myna.data.loader import Batch, padded_batches
from myna.data.packing import Pack, pack_step
from myna.models.packed import check_packing, longrope_boundary, packed_attention
from myna.ops.attention import tree_layout
from myna.ops.cross_entropy import frozen_head_cross_entropy

TOKEN_BUDGET = 8192
"""Tokens computed at once in a pack where rows per micro-batch are not set."""


class Piece(Protocol):
    """Some rows of a step, laid out to be computed at once."""

    @property
    def computed_tokens(self) -> int:
        """Token positions that the model computes."""


class Computation(Protocol):
    """One way to compute steps. `prepared` is entered once around all of them."""

    def prepared(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Make `model` ready for forwards and backwards of pieces; afterwards it is as before."""

    def pieces(self, examples: Sequence[Example], rows: Sequence[int]) -> Sequence[Piece]:
        """The rows `rows` of `examples`, each in exactly one piece."""

    def summed_loss(self, model: nn.Module, piece: Any) -> Tensor:
        """Cross-entropy summed over the piece's trained tokens, float32, with gradient."""


@dataclass(frozen=True)
class Padded:
    """Micro-batches of a fixed number of rows under the model's own attention, padded."""

    micro_batch_size: int
    pad_id: int
    device: torch.device

    @contextlib.contextmanager
    def prepared(self, model: nn.Module) -> Iterator[None]:
        """Nothing to do."""
        yield

    def pieces(self, examples: Sequence[Example], rows: Sequence[int]) -> list[Batch]:
        """The rows in their order, `micro_batch_size` at a time."""
        return padded_batches(
            examples, rows, micro_batch_size=self.micro_batch_size, pad_id=self.pad_id
        )

    def summed_loss(self, model: nn.Module, piece: Batch) -> Tensor:
        """See `Computation`."""
        batch = piece.to(self.device)
        logits = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits
        # (B, T, V) -> (S, V): softmax only where a token is trained.
        chosen = logits.flatten(0, 1)[batch.positions].float()
        return nn.functional.cross_entropy(chosen, batch.targets, reduction="sum")


@dataclass(frozen=True)
class Packed:
    """Token trees: every distinct prefix of a step's rows is computed once.

    Without dropout the gradients are those of separate rows. With it, rows that share a prefix
    share its dropout mask: the same expectation, other noise.
    """

    device: torch.device
    micro_batch_size: int | None = None
    """Rows in a pack at most. None: as many as `TOKEN_BUDGET` allows."""
    length_boundary: int | None = None
    """Rows up to this length and longer ones do not share a pack (longrope)."""
    fused_head: bool = False
    """Loss by `frozen_head_cross_entropy`, without logits."""

    def prepared(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Switch attention to token trees: activations may be recomputed in the backward pass."""
        return packed_attention(model)

    def pieces(self, examples: Sequence[Example], rows: Sequence[int]) -> list[Pack]:
        """Few packs, largest first."""
        packs: list[Pack] = []
        for side in self._sides(examples, rows):
            size = self.micro_batch_size or max(1, len(side))
            for start in range(0, len(side), size):
                packs += pack_step(examples, side[start : start + size], token_budget=TOKEN_BUDGET)
        return packs

    def _sides(self, examples: Sequence[Example], rows: Sequence[int]) -> list[list[int]]:
        if self.length_boundary is None:
            return [list(rows)]
        sides: tuple[list[int], list[int]] = ([], [])
        for row in rows:
            length = len(examples[row].prompt_ids) + len(examples[row].completion_ids)
            sides[length > self.length_boundary].append(row)
        return [side for side in sides if side]

    def summed_loss(self, model: nn.Module, piece: Pack) -> Tensor:
        """See `Computation`."""
        pack = piece.to(self.device)
        layout = tree_layout(pack.segment_offsets, pack.parents, device=self.device)
        given = {
            "input_ids": pack.input_ids[None],
            "position_ids": pack.position_ids[None],
            "use_cache": False,
            "tree": layout,
        }
        if self.fused_head:
            return _fused_loss(model, pack, given)
        # A position may have several targets: the head computes it once.
        predicting, which = torch.unique(pack.positions, return_inverse=True)
        logits = model(**given, logits_to_keep=predicting).logits[0]
        losses = nn.functional.cross_entropy(logits.float()[which], pack.targets, reduction="none")
        return losses @ pack.weights


def _fused_loss(model: nn.Module, pack: Pack, given: dict[str, Any]) -> Tensor:
    """The loss without logits: hidden states at trained positions against the frozen head."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    head = base.get_output_embeddings()
    hidden = base.get_decoder()(**given).last_hidden_state[0]
    return frozen_head_cross_entropy(
        hidden[pack.positions],
        head.weight.detach(),
        pack.targets,
        pack.weights,
        softcap=getattr(base.config.get_text_config(), "final_logit_softcapping", None),
        bias=head.bias,
    )


@torch.no_grad()
def _head_can_be_fused(model: PeftModel, device: torch.device) -> bool:
    """Whether the head is a plain linear layer and the fused loss is that of the model's logits.

    Heads that scale their logits, or that carry an adapter, are left to the model.
    """
    base: Any = model.get_base_model()
    if type(base.get_output_embeddings()) is not nn.Linear:
        return False
    place = Place(Path("probe"), 1, 1)
    rows = [
        Example("", "", (1, 2, 3), (4, 5, 6), place, 1),
        Example("", "", (1, 2), (7, 5), place, 1),
    ]
    was_training = model.training
    model.eval()
    try:
        losses = []
        for fused in (False, True):
            computation = Packed(device, fused_head=fused)
            with computation.prepared(model):
                (pack,) = computation.pieces(rows, [0, 1])
                losses.append(computation.summed_loss(model, pack).item())
    finally:
        model.train(was_training)
    exact = next(model.parameters()).dtype == torch.float32
    return math.isclose(*losses, rel_tol=1e-4 if exact else 2e-2)


def choose_computation(
    model: PeftModel,
    *,
    micro_batch_size: int | None,
    padded_rows: int,
    pad_id: int,
    device: torch.device,
) -> tuple[Computation, str]:
    """Packs where the model passes the check against its own attention, else padded batches.

    Returns the computation and a sentence that says which and why.
    """
    reason = check_packing(model)
    forward = inspect.signature(model.get_base_model().forward).parameters
    if reason is None and "logits_to_keep" not in forward:
        reason = "its head computes every position (forward has no logits_to_keep)"
    if reason is None:
        boundary = longrope_boundary(model)
        fused_head = _head_can_be_fused(model, device)
        return (
            Packed(device, micro_batch_size, boundary, fused_head),
            "packs of shared prefixes, checked against the model's own attention",
        )
    return (
        Padded(micro_batch_size or padded_rows, pad_id, device),
        f"padded batches, because this model cannot be packed: {reason}",
    )
