"""Trackers: programs that people watch their runs in, fed with the events of a run.

Owns which trackers there are, what they are sent (numbers and settings, no text of the data), and
that none of them can hold up or end a run: each has a thread of its own, and one that fails is one
warning. It hears the events that `events.jsonl` keeps. A tracker is asked for by `report_to`.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from myna.errors import ConfigError
from myna.training.events import EventLog

PROJECT = "myna"
"""Project or experiment that runs belong to, where the tracker's own variable names no other."""

WAIT_SECONDS = 10
"""For a tracker to take its last numbers when the run has ended."""

_LONGEST_PARAMETER = 500
"""Characters of a setting that every MLflow takes."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of a run."""

    folder: Path
    identity: str
    """The same after a resumption, and no other run's."""
    settings: Mapping[str, Any]
    """By dotted name."""
    first_step: int
    """The step that comes next; what was sent of it and of later ones before is void."""


class Tracker(Protocol):
    """What numbers are given to."""

    def log(self, numbers: Mapping[str, float], step: int, time: float) -> None:
        """Take the numbers of a step, which ended at `time` (seconds since 1970)."""

    def close(self, *, failed: bool) -> None:
        """Send what is not sent; the run has ended, well or not."""


class TensorBoard:
    """Event files in the run's folder `tensorboard`, for `tensorboard --logdir`.

    What an earlier process of the run wrote of repeated steps, TensorBoard leaves out.
    """

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(
            str(run.folder / "tensorboard"), purge_step=run.first_step
        )

    def log(self, numbers: Mapping[str, float], step: int, time: float) -> None:
        """Add one point to each curve."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step, walltime=time)

    def close(self, *, failed: bool) -> None:
        """Write what is waiting."""
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb with the name of ours; repeated steps keep the numbers sent first.

    Account, server, project and offline mode are what wandb's own variables say.
    """

    def __init__(self, run: TrackedRun) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run: Any = wandb.init(
            project=None if "WANDB_PROJECT" in os.environ else PROJECT,
            name=run.folder.name,
            id=run.identity,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
            settings={"console": "off"},  # or it sends what the terminal shows, rows of data too
        )

    def log(self, numbers: Mapping[str, float], step: int, time: float) -> None:
        """Send the numbers; wandb notes its own time."""
        self._run.log(dict(numbers), step=step)

    def close(self, *, failed: bool) -> None:
        """Wait until all is sent."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow, found again by a tag; steps that are repeated have two points.

    The server is what MLflow's own variables say.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._entities: Any = importlib.import_module("mlflow.entities")
        self._client: Any = importlib.import_module("mlflow").MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        earlier = self._client.search_runs([experiment], f"tags.`myna.run` = '{run.identity}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"myna.run": run.identity}
        self._id = self._client.create_run(
            experiment, run_name=run.folder.name, tags=tags
        ).info.run_id
        parameters = [
            self._entities.Param(name, json.dumps(value, ensure_ascii=False)[:_LONGEST_PARAMETER])
            for name, value in run.settings.items()
        ]
        self._client.log_batch(self._id, params=parameters)

    def log(self, numbers: Mapping[str, float], step: int, time: float) -> None:
        """Send the numbers of a step in one request."""
        metrics = [
            self._entities.Metric(name, value, round(1000 * time), step)
            for name, value in numbers.items()
        ]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, *, failed: bool) -> None:
        """Say how it ended."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
"""Tracker by its name in `report_to`, which is also the name of its package."""

INSTALL = {"tensorboard": "'myna[track]'", "wandb": "wandb", "mlflow": "mlflow"}
"""What `pip install` is told."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError, with the command that installs it, for a package that is not there."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"report_to: {name} needs the package {name}, which is not installed.\n"
                f"  Install it with: pip install {INSTALL[name]}"
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
def tracked(names: Sequence[str], run: TrackedRun, events: EventLog) -> Iterator[None]:
    """Feed the trackers with all events of the block; what goes wrong is a warning among these.

    `names` are keys of `TRACKERS`.
    """
    feeds = [_Feed(name, run) for name in names]

    def hear(event: dict[str, Any]) -> None:
        for feed in list(feeds):
            if feed.failure is None:
                feed.put(event)
            else:
                feeds.remove(feed)
                events.emit("warning", message=feed.failure)

    events.listen(hear)
    failed = True
    try:
        yield
        failed = False
    finally:
        ended, feeds = feeds, []  # so that `hear` does not tell of them a second time
        for feed in ended:
            feed.finish(failed=failed)
            if feed.failure is not None:
                events.emit("warning", message=feed.failure)


class _Feed:
    """One tracker with the events that wait for it."""

    def __init__(self, name: str, run: TrackedRun) -> None:
        self.failure: str | None = None
        self._name = name
        self._run = run
        self._failed = False
        self._waiting: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        # Of a daemon: a tracker that hangs does not keep the program from ending.
        self._thread = threading.Thread(target=self._feed, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, event: dict[str, Any]) -> None:
        """Have an event sent."""
        self._waiting.put(event)

    def finish(self, *, failed: bool) -> None:
        """Have the rest sent, and wait for it a while."""
        self._failed = failed
        self._waiting.put(None)
        self._thread.join(WAIT_SECONDS)
        if self._thread.is_alive():
            self.failure = (
                f"report_to: {self._name} has not taken all numbers {WAIT_SECONDS} seconds after "
                "the run; the rest may be missing there"
            )

    def _feed(self) -> None:
        try:
            tracker = TRACKERS[self._name](self._run)
            while (event := self._waiting.get()) is not None:
                if numbers := numbers_of(event):
                    tracker.log(numbers, event["step"], event["time"])
            tracker.close(failed=self._failed)
        except Exception as error:  # of other people's code, and no reason not to train
            self.failure = (
                f"report_to: {self._name} failed and gets no more numbers of this run, which goes "
                f"on: {type(error).__name__}: {error}"
            )
