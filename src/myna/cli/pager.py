"""The pager: long output a screen at a time, where there is a screen.

Owns starting `less` (or what PAGER names) and being told that its reader has left. What is printed
may be endless: it is written as it is read.
"""

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from rich.console import Console


class _ReaderLeft(Exception):
    """The pager was closed before all was printed."""


class _PagerConsole(Console):
    def on_broken_pipe(self) -> None:
        raise _ReaderLeft


@contextmanager
def paged(console: Console) -> Iterator[Console]:
    """A console whose output is read in a pager; `console` itself where it is no terminal.

    The block ends early, without an exception, when the reader leaves. PAGER is heeded, and where
    it is empty or there is no such program, all is printed at once.
    """
    command = shlex.split(os.environ.get("PAGER", "less"))
    if not console.is_terminal or not command or shutil.which(command[0]) is None:
        yield console
        return
    if Path(command[0]).name == "less":
        command.append("-R")
    # F: what fits on the screen is printed, and that is all. X: it stays there afterwards.
    environment = {"LESS": "FX", **os.environ}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, env=environment, text=True, encoding="utf-8"
    )
    assert process.stdin is not None, "it was asked for"
    # Ctrl-C is the pager's: it ends a search there, and must not leave it without a parent.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with suppress(_ReaderLeft):
            yield _PagerConsole(
                file=process.stdin,
                force_terminal=True,
                color_system=cast(Any, console.color_system),
                width=console.width,
                highlight=False,
            )
    finally:
        with suppress(BrokenPipeError):  # what was not read yet has nowhere to go
            process.stdin.close()
        process.wait()
        signal.signal(signal.SIGINT, before)
