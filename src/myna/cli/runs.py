"""`myna runs`: the runs in a folder, with what is known of each.

Owns the list and how a run's state is told: by its lock, which the kernel frees when its process
dies, never by what a process last wrote of itself.
"""

import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from myna.run_dir import RunDir
from myna.training.events import read_events

Condition = Literal["running", "finished", "stopped", "failed", "begun"]
_STYLES = {"running": "green", "failed": "red", "stopped": "yellow"}


@dataclass(frozen=True)
class RunState:
    """One run, as the list shows it."""

    path: str
    state: Condition
    """`running`: a process holds its lock. `stopped`: by a signal, or its process died; the same
    command goes on. `failed`: its last event is an error. `begun`: no step yet."""
    step: int
    total_steps: int | None
    loss: float | None
    best_loss: float | None
    """Best held-out loss."""
    seconds_since: float
    """Since its last event."""
    message: str = ""
    """Why it failed."""


def list_runs(root: Path) -> list[RunState]:
    """The runs directly under `root`, the last one that did something first."""
    found = [run_state(RunDir(path)) for path in root.iterdir()] if root.is_dir() else []
    return sorted((run for run in found if run), key=lambda run: run.seconds_since)


def show(root: Path, *, as_json: bool, console: Console) -> None:
    """Print the list as a table, or one JSON object a line."""
    runs = list_runs(root)
    if as_json:
        for run in runs:
            print(json.dumps(asdict(run)), file=console.file)
        return
    if not runs:
        console.print(f"no runs in {root}; `myna train` makes one")
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column, justify in (("run", "left"), ("state", "left"), ("step", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type] # one of two literals
    for column in ("loss", "held-out", "last sign"):
        table.add_column(column, justify="right")
    for run in runs:
        style = _STYLES.get(run.state, "")
        total = f"/{run.total_steps:,}" if run.total_steps else ""
        table.add_row(
            run.path,
            f"[{style}]{run.state}[/]" if style else run.state,
            f"{run.step:,}{total}",
            "" if run.loss is None else f"{run.loss:.4f}",
            "" if run.best_loss is None else f"{run.best_loss:.4f}",
            _age(run.seconds_since),
        )
    console.print(table)
    for run in runs:
        if run.message:
            console.print(f"{run.path}: {run.message}", style="dim", markup=False, soft_wrap=True)


def run_state(directory: RunDir) -> RunState | None:
    """How a run stands; None where the folder is no run."""
    lock = directory.path / "run.lock"
    if not lock.is_file():
        return None
    step, total, loss, best, last, message = 0, None, None, None, lock.stat().st_mtime, ""
    failed = False
    if directory.events.is_file():
        for event in read_events(directory.events):
            last = event["time"]
            kind = event["event"]
            failed = kind == "error"
            if kind == "start":
                total = event["total_steps"]
            elif kind == "step":
                step, loss = event["step"], event["loss"]
            elif kind == "eval":
                best = event["loss"] if best is None else min(best, event["loss"])
            elif kind == "error":
                message = event["message"].splitlines()[0]
    state: Condition
    if _is_held(lock):
        state = "running"
    elif directory.adapter.is_dir():
        state = "finished"
    elif failed:
        state = "failed"
    else:
        state = "stopped" if step else "begun"
    if state != "failed":
        message = ""
    return RunState(
        _relative(directory.path), state, step, total, loss, best, time.time() - last, message
    )


def _is_held(lock: Path) -> bool:
    descriptor = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _relative(path: Path) -> str:
    absolute = path.absolute()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path)


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"
