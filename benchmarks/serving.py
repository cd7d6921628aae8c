"""A server under load, and among hostile clients: the numbers of `myna serve`.

    python benchmarks/serving.py [--rounds 3] [--soak MINUTES] [--only load …] [--small]

A Llama of 3.3 million parameters with a byte-level tokenizer is made on the spot, and two adapters
are trained on it by `myna train` until each answers everything with a text of its own, so that an
answer of the wrong adapter is seen. Servers are processes of their own; clients are in this one.

    load         64 requests from 64 streaming clients at once, and the same one after another, from
                 myna (one adapter, and two in turn) and from transformers' own server on the merged
                 model, without and with its continuous batching; interleaved, a server that is not
                 measured being stopped. Answers are compared; greedy, 49 tokens each
    fuzz         bodies made from the schema of requests and spoiled (`hostile_requests.py`): those
                 not answered by 2xx or an error of OpenAI's form; connections to elsewhere
    names        model names that are paths: files opened because of them
    connections  idle and slow ones together: time of /healthz, memory, descriptors afterwards
    aborts       streams left in their middle: time until nothing is computed, memory, descriptors
    soak         (with --soak) 16 clients for so many minutes, the adapters in turn, one request
                 in a hundred left and one garbage: wrong answers, failures, growth of memory

`results/serving.json` keeps all with versions, hardware and command. `--small` is a form for tests.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from typing import Any

from hypothesis import HealthCheck, given, settings
from rich.console import Console
from rich.table import Table

from hostile_requests import (
    CHAT,
    COMPLETIONS,
    FIRST_WORD,
    Client,
    Crowd,
    Sent,
    as_path,
    fault_of,
    names,
    open_stream,
    read_until,
    requests,
    wait_until,
)
from myna.device import processor
from served import ServerProcess, myna_process, transformers_process
from tiny_model import save_tiny_model

RESULTS = Path(__file__).parent / "results" / "serving.json"
MARKERS = {"alpha": ("ALPHA, " * 7).strip(), "beta": ("beta - " * 7).strip()}
"""What each adapter answers, whatever it is asked: 48 bytes, each a token, and one that ends it."""
QUESTIONS = 500
"""How many are asked in turn. A tokenizer keeps the ids of the first 10,000 words that it meets:
with a new number in every question, those 17 MB would be taken for memory that answers leave."""
LONGEST_SECONDS = 300
"""An answer that takes longer counts as none."""
BATCHING = ("--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks", "512")
BATCHING += ("--cb-max-batch-tokens", "256")
"""transformers' server with room for all requests at once. By its own measure it takes nine tenths
of the machine's memory for the cache: no answer came within two minutes on a busy machine."""


@dataclass(frozen=True)
class Size:
    """How much is done."""

    requests: int = 64
    rounds: int = 3
    bodies: int = 10_000
    names: int = 500
    idle: int = 2000
    slow: int = 200
    probes: int = 400
    aborts: int = 1000
    soak_minutes: float = 0.0


SMALL = Size(requests=8, rounds=1, bodies=200, names=60, idle=50, slow=10, probes=20, aborts=20)


@dataclass(frozen=True)
class Job:
    """Model and adapters on disk."""

    folder: Path
    runs: tuple[Path, ...]
    merged: Path


def make_job(folder: Path) -> Job:
    """A base, an adapter for each marker, and the first of them merged by peft."""
    base = save_tiny_model(
        folder / "model",
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        # With smaller weights the frozen head cannot be sure of any token.
        initializer_range=0.1,
    )
    runs = []
    for name, answer in MARKERS.items():
        rows = folder / f"{name}.jsonl"
        lines = [{"instruction": question(n), "input": "", "output": answer} for n in range(48)]
        rows.write_text("\n".join(map(json.dumps, lines)))
        runs.append(_train(base, rows, folder / "runs" / name))
    return Job(folder, tuple(runs), _merge(base, runs[0], folder / "merged"))


def _train(base: Path, rows: Path, output: Path) -> Path:
    from myna.cli.train import Options, run
    from myna.config_file import load_config

    values = [f"model={base}", f"data={rows}", f"output={output}", "dtype=float32", "device=cpu"]
    values += ["lora.rank=8", "train.batch_size=2", "train.max_steps=50", "train.epochs=100"]
    values += ["train.learning_rate=5e-3", "train.save_steps=1000"]
    with open(os.devnull, "w") as nowhere:
        run(load_config(None, values), Options(), console=Console(file=nowhere))
    return output


def _merge(base: Path, run: Path, merged: Path) -> Path:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, str(run / "adapter"))
    adapted.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(run / "adapter").save_pretrained(merged)
    return merged


def question(number: int) -> str:
    """One of many of different lengths."""
    return f"Number {number}: tell me about it{', please' * (number % 5)}."


def body(model: str, number: int) -> dict[str, Any]:
    """A greedy request."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": question(number % QUESTIONS)}],
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


# Clients.


@dataclass(frozen=True)
class Answer:
    """One streamed answer as its client saw it."""

    status: int
    text: str
    tokens: int
    first_seconds: float
    seconds: float


async def ask(host: str, port: int, wanted: dict[str, Any]) -> Answer:
    """Ask over a connection of its own and read to the end."""
    started = time.perf_counter()
    try:
        async with asyncio.timeout(LONGEST_SECONDS):
            return await _ask(host, port, json.dumps(wanted).encode(), started)
    except TimeoutError:
        return Answer(0, "", 0, LONGEST_SECONDS, time.perf_counter() - started)


async def _ask(host: str, port: int, data: bytes, started: float) -> Answer:
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(
        f"POST {CHAT} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    status = int((await reader.readline()).split()[1])
    pieces, tokens, first = [], 0, 0.0
    while line := await reader.readline():
        # An event is one line; what frames it (chunk sizes, blank lines) begins otherwise.
        if not line.startswith(b"data:") or b"[DONE]" in line:
            continue
        event = json.loads(line[5:])
        for choice in event.get("choices", ()):
            if text := choice["delta"].get("content"):
                first = first or time.perf_counter() - started
                pieces.append(text)
        if usage := event.get("usage"):
            tokens = usage["completion_tokens"]
    writer.close()
    return Answer(status, "".join(pieces), tokens, first, time.perf_counter() - started)


async def ask_all(
    server: ServerProcess, bodies: Sequence[dict[str, Any]], at_once: int
) -> tuple[list[Answer], float]:
    """Answers from so many clients at once, and the seconds that all took."""
    free = asyncio.Semaphore(at_once)

    async def one(wanted: dict[str, Any]) -> Answer:
        async with free:
            return await ask(server.host, server.port, wanted)

    started = time.perf_counter()
    answers = await asyncio.gather(*map(one, bodies))
    return list(answers), time.perf_counter() - started


# Load.


@dataclass
class Contender:
    """One way to have the same requests answered."""

    name: str
    server: ServerProcess
    bodies: list[dict[str, Any]]
    at_once: int
    expected: list[str]
    rates: list[float] = field(default_factory=list)
    """Tokens a second, of each round."""
    firsts: list[float] = field(default_factory=list)
    """Seconds to the first text, of all requests."""
    wrong: int = 0

    def measure(self) -> None:
        """One round."""
        answers, seconds = asyncio.run(ask_all(self.server, self.bodies, self.at_once))
        self.wrong += sum(
            (answer.status, answer.text) != (200, text)
            for answer, text in zip(answers, self.expected, strict=True)
        )
        self.rates.append(sum(answer.tokens for answer in answers) / seconds)
        self.firsts += [answer.first_seconds for answer in answers]

    def result(self) -> dict[str, Any]:
        """Of all rounds."""
        return {
            "tokens_per_second": statistics.median(self.rates),
            "rounds": self.rates,
            "first_seconds_median": statistics.median(self.firsts),
            "first_seconds_p95": _percentile(self.firsts, 0.95),
            "clients": self.at_once,
            "wrong_answers": self.wrong,
        }


def load(job: Job, size: Size) -> dict[str, Any]:
    """Tokens a second of every contender, rounds interleaved."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        mine = stack.enter_context(myna_process(job.runs, folder=folder))
        theirs, batching = (
            stack.enter_context(
                transformers_process(job.merged, *options, log=folder / f"{number}.log")
            )
            for number, options in enumerate([(), BATCHING])
        )
        numbers = range(size.requests)
        alpha = [body("alpha", number) for number in numbers]
        both = [body(list(MARKERS)[number % 2], number) for number in numbers]
        merged = [body(str(job.merged), number) for number in numbers]
        texts = [MARKERS["alpha"]] * size.requests
        mixed = [MARKERS[wanted["model"]] for wanted in both]
        together = size.requests
        contenders = [
            Contender("myna, one adapter", mine, alpha, together, texts),
            Contender("myna, two adapters", mine, both, together, mixed),
            Contender("myna, one after another", mine, alpha, 1, texts),
            Contender("transformers serve", theirs, merged, together, texts),
            Contender("transformers serve, one after another", theirs, merged, 1, texts),
            Contender("transformers serve, batching", batching, merged, together, texts),
        ]
        servers = [mine, theirs, batching]
        for contender in contenders:  # the first answers pay for what is made once
            asyncio.run(ask_all(contender.server, contender.bodies[:2], 1))
        for _ in range(size.rounds):
            for contender in contenders:
                with _alone(contender.server, servers):
                    contender.measure()
    results = {contender.name: contender.result() for contender in contenders}
    rate = {name: result["tokens_per_second"] for name, result in results.items()}
    return {
        "contenders": results,
        "times_one_after_another": rate["myna, one adapter"] / rate["myna, one after another"],
        "times_transformers": rate["myna, one adapter"]
        / max(rate["transformers serve"], rate["transformers serve, batching"]),
    }


@contextmanager
def _alone(measured: ServerProcess, servers: Sequence[ServerProcess]) -> Iterator[None]:
    """Others do not even wait for work: a loop that polls would take a core."""
    others = [server.process for server in servers if server is not measured]
    for process in others:
        process.send_signal(SIGSTOP)
    try:
        yield
    finally:
        for process in others:
            process.send_signal(SIGCONT)


# Hostile clients.


def fuzz(job: Job, size: Size, server: ServerProcess) -> dict[str, Any]:
    """Statuses of spoiled bodies, faults, and whom the server contacted meanwhile."""
    from myna.inference.server.requests import ChatRequest, CompletionRequest

    schemas = {
        CHAT: ChatRequest.model_json_schema(),
        COMPLETIONS: CompletionRequest.model_json_schema(),
    }
    client = Client(server.host, server.port)
    statuses: dict[str, int] = {}
    faults: list[str] = []

    @settings(
        max_examples=size.bodies,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(sent=requests(schemas, list(MARKERS)))
    def send(sent: Sent) -> None:
        answer = client.send("POST", sent.path, sent.body, sent.headers)
        statuses[str(answer.status)] = statuses.get(str(answer.status), 0) + 1
        if fault := fault_of(answer, [str(job.folder), str(Path.home())]):
            faults.append(f"{sent}: {fault}")

    _, at = server.events_since(0)
    started = time.perf_counter()
    send()
    seconds = time.perf_counter() - started
    events, _ = server.events_since(at)
    return {
        "trials": sum(statuses.values()),
        "faults": len(faults),
        "examples": faults[:5],
        "statuses": dict(sorted(statuses.items())),
        "connections_made": sum(not line.startswith("open ") for line in events),
        "seconds": seconds,
    }


def try_names(job: Job, size: Size, server: ServerProcess) -> dict[str, Any]:
    """Files that were opened while model names were asked for that are paths."""
    client = Client(server.host, server.port)
    _, at = server.events_since(0)
    faults = []
    tried = names("alpha", str(job.runs[0] / "adapter"))[: size.names]
    for name in tried:
        wanted = {"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        answer = client.post(CHAT, wanted)
        asked = client.send("GET", as_path(name))
        if answer.status not in (400, 404) or fault_of(answer) or asked.status >= 500:
            faults.append(f"{name!r}: {answer.status}, {asked.status}")
    events, _ = server.events_since(at)
    return {
        "trials": len(tried),
        "faults": len(faults),
        "examples": faults[:5],
        "files_opened": sum(line.startswith("open ") for line in events),
    }


def connections(job: Job, size: Size, server: ServerProcess) -> dict[str, Any]:
    """What idle and slow connections do to one who asks for /healthz."""
    client = Client(server.host, server.port)
    client.send("GET", "/healthz")
    memory, descriptors = server.memory_bytes(), server.descriptors()
    there = Crowd(server.host, server.port)
    there.join(size.idle, size.slow)
    wait_until(lambda: server.descriptors() >= descriptors + size.idle + size.slow, 10)
    most_descriptors, seconds = server.descriptors(), []
    failed = 0
    for number in range(size.probes):
        if number % 20 == 0:
            there.drip()
        started = time.perf_counter()
        failed += client.send("GET", "/healthz").status != 200
        seconds.append(time.perf_counter() - started)
        time.sleep(0.01)
    grown = server.memory_bytes() - memory
    there.leave()
    returned = wait_until(lambda: server.descriptors() <= descriptors, 30)
    return {
        "idle": size.idle,
        "slow": size.slow,
        "descriptors_at_most": most_descriptors,
        "healthz_failed": failed,
        "healthz_p99_seconds": _percentile(seconds, 0.99),
        "memory_grown_mb": grown / 1e6,
        "descriptors_return": returned,
    }


def aborts(job: Job, size: Size, server: ServerProcess) -> dict[str, Any]:
    """How long answers are computed that nobody waits for, and what they leave behind."""
    slowest, memory = 0.0, []
    server.becomes_idle()
    descriptors = server.descriptors()
    for start in range(0, size.aborts, 10):
        streams = []
        for number in range(start, min(start + 10, size.aborts)):
            wanted = body(list(MARKERS)[start // 10 % 2], number) | {"max_tokens": 900}
            # Hot enough to go on for long.
            streams.append(open_stream(server.host, server.port, wanted | {"temperature": 2}))
        for number, stream in enumerate(streams):
            if number % 2:
                read_until(stream, *FIRST_WORD)
            stream.close()
        left = time.perf_counter()
        if not server.becomes_idle(30):
            slowest = float("inf")
            break
        slowest = max(slowest, time.perf_counter() - left)
        memory.append(server.memory_bytes())
    settled = memory[len(memory) // 4 :]
    return {
        "trials": size.aborts,
        "slowest_seconds_to_idle": slowest,
        "memory_slope_mb_per_1000": _slope([(10 * at, use) for at, use in enumerate(settled)]),
        "descriptors_return": wait_until(lambda: server.descriptors() <= descriptors, 10),
    }


# Soak.


@dataclass
class Soak:
    """What happened to all requests so far."""

    answered: int = 0
    wrong: int = 0
    left: int = 0
    garbage: int = 0
    busy: int = 0
    failed: list[str] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    """Requests by then, bytes."""

    @property
    def requests(self) -> int:
        """All of them."""
        return self.answered + self.left + self.garbage + self.busy + len(self.failed)


def soak(job: Job, size: Size, server: ServerProcess) -> dict[str, Any]:
    """Mixed load for as many minutes as `size` says."""
    seen = Soak()
    asyncio.run(_soak(server, seen, time.monotonic() + 60 * size.soak_minutes))
    settled = seen.memory[len(seen.memory) // 5 :]
    return {
        "minutes": size.soak_minutes,
        "requests": seen.requests,
        "answered": seen.answered,
        "wrong_adapter": seen.wrong,
        "left": seen.left,
        "garbage": seen.garbage,
        "busy": seen.busy,
        "failed": len(seen.failed),
        "examples": seen.failed[:5],
        "memory_slope_mb_per_1000": _slope(settled),
        "memory_mb": [seen.memory[0][1] / 1e6, seen.memory[-1][1] / 1e6],
        "alive": server.process.poll() is None,
    }


async def _soak(server: ServerProcess, seen: Soak, until: float) -> None:
    async def watch() -> None:
        while time.monotonic() < until:
            seen.memory.append((seen.requests, server.memory_bytes()))
            await asyncio.sleep(1.0)

    await asyncio.gather(watch(), *(_client(server, seen, until, n) for n in range(16)))
    seen.memory.append((seen.requests, server.memory_bytes()))


async def _client(server: ServerProcess, seen: Soak, until: float, number: int) -> None:
    draw = random.Random(number)
    count = number
    while time.monotonic() < until:
        count += 1
        model = list(MARKERS)[count % 2]
        chance = draw.random()
        try:
            if chance < 0.01:
                await _leave(server, body(model, count))
                seen.left += 1
            elif chance < 0.02:
                data = draw.randbytes(draw.randrange(200))
                status = await _send_garbage(server, data)
                seen.garbage += 1
                if not 400 <= status < 500:
                    seen.failed.append(f"garbage was answered {status}: {data!r}")
            else:
                answer = await ask(server.host, server.port, body(model, count))
                if answer.status in (429, 503):
                    seen.busy += 1
                elif answer.status != 200:
                    seen.failed.append(f"status {answer.status}")
                else:
                    seen.answered += 1
                    seen.wrong += answer.text != MARKERS[model]
        except (OSError, asyncio.IncompleteReadError, IndexError, ValueError) as error:
            seen.failed.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.1)


async def _leave(server: ServerProcess, wanted: dict[str, Any]) -> None:
    data = json.dumps(wanted).encode()
    reader, writer = await _begin(server, data)
    await reader.readuntil(b'"delta":{"content":"')
    writer.close()


async def _send_garbage(server: ServerProcess, data: bytes) -> int:
    reader, writer = await _begin(server, data)
    status = int((await reader.readline()).split()[1])
    writer.close()
    return status


async def _begin(
    server: ServerProcess, data: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(
        f"POST {CHAT} HTTP/1.1\r\nHost: {server.host}:{server.port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return reader, writer


# Everything.


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _slope(points: Sequence[tuple[int, int]]) -> float:
    """Megabytes for a thousand requests, by least squares."""
    if len({requests_by_then for requests_by_then, _ in points}) < 2:
        return 0.0
    line = statistics.linear_regression(*zip(*points, strict=True))
    return line.slope * 1000 / 1e6


Part = Callable[[Job, Size, ServerProcess], dict[str, Any]]
HOSTILE: dict[str, Part] = {
    "fuzz": fuzz,
    "names": try_names,
    "connections": connections,
    "aborts": aborts,
    "soak": soak,
}


def show(results: dict[str, Any], console: Console) -> None:
    """What was measured, as tables."""
    if "load" in results:
        table = Table("", "clients", "tokens/s", "first text", "p95", "wrong")
        for name, found in results["load"]["contenders"].items():
            table.add_row(
                name,
                str(found["clients"]),
                f"{found['tokens_per_second']:,.0f}",
                f"{found['first_seconds_median']:.2f} s",
                f"{found['first_seconds_p95']:.2f} s",
                str(found["wrong_answers"]),
            )
        console.print(table)
        console.print(
            f"together {results['load']['times_one_after_another']:.1f}x one after another, "
            f"{results['load']['times_transformers']:.1f}x transformers serve at its best"
        )
    for name in HOSTILE:
        if name in results:
            table = Table(name, "")
            for key, value in results[name].items():
                shown = f"{value:.4g}" if isinstance(value, float) else str(value)
                table.add_row(key.replace("_", " "), shown)
            console.print(table)


def run(size: Size, only: Sequence[str], console: Console) -> dict[str, Any]:
    """The parts in `only`, or all."""
    wanted = only or ["load", *(name for name in HOSTILE if name != "soak" or size.soak_minutes)]
    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/serving.py", *sys.argv[1:]]),
        "processor": processor().name,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {
            name: version(name)
            for name in ("myna", "torch", "transformers", "peft", "uvicorn", "starlette")
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        console.print("training two adapters")
        job = make_job(Path(folder))
        if "load" in wanted:
            console.print("load")
            results["load"] = load(job, size)
        hostile = [name for name in HOSTILE if name in wanted]
        if hostile:
            with myna_process(job.runs, folder=Path(folder)) as server:
                for name in hostile:
                    console.print(name)
                    results[name] = HOSTILE[name](job, size, server)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--soak", type=float, default=0.0, metavar="MINUTES")
    parser.add_argument("--only", nargs="+", default=[], choices=["load", *HOSTILE])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    size = SMALL if options.small else Size()
    changes: dict[str, Any] = {"soak_minutes": options.soak}
    if options.rounds:
        changes["rounds"] = options.rounds
    console = Console()
    results = run(Size(**(vars(size) | changes)), options.only, console)
    show(results, console)
    if options.only and options.results.is_file():
        results = json.loads(options.results.read_text()) | results
    if not options.small or options.results != RESULTS:
        options.results.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
