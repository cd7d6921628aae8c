"""The training loop, whole and in sight: from the first step to the last.

Owns what a step is: its rows, one loss over all of them, one backward per piece, one clipped
update; and that a step which ran out of memory is repeated whole, with the same rows. Everything it
reports goes through events; files of data, models and consoles are known to those who call it.
"""

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from peft import PeftModel
from torch import Tensor, nn

from myna.data.loader import (
    Draws,
    loss_weights,
    num_steps,
    rows_of_steps,
    steps_per_epoch,
    targets_of_rows,
)
from myna.data.store import Example, Examples
from myna.device import free_unused_memory, peak_memory_bytes
from myna.distributed.group import ALONE, Group
from myna.errors import Interrupted, NonFiniteError, OutOfMemoryError, StorageError
from myna.lora.adapter_file import load_adapter_state
from myna.lora.inject import adapter_state
from myna.training.checkpoint import Checkpoint, State, load_best
from myna.training.computation import Computation, Piece, PiecesAhead
from myna.training.events import EventLog
from myna.training.health import Divergence, check_gradients_arrive
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
    optimizer = adamw(model, weight_decay=settings.weight_decay)
    state = beginning or State(0)
    if resume is not None:
        state = resume.state
        load_adapter_state(model, resume.adapter)
        load_optimizer_tensors(optimizer, model, resume.optimizer)
    memory = Memory(
        model,
        computation,
        train_rows,
        checkpointing=checkpointing,
        plans=plans or [MemoryPlan(**plan) for plan in state.plans],
    )
    kept = checkpoints if writes else None
    run = _Run(
        model,
        train_rows,
        held_out_rows,
        settings,
        draws=draws,
        rates=settings.learning_rates(draws.num_rows),
        optimizer=optimizer,
        memory=memory,
        saving=Saving(
            kept, keep=settings.keep_checkpoints, every=settings.save_steps, events=events
        ),
        checkpoints=kept,
        state=state,
        is_resumed=resume is not None,
        device=device,
        group=group,
        events=events,
        stop=stop or StopRequest(),
        evaluate=evaluate,
    )
    run.go()
    return run.result


@dataclass(frozen=True)
class _Update:
    """What came of a step."""

    loss: float
    grad_norm: float
    learning_rate: float | None
    """None where the weights did not move."""
    computed_tokens: int


@dataclass
class _Run:
    """What a run consists of, and how far it has come."""

    model: PeftModel
    train_rows: Examples
    held_out_rows: Examples
    settings: FitSettings
    _: KW_ONLY
    draws: Draws
    rates: Schedule
    optimizer: torch.optim.Optimizer
    memory: Memory
    saving: Saving
    checkpoints: Path | None
    state: State
    is_resumed: bool
    device: torch.device
    group: Group
    events: EventLog
    stop: StopRequest
    evaluate: Evaluate | None

    def __post_init__(self) -> None:
        """Begin where `state` stands."""
        self.parameters = list(trainable(self.model).values())
        self.scaler = self._loss_scaler()
        self.ahead = PiecesAhead(self.train_rows)
        self.divergence = Divergence()
        self.result = FitResult(
            self.state.step, best_loss=self.state.best_loss, best_step=self.state.best_step
        )

    def go(self) -> None:
        """From the next step to the last, or to where somebody or something stops it."""
        self.model.train()
        last_step = self.rates.total_steps
        self.result.stopped_early = self._has_waited_long_enough()
        steps = rows_of_steps(
            self.draws,
            self.settings.batch_size,
            seed=self.settings.seed,
            first_step=self.state.step + 1,
            last_step=self.state.step if self.result.stopped_early else last_step,
        )
        with (
            _left_in_time(self.optimizer) as time_left,
            self.saving,
            self.memory.computation.prepared(self.model),
            self.ahead,
        ):
            for (step, epoch, rows), following in _with_next(steps):
                self._take_step(step, epoch, rows, following[2] if following else None)
                is_last = step == last_step
                if self.held_out_rows and (is_last or self._evaluation_is_due()):
                    self._evaluate()
                self.result.stopped_early = self._has_waited_long_enough()
                stops = self.group.any(self.stop(), self.device)
                self.saving.report(step)
                if stops or self.result.stopped_early or is_last or self.saving.is_due(step):
                    self._save()
                if stops and not is_last:
                    self.saving.finish(step)
                    raise Interrupted(
                        f"stopped after step {step}; the same command goes on from here."
                    )
                if self.result.stopped_early:
                    break
        if time_left.is_over:
            if self.state.step:
                self._save()
            self.saving.finish(self.state.step)
            raise Interrupted(
                f"stopped in the step after step {self.state.step}, for which there was no time "
                "left; the same command goes on from here."
            )
        self.saving.finish(self.state.step)
        if self.settings.keep_best and self.checkpoints is not None:
            load_adapter_state(self.model, load_best(self.checkpoints))

    def _take_step(
        self, step: int, epoch: float, rows: list[int], following: list[int] | None
    ) -> None:
        """One update from all of `rows`, or none; repeated until it fits into memory."""
        started = time.monotonic()
        self.memory.begin(step, "step")
        share = slice(self.group.rank, None, self.group.size)
        while True:
            pieces = self.ahead.take(self.memory.computation, rows[share])
            if following is not None:
                self.ahead.begin(self.memory.computation, following[share])
            sums = torch.zeros(2, device=self.device)  # loss, token positions computed
            computing, updating = Shortage(), Shortage()
            with self.stop.may_be_left(), computing:
                self._add_gradients(step, rows, pieces, sums)
            # All go on or none: a process that waits for the others' gradients waits for ever.
            if not self.group.any(computing.met, self.device):
                with updating:
                    update = self._update(step, rows, sums)
                    break
                if self.group.size > 1:
                    raise OutOfMemoryError(
                        f"step {step}: memory ran out in the update of process {self.group.rank}, "
                        "and the others have made theirs.\n  Repeat the command: it goes on from "
                        "the last checkpoint. Fewer processes per machine take less."
                    )
            self.optimizer.zero_grad()
            if self.state.step == 0:
                self.optimizer.state.clear()  # AdamW may have made half of it
            self.scaler = self._loss_scaler()  # as it was before this step
            self._plan_smaller(
                step, "step", max(map(self.memory.computation.size, pieces), default=1)
            )

        self.result.step = step
        self.state = replace(self.state, step=step, loss_scaling=self.scaler.state_dict())
        if update.learning_rate is None:
            self.state = replace(self.state, skipped_steps=(*self.state.skipped_steps, step))
            return
        examples = self.train_rows.select(rows)
        self.result.losses.append(update.loss)
        self.events.emit(
            "step",
            step=step,
            epoch=round(epoch, 4),
            loss=update.loss,
            learning_rate=update.learning_rate,
            grad_norm=update.grad_norm if math.isfinite(update.grad_norm) else None,
            rows=len(rows),
            tokens=int(examples.lengths.sum()),
            computed_tokens=update.computed_tokens,
            trained_tokens=int(targets_of_rows(examples).sum()),
            seconds=round(time.monotonic() - started, 4),
            peak_memory_bytes=peak_memory_bytes(self.device.type),
        )
        if message := self.divergence.note(update.loss):
            self.events.emit("warning", step=step, message=f"step {step}: {message}")

    def _add_gradients(
        self, step: int, rows: Sequence[int], pieces: Sequence[Piece], sums: Tensor
    ) -> None:
        """One backward per piece; adds loss and computed tokens to `sums`."""
        total_weight: float = sum(loss_weights(self.train_rows.select(rows)).tolist())
        for number, piece in enumerate(pieces):
            torch.manual_seed(_dropout_seed(self.settings.seed, step, self.group.rank, number))
            loss = self.memory.computation.summed_loss(self.model, piece) / total_weight
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            loss = loss.detach()  # or the graph lives until the next one is whole
            sums[0] += loss
            sums[1] += piece.computed_tokens

    def _update(self, step: int, rows: Sequence[int], sums: Tensor) -> _Update:
        """Move the weights by the clipped gradients of all processes, if all is finite."""
        # Before unscaling, so that all processes find the same overflow.
        self.group.add_gradients(self.parameters)
        if step == 1:
            check_gradients_arrive(self.model, [self.train_rows[row] for row in rows])
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        # The only place where the host waits for the device.
        loss, computed_tokens, grad_norm = torch.cat(
            [self.group.add(sums), norm.to(sums)[None]]
        ).tolist()
        learning_rate = None
        if math.isfinite(loss) and (math.isfinite(grad_norm) or self.scaler.is_enabled()):
            learning_rate = self.rates.learning_rate(step)
            set_learning_rate(self.optimizer, learning_rate)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self._leave_out(step, rows, loss, grad_norm)
            self.scaler = self._loss_scaler()
        self.optimizer.zero_grad()
        return _Update(loss, grad_norm, learning_rate, int(computed_tokens))

    def _leave_out(self, step: int, rows: Sequence[int], loss: float, grad_norm: float) -> None:
        """Keep what repeats a step that is not finite; raise, unless it may be skipped."""
        examples = [self.train_rows[row] for row in rows]
        dump = None
        if self.checkpoints is not None:
            with contextlib.suppress(StorageError):  # a full disk must not hide what happened
                dump = write_dump(
                    self.checkpoints.parent / "nonfinite",
                    step=step,
                    loss=loss,
                    grad_norm=grad_norm,
                    rows=rows,
                    examples=examples,
                    adapter=adapter_state(self.model),
                    seed=self.settings.seed,
                    plan=self.memory.plan.to_json(),
                )
        places = ", ".join(str(example.place) for example in examples)
        skipped = self.state.skipped_steps
        if self.settings.on_nonfinite != "skip" or too_many(skipped, step):
            before = f" {len(skipped)} were left out before it." if skipped else ""
            where = f"\n  The step can be repeated from {dump}." if dump else ""
            raise NonFiniteError(
                f"step {step}: loss is {loss}, gradient norm {grad_norm}; the weights did not move."
                f"{before}\n  Rows: {places}.\n  Try a learning rate below "
                f"{self.settings.learning_rate}, or dtype: float32.{where}"
            )
        self.events.emit(
            "warning",
            step=step,
            message=f"step {step} is left out (on_nonfinite: skip): loss {loss}, gradient norm "
            f"{grad_norm}; the weights did not move. Rows: {places}"
            + (f"; see {dump}" if dump else ""),
        )

    def _plan_smaller(self, step: int, part: Part, size: int) -> None:
        """Have the same again computed in less memory; every process comes here together."""
        free_unused_memory(self.device.type, cycles=True)
        (size,) = self.group.largest([size], self.device)
        try:
            plan = self.memory.shrink(step, part, size)
        except OutOfMemoryError:
            if self.state.step:
                self._save()
                self.saving.finish(self.state.step)
            raise
        message = f"{plan.reason}; it is repeated with the same rows: {replace(plan, reason='')}"
        if self.is_resumed:
            message += "; resumed, not bit-identical"
        self.events.emit("plan", memory=plan.to_json(), step=step, part=part, message=message)
        self.events.emit("warning", step=step, message=message)

    def _evaluate(self) -> None:
        """Find the held-out loss and metrics, and whether this adapter is the best so far."""
        step = self.state.step
        self.memory.begin(step, "eval")
        while True:  # until the evaluation fits into memory
            shortage = Shortage()
            with shortage:
                sums = held_out_sums(
                    self.model,
                    self.held_out_rows,
                    computation=self.memory.computation,
                    device=self.device,
                    group=self.group,
                )
            if not self.group.any(shortage.met, self.device):
                break
            self._plan_smaller(step, "eval", self.memory.computation.limit)
        held_out_sum, held_out_weight = self.group.add(sums).tolist()
        held_out = held_out_sum / held_out_weight
        scores = _scores(self.evaluate, self.settings.metrics, self.group, self.device)
        self.events.emit(
            "eval",
            step=step,
            loss=held_out,
            rows=len(self.held_out_rows),
            tokens=int(targets_of_rows(self.held_out_rows).sum()),
            **({"metrics": scores} if scores else {}),
        )
        self.state = _judge(self.state, held_out, scores.get(self.settings.best_by))
        if self.state.best_step == step and self.settings.keep_best:
            self.saving.keep_best(step, held_out, adapter_state(self.model))
        self.result.best_loss = self.state.best_loss
        self.result.best_step = self.state.best_step

    def _save(self) -> None:
        """Have a checkpoint of this moment written while the run goes on."""
        whole = replace(self.state, plans=[plan.to_json() for plan in self.memory.plans])
        optimizer = optimizer_tensors(self.optimizer, self.model)
        self.saving.begin(whole, adapter_state(self.model), optimizer)

    def _loss_scaler(self) -> torch.amp.GradScaler:
        """As the last step left it; float16 gradients underflow without, others need none."""
        dtype = next(p.dtype for p in self.model.parameters() if not p.requires_grad)
        scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        if self.state.loss_scaling:
            scaler.load_state_dict(self.state.loss_scaling)
        return scaler

    def _has_waited_long_enough(self) -> bool:
        """Whether early stopping was asked for and its patience is at its end."""
        patience = self.settings.early_stopping_patience
        return patience is not None and self.state.evaluations_without_gain >= patience

    def _evaluation_is_due(self) -> bool:
        """Whether the held-out rows are evaluated after this step."""
        every = self.settings.eval_steps or steps_per_epoch(
            self.draws.num_rows, self.settings.batch_size
        )
        return self.state.step % every == 0


Item = TypeVar("Item")


def _with_next(items: Iterable[Item]) -> Iterator[tuple[Item, Item | None]]:
    """Every item with the one after it."""
    ahead = iter(items)
    item = next(ahead, None)
    while item is not None:
        following = next(ahead, None)
        yield item, following
        item = following


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
