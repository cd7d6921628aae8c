"""What happens to runs when machines fail: the table of the README.

    python benchmarks/reliability.py [--full | --small] [--only kills …] [--workers 2]

Owns the injuries and what counts as survived. The case is a run of `myna train` on a tiny model
(`tiny_model.py`): packed, with dropout, an evaluation every three steps, a checkpoint every two and
epochs that end in between. A trial is the whole command in a process of its own, forked from one
that has everything imported; it is hurt, then the same command is repeated until it ends by itself,
and the SHA-256 of `adapter_model.safetensors` is compared with that of a run that nobody hurt.

    kills        SIGKILL at a random moment
    crash points SIGKILL at every file operation of a short run, one after the other
    repeated     one run killed twenty times, each time after a step or more
    signals      SIGTERM, SIGINT or SIGUSR1 at a random moment; the exit code has to be 75
    disk full    every file operation of a short run fails once with ENOSPC
    bit flips    one bit of the newest checkpoint, anywhere in its files
    non-finite   NaN or infinity in the loss, a gradient, an adapter or the embedding, at the first,
                 a middle or the last step
    races        two commands for one directory at once
    clock        checkpoints whose times are shuffled, or years away
    hostile      adapter folders made to do harm (`hostile.py`)
    overhead     a checkpoint of 20 million adapter parameters, as of a 7B model

Unasked it takes a few minutes, `--full` five times as many trials; `--small`, for the tests, a
twentieth of them and of the file operations. Results are kept in `results/reliability.json`.
"""

import argparse
import errno
import functools
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from hostile import FOLDERS, make_adapter
from myna.cli.train import Options, run
from myna.config_file import load_config
from myna.device import processor
from myna.errors import MynaError
from myna.training.checkpoint import CheckpointWriter, State, latest_checkpoint, save_checkpoint
from tiny_model import save_tiny_model

RESULTS = Path(__file__).parent / "results" / "reliability.json"
NUMBERS = {
    "kills": 200,
    "repeated": 1,
    "signals": 100,
    "bit flips": 1000,
    "non-finite": 300,
    "races": 100,
    "clock": 100,
}
"""Trials of the short form; those that are not listed take every case there is."""
FULL, SMALL = 5, 1 / 20
MOST_ATTEMPTS = 60


@dataclass
class Outcome:
    """The trials of one kind."""

    trials: int = 0
    survived: int = 0
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    """What went wrong in those that did not, the first ten."""


@dataclass(frozen=True)
class Bench:
    """The job, in a folder of its own, and the adapter that an unhurt run ends in."""

    folder: Path
    wanted: str
    seconds: float
    """How long an unhurt run takes."""
    operations: int
    """File operations of the short run."""


def write_job(folder: Path) -> None:
    """Model, rows and YAMLs: `job.yaml`, and `short.yaml` with three checkpoints."""
    save_tiny_model(folder / "model")
    lines = [
        {"instruction": f"What is {n} and {n % 7}?", "input": "", "output": f"It is {n + n % 7}!"}
        for n in range(36)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shared = (
        f"model: {folder / 'model'}\ndata: {folder / 'rows.jsonl'}\ndtype: float32\n"
        "template: chatml\nsystem: Answer like a bird.\nheld_out: 4\n"
        "lora: {rank: 4, dropout: 0.1}\n"
    )
    train = "batch_size: 6, learning_rate: 1e-3, eval_steps: 3, keep_best: true"
    (folder / "job.yaml").write_text(
        f"{shared}train: {{epochs: 2, save_steps: 2, logging_steps: 100, {train}}}\n"
    )
    (folder / "short.yaml").write_text(
        f"{shared}train: {{max_steps: 5, save_steps: 2, logging_steps: 100, {train}}}\n"
    )


def command(job: Path, output: Path) -> int:
    """`myna train` in this process, silent; its exit code."""
    try:
        run(load_config(job, [f"output={output}"]), Options(), console=Console(file=io.StringIO()))
    except MynaError as error:
        (output.parent / f"{output.name}.error").write_text(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        (output.parent / f"{output.name}.error").write_text(f"{type(error).__name__}: {error}")
        return 1
    return 0


def begin(job: Path, output: Path, prepare: Callable[[], None] | None = None) -> int:
    """The command in a process of its own; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if prepare is not None:
            prepare()
        code = command(job, output)
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """Exit code of a process; below zero the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def adapter_sum(output: Path) -> str:
    """SHA-256 of the finished adapter; empty where there is none."""
    path = output / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def resume(job: Path, output: Path, wanted: str, allowed: Sequence[int] = (0,)) -> str:
    """Repeat the command until it ends by itself; what is wrong then, or nothing."""
    code = finish(begin(job, output))
    if code not in allowed:
        said = output.parent / f"{output.name}.error"
        return f"resumption ended with {code}: {said.read_text() if said.exists() else ''}"
    if adapter_sum(output) != wanted:
        return "another adapter"
    damaged = [path.name for path in (output / "checkpoints").glob("*.corrupt*")]
    return f"damaged checkpoints: {damaged}" if damaged else ""


def hurt(
    bench: Bench,
    name: str,
    job: str,
    wanted: str,
    injure: Callable[[int, Path], tuple[int, str]],
    prepare: Callable[[], None] | None = None,
) -> str:
    """One trial in a fresh directory: begin, injure, resume; what is wrong, or nothing.

    `injure` gets the pid and the run's directory, and gives the exit code and what is wrong.
    """
    output = bench.folder / "runs" / name.replace(" ", "-")
    try:
        _, wrong = injure(begin(bench.folder / job, output, prepare), output)
        return wrong or resume(bench.folder / job, output, wanted)
    finally:
        shutil.rmtree(output, ignore_errors=True)
        output.with_name(f"{output.name}.error").unlink(missing_ok=True)


def kill(bench: Bench, number: int) -> str:
    """SIGKILL at a moment drawn from the whole length of a run."""
    draw = random.Random(f"kill {number}")

    def injure(pid: int, _: Path) -> tuple[int, str]:
        time.sleep(draw.uniform(0, bench.seconds))
        os.kill(pid, signal.SIGKILL)
        return finish(pid), ""

    return hurt(bench, f"kill {number}", "job.yaml", bench.wanted, injure)


def ask_to_stop(bench: Bench, number: int) -> str:
    """A signal at a random moment: exit 75, or 0 where the run was at its end."""
    draw = random.Random(f"signal {number}")
    asked = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[number % 3]

    def injure(pid: int, output: Path) -> tuple[int, str]:
        # Before its first event a run holds nothing that a signal could spoil.
        while not (output / "events.jsonl").exists():
            time.sleep(0.002)
        time.sleep(draw.uniform(0.02, 0.5 * bench.seconds))
        os.kill(pid, asked)
        code = finish(pid)
        # Once the adapter is written, a signal is whatever it is to any program.
        is_over = (output / "adapter").is_dir()
        return code, "" if is_over or code in (75, 0) else f"{asked.name}: exit code {code}"

    return hurt(bench, f"signal {number}", "job.yaml", bench.wanted, injure)


def kill_repeatedly(bench: Bench, number: int) -> str:
    """One run killed again and again, each time once it has done a step."""
    output = bench.folder / "runs" / f"repeated-{number}"
    job = bench.folder / "job.yaml"
    events = output / "events.jsonl"
    try:
        for _ in range(20):
            before = events.read_bytes().count(b'"event": "step"') if events.exists() else 0
            pid = begin(job, output)
            while True:
                done, _ = os.waitpid(pid, os.WNOHANG)
                if done:
                    break
                if events.exists() and events.read_bytes().count(b'"event": "step"') > before:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    break
                time.sleep(0.001)
        return resume(job, output, bench.wanted)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def at_operation(number: int, act: Callable[[], None], root: str) -> Callable[[], None]:
    """Have the `number`-th file operation under `root` (from 1) begin with `act`.

    Opening for writing, renaming, removing and making are seen by an audit hook; fsync has no
    event and is wrapped. A `number` of 0 only counts, into a file beside the run.
    """
    count = 0

    def note(path: object) -> None:
        nonlocal count
        if isinstance(path, int) or root in str(path):
            count += 1
            if count == number:
                act()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writing = isinstance(mode, str) and any(sign in mode for sign in "wax+")
            creating = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not isinstance(path, int) and (writing or creating):
                note(path)
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            note(arguments[0])

    def prepare() -> None:
        whole = os.fsync

        def fsync(descriptor: int) -> None:
            note(descriptor)
            whole(descriptor)

        os.fsync = fsync
        sys.addaudithook(hook)
        if number == 0:
            leave = os._exit

            def told(code: int) -> None:
                Path(f"{root}.count").write_text(str(count))
                leave(code)

            os._exit = told  # type: ignore[assignment]

    return prepare


def count_operations(folder: Path) -> int:
    """File operations of the short run."""
    output = folder / "runs" / "counted"
    prepare = at_operation(0, lambda: None, str(output))
    assert finish(begin(folder / "short.yaml", output, prepare)) == 0, "an unhurt run ends"
    counted = Path(f"{output}.count")
    number = int(counted.read_text())
    counted.unlink()
    shutil.rmtree(output)
    return number


def crash_point(bench: Bench, number: int, wanted: str) -> str:
    """SIGKILL at one file operation of the short run."""
    name = f"crash {number}"
    root = str(bench.folder / "runs" / name.replace(" ", "-"))

    def injure(pid: int, _: Path) -> tuple[int, str]:
        code = finish(pid)
        return code, "" if code in (-signal.SIGKILL, 0) else f"ended with {code}"

    prepare = at_operation(number, lambda: os.kill(os.getpid(), signal.SIGKILL), root)
    return hurt(bench, name, "short.yaml", wanted, injure, prepare)


def full_disk(bench: Bench, number: int, wanted: str) -> str:
    """ENOSPC at one file operation of the short run: it goes on or ends with 4 (at its start 2)."""
    name = f"disk {number}"
    root = str(bench.folder / "runs" / name.replace(" ", "-"))

    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def injure(pid: int, output: Path) -> tuple[int, str]:
        code = finish(pid)
        said = output.parent / f"{output.name}.error"
        text = said.read_text() if said.exists() else ""
        return code, "" if code in (0, 2, 4) else f"ended with {code}: {text}"

    return hurt(bench, name, "short.yaml", wanted, injure, at_operation(number, refuse, root))


def race(bench: Bench, number: int) -> str:
    """Two commands for one directory: one trains, the other ends with 7."""
    output = bench.folder / "runs" / f"race-{number}"
    job = bench.folder / "short.yaml"
    try:
        codes = sorted(map(finish, [begin(job, output), begin(job, output)]))
        # The second may also come when the first is done, and finds a finished run.
        return "" if codes in ([0, 7], [0, 0]) else f"exit codes {codes}"
    finally:
        shutil.rmtree(output, ignore_errors=True)
        output.with_name(f"{output.name}.error").unlink(missing_ok=True)


def flip_bits(folder: Path, number: int) -> Outcome:
    """Single bits of the newest of two checkpoints: never used, and the other one is."""
    outcome = Outcome()
    draw = random.Random("bits")
    origin, work = folder / "origin", folder / "work"
    tensors = {"a.lora_A.weight": torch.randn(8, 64), "a.lora_B.weight": torch.randn(64, 8)}
    for step in (1, 2):
        save_checkpoint(origin, State(step, run="r"), tensors, tensors, keep=2)
    files = sorted((origin / "step-00000002").iterdir())
    where: Counter[str] = Counter()
    for _ in range(number):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(origin, work)
        file = work / "step-00000002" / draw.choice(files).name
        content = bytearray(file.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        said: list[str] = []
        found = latest_checkpoint(work, said.append, "r")
        outcome.trials += 1
        where[file.name] += 1
        if found is not None and found.state.step == 1 and len(said) == 1:
            outcome.survived += 1
        else:
            outcome.failures.append(f"{file.name}: {said}")
    outcome.details["flips"] = dict(where)
    return outcome


def shuffle_clock(folder: Path, number: int) -> Outcome:
    """Checkpoints written under a clock that jumps: the highest step is kept and chosen."""
    outcome = Outcome()
    draw = random.Random("clock")
    tensors = {"a": torch.zeros(4)}
    for trial in range(number):
        root = folder / f"clock-{trial}"
        for step in range(1, 5):
            save_checkpoint(root, State(step), tensors, tensors, keep=2)
            for path in root.iterdir():
                moment = time.time() + draw.choice((-86400, 86400, -1e9, 1e8)) * draw.random()
                os.utime(path, (moment, moment))
        found = latest_checkpoint(root, outcome.failures.append)
        names = sorted(path.name for path in root.iterdir())
        outcome.trials += 1
        kept = names == ["step-00000003", "step-00000004"]
        outcome.survived += found is not None and found.state.step == 4 and kept
        shutil.rmtree(root)
    return outcome


def not_finite(bench: Bench, number: int) -> str:
    """NaN or infinity in one place at one step: exit 6, nothing of it on disk."""
    places = ("loss", "gradient", "adapter", "embedding")
    place, at = places[number % 4], (1, 4, 11)[number // 4 % 3]
    value = (float("nan"), float("inf"))[number // 12 % 2]
    output = bench.folder / "runs" / f"finite-{number}"
    try:
        code = finish(begin(bench.folder / "job.yaml", output, lambda: _poison(place, at, value)))
        if code != 6:
            said = output.parent / f"{output.name}.error"
            return (
                f"{place} {value} at {at}: exit {code}: {said.read_text() if said.exists() else ''}"
            )
        for file in output.rglob("*.safetensors"):
            if "nonfinite" in file.parts:
                continue  # the dump shows what the step began with
            if not all(bool(tensor.isfinite().all()) for tensor in load_file(file).values()):
                return f"{place} {value} at {at}: {file.relative_to(output)} is not finite"
        dumps = list((output / "nonfinite").glob("step-*/step.json"))
        return "" if len(dumps) == 1 else f"{place} at {at}: {len(dumps)} dumps"
    finally:
        shutil.rmtree(output, ignore_errors=True)
        output.with_name(f"{output.name}.error").unlink(missing_ok=True)


def _poison(place: str, step: int, value: float) -> None:
    """Have step `step` of the run that follows meet `value` in one place, for that step only."""
    from myna.training import computation, fit

    calls = 0
    whole = computation.Packed.summed_loss

    def summed_loss(self: Any, model: Any, piece: Any) -> Any:
        nonlocal calls
        if not model.training or not torch.is_grad_enabled():
            return whole(self, model, piece)
        calls += started()
        if calls != step:
            return whole(self, model, piece)
        trained = [p for p in model.parameters() if p.requires_grad]
        if place == "adapter":
            with torch.no_grad():
                kept = trained[0].clone()
                trained[0].view(-1)[0] = value
            loss = whole(self, model, piece)
            trained[0].register_hook(lambda grad: _restore(trained[0], kept, grad))
            return loss
        if place == "embedding":
            table = model.get_input_embeddings().weight
            with torch.no_grad():
                row = int(piece.pack.input_ids[0])
                kept = table[row].clone()
                table[row] = value
            loss = whole(self, model, piece)
            with torch.no_grad():
                table[row] = kept
            return loss
        loss = whole(self, model, piece)
        if place == "gradient":
            trained[0].register_hook(lambda grad: grad + value)
            return loss
        return loss * value

    def _restore(parameter: torch.Tensor, kept: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            parameter.copy_(kept)
        return grad

    in_fit = False
    begin_fit = fit.fit

    def started() -> int:
        return int(in_fit)

    def watched(*arguments: Any, **given: Any) -> Any:
        nonlocal in_fit
        in_fit = True
        return begin_fit(*arguments, **given)

    computation.Packed.summed_loss = summed_loss  # type: ignore[method-assign]
    import myna.cli.train

    myna.cli.train.fit = watched  # type: ignore[attr-defined]


def refuse_hostile(folder: Path) -> Outcome:
    """Every folder of `hostile.py`: refused within a second and 512 MB, no canary touched."""
    from hostile import load

    outcome = Outcome()
    for name, spoil in FOLDERS.items():
        place = folder / "hostile" / name.replace(" ", "-")
        adapter = make_adapter(place)
        spoil(adapter)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.monotonic()
        wrong = load(adapter)
        took = time.monotonic() - started
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        outcome.trials += 1
        if wrong or took > 1 or grown > 512 or (place / "canary").exists():
            outcome.failures.append(f"{name}: {wrong} {took:.1f} s, {grown:.0f} MB")
        else:
            outcome.survived += 1
        shutil.rmtree(place)
    return outcome


def overhead(folder: Path) -> Outcome:
    """How long training stands still for a checkpoint of 20 million adapter parameters."""
    adapter, optimizer = {}, {}
    for layer in range(32):
        for number, (inner, outer) in enumerate([(4096, 4096)] * 4 + [(4096, 11008)] * 3):
            name = f"layers.{layer}.{number}"
            for part, shape in (("A", (8, inner)), ("B", (outer, 8))):
                adapter[f"{name}.{part}"] = torch.randn(shape)
                for average in ("exp_avg", "exp_avg_sq"):
                    optimizer[f"{name}.{part}.{average}"] = torch.randn(shape)
    parameters = sum(tensor.numel() for tensor in adapter.values())
    stalls, writes = [], []
    writer = CheckpointWriter(folder / "overhead", keep=2)
    for step in range(1, 6):
        started = time.monotonic()
        writer.begin(State(step), adapter, optimizer)
        stalls.append(time.monotonic() - started)
        ((_, error),) = writer.wait()
        writes.append(time.monotonic() - started)
        assert error is None, error
    stall = statistics.median(stalls)
    return Outcome(
        1,
        int(max(stalls) < 1),
        details={
            "parameters": parameters,
            "bytes": 12 * parameters,
            "stall_seconds_median": stall,
            "stall_seconds_most": max(stalls),
            "written_after_seconds_median": statistics.median(writes),
        },
        failures=[] if max(stalls) < 1 else [f"{max(stalls):.2f} s"],
    )


def many(trial: Callable[[int], str], numbers: Sequence[int], workers: int) -> Outcome:
    """Trials side by side, each in a process forked from a forked worker."""
    outcome = Outcome()
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        for number, wrong in zip(numbers, pool.map(trial, numbers), strict=True):
            outcome.trials += 1
            if wrong:
                outcome.failures.append(f"{number}: {wrong}")
            else:
                outcome.survived += 1
    return outcome


def prepared(folder: Path) -> tuple[Bench, str]:
    """The job, an unhurt run of it, and what the short one ends in."""
    write_job(folder)
    runs = folder / "runs"
    runs.mkdir()
    sums, times = set(), []
    for attempt in range(3):
        started = time.monotonic()
        assert finish(begin(folder / "job.yaml", runs / f"whole-{attempt}")) == 0, (
            runs / f"whole-{attempt}.error"
        ).read_text()
        times.append(time.monotonic() - started)
        sums.add(adapter_sum(runs / f"whole-{attempt}"))
        shutil.rmtree(runs / f"whole-{attempt}")
    assert len(sums) == 1, "the same command gives the same bytes"
    assert finish(begin(folder / "short.yaml", runs / "short")) == 0
    short = adapter_sum(runs / "short")
    shutil.rmtree(runs / "short")
    operations = count_operations(folder)
    return Bench(folder, sums.pop(), statistics.median(times), operations), short


def kinds(
    bench: Bench, short: str, times: float, workers: int
) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Every kind of trial by its name."""
    number = {name: max(1, int(count * times)) for name, count in NUMBERS.items()}
    points = range(1, bench.operations + 1, max(1, int(1 / times)))

    def run_many(trial: Callable[..., str], numbers: Sequence[int], *more: Any) -> Outcome:
        return many(functools.partial(_call, trial, bench, more), numbers, workers)

    yield "kills", lambda: run_many(kill, range(number["kills"]))
    yield "crash points", lambda: run_many(crash_point, points, short)
    yield "repeated", lambda: run_many(kill_repeatedly, range(number["repeated"]))
    yield "signals", lambda: run_many(ask_to_stop, range(number["signals"]))
    yield "disk full", lambda: run_many(full_disk, points, short)
    yield "bit flips", lambda: flip_bits(bench.folder, number["bit flips"])
    yield "non-finite", lambda: run_many(not_finite, range(number["non-finite"]))
    yield "races", lambda: run_many(race, range(number["races"]))
    yield "clock", lambda: shuffle_clock(bench.folder, number["clock"])
    yield "hostile", lambda: refuse_hostile(bench.folder)
    yield "overhead", lambda: overhead(bench.folder)


def _call(trial: Callable[..., str], bench: Bench, more: tuple[Any, ...], number: int) -> str:
    return trial(bench, number, *more)


def main() -> None:
    """Run the trials, print the table, keep the results; exit 1 where one did not survive."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="five times as many trials")
    size.add_argument("--small", action="store_true", help="a twentieth of the trials")
    parser.add_argument("--only", nargs="+", metavar="KIND")
    parser.add_argument("--workers", type=int, default=2, help="trials side by side")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    times = FULL if given.full else SMALL if given.small else 1
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="myna-reliability-") as folder:
        bench, short = prepared(Path(folder))
        print(f"an unhurt run takes {bench.seconds:.2f} s and {bench.operations} file operations")
        for name, measure in kinds(bench, short, times, given.workers):
            if given.only and name not in given.only:
                continue
            begun = time.monotonic()
            outcomes[name] = measure()
            outcomes[name].seconds = time.monotonic() - begun
            done = outcomes[name]
            print(f"{name}: {done.survived} of {done.trials} in {done.seconds:.0f} s", flush=True)
            for failure in done.failures[:10]:
                print(f"  {failure}", flush=True)
    table = Table(title="what became of hurt runs")
    for column in ("injury", "trials", "survived", "seconds"):
        table.add_column(column, justify="left" if column == "injury" else "right")
    for name, done in outcomes.items():
        table.add_row(name, f"{done.trials:,}", f"{done.survived:,}", f"{done.seconds:,.0f}")
    Console().print(table)
    if "overhead" in outcomes:
        found = outcomes["overhead"].details
        print(
            f"a checkpoint of {found['parameters']:,} parameters stops training for "
            f"{found['stall_seconds_median']:.3f} s and is on disk after "
            f"{found['written_after_seconds_median']:.2f} s"
        )
    stored = json.loads(given.results.read_text()) if given.results.exists() else {"kinds": {}}
    stored |= {
        "command": "python benchmarks/reliability.py" + (" --full" if given.full else ""),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": processor().name,
        "workers": given.workers,
        "versions": {n: version(n) for n in ("torch", "transformers", "peft", "safetensors")},
        "seconds": round(time.monotonic() - started, 1),
    }
    for name, done in outcomes.items():
        stored["kinds"][name] = {
            "trials": done.trials,
            "survived": done.survived,
            "seconds": round(done.seconds, 1),
            "details": done.details,
            "failures": done.failures[:10],
        }
    given.results.write_text(json.dumps(stored, indent=1) + "\n")
    if any(done.survived < done.trials for done in outcomes.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
