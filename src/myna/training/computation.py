"""How the rows of a step are computed: as packs of shared prefixes, or as padded micro-batches.

Owns the cut of a step's rows into pieces, also ahead of time, the summed loss of a piece, and which
layers recompute their activations; none of these changes the loss or the gradients. Whether a model
can be packed is found out at the start of a run; how large pieces may be is `memory`'s to say.
"""

import contextlib
import inspect
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from myna.data.conversation import Place
from myna.data.loader import Batch, padded_batches
from myna.data.packing import Pack, filled, pack_step, packed_tokens
from myna.data.store import Example
from myna.models.last_layer import shorten_last_layer
from myna.models.packed import check_packing, longrope_boundary, packed_attention
from myna.ops.attention import TreeLayout, tree_layout
from myna.ops.cross_entropy import frozen_head_cross_entropy

TOKEN_BUDGET = 8192
"""Tokens computed at once in a pack where memory does not ask for less."""

FILLED_TO = 128
"""Packs that are compiled size by size have a multiple of so many tokens: a GPU computes tiles of
that height anyway."""


class Piece(Protocol):
    """Some rows of a step, laid out to be computed at once."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Indices of the rows in the training set."""

    @property
    def computed_tokens(self) -> int:
        """Token positions that the model computes."""

    @property
    def num_predictions(self) -> int:
        """Trained tokens: positions and targets that the head computes."""


class Computation(Protocol):
    """One way to compute steps. `prepared` is entered once around all of them."""

    @property
    def unit(self) -> Literal["tokens", "rows"]:
        """What the size of a piece is counted in."""

    @property
    def limit(self) -> int:
        """Size of a piece at most; a single row that is larger stands alone."""

    @property
    def limit_is_set(self) -> bool:
        """Whether the settings fix how steps are cut."""

    def cut_at(self, limit: int) -> Self:
        """The same computation in pieces of this size at most."""

    def limit_near(self, tokens: int, longest: int) -> int:
        """The limit at which pieces have about `tokens` tokens, the longest row being `longest`."""

    def size(self, piece: Any) -> int:
        """The size of a piece, in `unit`."""

    def most_tokens(self, examples: Sequence[Example], rows: Sequence[int]) -> int:
        """Tokens of the largest piece of these rows were there no limit, quickly counted."""

    def prepared(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Make `model` ready for forwards and backwards of pieces; afterwards it is as before."""

    def pieces(self, examples: Sequence[Example], rows: Sequence[int]) -> Sequence[Piece]:
        """The rows `rows` of `examples`, each in exactly one piece. A function of its arguments."""

    def summed_loss(self, model: nn.Module, piece: Any) -> Tensor:
        """Weighted cross-entropy summed over the piece's trained tokens, float32, with gradient."""


@dataclass(frozen=True)
class Padded:
    """Micro-batches of a fixed number of rows under the model's own attention, padded."""

    limit: int
    """Rows in a micro-batch."""
    pad_id: int
    device: torch.device
    limit_is_set: bool = False

    @property
    def unit(self) -> Literal["tokens", "rows"]:
        """See `Computation`."""
        return "rows"

    def cut_at(self, limit: int) -> Self:
        """See `Computation`."""
        return replace(self, limit=limit)

    def limit_near(self, tokens: int, longest: int) -> int:
        """See `Computation`."""
        return max(1, tokens // longest)

    def size(self, piece: Batch) -> int:
        """Rows."""
        return len(piece.rows)

    def most_tokens(self, examples: Sequence[Example], rows: Sequence[int]) -> int:
        """See `Computation`; micro-batches have their fixed number of rows."""
        lengths = [
            len(examples[row].prompt_ids) + len(examples[row].completion_ids) for row in rows
        ]
        cuts = [lengths[at : at + self.limit] for at in range(0, len(rows), self.limit)]
        return max((len(cut) * max(cut) for cut in cuts), default=0)

    @contextlib.contextmanager
    def prepared(self, model: nn.Module) -> Iterator[None]:
        """Nothing to do."""
        yield

    def pieces(self, examples: Sequence[Example], rows: Sequence[int]) -> list[Batch]:
        """The rows in their order, `limit` at a time."""
        batches = padded_batches(examples, rows, micro_batch_size=self.limit, pad_id=self.pad_id)
        return [batch.to(self.device) for batch in batches]

    def summed_loss(self, model: nn.Module, piece: Batch) -> Tensor:
        """See `Computation`."""
        logits = model(
            input_ids=piece.input_ids, attention_mask=piece.attention_mask, use_cache=False
        ).logits
        # (B, T, V) -> (S, V): softmax only where a token is trained.
        chosen = logits.flatten(0, 1)[piece.positions].float()
        return nn.functional.cross_entropy(chosen, piece.targets, reduction="none") @ piece.weights


@dataclass(frozen=True)
class PlannedPack:
    """A pack on the device, and what its computation needs to know beforehand.

    All of it is made before the step that computes it, for much of it is the work of the CPU.
    """

    pack: Pack
    layout: TreeLayout
    predicting: Tensor
    """(P,) int64: positions that predict, each once."""
    which: Tensor
    """(N,) int64: for every prediction, its place in `predicting`."""

    @property
    def rows(self) -> tuple[int, ...]:
        """See `Piece`."""
        return self.pack.rows

    @property
    def computed_tokens(self) -> int:
        """See `Piece`."""
        return self.pack.computed_tokens

    @property
    def num_predictions(self) -> int:
        """See `Piece`."""
        return len(self.pack.positions)


@dataclass(frozen=True)
class Packed:
    """Token trees: every distinct prefix of a step's rows is computed once.

    Without dropout the gradients are those of separate rows. With it, rows that share a prefix
    share its dropout mask: the same expectation, other noise.
    """

    device: torch.device
    micro_batch_size: int | None = None
    """Rows in a pack at most. None: as many as `token_budget` allows."""
    length_boundary: int | None = None
    """Rows that compute up to so many tokens and longer ones do not share a pack (longrope)."""
    fused_head: bool = False
    """Loss by `frozen_head_cross_entropy`, without logits."""
    short_last_layer: bool = False
    """The last layer ends in the predicting positions; with `fused_head` only."""
    token_budget: int = TOKEN_BUDGET
    """Tokens in a pack at most; the memory planner's to choose."""
    multiple: int = 1
    """Packs are filled up with idle tokens to a multiple of so many."""

    @property
    def unit(self) -> Literal["tokens", "rows"]:
        """See `Computation`."""
        return "tokens"

    @property
    def limit(self) -> int:
        """See `Computation`."""
        return self.token_budget

    @property
    def limit_is_set(self) -> bool:
        """See `Computation`."""
        return self.micro_batch_size is not None

    def cut_at(self, limit: int) -> Self:
        """See `Computation`."""
        return replace(self, token_budget=limit)

    def limit_near(self, tokens: int, longest: int) -> int:
        """See `Computation`; a row's last token is not computed."""
        return max(tokens, longest - 1)

    def size(self, piece: PlannedPack) -> int:
        """Tokens."""
        return piece.computed_tokens

    def most_tokens(self, examples: Sequence[Example], rows: Sequence[int]) -> int:
        """See `Computation`."""
        return max((packed_tokens(examples, run) for run in self._runs(examples, rows)), default=0)

    def prepared(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Switch attention to token trees: activations may be recomputed in the backward pass."""
        return packed_attention(model)

    def pieces(self, examples: Sequence[Example], rows: Sequence[int]) -> list[PlannedPack]:
        """Few packs, largest first."""
        return [
            self._planned(filled(pack, self.multiple))
            for run in self._runs(examples, rows)
            for pack in pack_step(examples, run, token_budget=self.token_budget)
        ]

    def _planned(self, pack: Pack) -> PlannedPack:
        layout = tree_layout(pack.segment_offsets, pack.parents, device=self.device)
        # A position may have several targets: the head computes it once.
        predicting, which = torch.unique(pack.positions, return_inverse=True)
        on_device = predicting.to(self.device), which.to(self.device)
        return PlannedPack(pack.to(self.device), layout, *on_device)

    def _runs(self, examples: Sequence[Example], rows: Sequence[int]) -> Iterator[list[int]]:
        """The rows that may share a pack."""
        for side in self._sides(examples, rows):
            size = self.micro_batch_size or max(1, len(side))
            for start in range(0, len(side), size):
                yield side[start : start + size]

    def _sides(self, examples: Sequence[Example], rows: Sequence[int]) -> list[list[int]]:
        if self.length_boundary is None:
            return [list(rows)]
        sides: tuple[list[int], list[int]] = ([], [])
        for row in rows:
            # A row's last token is not computed, neither here nor when the answer is generated.
            computed = len(examples[row].prompt_ids) + len(examples[row].completion_ids) - 1
            sides[computed > self.length_boundary].append(row)
        return [side for side in sides if side]

    def summed_loss(self, model: nn.Module, piece: PlannedPack) -> Tensor:
        """See `Computation`."""
        pack = piece.pack
        given = {
            "input_ids": pack.input_ids[None],
            "position_ids": pack.position_ids[None],
            "use_cache": False,
            "tree": piece.layout,
        }
        if self.fused_head:
            return self._fused_loss(model, piece, given)
        logits = model(**given, logits_to_keep=piece.predicting).logits[0]
        losses = nn.functional.cross_entropy(
            logits.float()[piece.which], pack.targets, reduction="none"
        )
        return losses @ pack.weights

    def _fused_loss(self, model: nn.Module, piece: PlannedPack, given: dict[str, Any]) -> Tensor:
        """The loss without logits: hidden states at trained positions against the frozen head."""
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        head = base.get_output_embeddings()
        if self.short_last_layer:
            given["predicting"] = piece.predicting
        hidden = base.get_decoder()(**given).last_hidden_state[0]
        return frozen_head_cross_entropy(
            hidden[piece.which if self.short_last_layer else piece.pack.positions],
            head.weight.detach(),
            piece.pack.targets,
            piece.pack.weights,
            softcap=getattr(base.config.get_text_config(), "final_logit_softcapping", None),
            bias=head.bias,
        )


class PiecesAhead:
    """The pieces of the next step, made by one thread while this step computes.

    Which pieces a step gets does not depend on it, for they are a function of computation and rows.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pieces")
        self._begun: tuple[Computation, list[int], Future[Sequence[Piece]]] | None = None

    def __enter__(self) -> Self:
        """The thread begins with the first order."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the thread; what it made is not needed."""
        self._worker.shutdown(cancel_futures=True)

    def begin(self, computation: Computation, rows: list[int]) -> None:
        """Order the pieces that `take` will be asked for next."""
        try:
            future = self._worker.submit(computation.pieces, self._examples, rows)
        except RuntimeError:  # no memory for a thread: `take` makes them
            return
        self._begun = (computation, rows, future)

    def take(self, computation: Computation, rows: list[int]) -> Sequence[Piece]:
        """`computation.pieces`: those that were ordered, or made here where others were."""
        begun, self._begun = self._begun, None
        if begun is not None and begun[:2] == (computation, rows):
            return begun[2].result()
        return computation.pieces(self._examples, rows)


def layers_to_recompute(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The decoder layers that can recompute their activations, lowest first.

    `model` is a transformers model, wrapped by peft or not. Empty for code that does not build its
    layers as transformers 5 does.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = base.get_decoder()
    return [
        module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)
    ]


def compile_layers(model: nn.Module, *, fixed_sizes: bool = False) -> int:
    """Let every decoder layer be compiled by torch when it is first called; their number.

    One layer's code serves all, so the wait does not grow with the model. Token counts are symbols:
    packs of another size do not compile again. With `fixed_sizes` every size has kernels of its
    own, for packs that are filled up to few sizes; a last layer that ends in the predicting
    positions, whose number is never fixed, keeps symbols. Attention over trees stays as it is, and
    so do LoRA layers with dropout, whose masks are drawn outside of torch.
    """
    layers = layers_to_recompute(model)
    for layer in layers:
        layer.compile(dynamic=not fixed_sizes or hasattr(layer, "_is_shortened"))
    if fixed_sizes:  # beyond its limit torch would silently stop compiling
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, TOKEN_BUDGET // FILLED_TO)
    return len(layers)


def recompute_activations(model: nn.Module, num_layers: int) -> None:
    """Let the `num_layers` lowest layers keep only their input and compute the rest again.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". May be called at any time
    between steps. The lowest, because they are recomputed last in the backward pass, when what the
    layers above them kept is already freed: the activations of one layer that is computed again
    come on top of the least. Non-reentrant, so nothing below the first adapter needs a gradient;
    transformers' own switch would make the embeddings' output require one.
    """
    layer: Any  # nn.Module's attributes are Tensor or Module to the type checker
    for number, layer in enumerate(layers_to_recompute(model)):
        layer.gradient_checkpointing = number < num_layers
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


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
    multiple: int = 1,
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
        short = fused_head and shorten_last_layer(model)
        return (
            Packed(device, micro_batch_size, boundary, fused_head, short, TOKEN_BUDGET, multiple),
            "packs of shared prefixes, checked against the model's own attention",
        )
    return (
        Padded(micro_batch_size or padded_rows, pad_id, device, micro_batch_size is not None),
        f"padded batches, because this model cannot be packed: {reason}",
    )
