"""events.jsonl: what happened in a run, one JSON object a line.

Owns writing and reading of the lines; console, plots and reports read nothing else. Every line has
`time` (seconds since 1970, UTC) and `event`: start, plan, step, eval, checkpoint, resume, warning
or end.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from myna.errors import StorageError

Listener = Callable[[dict[str, Any]], None]


class EventLog:
    """Appends events to a file (None: none is written) and tells listeners of them.

    Where the disk is full, lines wait until it is not: a run goes on without them. Raises
    StorageError where the file cannot be opened, and at the end if lines are still waiting.
    """

    def __init__(self, path: Path | None, *listeners: Listener) -> None:
        self._path = path
        self._listeners = list(listeners)
        self._waiting = b""
        self._descriptor: int | None = None
        if path is None:
            return
        try:
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            if not _ends_with_newline(path):
                self._waiting = b"\n"  # a line torn by a crash must not swallow the next one
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}.") from error

    def listen(self, listener: Listener) -> None:
        """Tell `listener` of the events from now on."""
        self._listeners.append(listener)

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event; the line is handed to the system before this returns, if it takes it."""
        entry = {"time": round(time.time(), 3), "event": event, **fields}
        self._waiting += json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._write()
        for listener in list(self._listeners):
            listener(entry)

    def _write(self) -> OSError | None:
        if self._descriptor is None:
            self._waiting = b""
            return None
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
        except OSError as error:
            return error
        return None

    def __enter__(self) -> Self:
        """The log itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the file."""
        error = self._write()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if error is not None and kind is None:
            raise StorageError(f"{self._path}: could not be written: {error.strerror}.") from error


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, 2) == 0:
            return True
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events that count, in order.

    After a resume at step k, earlier `step`, `eval` and `checkpoint` lines above k are void and
    left out; so are those of a process that ended before its first checkpoint, once another has
    begun at step 1. A torn line is ignored.
    """
    entries: list[dict[str, Any]] = []
    last = 0  # step of the last step line that counts
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["event"] == "resume":
                entries, last = _up_to(entries, entry["step"]), entry["step"]
            elif entry["event"] == "step":
                if entry["step"] <= last:
                    entries = _up_to(entries, entry["step"] - 1)
                last = entry["step"]
            entries.append(entry)
    yield from entries


def _up_to(entries: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Without what belongs to later steps."""
    return [
        entry
        for entry in entries
        if entry["event"] not in ("step", "eval", "checkpoint") or entry["step"] <= step
    ]
