"""Trackers: programs that people watch their runs in, fed with the events of a run.

Owns which trackers there are, what they are sent, and that none of them can slow down or end a run:
each has a thread of its own, and one that fails is one warning. It hears the events that
`events.jsonl` keeps, and sends nothing to a tracker that `report_to` does not name.
"""

import contextlib
import importlib.util
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from myna.errors import ConfigError
from myna.training.events import EventLog

PACKAGES = {"tensorboard": "tensorboard"}
"""Tracker -> the package that it needs."""

WAIT_SECONDS = 10
"""For a tracker to take its last numbers when the run has ended."""


class Tracker(Protocol):
    """What numbers are given to."""

    def log(self, numbers: Mapping[str, float], step: int, time: float) -> None:
        """Take the numbers of a step, which ended at `time` (seconds since 1970)."""

    def close(self) -> None:
        """Write what is not written."""


class TensorBoard:
    """Event files in a folder, for `tensorboard --logdir`.

    What an earlier process of the run wrote of `first_step` and later ones is void: TensorBoard
    leaves it out.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)  # type: ignore[no-untyped-call]

    def log(self, numbers: Mapping[str, float], step: int, time: float) -> None:
        """Add one point to each curve."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step, walltime=time)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Write what is waiting."""
        self._writer.close()  # type: ignore[no-untyped-call]


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError, with the command that installs it, for a package that is not there."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"report_to: {name} needs the package {PACKAGES[name]}, which is not installed.\n"
                "  Install it with: pip install 'myna[track]'"
            )


def numbers_of(event: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker is sent of an event, under the names that Trainer gives them."""
    if event["event"] == "eval":
        return {"eval/loss": event["loss"]}
    if event["event"] != "step":
        return {}
    numbers = {
        "train/loss": event["loss"],
        "train/learning_rate": event["learning_rate"],
        "train/grad_norm": event["grad_norm"],
        "train/epoch": event["epoch"],
        "train/tokens_per_second": event["tokens"] / max(event["seconds"], 1e-9),
        "train/peak_memory_bytes": event["peak_memory_bytes"],
    }
    return {name: value for name, value in numbers.items() if value is not None}


@contextlib.contextmanager
def tracked(
    names: Sequence[str], folder: Path, events: EventLog, *, first_step: int
) -> Iterator[None]:
    """Feed the trackers with all events of the block; what they lack at its end is a warning.

    Args:
        names: keys of `PACKAGES`.
        folder: the run directory, in which TensorBoard's files become `tensorboard/`.
        events: whom to listen to, and where warnings go.
        first_step: the step that comes next; what was sent of it and of later ones before is void.
    """
    feeds: list[_Feed] = []

    def hear(event: dict[str, Any]) -> None:
        for feed in list(feeds):
            if feed.failure is None:
                feed.put(event)
            else:
                feeds.remove(feed)
                events.emit("warning", message=feed.failure)

    for name in names:
        try:
            feeds.append(_Feed(name, TensorBoard(folder / name, first_step)))
        except Exception as error:  # of other people's code, and no reason not to train
            events.emit("warning", message=_failure(name, error))
    events.listen(hear)
    try:
        yield
    finally:
        for feed in feeds:
            feed.finish()
            if feed.failure is not None:
                events.emit("warning", message=feed.failure)
        feeds.clear()


def _failure(name: str, error: Exception) -> str:
    return (
        f"report_to: {name} failed and gets no more numbers of this run, which goes on: "
        f"{type(error).__name__}: {error}"
    )


class _Feed:
    """One tracker with the events that wait for it."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.failure: str | None = None
        self._name = name
        self._tracker = tracker
        self._waiting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        # Of a daemon: a tracker that hangs does not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, event: dict[str, Any]) -> None:
        """Have an event sent."""
        self._waiting.put(event)

    def finish(self) -> None:
        """Have the rest sent, and wait for it a while."""
        self._waiting.put(None)
        self._thread.join(WAIT_SECONDS)
        if self._thread.is_alive():
            self.failure = (
                f"report_to: {self._name} has not taken all numbers {WAIT_SECONDS} seconds after "
                "the run; the rest is not sent"
            )

    def _run(self) -> None:
        try:
            while (event := self._waiting.get()) is not None:
                if numbers := numbers_of(event):
                    self._tracker.log(numbers, event["step"], event["time"])
            self._tracker.close()
        except Exception as error:  # of other people's code, and no reason not to train
            self.failure = _failure(self._name, error)
