"""events.jsonl: what a reader gets after crashes and resumptions."""

import json
from pathlib import Path

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
