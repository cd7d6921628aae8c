"""Saving: when a run writes checkpoints, and what happens if one cannot be written.

Owns that a full disk in the middle of a run costs nothing but a warning: training goes on, and the
next attempt comes soon, then less and less often. The best adapter so far is written with the
checkpoint after it, under the same rule. Only the last checkpoint of a run must be written. How one
is written is `checkpoint.py`'s.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

from torch import Tensor

from myna.errors import StorageError
from myna.training.checkpoint import Best, CheckpointWriter, Outcome, State
from myna.training.events import EventLog


class Saving:
    """The checkpoints of one run; with no `root` nothing is written."""

    def __init__(self, root: Path | None, *, keep: int, every: int, events: EventLog) -> None:
        self._writer = None if root is None else CheckpointWriter(root, keep=keep)
        self._every = every
        self._events = events
        self._failures = 0
        self._retry_at: int | None = None
        self._error: StorageError | None = None
        self._best: Best | None = None
        self._told = 0

    def __enter__(self) -> Self:
        """The same."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing half written, whatever ended the run."""
        if self._writer is not None:
            self._tell(self._writer.wait(), self._told)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint belongs after `step`: every so many, or because one failed."""
        return step % self._every == 0 or (self._retry_at is not None and step >= self._retry_at)

    def keep_best(self, step: int, loss: float, adapter: Mapping[str, Tensor]) -> None:
        """Have this adapter written with the next checkpoint, as the best so far."""
        if self._writer is not None:
            copy = {name: tensor.detach().to("cpu", copy=True) for name, tensor in adapter.items()}
            self._best = Best(step, loss, copy)

    def begin(
        self, state: State, adapter: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
    ) -> None:
        """Have it written while the run goes on."""
        if self._writer is not None:
            self._writer.begin(state, adapter, optimizer, self._best)

    def report(self, step: int) -> None:
        """Tell of checkpoints that have ended, at step `step`."""
        if self._writer is not None:
            self._tell(self._writer.finished(), step)

    def finish(self, step: int) -> None:
        """Wait until all is written. Raises StorageError where the last one could not be."""
        if self._writer is None:
            return
        self._tell(self._writer.wait(), step)
        if self._error is not None:
            raise self._error

    def _tell(self, outcomes: list[Outcome], step: int) -> None:
        self._told = step
        for saved, error in outcomes:
            if not (error is None or isinstance(error, StorageError)):
                raise error
            self._error = error
            if error is None:
                if self._best is not None and self._best.step <= saved:
                    self._best = None
                self._failures, self._retry_at = 0, None
                self._events.emit("checkpoint", step=saved)
                continue
            self._failures += 1
            wait = 2 ** (self._failures - 1)
            self._retry_at = step + wait
            self._events.emit(
                "warning",
                step=saved,
                message=f"the checkpoint of step {saved} was not written; training goes on and "
                f"tries again in {wait} {'step' if wait == 1 else 'steps'}: {error}",
            )
