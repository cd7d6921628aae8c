"""Trackers get the numbers of the events, and none of them can end or hold up a run."""

import sys
from pathlib import Path
from typing import Any

import pytest
from made_run import step

from myna.errors import ConfigError
from myna.report import trackers
from myna.report.trackers import check_trackers, tracked
from myna.training.events import EventLog, read_events

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def feed(folder: Path, *events: dict[str, Any], first_step: int = 1) -> None:
    with (
        EventLog(folder / "events.jsonl") as log,
        tracked(["tensorboard"], folder, log, first_step=first_step),
    ):
        for event in events:
            log.emit(**event)


def read(folder: Path) -> Any:
    found = accumulator.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return found


def values(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(point.step, pytest.approx(point.value)) for point in read(folder).Scalars(name)]


def test_tensorboard_reads_the_numbers_of_the_events(tmp_path: Path) -> None:
    held_out = {"event": "eval", "step": 2, "loss": 0.75, "rows": 2, "tokens": 20}
    feed(tmp_path, step(1, grad_norm=None), step(2), held_out, {"event": "checkpoint", "step": 2})
    assert set(read(tmp_path).Tags()["scalars"]) == {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/epoch",
        "train/tokens_per_second",
        "train/peak_memory_bytes",
        "eval/loss",
    }
    assert values(tmp_path, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert values(tmp_path, "train/grad_norm") == [(2, 2.0)]
    assert values(tmp_path, "train/tokens_per_second") == [(1, 50.0), (2, 50.0)]
    assert values(tmp_path, "eval/loss") == [(2, 0.75)]
    times = [event["time"] for event in read_events(tmp_path / "events.jsonl")]
    assert [point.wall_time for point in read(tmp_path).Scalars("train/loss")] == times[:2]


def test_steps_that_a_resumed_run_repeats_are_there_once(tmp_path: Path) -> None:
    feed(tmp_path, *map(step, (1, 2, 3, 4)))
    feed(tmp_path, step(3, loss=9.0), step(4, loss=8.0), step(5, loss=7.0), first_step=3)
    assert values(tmp_path, "train/loss") == [(1, 1.0), (2, 0.5), (3, 9.0), (4, 8.0), (5, 7.0)]


def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder would be")
    feed(tmp_path, *map(step, (1, 2, 3)))
    events = list(read_events(tmp_path / "events.jsonl"))
    assert [event["event"] for event in events] == ["warning", "step", "step", "step"]
    assert "report_to: tensorboard failed and gets no more numbers" in events[0]["message"]


class Failing:
    def __init__(self, *_: object) -> None:
        self.taken: list[int] = []

    def log(self, numbers: object, step: int, time: float) -> None:
        if step == 2:
            raise OSError("the line is dead")

    def close(self) -> None:
        raise AssertionError("a tracker that failed is left alone")


def test_a_tracker_that_fails_later_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "TensorBoard", Failing)
    feed(tmp_path, *map(step, (1, 2, 3, 4)))
    events = list(read_events(tmp_path / "events.jsonl"))
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4]
    (warning,) = [event for event in events if event["event"] == "warning"]
    assert "OSError: the line is dead" in warning["message"]


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_trackers(["tensorboard"])
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError) as caught:
        check_trackers(["tensorboard"])
    assert str(caught.value) == (
        "report_to: tensorboard needs the package tensorboard, which is not installed.\n"
        "  Install it with: pip install 'myna[track]'"
    )
