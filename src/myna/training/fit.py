"""The training loop, whole and in sight: from the first step to the last.

Owns what a step is: its rows, one loss over all of them, one backward per piece, one clipped
update; and that a step which ran out of memory is repeated whole, with the same rows. Everything it
reports goes through events; files of data, models and consoles are known to those who call it.
"""

import contextlib
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from peft import PeftModel
from torch import nn

from myna.data.loader import (
    Draws,
    loss_weight,
    num_steps,
    num_targets,
    rows_of_steps,
    steps_per_epoch,
)
from myna.data.store import Example, Examples
from myna.device import free_unused_memory, peak_memory_bytes
from myna.distributed.group import ALONE, Group
from myna.errors import (
    ConfigError,
    Interrupted,
    NonFiniteError,
    OutOfMemoryError,
    StorageError,
)
from myna.lora.adapter_file import load_adapter_state
from myna.lora.inject import adapter_state
from myna.training.checkpoint import Checkpoint, State, load_best
from myna.training.computation import Computation, PiecesAhead
from myna.training.events import EventLog
from myna.training.memory import Checkpointing, Memory, MemoryPlan, Part, Shortage
from myna.training.nonfinite import too_many, write_dump
from myna.training.optimizer import (
    Schedule,
    adamw,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    trainable,
)
from myna.training.saving import Saving
from myna.training.stop import OutOfTime, StopRequest
from myna.training.validate import held_out_sums

Evaluate = Callable[[], Mapping[str, float]]
"""Judges the model as it is now, on the held-out rows: what each metric says, more being better. It
leaves model and random numbers as they were."""


@dataclass(frozen=True)
class FitSettings:
    """What `fit` is asked to do; the names and defaults of `config.TrainConfig` apply."""

    epochs: float
    max_steps: int | None
    batch_size: int
    learning_rate: float
    schedule: str
    warmup_steps: int | None
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    seed: int
    save_steps: int
    keep_checkpoints: int
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    keep_best: bool = False
    metrics: tuple[str, ...] = ()
    """Names of what `evaluate` gives, in an order that all processes have."""
    best_by: str = "loss"
    """`loss`, or one of `metrics`."""
    on_nonfinite: str = "stop"

    def total_steps(self, num_rows: int) -> int:
        """Optimizer steps of the run, with `num_rows` rows in an epoch."""
        return num_steps(num_rows, self.batch_size, self.epochs, self.max_steps)

    def learning_rates(self, num_rows: int) -> Schedule:
        """The learning rate of every step of that run."""
        total = self.total_steps(num_rows)
        warmup = self.warmup_steps
        if warmup is None:
            warmup = math.ceil(self.warmup_ratio * total)
        return Schedule(self.schedule, self.learning_rate, warmup, total)  # type: ignore[arg-type] # checked by the config


@dataclass
class FitResult:
    """How a run ended."""

    step: int
    losses: list[float] = field(default_factory=list)
    """Loss of every step that this process computed."""
    best_loss: float | None = None
    best_step: int | None = None
    stopped_early: bool = False


def fit(
    model: PeftModel,
    train_rows: Sequence[Example],
    held_out_rows: Sequence[Example],
    settings: FitSettings,
    *,
    computation: Computation,
    device: torch.device,
    events: EventLog,
    checkpointing: Checkpointing = "auto",
    plans: Sequence[MemoryPlan] = (),
    checkpoints: Path | None = None,
    resume: Checkpoint | None = None,
    group: Group = ALONE,
    writes: bool = True,
    stop: StopRequest | None = None,
    beginning: State | None = None,
    evaluate: Evaluate | None = None,
) -> FitResult:
    """Train `model`'s trainable parameters on `train_rows`; the adapter is in the model afterwards.

    The loss of a step is the sum of the cross-entropy over all trained tokens of its rows, each
    times its row's weight, in all pieces and processes, divided once by the sum of these weights;
    how rows are cut into pieces changes nothing. With `resume` the run goes on after that
    checkpoint as if it had not stopped; without, it starts from `beginning`, which says whose
    checkpoints these are. `plans` says from which step on what is computed how; without any,
    nothing recomputes until memory runs out, or what `checkpointing` fixes. When memory runs out, a
    smaller plan is made, told as a `plan` event, and the same step repeated. `evaluate` is called
    after every evaluation of the held-out loss, by the first process.

    Raises NonFiniteError before the weights move (with a dump of the step beside the checkpoints),
    OutOfMemoryError and Interrupted after a checkpoint, the first when there is no smaller plan,
    the other when `stop` asks for it, StorageError where the last checkpoint cannot be written, and
    ConfigError where after the first step a layer of the adapter has no gradient.
    """
    train_rows, held_out_rows = Examples.of(train_rows), Examples.of(held_out_rows)
    draws = Draws.of(train_rows)
    rates = settings.learning_rates(draws.num_rows)
    optimizer = adamw(model, weight_decay=settings.weight_decay)
    parameters = list(trainable(model).values())
    state = beginning or State(0)
    stop = stop or StopRequest()
    if resume is not None:
        state = resume.state
        load_adapter_state(model, resume.adapter)
        load_optimizer_tensors(optimizer, model, resume.optimizer)
    scaler = _loss_scaler(model, device, state)
    memory = Memory(
        model,
        computation,
        train_rows,
        checkpointing=checkpointing,
        plans=plans or [MemoryPlan(**plan) for plan in state.plans],
    )
    result = FitResult(state.step, best_loss=state.best_loss, best_step=state.best_step)
    result.stopped_early = _has_waited_long_enough(state, settings)
    model.train()

    kept = checkpoints if writes else None
    saving = Saving(kept, keep=settings.keep_checkpoints, every=settings.save_steps, events=events)

    def save() -> None:
        whole = replace(state, plans=[plan.to_json() for plan in memory.plans])
        saving.begin(whole, adapter_state(model), optimizer_tensors(optimizer, model))

    def plan_smaller(step: int, part: Part, size: int) -> None:
        """Have the same again computed in less memory; every process comes here together."""
        free_unused_memory(device.type, cycles=True)
        (size,) = group.largest([size], device)
        try:
            plan = memory.shrink(step, part, size)
        except OutOfMemoryError:
            if state.step:
                save()
                saving.finish(state.step)
            raise
        message = f"{plan.reason}; it is repeated with the same rows: {replace(plan, reason='')}"
        if resume is not None:
            message += "; resumed, not bit-identical"
        events.emit("plan", memory=plan.to_json(), step=step, part=part, message=message)
        events.emit("warning", step=step, message=message)

    steps = rows_of_steps(
        draws,
        settings.batch_size,
        seed=settings.seed,
        first_step=state.step + 1,
        last_step=state.step if result.stopped_early else rates.total_steps,
    )
    share = slice(group.rank, None, group.size)

    def leave_out(step: int, rows: Sequence[int], loss: float, grad_norm: float) -> None:
        """Keep what repeats a step that is not finite; raise, unless it may be skipped."""
        dump = None
        if kept is not None:
            with contextlib.suppress(StorageError):  # a full disk must not hide what happened
                dump = write_dump(
                    kept.parent / "nonfinite",
                    step=step,
                    loss=loss,
                    grad_norm=grad_norm,
                    rows=rows,
                    examples=[train_rows[row] for row in rows],
                    adapter=adapter_state(model),
                    seed=settings.seed,
                    plan=memory.plan.to_json(),
                )
        places = [str(train_rows[row].place) for row in rows]
        if settings.on_nonfinite != "skip" or too_many(state.skipped_steps, step):
            raise _non_finite(step, loss, grad_norm, places, settings, state, dump)
        events.emit(
            "warning",
            step=step,
            message=f"step {step} is left out (on_nonfinite: skip): loss {loss}, gradient norm "
            f"{grad_norm}; the weights did not move. Rows: {', '.join(places)}"
            + (f"; see {dump}" if dump else ""),
        )

    divergence = _Divergence()
    with (
        _left_in_time(optimizer) as time_left,
        saving,
        computation.prepared(model),
        PiecesAhead(train_rows) as ahead,
    ):
        for (step, epoch, rows), following in _with_next(steps):
            started = time.monotonic()
            num_trained = sum(num_targets(train_rows[row]) for row in rows)
            total_weight = sum(loss_weight(train_rows[row]) for row in rows)
            memory.begin(step, "step")
            is_finite = True
            while True:  # until the step fits into memory
                pieces = ahead.take(memory.computation, rows[share])
                if following is not None:
                    ahead.begin(memory.computation, following[2][share])
                sums = torch.zeros(2, device=device)  # loss, token positions computed
                computing, updating = Shortage(), Shortage()
                with stop.may_be_left(), computing:
                    for number, piece in enumerate(pieces):
                        torch.manual_seed(_dropout_seed(settings.seed, step, group.rank, number))
                        loss = memory.computation.summed_loss(model, piece) / total_weight
                        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                        loss = loss.detach()  # or the graph lives until the next one is whole
                        sums[0] += loss
                        sums[1] += piece.computed_tokens
                # All go on or none: a process that waits for the others' gradients waits for ever.
                if not group.any(computing.met, device):
                    with updating:
                        # Before unscaling, so that all processes find the same overflow.
                        group.add_gradients(parameters)
                        if step == 1:
                            _check_gradients_arrive(model, [train_rows[row] for row in rows])
                        scaler.unscale_(optimizer)
                        norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                        # The only place where the host waits for the device.
                        step_loss, computed_tokens, grad_norm = torch.cat(
                            [group.add(sums), norm.to(sums)[None]]
                        ).tolist()
                        is_finite = math.isfinite(step_loss) and (
                            math.isfinite(grad_norm) or scaler.is_enabled()
                        )
                        if is_finite:
                            learning_rate = rates.learning_rate(step)
                            set_learning_rate(optimizer, learning_rate)
                            scaler.step(optimizer)
                            scaler.update()
                        else:
                            leave_out(step, rows, step_loss, grad_norm)
                            scaler = _loss_scaler(model, device, state)
                        optimizer.zero_grad()
                        break
                    if group.size > 1:
                        raise OutOfMemoryError(
                            f"step {step}: memory ran out in the update of process {group.rank}, "
                            "and the others have made theirs.\n  Repeat the command: it goes on "
                            "from the last checkpoint. Fewer processes per machine take less."
                        )
                loss = torch.zeros((), device=device)  # lets go of the graph
                optimizer.zero_grad()
                if state.step == 0:
                    optimizer.state.clear()  # AdamW may have made half of it
                scaler = _loss_scaler(model, device, state)  # as it was before this step
                plan_smaller(step, "step", max(map(memory.computation.size, pieces), default=1))

            result.step = step
            state = replace(state, step=step, loss_scaling=scaler.state_dict())
            if is_finite:
                result.losses.append(step_loss)
                tokens = sum(
                    len(train_rows[row].prompt_ids) + len(train_rows[row].completion_ids)
                    for row in rows
                )
                events.emit(
                    "step",
                    step=step,
                    epoch=round(epoch, 4),
                    loss=step_loss,
                    learning_rate=learning_rate,
                    grad_norm=grad_norm if math.isfinite(grad_norm) else None,
                    rows=len(rows),
                    tokens=tokens,
                    computed_tokens=int(computed_tokens),
                    trained_tokens=num_trained,
                    seconds=round(time.monotonic() - started, 4),
                    peak_memory_bytes=peak_memory_bytes(device.type),
                )
                if message := divergence.note(step_loss):
                    events.emit("warning", step=step, message=f"step {step}: {message}")
            else:
                state = replace(state, skipped_steps=(*state.skipped_steps, step))
            is_last = step == rates.total_steps
            if held_out_rows and (is_last or _is_due(step, settings, draws.num_rows)):
                memory.begin(step, "eval")
                while True:  # until the evaluation fits into memory
                    shortage = Shortage()
                    with shortage:
                        sums = held_out_sums(
                            model,
                            held_out_rows,
                            computation=memory.computation,
                            device=device,
                            group=group,
                        )
                    if not group.any(shortage.met, device):
                        break
                    plan_smaller(step, "eval", memory.computation.limit)
                held_out_sum, held_out_weight = group.add(sums).tolist()
                held_out = held_out_sum / held_out_weight
                scores = _scores(evaluate, settings.metrics, group, device)
                events.emit(
                    "eval",
                    step=step,
                    loss=held_out,
                    rows=len(held_out_rows),
                    tokens=sum(map(num_targets, held_out_rows)),
                    **({"metrics": scores} if scores else {}),
                )
                state = _judge(state, held_out, scores.get(settings.best_by))
                if state.best_step == step and settings.keep_best:
                    saving.keep_best(step, held_out, adapter_state(model))
                result.best_loss, result.best_step = state.best_loss, state.best_step
            result.stopped_early = _has_waited_long_enough(state, settings)
            stops = group.any(stop(), device)
            saving.report(step)
            if stops or result.stopped_early or is_last or saving.is_due(step):
                save()
            if stops and not is_last:
                saving.finish(step)
                raise Interrupted(f"stopped after step {step}; the same command goes on from here.")
            if result.stopped_early:
                break
    if time_left.is_over:
        if state.step:
            save()
        saving.finish(state.step)
        raise Interrupted(
            f"stopped in the step after step {state.step}, for which there was no time left; the "
            "same command goes on from here."
        )
    saving.finish(state.step)
    if settings.keep_best and kept is not None:
        load_adapter_state(model, load_best(kept))
    return result


Item = TypeVar("Item")


def _with_next(items: Iterable[Item]) -> Iterator[tuple[Item, Item | None]]:
    """Every item with the one after it."""
    ahead = iter(items)
    item = next(ahead, None)
    while item is not None:
        following = next(ahead, None)
        yield item, following
        item = following


def _loss_scaler(model: nn.Module, device: torch.device, state: State) -> torch.amp.GradScaler:
    """float16 gradients underflow without it; it does nothing for the other formats."""
    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state.loss_scaling:
        scaler.load_state_dict(state.loss_scaling)
    return scaler


def _non_finite(
    step: int,
    loss: float,
    grad_norm: float,
    places: Sequence[str],
    settings: FitSettings,
    state: State,
    dump: Path | None,
) -> NonFiniteError:
    skipped = f" {len(state.skipped_steps)} were left out before it." if state.skipped_steps else ""
    where = f"\n  The step can be repeated from {dump}." if dump else ""
    return NonFiniteError(
        f"step {step}: loss is {loss}, gradient norm {grad_norm}; the weights did not move."
        f"{skipped}\n  Rows: {', '.join(places)}.\n"
        f"  Try a learning rate below {settings.learning_rate}, or dtype: float32.{where}"
    )


def _check_gradients_arrive(model: nn.Module, examples: Sequence[Example]) -> None:
    """Raise ConfigError for layers whose adapter the first step does not reach.

    At B = 0 every B has a gradient and no A has one. Experts that no token was sent to have none
    either, and where every row computes a single token, attention has nothing to choose from.
    """
    if all(len(example.prompt_ids) + len(example.completion_ids) <= 2 for example in examples):
        return
    dead = [
        name.removeprefix("base_model.model.")
        for name, parameter in trainable(model).items()
        if ".lora_B." in name
        and "expert" not in name
        and (parameter.grad is None or not bool(parameter.grad.any()))
    ]
    if dead:
        listed = ", ".join(dead[:8]) + (f" and {len(dead) - 8} more" if len(dead) > 8 else "")
        raise ConfigError(
            f"After the first step {len(dead)} adapter weights have no gradient, so they would "
            f"never learn: {listed}.\n"
            "  Leave these layers out of lora.target_modules (parts of a model that text does not "
            "pass through, such as a vision tower, cannot learn from it)."
        )


class _Divergence:
    """Says once in a while that the loss has jumped far above what it was."""

    TIMES, WINDOW, FEWEST = 10, 50, 10

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=self.WINDOW)
        self._quiet = 0

    def note(self, loss: float) -> str | None:
        """A sentence where `loss` is more than ten times the median of the last fifty."""
        usual = statistics.median(self._recent) if len(self._recent) >= self.FEWEST else math.inf
        self._recent.append(loss)
        self._quiet = max(0, self._quiet - 1)
        if loss <= self.TIMES * usual or self._quiet:
            return None
        self._quiet = self.WINDOW
        return (
            f"the loss is {loss:.4g}, more than {self.TIMES} times the {usual:.4g} of the steps "
            "before; a lower learning rate may be needed"
        )


@dataclass
class _TimeLeft:
    is_over: bool = False


@contextlib.contextmanager
def _left_in_time(optimizer: torch.optim.Optimizer) -> Iterator[_TimeLeft]:
    """Ends in good order where a step was left for want of time."""
    left = _TimeLeft()
    try:
        yield left
    except OutOfTime:
        left.is_over = True
        optimizer.zero_grad()


def _dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """A resumed run draws the dropout that the uninterrupted one would have drawn."""
    return random.Random(f"{seed}:{step}:{rank}:{micro_batch}").getrandbits(63)


def _scores(
    evaluate: Evaluate | None, names: Sequence[str], group: Group, device: torch.device
) -> dict[str, float]:
    """What the first process finds by each metric; all have to choose alike."""
    if not names:
        return {}
    assert evaluate is not None, "metrics need somebody who judges"
    found = dict(evaluate()) if group.is_first else dict.fromkeys(names, 0.0)
    if group.size > 1:  # mps has no float64, and no process group either
        values = torch.tensor([found[name] for name in names], dtype=torch.float64, device=device)
        found = dict(zip(names, group.add(values).tolist(), strict=True))
    return {name: found[name] for name in names}


def _judge(state: State, held_out: float, score: float | None) -> State:
    """The state after an evaluation with this held-out loss, and this worth by `best_by`."""
    found = (-(score or 0.0), held_out)
    is_better = state.best_loss is None or found < (-(state.best_score or 0.0), state.best_loss)
    if is_better:
        return replace(
            state,
            best_loss=held_out,
            best_score=score,
            best_step=state.step,
            evaluations_without_gain=0,
        )
    return replace(state, evaluations_without_gain=state.evaluations_without_gain + 1)


def _has_waited_long_enough(state: State, settings: FitSettings) -> bool:
    """Whether early stopping was asked for and its patience is at its end."""
    patience = settings.early_stopping_patience
    return patience is not None and state.evaluations_without_gain >= patience


def _is_due(step: int, settings: FitSettings, num_rows: int) -> bool:
    """Whether the held-out rows are evaluated after `step`."""
    every = settings.eval_steps or steps_per_epoch(num_rows, settings.batch_size)
    return step % every == 0
