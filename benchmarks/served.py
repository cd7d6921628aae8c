"""Servers on tiny models, in a thread of this program or in a process of its own.

Owns starting `myna serve` (and transformers' own server, to compare with), watching what it opens
and connects to, its memory and its descriptors, and stopping it. What it is asked is `serving.py`'s
and the tests'.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hostile_requests import wait_until
from tiny_model import save_tiny_model, save_tiny_run

CONTEXT = 1024

_WATCHED = """
import os, sys
log = int(sys.argv.pop(1))
def watch(event, arguments):
    if event == "open":
        line = f"open {arguments[0]!r}"
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen"):
        line = f"{event} {arguments[1:]!r}"
    else:
        return
    os.write(log, line.encode("utf-8", "replace") + b"\\n")
sys.addaudithook(watch)
from myna.cli.main import main
main()
"""
"""`myna` in a process whose audit hook writes down what is opened and whom it speaks to."""


def make_runs(folder: Path, *names: str) -> list[Path]:
    """A tiny base in `folder`, and a run directory with an adapter of its own for each name."""
    base = save_tiny_model(
        folder / "model", max_position_embeddings=CONTEXT, initializer_range=0.2
    )
    return [
        save_tiny_run(base, folder / "runs" / name, seed=number)
        for number, name in enumerate(names, start=1)
    ]


@dataclass
class ServerProcess:
    """A server under its own process id."""

    process: subprocess.Popen[bytes]
    url: str
    events: Path | None = None
    """Where its audit hook writes."""

    @property
    def host(self) -> str:
        """Without the port."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """Where it listens."""
        return urlsplit(self.url).port or 0

    def memory_bytes(self) -> int:
        """Resident memory of the process."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> int:
        """Open files and sockets of the process."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def events_since(self, at: int) -> tuple[list[str], int]:
        """What the audit hook wrote after byte `at`, and where it is now."""
        assert self.events is not None, "started without a watch"
        data = self.events.read_bytes()[at:]
        return data.decode("utf-8", "replace").splitlines(), at + len(data)

    def metric(self, name: str) -> float:
        """The value of a gauge or counter without labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[1])
        raise KeyError(name)

    def becomes_idle(self, seconds: float = 10.0) -> bool:
        """Whether nothing was computed any more within so many seconds."""
        return wait_until(
            lambda: self.metric("myna_running") == 0 and self.metric("myna_queue_length") == 0,
            seconds,
        )


@contextlib.contextmanager
def myna_process(
    runs: Sequence[Path], *arguments: str, folder: Path, environment: Mapping[str, str] = {}
) -> Iterator[ServerProcess]:
    """`myna serve` of these runs on a free port, watched by an audit hook."""
    events = folder / "events.log"
    log = os.open(events, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    command = [sys.executable, "-c", _WATCHED, str(log), "serve", *map(str, runs)]
    process = subprocess.Popen(
        [*command, "--port", "0", *arguments],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=[log],
    )
    os.close(log)
    try:
        yield ServerProcess(process, _address_in(process), events)
    finally:
        _end(process)


@contextlib.contextmanager
def transformers_process(
    model: Path, port: int, *arguments: str, log: Path
) -> Iterator[ServerProcess]:
    """transformers' own server on a model folder."""
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with open(log, "wb") as written:
        process = subprocess.Popen(
            [*command, *options, *arguments], stdout=written, stderr=subprocess.STDOUT
        )
        url = f"http://127.0.0.1:{port}"
        try:
            if not wait_until(lambda: _answers(f"{url}/health", process), 120):
                raise RuntimeError(f"transformers serve did not start:\n{log.read_text()[-2000:]}")
            yield ServerProcess(process, url)
        finally:
            _end(process)


def _address_in(process: subprocess.Popen[bytes]) -> str:
    """The address in the line that says that the server is ready."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line.decode("utf-8", "replace"))
        if "listening on " in seen[-1]:
            os.set_blocking(process.stderr.fileno(), False)
            return seen[-1].split("listening on ", 1)[1].split()[0]
    raise RuntimeError("myna serve did not start:\n" + "".join(seen[-30:]))


def _answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"the server ended with {process.returncode}")
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        time.sleep(0.1)
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stderr is not None:
        process.stderr.close()
