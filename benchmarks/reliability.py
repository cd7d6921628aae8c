"""What happens to runs when machines fail: the table of the README.

    python benchmarks/reliability.py [--full | --small] [--only kills …] [--workers 2]

Owns the kinds of trials, their numbers and the table; injuries to whole runs, and what counts as
survived, are in `hurt_runs.py`. Behind each kind stands the promise it shows, by its number in the
project's list.

    unhurt        P15  the same command in another directory gives the same bytes
    finished      P03  the command of a finished run, in a new process: within two seconds, and no
                       file is touched
    kills         P01  SIGKILL at a random moment
    crash points  P01  SIGKILL at every file operation of a short run, one after the other; old
                  P14  checkpoints being removed are among them
    repeated      P02  one run killed twenty times, each time after one to four steps
    signals       P09  SIGTERM, SIGINT or SIGUSR1 at a random moment; the exit code has to be 75
    disk full     P07  every file operation of a short run fails once with ENOSPC
    bit flips     P05  one bit of the newest checkpoint, anywhere in its files
    power cuts    P06  every state in which the disk may be after each file operation of a short run
                       (`power_loss.py`): what was told to be saved is there; from every hundredth
                       the run goes on
    non-finite    P10  NaN or infinity in the loss, a gradient, an adapter or the embedding, at the
                       first, a middle or the last step
    memory        P11  no memory in the forward or backward pass, the update, an evaluation or a
                       checkpoint: the run goes on by itself to the same losses (1e-5)
    races         P12  two commands for one directory at once
    clock         P13  checkpoints whose times are shuffled, or years away
    hostile       P30  adapter folders made to do harm (`hostile.py`)
    overhead           a checkpoint of 20 million adapter parameters, as of a 7B model

Unasked it takes a few minutes, `--full` five times as many trials; `--small`, for the tests, a
twentieth of them and of the file operations. Results are kept in `results/reliability.json`.
"""

import argparse
import functools
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
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

import hurt_runs
from hostile import FOLDERS, load, make_adapter
from hurt_runs import TIMES_KILLED, Bench, Trial
from myna.device import processor
from myna.training.checkpoint import CheckpointWriter, State, latest_checkpoint, save_checkpoint
from power_loss import Recording, power_cuts

RESULTS = Path(__file__).parent / "results" / "reliability.json"
NUMBERS = {
    "unhurt": 20,
    "finished": 3,
    "kills": 200,
    "repeated": 20,
    "signals": 100,
    "bit flips": 1000,
    "non-finite": 300,
    "memory": 50,
    "races": 100,
    "clock": 100,
}
"""Trials of the short form; those that are not listed take every case there is."""
FULL, SMALL = 5, 1 / 20
RESUMED = 100
"""One in so many of the states after a power cut is run on from."""


@dataclass
class Outcome:
    """The trials of one kind."""

    trials: int = 0
    survived: int = 0
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    """What went wrong in those that did not, the first ten."""

    def add(self, wrong: str) -> None:
        """Count a trial."""
        self.trials += 1
        if wrong:
            self.failures.append(wrong)
        else:
            self.survived += 1


def many(trial: Callable[[int], Trial], numbers: Sequence[int], workers: int) -> Outcome:
    """Trials side by side, each in a process forked from a forked worker."""
    outcome, where = Outcome(), Counter[str]()
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        for number, done in zip(numbers, pool.map(trial, numbers), strict=True):
            outcome.add(f"{number}: {done.wrong}" if done.wrong else "")
            where[done.where] += bool(done.where)
    outcome.details = {words: count for words, count in sorted(where.items()) if words}
    return outcome


def repeated(bench: Bench, kills: int, workers: int) -> Outcome:
    """Counted by kills, of which a run gets twenty at most."""
    times = min(TIMES_KILLED, kills)
    trial = functools.partial(hurt_runs.kill_repeatedly, bench, times)
    outcome = many(trial, range(kills // times), workers)
    outcome.trials *= times
    outcome.survived *= times
    return outcome


def finished(bench: Bench, number: int) -> Outcome:
    """The command as a person gives it, where there is nothing left to do."""
    outcome = Outcome()
    output, yaml = bench.place("finished"), bench.folder / "short.yaml"
    assert hurt_runs.finish(hurt_runs.begin(yaml, output)) == 0, hurt_runs.said_by(output)

    def look() -> list[tuple[Path, int, int]]:
        there = [(path, path.stat()) for path in sorted(output.rglob("*"))]
        return [(path, stat.st_mtime_ns, stat.st_size) for path, stat in there]

    def own_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before, times = look(), []
    for _ in range(number):
        # Its own time: other programs may have the processor.
        started = own_seconds()
        done = subprocess.run(
            [sys.executable, "-m", "myna", "train", str(yaml), f"output={output}"],
            capture_output=True,
            text=True,
        )
        times.append(own_seconds() - started)
        fine = done.returncode == 0 and "nothing was changed" in done.stdout
        wrong = "" if fine else done.stdout + done.stderr
        wrong = wrong or ("" if look() == before else "files were touched")
        outcome.add(wrong or ("" if times[-1] < 2 else f"{times[-1]:.1f} s"))
    outcome.details = {"seconds of the processor, at most": round(max(times), 2)}
    hurt_runs.remove(output)
    return outcome


def flip_bits(folder: Path, number: int, workers: int) -> Outcome:
    """Single bits of the newest of two checkpoints: never used, and the other one is."""
    tensors = {"a.lora_A.weight": torch.randn(8, 64), "a.lora_B.weight": torch.randn(64, 8)}
    for step in (1, 2):
        save_checkpoint(folder / "origin", State(step, run="r"), tensors, tensors, keep=2)
    return many(functools.partial(_flip_bit, folder), range(number), workers)


def _flip_bit(folder: Path, number: int) -> Trial:
    draw = random.Random(f"bit {number}")
    work = folder / f"flipped-{number}"
    shutil.copytree(folder / "origin", work)
    file = draw.choice(sorted((work / "step-00000002").iterdir()))
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    said: list[str] = []
    found = latest_checkpoint(work, said.append, "r")
    shutil.rmtree(work)
    used_other = found is not None and found.state.step == 1
    told = len(said) == 1 and "goes on from step-00000001" in said[0]
    return Trial("" if used_other and told else f"{file.name}: {said}", file.name)


def cut_power(bench: Bench, recording: Recording, workers: int, times: float) -> Outcome:
    """Every state after every file operation of the short run."""
    outcome = Outcome()
    share = max(1, round(1 / times))
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        halves = [
            pool.submit(_cut_power, bench, recording, number, workers, share)
            for number in range(workers)
        ]
        for half in halves:
            done = half.result()
            outcome.trials += done.trials
            outcome.survived += done.survived
            outcome.failures += done.failures
            outcome.details = dict(Counter(outcome.details) + Counter(done.details))
    outcome.details["operations"] = len(recording.operations)
    return outcome


def _cut_power(
    bench: Bench, recording: Recording, number: int, workers: int, share: int
) -> Outcome:
    """One worker's part of the states, of which one in `share` is looked at."""
    outcome, known = Outcome(details={"run on from": 0}), dict[int, int | str]()
    for index, left in enumerate(power_cuts(recording)):
        if index % share or index // share % workers != number:
            continue
        wrong = hurt_runs.lost_by(left, bench.place(f"left-{number}"), known)
        if not wrong and index // share % RESUMED < workers:
            outcome.details["run on from"] += 1
            wrong = hurt_runs.resume_after_power_cut(bench, left, index)
        outcome.add(f"after {left.moment} operations, {left.what}: {wrong}" if wrong else "")
    shutil.rmtree(bench.place(f"left-{number}"), ignore_errors=True)
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
        said: list[str] = []
        found = latest_checkpoint(root, said.append)
        names = sorted(path.name for path in root.iterdir())
        kept = names == ["step-00000003", "step-00000004"] and not said
        right = found is not None and found.state.step == 4 and kept
        outcome.add("" if right else f"{names}: {said}")
        shutil.rmtree(root)
    return outcome


def refuse_hostile(folder: Path) -> Outcome:
    """Every folder of `hostile.py`: refused within a second and 512 MB, no canary touched."""
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
        touched = (place / "canary").exists()
        bad = wrong or took > 1 or grown > 512 or touched
        outcome.add(f"{name}: {wrong} {took:.1f} s, {grown:.0f} MB" if bad else "")
        shutil.rmtree(place)
    return outcome


def overhead(folder: Path, saves: int) -> Outcome:
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
    for step in range(1, saves + 1):
        started = time.monotonic()
        writer.begin(State(step), adapter, optimizer)
        stalls.append(time.monotonic() - started)
        ((_, error),) = writer.wait()
        writes.append(time.monotonic() - started)
        assert error is None, error
    outcome = Outcome(
        details={
            "parameters": parameters,
            "bytes": 12 * parameters,
            "stall_seconds_median": statistics.median(stalls),
            "stall_seconds_most": max(stalls),
            "written_after_seconds_median": statistics.median(writes),
        }
    )
    outcome.add("" if max(stalls) < 1 else f"{max(stalls):.2f} s")
    return outcome


def kinds(
    bench: Bench, recording: Recording, times: float, workers: int
) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Every kind of trial by its name."""
    number = {name: max(1, int(count * times)) for name, count in NUMBERS.items()}
    points = range(1, bench.operations + 1, max(1, int(1 / times)))

    def run_many(trial: Callable[[Bench, int], Trial], numbers: Sequence[int]) -> Outcome:
        return many(functools.partial(trial, bench), numbers, workers)

    yield "unhurt", lambda: run_many(hurt_runs.unhurt, range(number["unhurt"]))
    yield "finished", lambda: finished(bench, number["finished"])
    yield "kills", lambda: run_many(hurt_runs.kill, range(number["kills"]))
    yield "crash points", lambda: run_many(hurt_runs.crash_point, points)
    yield "repeated", lambda: repeated(bench, number["repeated"], workers)
    yield "signals", lambda: run_many(hurt_runs.ask_to_stop, range(number["signals"]))
    yield "disk full", lambda: run_many(hurt_runs.full_disk, points)
    yield "bit flips", lambda: flip_bits(bench.folder, number["bit flips"], workers)
    yield "power cuts", lambda: cut_power(bench, recording, workers, times)
    yield "non-finite", lambda: run_many(hurt_runs.not_finite, range(number["non-finite"]))
    yield "memory", lambda: run_many(hurt_runs.run_out_of_memory, range(number["memory"]))
    yield "races", lambda: run_many(hurt_runs.race, range(number["races"]))
    yield "clock", lambda: shuffle_clock(bench.folder, number["clock"])
    yield "hostile", lambda: refuse_hostile(bench.folder)
    yield "overhead", lambda: overhead(bench.folder, max(1, min(5, int(5 * times))))


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
        bench, recording = hurt_runs.prepared(Path(folder).resolve())
        print(
            f"an unhurt run takes {bench.seconds:.2f} s, {bench.training_seconds:.2f} s of them "
            f"training; a short one {bench.operations} file operations",
            flush=True,
        )
        for name, measure in kinds(bench, recording, times, given.workers):
            if given.only and name not in given.only:
                continue
            begun = time.monotonic()
            outcomes[name] = measure()
            outcomes[name].seconds = time.monotonic() - begun
            done = outcomes[name]
            print(f"{name}: {done.survived} of {done.trials} in {done.seconds:.0f} s", flush=True)
            for failure in done.failures[:10]:
                print(f"  {failure}", flush=True)
    show(outcomes)
    keep(outcomes, given, time.monotonic() - started)
    if any(done.survived < done.trials for done in outcomes.values()):
        sys.exit(1)


def show(outcomes: dict[str, Outcome]) -> None:
    """The table, and where runs were hurt."""
    table = Table(title="what became of hurt runs")
    for column in ("injury", "trials", "survived", "seconds"):
        table.add_column(column, justify="left" if column == "injury" else "right")
    for name, done in outcomes.items():
        table.add_row(name, f"{done.trials:,}", f"{done.survived:,}", f"{done.seconds:,.0f}")
    Console().print(table)
    for name, done in outcomes.items():
        if done.details and name != "overhead":
            print(f"{name}: " + ", ".join(f"{words}: {n}" for words, n in done.details.items()))
    if "overhead" in outcomes:
        found = outcomes["overhead"].details
        print(
            f"a checkpoint of {found['parameters']:,} parameters stops training for "
            f"{found['stall_seconds_median']:.3f} s and is on disk after "
            f"{found['written_after_seconds_median']:.2f} s"
        )


def keep(outcomes: dict[str, Outcome], given: argparse.Namespace, seconds: float) -> None:
    """Results of these kinds, beside those of the others from before."""
    stored = json.loads(given.results.read_text()) if given.results.exists() else {"kinds": {}}
    stored |= {
        "command": "python benchmarks/reliability.py" + (" --full" if given.full else ""),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": processor().name,
        "workers": given.workers,
        "versions": {n: version(n) for n in ("torch", "transformers", "peft", "safetensors")},
    }
    if not given.only:
        stored["seconds"] = round(seconds, 1)
    for name, done in outcomes.items():
        stored["kinds"][name] = {
            "trials": done.trials,
            "survived": done.survived,
            "seconds": round(done.seconds, 1),
            "details": done.details,
            "failures": done.failures[:10],
        }
    given.results.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
