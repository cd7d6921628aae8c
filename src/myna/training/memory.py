"""The memory planner: how large pieces are and how many layers recompute, so that a step fits.

Owns the plan of a run: found before step 1 by measured trials of the largest piece, made smaller
when memory runs out later, and replayed when the run is resumed. How steps are cut and how layers
recompute is `computation`'s, how memory is measured is `device`'s, and to catch a lack of memory
and repeat the step is the loop's. A plan changes which sums are rounded together, never the rows of
a step.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import nn

from myna.data.loader import targets_of_rows
from myna.data.store import Example, Examples
from myna.device import (
    free_unused_memory,
    is_out_of_memory,
    memory_available,
    memory_in_use,
    peak_memory_within,
)
from myna.distributed.group import ALONE, Group
from myna.errors import ConfigError, OutOfMemoryError
from myna.training.computation import Computation, layers_to_recompute, recompute_activations
from myna.training.optimizer import adamw, trainable

Checkpointing = Literal["auto", "none", "all"] | int
"""`config.TrainConfig.checkpointing`."""
Part = Literal["step", "eval"]
"""What of a step runs out of memory: its training, or the evaluation after it."""

SHARE = 0.9
"""Part of the available memory that a plan may count on; the rest is for other processes and for
what allocators lose between the tensors."""

COMFORTABLE_TOKENS = 1024
"""Every piece reads all weights once more, which is little beside the arithmetic of so many tokens.
So steps are cut down to this size before layers recompute, which costs a third of the arithmetic;
below it, recomputing comes first."""

COUNTED_ROWS = 250_000
"""Rows of the run that are looked at to find the largest piece: about a second of work. A larger
one that comes after them is met like any lack of memory."""

_DOES_NOT_FIT = 2**62
"""Peak of a trial that ran out of memory."""


@dataclass(frozen=True)
class MemoryPlan:
    """How the steps of a run are computed, from a certain step on."""

    unit: Literal["tokens", "rows"]
    limit: int
    """Size of a piece at most, in `unit`."""
    layers_recomputed: int
    """So many of the lowest decoder layers recompute their activations."""
    num_layers: int
    step: int = 1
    """The first step that is computed so."""
    part: Part = "step"
    """`eval`: from the evaluation after that step on."""
    reason: str = ""
    """Why not in pieces as large as possible, without recomputation."""
    pieces: int | None = None
    """Pieces of the step with most tokens; None where that was not counted, as below."""
    largest_piece: int | None = None
    """Tokens of the largest piece."""
    expected_peak_bytes: int | None = None
    """Peak of the trial of that piece."""
    budget_bytes: int | None = None
    """What there was for it: the memory in use then and `SHARE` of what was available."""

    def __str__(self) -> str:
        """One line, with the reason and the numbers that led to it."""
        one, many = ("pack", "packs") if self.unit == "tokens" else ("micro-batch", "micro-batches")
        if self.pieces is None or self.largest_piece is None:
            cut = f"{many} of at most {self.limit:,} {self.unit}"
        else:
            count = f"1 {one}" if self.pieces == 1 else f"up to {self.pieces} {many}"
            cut = f"{count} of at most {self.largest_piece:,} tokens"
        text = f"steps in {cut}, {_recomputed(self.layers_recomputed, self.num_layers)}"
        if self.reason:
            text += f" ({self.reason})"
        if self.expected_peak_bytes is not None and self.budget_bytes is not None:
            text += f"; peak {_size(self.expected_peak_bytes)} expected "
            text += f"of {_size(self.budget_bytes)}"
        return text

    def to_json(self) -> dict[str, Any]:
        """As plan.json, events and checkpoints keep it; `MemoryPlan(**found)` reads it."""
        return asdict(self)

    @property
    def _moment(self) -> tuple[int, bool]:
        return self.step, self.part == "eval"


@dataclass(frozen=True)
class Ladder:
    """The ways to compute a step, from the fastest down to the one that takes least memory."""

    comfortable: int
    """The limit below which layers recompute before pieces become smaller still."""
    smallest: int
    """The limit at which every piece is one row."""
    num_layers: int
    limit_is_set: bool
    layers_are_set: bool

    def below(
        self, limit: int, layers: int, size: int, part: Part = "step", *, nearly: bool = False
    ) -> tuple[int, int]:
        """The next limit and number of layers, where pieces have `size` at most.

        The same again at the bottom. A quarter of the layers at a time, or one where it should
        `nearly` fit. An evaluation keeps no activations, so recomputing does not help it.
        """
        more_layers = not self.layers_are_set and part == "step" and layers < self.num_layers
        floor = self.comfortable if more_layers else self.smallest
        halved = max(math.ceil(min(limit, size) / 2), floor)
        if not self.limit_is_set and halved < min(limit, size):
            return halved, layers
        if more_layers:
            more = 1 if nearly else math.ceil(self.num_layers / 4)
            return limit, min(self.num_layers, layers + more)
        return limit, layers


def ladder_of(
    model: nn.Module,
    computation: Computation,
    examples: Sequence[Example],
    checkpointing: Checkpointing,
) -> tuple[Ladder, int]:
    """The ladder of a run, and the number of layers that recompute at its top.

    Raises ConfigError where `checkpointing` asks for layers that are not there.
    """
    num_layers = len(layers_to_recompute(model))
    if checkpointing == "all" and num_layers == 0:
        raise ConfigError(
            "train.checkpointing is 'all', but this model has no layers that can recompute their "
            "activations.\n  Use checkpointing: none."
        )
    if isinstance(checkpointing, int) and checkpointing > num_layers:
        raise ConfigError(
            f"train.checkpointing is {checkpointing}, but the model has {num_layers} layers that "
            "can recompute their activations.\n  Use a number up to that, all, or auto."
        )
    longest = int(Examples.of(examples).lengths.max())
    ladder = Ladder(
        comfortable=computation.limit_near(COMFORTABLE_TOKENS, longest),
        smallest=computation.limit_near(1, longest),
        num_layers=num_layers,
        limit_is_set=computation.limit_is_set,
        layers_are_set=checkpointing != "auto",
    )
    if checkpointing == "all":
        return ladder, num_layers
    return ladder, checkpointing if isinstance(checkpointing, int) else 0


class Memory:
    """The plan in force while a run goes on."""

    def __init__(
        self,
        model: nn.Module,
        computation: Computation,
        examples: Sequence[Example],
        *,
        checkpointing: Checkpointing,
        plans: Sequence[MemoryPlan],
    ) -> None:
        self._model = model
        examples = Examples.of(examples)
        self._ladder, layers = ladder_of(model, computation, examples, checkpointing)
        self._longest = int(examples.lengths.max())
        self.computation = computation
        """Cuts steps as the plan in force says."""
        first = MemoryPlan(computation.unit, computation.limit, layers, self._ladder.num_layers)
        self.plans: list[MemoryPlan] = list(plans) or [first]
        """All plans of the run, in the order in which they come into force."""
        self._use(self.plans[0])

    @property
    def plan(self) -> MemoryPlan:
        """The one in force."""
        return self._in_force

    def begin(self, step: int, part: Part) -> None:
        """Use the plan of this moment, so that a resumed run replays the plans of the first."""
        moment = (step, part == "eval")
        plan = [plan for plan in self.plans if plan._moment <= moment][-1]
        if plan is not self._in_force:
            self._use(plan)

    def shrink(self, step: int, part: Part, size: int) -> MemoryPlan:
        """Go one step down, because `part` of `step` ran out of memory with pieces of `size`.

        Raises OutOfMemoryError at the bottom.
        """
        limit, layers = self.computation.limit, self._in_force.layers_recomputed
        lower = self._ladder.below(limit, layers, size, part)
        if lower == (limit, layers):
            raise OutOfMemoryError(
                f"memory ran out in {_what(part)} {step}, and nothing smaller is left to try "
                f"than {self._in_force}.\n{_advice(self._ladder, self._longest)}"
            )
        plan = MemoryPlan(
            self.computation.unit,
            *lower,
            self._ladder.num_layers,
            step=step,
            part=part,
            reason=f"memory ran out in {_what(part)} {step}",
        )
        self.plans = [older for older in self.plans if older._moment <= plan._moment] + [plan]
        self._use(plan)
        return plan

    def _use(self, plan: MemoryPlan) -> None:
        self._in_force = plan
        self.computation = self.computation.cut_at(plan.limit)
        recompute_activations(self._model, plan.layers_recomputed)


class Shortage:
    """A block in which a lack of memory is noted rather than raised; what it held is let go."""

    def __init__(self) -> None:
        self.met = False

    def __enter__(self) -> Self:
        """The note."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        """Swallow `error` where it says that memory ran out."""
        if error is None or not is_out_of_memory(error):
            return False
        self.met = True
        return True


def plan_memory(
    model: nn.Module,
    computation: Computation,
    examples: Sequence[Example],
    steps: Iterator[Sequence[int]],
    *,
    checkpointing: Checkpointing,
    device: torch.device,
    group: Group = ALONE,
) -> MemoryPlan:
    """The fastest plan that fits, found by trials of the largest piece among the rows of `steps`.

    Estimated from a quarter of that piece, then confirmed by the whole of it: forward, backward and
    an optimizer step. In order of preference: whole steps (as far as `computation` takes them)
    without recomputation; steps cut into pieces of no less than `COMFORTABLE_TOKENS`; as few layers
    recomputed as will do; smaller pieces with all layers recomputed, down to single rows. All
    processes of `group` get the same plan. `model` and the random number generators are left as
    they were, but for which layers recompute.

    Raises OutOfMemoryError where a single row does not fit.
    """
    examples = Examples.of(examples)
    ladder, layers = ladder_of(model, computation, examples, checkpointing)
    longest = int(np.argmax(examples.lengths))
    step = _largest_step(computation, examples, steps, group)
    with _Trials(model, computation, examples, device, group) as trials:
        limit, reason = computation.limit, ""
        rows = max(([*step], [longest]), key=lambda rows: trials.largest(limit, rows)[:2])
        _, _, size, largest_rows = trials.largest(limit, rows)
        estimate = _Estimate(trials, ladder, limit, size, largest_rows)
        estimated = not (ladder.limit_is_set and ladder.layers_are_set) and len(largest_rows) > 1
        if estimated:
            limit, layers, reason = estimate.choose(limit, layers)
        while True:
            tokens, _, size, largest_rows = trials.largest(limit, rows)
            peak = trials.peak(limit, layers, largest_rows)
            lower = ladder.below(limit, layers, size, nearly=estimated)
            if peak <= trials.budget or (lower == (limit, layers) and peak < _DOES_NOT_FIT):
                break
            if lower == (limit, layers):
                many = len(largest_rows)
                raise OutOfMemoryError(
                    f"memory: {'a row' if many == 1 else f'a piece of {many} rows'} with "
                    f"{tokens:,} tokens, {_recomputed(layers, ladder.num_layers)}, needs "
                    f"{estimate.need(tokens, layers)}more than the "
                    f"{_size(max(0, trials.budget - trials.base))} that are there beside the "
                    f"{_size(trials.base)} of model and optimizer.\n"
                    f"{_advice(ladder, int(examples.lengths[longest]))}"
                )
            reason = reason or (
                "otherwise memory runs out"
                if peak == _DOES_NOT_FIT
                else f"otherwise {_size(peak)} would be needed"
            )
            limit, layers = lower
        return MemoryPlan(
            computation.unit,
            limit,
            layers,
            ladder.num_layers,
            reason=reason,
            pieces=len(computation.cut_at(limit).pieces(examples, step)),
            largest_piece=tokens,
            expected_peak_bytes=peak,
            budget_bytes=trials.budget,
        )


def _largest_step(
    computation: Computation,
    examples: Examples,
    steps: Iterator[Sequence[int]],
    group: Group,
) -> list[int]:
    """Of one process, the rows of one step with the most tokens, then the most trained ones."""
    targets = targets_of_rows(examples)
    best, counted = ((-1, -1), [0]), 0
    for rows in steps:
        for rank in range(group.size):
            own = list(rows[rank :: group.size])
            trained = int(targets[own].sum())
            best = max(best, ((computation.most_tokens(examples, own), trained), own))
        counted += len(rows)
        if counted >= COUNTED_ROWS:
            break
    return best[1]


class _Trials:
    """Forward, backward and optimizer step of single pieces, after which all is as it was.

    The optimizer is another one of the same size, and it sees gradients of zero, so that neither
    the parameters nor the state of the run's own move; its state and the gradients are there from
    the start, as in every step of a run but the first.
    """

    def __init__(
        self,
        model: nn.Module,
        computation: Computation,
        examples: Sequence[Example],
        device: torch.device,
        group: Group,
    ) -> None:
        self._model = model
        self._computation = computation
        self._examples = examples
        self._device = device
        self._group = group
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Take what stays taken during a run, and measure it."""
        kind = self._device.type
        sharing = self._group.local_size if kind == "cpu" else 1
        free_unused_memory(kind, cycles=True)
        budget = memory_in_use(kind) + int(SHARE * memory_available(kind) / sharing)
        (below,) = self._group.largest([-budget], self._device)
        self.budget = -below
        self._stack.enter_context(torch.random.fork_rng([self._device] if kind == "cuda" else []))
        self._stack.enter_context(self._computation.prepared(self._model))
        self._stack.callback(self._model.train, self._model.training)
        self._stack.callback(self._model.zero_grad)
        self._model.train()
        shortage = Shortage()
        with shortage:
            self._optimizer = adamw(self._model, weight_decay=0.0)
            self._zero_gradients()
            self._optimizer.step()
        if self._group.any(shortage.met, self._device):
            self._stack.close()
            number = sum(parameter.numel() for parameter in trainable(self._model).values())
            raise OutOfMemoryError(
                f"memory: gradients and optimizer of {number:,} trained parameters, "
                f"{_size(12 * number)}, do not fit beside the model.\n"
                "  Use a smaller lora.rank, fewer lora.target_modules, a smaller model, or a "
                "machine with more memory."
            )
        (self.base,) = self._group.largest([memory_in_use(kind)], self._device)
        return self

    def __exit__(self, *_: object) -> None:
        """Put everything back."""
        del self._optimizer
        self._stack.close()
        free_unused_memory(self._device.type)

    def _zero_gradients(self) -> None:
        for parameter in trainable(self._model).values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.zero_()

    def largest(self, limit: int, rows: Sequence[int]) -> tuple[int, int, int, tuple[int, ...]]:
        """Tokens, predictions, size and rows of the largest piece of these rows."""
        way = self._computation.cut_at(limit)
        return max(
            (
                (piece.computed_tokens, piece.num_predictions, way.size(piece), piece.rows)
                for piece in way.pieces(self._examples, rows)
            ),
            default=(0, 0, 0, (rows[0],)),
        )

    def peak(self, limit: int, layers: int, rows: Sequence[int]) -> int:
        """Most memory in use while these rows, one piece, are computed; the same in all processes.

        Where memory ran out in one of them it is `_DOES_NOT_FIT`.
        """
        kind = self._device.type
        way = self._computation.cut_at(limit)
        recompute_activations(self._model, layers)
        free_unused_memory(kind)
        shortage = Shortage()
        with peak_memory_within(kind) as used, shortage:
            for piece in way.pieces(self._examples, rows):
                way.summed_loss(self._model, piece).backward()  # type: ignore[no-untyped-call]
            self._zero_gradients()
            self._optimizer.step()
        self._zero_gradients()
        free_unused_memory(kind, cycles=shortage.met)
        (peak,) = self._group.largest([_DOES_NOT_FIT if shortage.met else used.bytes], self._device)
        return peak


class _Estimate:
    """What plans would need, by trials of a quarter of the largest piece.

    Activations grow with the tokens and shrink with every layer that recomputes, both in
    proportion. That is not exact, hence the trial of what was chosen.
    """

    def __init__(
        self, trials: _Trials, ladder: Ladder, limit: int, size: int, rows: Sequence[int]
    ) -> None:
        self._trials = trials
        self._ladder = ladder
        self._largest = trials.largest(limit, rows)[0]
        self._size = size
        self._limit = limit
        self._rows = rows[: math.ceil(len(rows) / 4)]
        self._per_token: dict[int, float] = {}

    def choose(self, limit: int, layers: int) -> tuple[int, int, str]:
        """The first plan on the ladder that should fit, or its last, and why not its first."""
        fastest = self._bytes(limit, layers)
        reason = "otherwise memory runs out"
        if fastest < math.inf:
            reason = f"otherwise {_size(int(fastest))} would be needed"
        plan = limit, layers
        for plan in self._plans(limit, layers):
            if self._bytes(*plan) <= self._trials.budget:
                break
        return *plan, reason if plan != (limit, layers) else ""

    def _plans(self, limit: int, layers: int) -> Iterator[tuple[int, int]]:
        ladder = self._ladder
        yield limit, layers
        if not ladder.limit_is_set:
            for smaller in self._halves(limit, ladder.comfortable):
                limit = smaller
                yield limit, layers
        if not ladder.layers_are_set:
            for layers in range(1, ladder.num_layers + 1):
                yield limit, layers
        if not ladder.limit_is_set:
            for smaller in self._halves(limit, ladder.smallest):
                yield smaller, layers

    def _halves(self, limit: int, floor: int) -> Iterator[int]:
        size = min(limit, self._size)
        while max(math.ceil(size / 2), floor) < size:
            size = max(math.ceil(size / 2), floor)
            yield size

    def _bytes(self, limit: int, layers: int) -> float:
        tokens = self._largest * min(1.0, limit / max(self._size, 1))
        return self._trials.base + tokens * self._bytes_per_token(layers)

    def _bytes_per_token(self, layers: int) -> float:
        if layers in self._per_token:
            return self._per_token[layers]
        if layers in (0, self._ladder.num_layers) or self._ladder.layers_are_set:
            tokens, *_ = self._trials.largest(self._limit, self._rows)
            peak = self._trials.peak(self._limit, layers, self._rows)
            taken = math.inf if peak == _DOES_NOT_FIT else max(0, peak - self._trials.base)
            self._per_token[layers] = taken / max(tokens, 1)
            return self._per_token[layers]
        none, every = (self._bytes_per_token(n) for n in (0, self._ladder.num_layers))
        if none == math.inf:
            return math.inf
        return none + (every - none) * layers / self._ladder.num_layers

    def need(self, tokens: int, layers: int) -> str:
        """What so many tokens would take, in words, where it has been measured."""
        found = self._per_token.get(layers, math.inf) * tokens
        return f"about {_size(int(found))}, " if found < math.inf else ""


def _size(number: int) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"


def _what(part: Part) -> str:
    return "step" if part == "step" else "the evaluation after step"


def _recomputed(layers: int, num_layers: int) -> str:
    if layers == 0:
        return "no layer recomputed"
    which = "all" if layers == num_layers else f"{layers} of"
    return f"{which} {num_layers} layers recomputed"


def _advice(ladder: Ladder, longest: int) -> str:
    fixed = [
        name
        for name, is_set in (
            ("train.micro_batch_size", ladder.limit_is_set),
            ("train.checkpointing", ladder.layers_are_set),
        )
        if is_set
    ]
    leave = f"Leave {' and '.join(fixed)} to myna by not setting them, or use" if fixed else "Use"
    return (
        f"  {leave} a train.max_length below {longest:,} (with over_length: truncate_prompt), a "
        "smaller model, dtype: bfloat16, or a machine with more memory."
    )
