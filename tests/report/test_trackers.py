"""Trackers get the numbers of the events, and none of them can end or hold up a run.

wandb and MLflow are tested where they are installed.
"""

import contextlib
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from made_run import step

from myna.errors import ConfigError, Interrupted
from myna.report import trackers
from myna.report.trackers import TrackedRun, check_trackers, tracked
from myna.training.events import EventLog, read_events

HELD_OUT = {"event": "eval", "step": 2, "loss": 0.75, "rows": 2, "tokens": 20}
NUMBERS = {
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "train/epoch",
    "train/tokens_per_second",
    "train/peak_memory_bytes",
    "eval/loss",
}


def feed(name: str, folder: Path, *events: dict[str, Any], first_step: int = 1) -> None:
    settings = {"model": "some/model", "lora.rank": 4, "system": "x" * 2000}
    run = TrackedRun(folder, "0123abcd", settings, first_step)
    with EventLog(folder / "events.jsonl") as log, tracked([name], run, log):
        for event in events:
            log.emit(**event)


def warnings_in(folder: Path) -> list[str]:
    events = read_events(folder / "events.jsonl")
    return [event["message"] for event in events if event["event"] == "warning"]


def read(folder: Path) -> Any:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(folder / "tensorboard"))
    return accumulator.Reload()


def values(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(point.step, pytest.approx(point.value)) for point in read(folder).Scalars(name)]


def test_tensorboard_reads_the_numbers_of_the_events(tmp_path: Path) -> None:
    checkpoint = {"event": "checkpoint", "step": 2}
    feed("tensorboard", tmp_path, step(1, grad_norm=None), step(2), HELD_OUT, checkpoint)
    assert set(read(tmp_path).Tags()["scalars"]) == NUMBERS
    assert values(tmp_path, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert values(tmp_path, "train/grad_norm") == [(2, 2.0)]
    assert values(tmp_path, "train/tokens_per_second") == [(1, 50.0), (2, 50.0)]
    assert values(tmp_path, "eval/loss") == [(2, 0.75)]
    times = [event["time"] for event in read_events(tmp_path / "events.jsonl")]
    assert [point.wall_time for point in read(tmp_path).Scalars("train/loss")] == times[:2]
    assert warnings_in(tmp_path) == []


def test_steps_that_a_resumed_run_repeats_are_there_once(tmp_path: Path) -> None:
    feed("tensorboard", tmp_path, *map(step, (1, 2, 3, 4)))
    again = step(3, loss=9.0), step(4, loss=8.0), step(5, loss=7.0)
    feed("tensorboard", tmp_path, *again, first_step=3)
    assert values(tmp_path, "train/loss") == [(1, 1.0), (2, 0.5), (3, 9.0), (4, 8.0), (5, 7.0)]


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format, behind a header of seven bytes."""
    at, record = 7, b""
    while at < len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole of a record, or its last part
            yield record
            record = b""


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_keeps_the_numbers_of_the_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    feed("wandb", tmp_path, step(1), step(2), HELD_OUT, step(3))
    assert warnings_in(tmp_path) == []
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = (tmp_path / "wandb").glob("offline-run-*-0123abcd/run-0123abcd.wandb")
    found: dict[str, list[str]] = {}
    settings: set[str] = set()
    for data in log_records(file.read_bytes()):
        record = Record.FromString(data)
        settings |= {entry.key for entry in record.run.config.update}
        for item in record.history.item:
            found.setdefault(item.key or ".".join(item.nested_key), []).append(item.value_json)
    assert found.keys() >= NUMBERS and {"model", "lora.rank"} <= settings
    assert [float(value) for value in found["train/loss"]] == pytest.approx([1, 1 / 2, 1 / 3])
    assert found["eval/loss"] == ["0.75"]


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_keeps_the_numbers_of_the_events_in_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    feed("mlflow", tmp_path, step(1), step(2), HELD_OUT)
    feed("mlflow", tmp_path, step(3), first_step=3)
    assert warnings_in(tmp_path) == []
    client = MlflowClient()
    experiment = client.get_experiment_by_name("myna")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics.keys() == NUMBERS and run.info.status == "FINISHED"
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert run.data.params["lora.rank"] == "4" and run.data.params["model"] == '"some/model"'


class Numbers:
    """A tracker that keeps what it is given."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.taken: list[int] = []
        self.failed: bool | None = None

    def log(self, numbers: object, step: int, time: float) -> None:
        self.taken.append(step)

    def close(self, *, failed: bool) -> None:
        self.failed = failed


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[TrackedRun], Numbers]], None]:
    return lambda tracker: monkeypatch.setitem(trackers.TRACKERS, "tensorboard", tracker)


def test_a_tracker_that_cannot_begin_is_one_warning_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder would be")
    feed("tensorboard", tmp_path, *map(step, (1, 2, 3)))
    events = list(read_events(tmp_path / "events.jsonl"))
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3]
    (warning,) = warnings_in(tmp_path)
    assert "report_to: tensorboard failed and gets no more numbers of this run" in warning


def test_a_tracker_that_fails_later_on_is_one_warning_too(
    tmp_path: Path, use: Callable[..., None]
) -> None:
    class Failing(Numbers):
        def log(self, numbers: object, step: int, time: float) -> None:
            if step == 2:
                raise OSError("the line is dead")

    use(Failing)
    feed("tensorboard", tmp_path, *map(step, (1, 2, 3, 4)))
    assert len(list(read_events(tmp_path / "events.jsonl"))) == 5
    (warning,) = warnings_in(tmp_path)
    assert "OSError: the line is dead" in warning


def test_a_tracker_that_hangs_holds_nothing_up(
    tmp_path: Path, use: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()

    class Hanging(Numbers):
        def log(self, numbers: object, step: int, time: float) -> None:
            opened.wait(60)

    use(Hanging)
    monkeypatch.setattr(trackers, "WAIT_SECONDS", 0.05)
    feed("tensorboard", tmp_path, *map(step, (1, 2)))
    opened.set()
    (warning,) = warnings_in(tmp_path)
    assert "tensorboard has not taken all numbers 0.05 seconds after the run" in warning


@pytest.mark.parametrize("failed", [False, True])
def test_a_tracker_is_told_how_the_run_ended(
    tmp_path: Path, use: Callable[..., None], failed: bool
) -> None:
    made: list[Numbers] = []

    def make(run: TrackedRun) -> Numbers:
        made.append(Numbers(run))
        return made[0]

    use(make)
    run = TrackedRun(tmp_path, "0123abcd", {}, 1)
    with (
        contextlib.suppress(Interrupted),
        EventLog(None) as log,
        tracked(["tensorboard"], run, log),
    ):
        log.emit(**step(1))
        if failed:
            raise Interrupted
    assert (made[0].taken, made[0].failed, made[0].run) == ([1], failed, run)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("tensorboard", "pip install 'myna[track]'"),
        ("wandb", "pip install wandb"),
        ("mlflow", "pip install mlflow"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as caught:
        check_trackers([name])
    assert str(caught.value) == (
        f"report_to: {name} needs the package {name}, which is not installed.\n"
        f"  Install it with: {command}"
    )
