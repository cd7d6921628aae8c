"""The training loop, whole and in sight: from the first step to the last.

Owns what a step is: its rows, one loss over all of them, one backward per micro-batch, one clipped
update. Everything it reports goes through events; files of data, models and consoles are known to
those who call it.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from myna.data.encode import Example
from myna.data.loader import num_steps, num_targets, rows_of_steps, steps_per_epoch
from myna.device import peak_memory_bytes
from myna.distributed.group import ALONE, Group
from myna.errors import Interrupted, NonFiniteError
from myna.lora.adapter_file import load_adapter_state
from myna.lora.inject import adapter_state
from myna.training.checkpoint import Checkpoint, State, load_best, save_best, save_checkpoint
from myna.training.computation import Computation
from myna.training.events import EventLog
from myna.training.optimizer import (
    Schedule,
    adamw,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
    trainable,
)
from myna.training.validate import held_out_loss


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

    def total_steps(self, num_rows: int) -> int:
        """Optimizer steps of the run on `num_rows` rows."""
        return num_steps(num_rows, self.batch_size, self.epochs, self.max_steps)

    def learning_rates(self, num_rows: int) -> Schedule:
        """The learning rate of every step of the run on `num_rows` rows."""
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
    checkpoints: Path | None = None,
    resume: Checkpoint | None = None,
    group: Group = ALONE,
    writes: bool = True,
    stop_requested: Callable[[], bool] = lambda: False,
) -> FitResult:
    """Train `model`'s trainable parameters on `train_rows`; the adapter is in the model afterwards.

    The loss of a step is the sum of the cross-entropy over all trained tokens of its rows, in all
    micro-batches and processes, divided once by their number; how rows are cut into micro-batches
    changes nothing. With `resume` the run goes on after that checkpoint as if it had not stopped.

    Raises NonFiniteError before the weights move, Interrupted after a checkpoint when
    `stop_requested` turns true, StorageError where a checkpoint cannot be written.
    """
    rates = settings.learning_rates(len(train_rows))
    optimizer = adamw(model, weight_decay=settings.weight_decay)
    parameters = list(trainable(model).values())
    # float16 gradients underflow without it; it does nothing for the other formats.
    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    state = State(0)
    if resume is not None:
        state = resume.state
        load_adapter_state(model, resume.adapter)
        load_optimizer_tensors(optimizer, model, resume.optimizer)
        scaler.load_state_dict(state.loss_scaling)
    result = FitResult(state.step, best_loss=state.best_loss, best_step=state.best_step)
    result.stopped_early = _has_waited_long_enough(state, settings)
    model.train()

    with computation.prepared(model):
        for step, epoch, rows in rows_of_steps(
            len(train_rows),
            settings.batch_size,
            seed=settings.seed,
            first_step=state.step + 1,
            last_step=state.step if result.stopped_early else rates.total_steps,
        ):
            started = time.monotonic()
            num_trained = sum(num_targets(train_rows[row]) for row in rows)
            pieces = computation.pieces(train_rows, rows[group.rank :: group.size])
            sums = torch.zeros(2, device=device)  # loss, token positions computed
            for number, piece in enumerate(pieces):
                torch.manual_seed(_dropout_seed(settings.seed, step, group.rank, number))
                loss = computation.summed_loss(model, piece) / num_trained
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                sums += torch.stack([loss.detach(), loss.new_tensor(piece.computed_tokens)])
            # Added before unscaling, so that every process finds the same overflow and skips alike.
            group.add_gradients(parameters)
            scaler.unscale_(optimizer)
            step_loss, computed_tokens = group.add(sums).tolist()
            grad_norm = nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm).item()
            if not math.isfinite(step_loss) or not (
                math.isfinite(grad_norm) or scaler.is_enabled()
            ):
                raise NonFiniteError(
                    f"step {step}: loss is {step_loss}, gradient norm {grad_norm}; "
                    "the weights did not move.\n"
                    f"  Rows: {', '.join(str(train_rows[row].place) for row in rows)}.\n"
                    f"  Try a learning rate below {settings.learning_rate}, or dtype: float32."
                )
            learning_rate = rates.learning_rate(step)
            set_learning_rate(optimizer, learning_rate)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            result.step = step
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
            is_last = step == rates.total_steps
            state = replace(state, step=step, loss_scaling=scaler.state_dict())
            if held_out_rows and (is_last or _is_due(step, settings, len(train_rows))):
                held_out, num_tokens = held_out_loss(
                    model,
                    held_out_rows,
                    computation=computation,
                    device=device,
                    group=group,
                )
                events.emit(
                    "eval", step=step, loss=held_out, rows=len(held_out_rows), tokens=num_tokens
                )
                state = _judge(state, held_out)
                if state.best_step == step and settings.keep_best and checkpoints and writes:
                    save_best(checkpoints, step, held_out, adapter_state(model))
                result.best_loss, result.best_step = state.best_loss, state.best_step
            result.stopped_early = _has_waited_long_enough(state, settings)
            stop = group.any(stop_requested(), device)
            save = step % settings.save_steps == 0 or stop or result.stopped_early or is_last
            if save and checkpoints is not None and writes:
                save_checkpoint(
                    checkpoints,
                    state,
                    adapter_state(model),
                    optimizer_tensors(optimizer, model),
                    keep=settings.keep_checkpoints,
                )
                events.emit("checkpoint", step=step)
            if stop and not is_last:
                raise Interrupted(f"stopped after step {step}; the same command goes on from here.")
            if result.stopped_early:
                break

    if settings.keep_best and checkpoints is not None and writes:
        load_adapter_state(model, load_best(checkpoints))
    return result


def recompute_activations(model: nn.Module) -> None:
    """Keep only the inputs of each layer for the backward pass and compute the rest again.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost". Non-reentrant, so nothing
    below the first adapter needs a gradient. `model` is a transformers model, wrapped or not.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:  # transformers before 5.23
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]


def _dropout_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """A resumed run draws the dropout that the uninterrupted one would have drawn."""
    return random.Random(f"{seed}:{step}:{rank}:{micro_batch}").getrandbits(63)


def _judge(state: State, held_out: float) -> State:
    """The state after an evaluation with this held-out loss."""
    if state.best_loss is None or held_out < state.best_loss:
        return replace(state, best_loss=held_out, best_step=state.step, evaluations_without_gain=0)
    return replace(state, evaluations_without_gain=state.evaluations_without_gain + 1)


def _has_waited_long_enough(state: State, settings: FitSettings) -> bool:
    """Whether early stopping was asked for and its patience is at its end."""
    patience = settings.early_stopping_patience
    return patience is not None and state.evaluations_without_gain >= patience


def _is_due(step: int, settings: FitSettings, num_rows: int) -> bool:
    """Whether the held-out rows are evaluated after `step`."""
    every = settings.eval_steps or steps_per_epoch(num_rows, settings.batch_size)
    return step % every == 0
