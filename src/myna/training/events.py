"""events.jsonl: what happened in a run, one JSON object a line.

Owns writing and reading of the lines; console, plots and reports read nothing else. Every line has
`time` (seconds since 1970, UTC) and `event`: start, plan, step, eval, checkpoint, resume, warning
or end.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

Listener = Callable[[dict[str, Any]], None]


class EventLog:
    """Appends events to a file (None: none is written) and tells listeners of them."""

    def __init__(self, path: Path | None, *listeners: Listener) -> None:
        self._file = None if path is None else open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed in __exit__
        self._listeners = listeners
        if self._file is not None and path is not None and not _ends_with_newline(path):
            self._file.write("\n")  # a line torn by a crash must not swallow the next one

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event; the line is handed to the system before this returns."""
        entry = {"time": round(time.time(), 3), "event": event, **fields}
        if self._file is not None:
            self._file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()
        for listener in self._listeners:
            listener(entry)

    def __enter__(self) -> Self:
        """The log itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, 2) == 0:
            return True
        file.seek(-1, 2)
        return file.read(1) == b"\n"


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events that count, in order.

    After a resume at step k, earlier `step` and `eval` lines above k are void and left out; a torn
    line is ignored.
    """
    entries: list[dict[str, Any]] = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["event"] == "resume":
                entries = [
                    kept
                    for kept in entries
                    if kept["event"] not in ("step", "eval", "checkpoint")
                    or kept["step"] <= entry["step"]
                ]
            entries.append(entry)
    yield from entries
