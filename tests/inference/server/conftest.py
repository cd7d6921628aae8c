"""A server of two runs on one base, in a thread, and the real client of it."""

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI

from myna.inference.chat import ChatSession
from myna.inference.generate import Sampling
from myna.inference.server.app import create_app
from myna.inference.server.batching import BatchingEngine, open_engine
from myna.inference.server.engine import Task
from myna.inference.server.limits import Limits
from myna.inference.server.listener import serve_in_thread
from myna.inference.server.names import Runs, find_runs
from myna.inference.speaker import open_speaker
from tiny_model import save_tiny_run

LIMITS = Limits(body_bytes=200_000, waiting=64, batch=16, turn_seconds=0.05)
TOKENS = 12

Chat = Callable[[str, str], str]


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    address: str
    engine: BatchingEngine
    runs: Runs
    notes: list[str]

    def client(self, **options: object) -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, **options)


@contextlib.contextmanager
def held(engine: BatchingEngine, task: Task) -> Iterator[None]:
    """While the engine stands still: whom it tells of a token of `task` does not return."""
    kept, let_go = threading.Event(), threading.Event()

    def keep(*_: object) -> None:
        kept.set()
        let_go.wait(60)

    engine.submit([task], keep)
    try:
        assert kept.wait(60)
        yield
    finally:
        let_go.set()


@pytest.fixture(autouse=True, scope="session")
def _frozen_heap(chatml: Path) -> Iterator[None]:
    """transformers collects garbage at every end of an engine: only in what tests made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def two_runs(chatml: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs on one base, one with a persona."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        save_tiny_run(chatml, folder / "huan", system="你是甄嬛", seed=5),
        save_tiny_run(chatml, folder / "plain.v2", seed=6),
    ]


@pytest.fixture(scope="session")
def served(two_runs: list[Path]) -> Iterator[Served]:
    notes: list[str] = []
    runs = find_runs([str(run) for run in two_runs])
    engine = open_engine(runs, limits=LIMITS, device="cpu", dtype="float32", note=notes.append)
    try:
        address, stop = serve_in_thread(create_app(engine, limits=LIMITS), LIMITS)
        yield Served(address, engine, runs, notes)
        stop()
    finally:
        engine.close()


@pytest.fixture(scope="session")
def client(served: Served) -> Iterator[OpenAI]:
    with served.client() as client:
        yield client


@pytest.fixture(scope="session")
def chat(two_runs: list[Path], chatml: Path) -> Chat:
    """What `myna chat` answers greedily: model name and question to the text."""
    sources = {run.name: str(run) for run in two_runs} | {"base": str(chatml)}
    speakers = {
        name: open_speaker(source, device="cpu", dtype="float32")
        for name, source in sources.items()
    }

    def ask(model: str, question: str) -> str:
        sampling = Sampling(max_new_tokens=TOKENS, temperature=0)
        session = ChatSession(speakers[model], sampling, note=pytest.fail)
        return "".join(session.ask(question))

    return ask
