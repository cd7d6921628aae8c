"""events.jsonl: what a reader gets after crashes and resumptions."""

import errno
import json
import os
from pathlib import Path

import pytest

from myna.errors import StorageError
from myna.training import events as events_module
from myna.training.events import EventLog, read_events


def steps(path: Path) -> list[tuple[str, int]]:
    return [(entry["event"], entry["step"]) for entry in read_events(path)]


def test_events_reach_the_file_and_the_listeners(tmp_path: Path) -> None:
    heard: list[dict[str, object]] = []
    with EventLog(tmp_path / "events.jsonl", heard.append) as log:
        log.emit("step", step=1, loss=2.5, note="甄嬛")
    written = json.loads((tmp_path / "events.jsonl").read_text(encoding="utf-8"))
    assert written == heard[0]
    assert written["event"] == "step" and written["note"] == "甄嬛" and written["time"] > 0


def test_steps_after_the_resumed_checkpoint_are_void(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for step in (1, 2, 3):
            log.emit("step", step=step)
    with EventLog(path) as log:
        log.emit("resume", step=2)
        log.emit("step", step=3)
    assert steps(path) == [("step", 1), ("step", 2), ("resume", 2), ("step", 3)]


def test_a_torn_line_is_ignored_and_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "step", "st')
    with EventLog(path) as log:
        log.emit("step", step=2)
    assert steps(path) == [("step", 1), ("step", 2)]


def test_a_full_disk_delays_lines_and_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events.jsonl"
    whole = os.write
    room = 10**9

    def write(descriptor: int, content: bytes) -> int:
        nonlocal room
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = whole(descriptor, content[:room])
        room -= written
        return written

    monkeypatch.setattr(events_module.os, "write", write)
    with EventLog(path) as log:
        log.emit("step", step=1)
        room = 20  # a part of the next line
        log.emit("step", step=2)
        log.emit("step", step=3)
        assert steps(path) == [("step", 1)]
        room = 10**9
        log.emit("step", step=4)
        assert steps(path) == [("step", number) for number in (1, 2, 3, 4)]
    with pytest.raises(StorageError, match="No space left on device"), EventLog(path) as log:
        room = 0
        log.emit("step", step=5)
    with pytest.raises(StorageError, match="cannot be written"):
        EventLog(tmp_path / "gone" / "events.jsonl")


def test_steps_of_a_process_that_left_no_checkpoint_are_void_when_another_begins(
    tmp_path: Path,
) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for step in (1, 2, 3):
            log.emit("step", step=step)
        log.emit("eval", step=3)
    with EventLog(path) as log:
        log.emit("step", step=1)
        log.emit("step", step=2)
    assert steps(path) == [("step", 1), ("step", 2)]


def test_a_listener_that_comes_later_hears_the_rest(tmp_path: Path) -> None:
    heard: list[dict[str, object]] = []
    with EventLog(tmp_path / "events.jsonl") as log:
        log.emit("step", step=1)
        log.listen(heard.append)
        log.emit("step", step=2)
    assert [event["step"] for event in heard] == [2]
