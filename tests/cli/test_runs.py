"""The list of runs: what the kernel knows of a process counts, not what it wrote of itself."""

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

from rich.console import Console

from myna.cli.runs import list_runs, show
from myna.run_dir import RunDir


def make_run(folder: Path, *events: dict[str, Any], finished: bool = False) -> RunDir:
    folder.mkdir(parents=True)
    (folder / "run.lock").write_text("12345\n")
    lines = [json.dumps({"time": 1_000.0 + number} | event) for number, event in enumerate(events)]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    if finished:
        (folder / "adapter").mkdir()
    return RunDir(folder)


START = {"event": "start", "total_steps": 12}
STEP = {"event": "step", "step": 3, "loss": 1.5}


def test_every_state(tmp_path: Path) -> None:
    make_run(tmp_path / "done", START, STEP, {"event": "end"}, finished=True)
    make_run(tmp_path / "killed", START, STEP)
    error = {"event": "error", "message": "step 4: loss is nan\n  Rows: …"}
    make_run(tmp_path / "broken", START, STEP, error)
    make_run(tmp_path / "again", START, STEP, error, START, STEP)  # it was resumed, then killed
    make_run(tmp_path / "new", START)
    (tmp_path / "no-run").mkdir()
    (tmp_path / "file").write_text("")
    found = {Path(run.path).name: run for run in list_runs(tmp_path)}
    assert {name: run.state for name, run in found.items()} == {
        "done": "finished",
        "killed": "stopped",
        "broken": "failed",
        "again": "stopped",
        "new": "begun",
    }
    assert found["broken"].message == "step 4: loss is nan"
    assert (found["killed"].step, found["killed"].total_steps, found["killed"].loss) == (3, 12, 1.5)


def test_a_dead_process_is_not_running_and_a_living_one_is(tmp_path: Path) -> None:
    run = make_run(tmp_path / "job", START, STEP)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with run.locked():
            os.write(writer, b"!")
            signal.pause()
    os.read(reader, 1)
    try:
        assert [found.state for found in list_runs(tmp_path)] == ["running"]
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)
    assert [found.state for found in list_runs(tmp_path)] == ["stopped"]


def test_looking_does_not_keep_anybody_from_training(tmp_path: Path) -> None:
    run = make_run(tmp_path / "job", START)
    before = sorted((path, path.stat().st_mtime_ns) for path in run.path.iterdir())
    list_runs(tmp_path)
    assert sorted((path, path.stat().st_mtime_ns) for path in run.path.iterdir()) == before
    with run.locked():
        pass


def test_as_a_person_and_as_a_program_reads_it(tmp_path: Path) -> None:
    make_run(tmp_path / "killed", START, STEP)
    console = Console(file=io.StringIO(), width=100)
    show(tmp_path, as_json=False, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "stopped" in text and "3/12" in text and "1.5000" in text
    console = Console(file=io.StringIO())
    show(tmp_path, as_json=True, console=console)
    (line,) = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert json.loads(line)["state"] == "stopped"
    console = Console(file=io.StringIO(), width=100)
    show(tmp_path / "nowhere", as_json=False, console=console)
    assert "no runs in" in console.file.getvalue()  # type: ignore[attr-defined]
