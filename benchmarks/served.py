"""Servers on tiny models, in a thread of this program or in a process of its own.

Owns starting `myna serve` (and transformers' own server, to compare with), watching what it opens
and connects to, its memory and its descriptors, and stopping it. What it is asked is `serving.py`'s
and the tests'.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hostile_requests import wait_until
from myna.inference.server.app import create_app
from myna.inference.server.batching import BatchingEngine, open_engine
from myna.inference.server.engine import Load
from myna.inference.server.limits import Limits
from myna.inference.server.listener import serve_in_thread
from myna.inference.server.names import find_runs
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
    base = save_tiny_model(folder / "model", max_position_embeddings=CONTEXT, initializer_range=0.2)
    return [
        save_tiny_run(base, folder / "runs" / name, seed=number)
        for number, name in enumerate(names, start=1)
    ]


@dataclass
class Served:
    """A server in a thread of this process."""

    url: str
    engine: BatchingEngine
    app: Any

    @property
    def host(self) -> str:
        """Without the port."""
        return urlsplit(self.url).hostname or ""

    @property
    def port(self) -> int:
        """Where it listens."""
        return urlsplit(self.url).port or 0

    @property
    def models(self) -> Collection[str]:
        """Names that clients send."""
        return self.engine.models.keys()

    @property
    def routes(self) -> list[Any]:
        """Of the app."""
        return list(self.app.routes)

    def answers(self) -> int:
        """How many requests were answered by a model."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            counts = re.findall(r"^myna_answers_total\S* (\d+)", answer.read().decode(), re.M)
        return sum(map(int, counts))

    def becomes_idle(self, seconds: float = 10.0) -> bool:
        """Whether nothing was computed or waiting any more within so many seconds."""
        return wait_until(lambda: self.engine.load() == Load(waiting=0, running=0), seconds)


@contextlib.contextmanager
def serve_runs(
    runs: Sequence[Path], *, limits: Limits | None = None, api_key: str | None = None
) -> Iterator[Served]:
    """These runs, served by a thread of this process."""
    found = find_runs([str(run) for run in runs])
    engine = open_engine(found, limits=limits, device="cpu", dtype="float32")
    with (
        contextlib.closing(engine),
        serve_engine(engine, limits=limits, api_key=api_key) as served,
    ):
        yield served


@contextlib.contextmanager
def serve_engine(
    engine: BatchingEngine, *, limits: Limits | None = None, api_key: str | None = None
) -> Iterator[Served]:
    """An engine that is there, at an address of its own."""
    app = create_app(engine, api_key=api_key, limits=limits)
    url, stop = serve_in_thread(app, limits or Limits())
    try:
        yield Served(url, engine, app)
    finally:
        stop()


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
def myna_process(runs: Sequence[Path], *arguments: str, folder: Path) -> Iterator[ServerProcess]:
    """`myna serve` of these runs on a free port, watched by an audit hook."""
    events, said = folder / "events.log", folder / "server.log"
    log = os.open(events, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    command = [sys.executable, "-c", _WATCHED, str(log), "serve", *map(str, runs)]
    with open(said, "wb") as written:
        process = subprocess.Popen(
            [*command, "--port", "0", *arguments],
            stdout=written,
            stderr=subprocess.STDOUT,
            pass_fds=[log],
        )
    os.close(log)
    try:
        yield ServerProcess(process, _address_in(said, process), events)
    finally:
        _end(process)


@contextlib.contextmanager
def transformers_process(model: Path, *arguments: str, log: Path) -> Iterator[ServerProcess]:
    """transformers' own server on a model folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with open(log, "wb") as written:
        process = subprocess.Popen(
            [*command, *options, *arguments], stdout=written, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        if not wait_until(lambda: _answers(f"{url}/health", process, log), 120):
            raise RuntimeError(f"transformers serve did not start:\n{log.read_text()[-2000:]}")
        yield ServerProcess(process, url)
    finally:
        _end(process)


def _address_in(said: Path, process: subprocess.Popen[bytes]) -> str:
    """The address in the line that says that the server is ready."""
    found: list[str] = []

    def look() -> bool:
        found[:] = re.findall(r"listening on (\S+)", said.read_text(errors="replace"))
        return bool(found) or process.poll() is not None

    wait_until(look, 120)
    if not found:
        raise RuntimeError(f"myna serve did not start:\n{said.read_text(errors='replace')[-2000:]}")
    return found[0]


def _answers(url: str, process: subprocess.Popen[bytes], log: Path) -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"the server has ended:\n{log.read_text(errors='replace')[-2000:]}")
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
