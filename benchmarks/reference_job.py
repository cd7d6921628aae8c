"""The reference job side by side: the tutorial's recipe, transformers + peft, trl and myna.

    python benchmarks/reference_job.py [--workload A B C D L] [--dropout 0 0.1] [--picture]

Owns the order of things and what is made of the outcomes. For each workload and dropout:

1. Equal work is shown first. A few steps in float32 without dropout: losses within 1e-4 and
   gradient norms within 1e-3 of transformers + peft's. In every run each loss must be divided by
   the number of trained tokens of the whole step, and in bfloat16 it must stay within 2 % of the
   float32 one. Otherwise the program names contender, step and both numbers, and ends without a
   timing.
2. transformers + peft and trl take a short run of each of their variants (layout of micro-batches,
   then format of the adapter); the fastest goes on. Base weights are bfloat16 where this machine
   multiplies them faster than float32, as `dtype: auto` finds out, else float32, for everybody.
3. Rounds: the matrix-product ceiling, then each contender in turn, each in a fresh process, so that
   the peak of memory is its own. The first step is not counted, for anybody: it warms caches up.

Figures: a step's time is the median over the rounds; rates are rows, real tokens (padding and
sharing change nothing) and trained tokens of the counted steps over the sum of these medians.
Start-up, loading and checks included, is told apart. The fraction of the limit is the time that the
FLOPs of `limit.py` take at the ceiling measured in that format (large squares; beside it, the
step's own shapes) over the time taken: with shared prefixes, and `unshared` for those who compute
each row.
`results/reference_job.json` keeps everything with all samples; `--picture` draws it. Contenders
for CUDA are written but unmeasured.

Other programs on the machine spoil the timings, not the checks. Needs `pip install '.[bench]'`.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Never

import torch

from contenders import Job, Outcome, missing, run_job
from limit import Sizes, limit_flops, measure_ceiling, shared_counts, unshared_counts
from myna.data.loader import num_targets
from myna.device import choose_compute, memory_total, processor
from picture import draw
from workloads import (
    WORKLOADS,
    Row,
    Workload,
    examples_of,
    rows_of,
    sha256_of,
    steps_of,
    write_adapter,
    write_model,
    write_rows,
)

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "reference_job.json"
PICTURE = ROOT / "docs" / "reference_job.png"

CHECK_STEPS = 3
PRELIMINARY_STEPS = 3
EXACT_LOSS, EXACT_NORM = 1e-4, 1e-3
ENVELOPE = 0.02
WARM_UP_STEPS = 1
CUDA_WARM_UP_STEPS, CUDA_STEPS = 20, 60
TUNED = ("peft", "trl", "liger")
"""Contenders whose variants are tried first."""
ADAPTERS = ("autocast", "bfloat16")
"""Formats of the adapter that are tried beside float32."""


@dataclass(frozen=True)
class Bench:
    """One workload, prepared in a folder, and how it is run here."""

    workload: Workload
    folder: Path
    rows: list[Row]
    num_steps: int
    warm_up: int
    threads: int
    device: str
    dtype: str
    """Of the base weights, but for the tutorial's on a CPU."""
    tiny: bool

    def job(self, contender: str, **changes: Any) -> Job:
        """The contender's run of the whole workload in its usual setting."""
        on_cpu = self.device == "cpu"
        job = Job(
            contender=contender,
            folder=str(self.folder),
            dropout=0.0,
            dtype="float32" if contender == "tutorial" and on_cpu else self.dtype,
            num_rows=len(self.rows),
            batch_size=self.workload.batch_size,
            num_steps=self.num_steps,
            threads=self.threads,
            device=self.device,
            spawned=0.0,
            layout=self.workload.layouts[0],
        )
        return replace(job, **changes)

    def child(self, entry: str, given: Mapping[str, Any]) -> dict[str, Any] | str:
        """Run a hidden entry of this script in a fresh process; its answer, or its last words."""
        with tempfile.TemporaryDirectory() as folder:
            asked, answer = Path(folder, "asked.json"), Path(folder, "answer.json")
            asked.write_text(json.dumps(given))
            environment = os.environ | {
                "OMP_NUM_THREADS": str(self.threads),
                "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1",
            }
            command = [sys.executable, str(Path(__file__)), entry, str(asked), str(answer)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if answer.exists():
                result: dict[str, Any] = json.loads(answer.read_text())
                return result
        if done.returncode == -9:
            return "killed: out of memory"
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]

    def run(self, job: Job) -> Outcome | str:
        """The outcome of a job, or why there is none."""
        answer = self.child("_run", asdict(replace(job, spawned=time.time())))
        return answer if isinstance(answer, str) else Outcome(**answer)

    def must_run(self, job: Job) -> Outcome:
        """The outcome of a job that has no reason to fail."""
        outcome = self.run(job)
        if isinstance(outcome, str):
            fail(f"{_name(job)} did not finish: {outcome}")
        return outcome


def fail(message: str) -> Never:
    sys.exit(f"reference_job: {message}")


def say(message: str) -> None:
    print(message, flush=True)


def check_exact(bench: Bench, names: Sequence[str]) -> Outcome:
    """Step 1 in float32; the losses of transformers + peft, which are the measure for bfloat16."""
    steps = min(CHECK_STEPS, bench.num_steps)
    say(f"equal work: {steps} steps in float32, dropout 0")
    reference: Outcome | None = None
    for name in dict.fromkeys(["peft", *names]):
        if name == "unsloth":
            say("  unsloth has no float32; its bfloat16 losses are compared")
            continue
        job = bench.job(name, dtype="float32", num_steps=steps)
        outcome = bench.must_run(job)
        reference = reference or outcome
        check_run(bench, job, outcome, reference, EXACT_LOSS)
        compare(name, outcome.grad_norms, reference.grad_norms, EXACT_NORM, "gradient norm")
        say(
            f"  {name:9} losses {_list(outcome.losses, 8)}  "
            f"gradient norms {_list(outcome.grad_norms, 5)}"
        )
    assert reference is not None, "peft has run"
    return reference


def check_run(
    bench: Bench, job: Job, outcome: Outcome, reference: Outcome, tolerance: float = ENVELOPE
) -> None:
    """That a run's losses are those of the whole step's trained tokens, and near the reference."""
    expected = [
        sum(num_targets(example) for example in examples_of([bench.rows[row] for row in rows]))
        for rows in steps_of(len(bench.rows), job.batch_size, job.num_steps)
    ]
    name = _name(job)
    compare(name, outcome.trained_tokens, expected, 0.0, "number of trained tokens")
    compare(name, outcome.losses, reference.losses, tolerance, "loss")


def compare(
    name: str, found: Sequence[float], expected: Sequence[float], tolerance: float, what: str
) -> None:
    """End the program at the first step that differs by more than `tolerance`, relative."""
    if len(found) < len(expected):
        fail(f"{name} reported {len(found)} times its {what}, expected {len(expected)}.")
    for step, (theirs, ours) in enumerate(zip(found, expected, strict=False), start=1):
        if not abs(theirs - ours) <= tolerance * abs(ours):
            fail(
                f"{name}, step {step}: {what} is {theirs:.7g}, expected {ours:.7g} "
                f"within {tolerance:g} relative. No timing is reported."
            )


def best_job(bench: Bench, job: Job, reference: Outcome) -> tuple[Job, dict[str, Any]]:
    """Step 2: the fastest variant of a contender, and what each took."""
    tried: dict[str, Any] = {}
    steps = min(PRELIMINARY_STEPS, bench.num_steps)

    def seconds(variant: Job) -> float:
        variant = replace(variant, num_steps=steps)
        outcome = bench.run(variant)
        if isinstance(outcome, str):
            tried[_variant(variant)] = outcome
            say(f"  {_name(variant)}: {outcome}")
            return math.inf
        check_run(bench, variant, outcome, reference)
        taken = statistics.mean(outcome.step_seconds[WARM_UP_STEPS:])
        tried[_variant(variant)] = round(taken, 4)
        say(f"  {_name(variant)}: {1e3 * taken:,.0f} ms a step")
        return taken

    layouts = [replace(job, layout=layout) for layout in bench.workload.layouts]
    times = {variant: seconds(variant) for variant in layouts}
    best = min(layouts, key=times.__getitem__)
    if times[best] == math.inf:
        fail(f"no variant of {job.contender} ran: {tried}")
    # Beside float32 weights, half of a float32 adapter's bits save nothing.
    adapters = ADAPTERS if job.dtype == "bfloat16" else ()
    others = [replace(best, adapter=adapter) for adapter in adapters]
    times |= {variant: seconds(variant) for variant in others}
    best = min(times, key=times.__getitem__)
    return best, tried


def run_league(bench: Bench, names: Sequence[str], dropout: float, rounds: int) -> dict[str, Any]:
    """All three steps of one workload at one dropout; the record for the results file."""
    workload, sizes = bench.workload, bench.workload.shape.sizes
    say(f"\nworkload {workload.name} ({workload.title}), dropout {dropout:g}, {bench.device}")
    steps = steps_of(len(bench.rows), workload.batch_size, bench.num_steps)
    work = describe_work(bench.rows, steps, sizes)
    say(
        f"  {sum(work['rows'])} rows in {len(steps)} steps, {sum(work['tokens']):,} tokens, "
        f"{sum(work['trained']):,} trained, {sum(work['shared_positions']):,} positions if "
        "prefixes are shared"
    )
    reference = check_exact(bench, names)
    jobs: dict[str, Job] = {}
    tried: dict[str, dict[str, Any]] = {}
    for name in names:
        jobs[name] = bench.job(name, dropout=dropout)
        if name in TUNED:
            say(f"variants of {name}")
            jobs[name], tried[name] = best_job(bench, jobs[name], reference)
    outcomes: dict[str, list[Outcome]] = {name: [] for name in names}
    ceilings, loads = [], []
    for number in range(1, rounds + 1):
        loads.append(round(os.getloadavg()[0], 2))
        say(f"round {number} of {rounds} (load {loads[-1]}): {', '.join(names)}")
        ceilings.append(measure(bench, work))
        for name, job in jobs.items():
            outcome = bench.must_run(job)
            check_run(bench, job, outcome, reference)
            outcomes[name].append(outcome)
    peak = max(ceiling["square"][bench.dtype] for ceiling in ceilings)
    own_peak = statistics.median(ceiling["own"][bench.dtype] for ceiling in ceilings)
    record = {
        "title": workload.title,
        "dropout": dropout,
        "device": device_name(bench.device, bench.dtype),
        "command": command(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {
            "processor": processor().name,
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "memory_bytes": memory_total(),
        },
        "threads": bench.threads,
        "load_averages": loads,
        "versions": versions(),
        "shape": {"model_type": workload.shape.model_type, **asdict(sizes)},
        "rows_sha256": sha256_of(bench.rows),
        "batch_size": workload.batch_size,
        "warm_up_steps": bench.warm_up,
        "rounds": rounds,
        "work_per_step": work,
        "reference_losses": reference.losses,
        "ceiling_flops": peak,
        "ceiling_flops_at_own_shapes": own_peak,
        "ceilings": ceilings,
        "variants_tried": tried,
        "contenders": {
            name: summary(runs, work, bench.warm_up, peak, own_peak, jobs[name])
            for name, runs in outcomes.items()
        },
    }
    report(bench, record)
    return record


def command() -> str:
    """What was asked for, without folders of this machine."""
    words = ["python benchmarks/reference_job.py"]
    is_place = False
    for word in sys.argv[1:]:
        if word.startswith("--"):
            is_place = word.partition("=")[0] in ("--data", "--keep", "--results", "--picture")
        if not is_place:
            words.append(word)
    return " ".join(words)


def describe_work(
    rows: Sequence[Row], steps: Sequence[Sequence[int]], sizes: Sizes
) -> dict[str, list[int]]:
    """Per step: rows, tokens, trained tokens, positions to compute and FLOPs of the limit."""
    examples = examples_of(rows)
    shared = [shared_counts(examples, step) for step in steps]
    unshared = [unshared_counts(examples, step) for step in steps]
    return {
        "rows": [len(step) for step in steps],
        "tokens": [sum(len(rows[row][0]) + len(rows[row][1]) for row in step) for step in steps],
        "trained": [counts.supervised for counts in unshared],
        "shared_positions": [counts.positions for counts in shared],
        "shared_supervised": [counts.supervised for counts in shared],
        "shared_flops": [limit_flops(sizes, counts) for counts in shared],
        "unshared_flops": [limit_flops(sizes, counts) for counts in unshared],
    }


def measure(bench: Bench, work: Mapping[str, list[int]]) -> dict[str, Any]:
    """The ceiling at the number of rows that myna's products have in a step of average size."""
    answer = bench.child(
        "_ceiling",
        {
            "sizes": asdict(bench.workload.shape.sizes),
            "dtypes": sorted({bench.dtype, "float32"}),
            "positions": round(statistics.mean(work["shared_positions"])),
            "supervised": round(statistics.mean(work["shared_supervised"])),
            "threads": bench.threads,
            "device": bench.device,
            "seconds_each": 0.0 if bench.tiny else 0.3,
        },
    )
    if isinstance(answer, str):
        fail(f"the ceiling could not be measured: {answer}")
    return answer


def summary(
    runs: Sequence[Outcome],
    work: Mapping[str, list[int]],
    warm_up: int,
    peak: float,
    own_peak: float,
    job: Job,
) -> dict[str, Any]:
    """The figures of one contender over its rounds; `peak` and `own_peak` are FLOP/s."""
    medians = [
        statistics.median(times)
        for times in zip(*(run.step_seconds[warm_up:] for run in runs), strict=True)
    ]
    seconds = sum(medians)
    samples = sorted(time for run in runs for time in run.step_seconds[warm_up:])
    counted = {name: sum(values[warm_up:]) for name, values in work.items()}
    return {
        "variant": job.dtype if job.contender.startswith("myna") else _described(job),
        "notes": runs[0].notes,
        "samples_per_second": counted["rows"] / seconds,
        "tokens_per_second": counted["tokens"] / seconds,
        "trained_tokens_per_second": counted["trained"] / seconds,
        "step_ms_median": 1e3 * statistics.median(samples),
        "step_ms_p95": 1e3 * samples[math.ceil(0.95 * len(samples)) - 1],
        "counted_seconds": seconds,
        "run_seconds": statistics.median(sum(run.step_seconds) for run in runs),
        "fraction_of_limit_shared": counted["shared_flops"] / peak / seconds,
        "fraction_of_limit_shared_at_own_shapes": counted["shared_flops"] / own_peak / seconds,
        "fraction_of_limit_unshared": counted["unshared_flops"] / peak / seconds,
        "peak_bytes": max(run.peak_bytes for run in runs),
        "resident_bytes_before_step_1": max(run.resident_bytes for run in runs),
        "startup_seconds": statistics.median(run.startup_seconds for run in runs),
        "samples": [
            {
                "step_seconds": [round(taken, 5) for taken in run.step_seconds],
                "losses": run.losses,
                "peak_bytes": run.peak_bytes,
                "startup_seconds": round(run.startup_seconds, 2),
            }
            for run in runs
        ],
    }


def report(bench: Bench, record: Mapping[str, Any]) -> None:
    """The table on the console."""
    from rich.console import Console
    from rich.table import Table

    ceiling = record["ceilings"][0]
    squares = {
        dtype: max(each["square"][dtype] for each in record["ceilings"])
        for dtype in ceiling["square"]
    }
    own = {
        dtype: statistics.median(each["own"][dtype] for each in record["ceilings"])
        for dtype in ceiling["own"]
    }
    say(
        "ceiling, GFLOP/s: "
        + "; ".join(
            f"{dtype} {squares[dtype] / 1e9:,.0f} square, {own[dtype] / 1e9:,.0f} at the step's "
            "own shapes"
            for dtype in squares
        )
    )
    table = Table(title=f"workload {bench.workload.name}, dropout {record['dropout']:g}")
    columns = ["samples/s", "tokens/s", "trained/s", "ms a step", "p95", "peak GB", "start s"]
    columns += ["of limit", "own shapes", "unshared", "myna is"]
    table.add_column("contender")
    for column in columns:
        table.add_column(column, justify="right")
    entries = record["contenders"]
    ours = entries.get("myna")
    for name, entry in entries.items():
        ratio = entry["counted_seconds"] / ours["counted_seconds"] if ours else math.nan
        table.add_row(
            f"{name}\n[dim]{entry['variant']}[/]",
            f"{entry['samples_per_second']:.2f}",
            f"{entry['tokens_per_second']:,.0f}",
            f"{entry['trained_tokens_per_second']:,.0f}",
            f"{entry['step_ms_median']:,.0f}",
            f"{entry['step_ms_p95']:,.0f}",
            f"{entry['peak_bytes'] / 1e9:.2f}",
            f"{entry['startup_seconds']:.1f}",
            f"{entry['fraction_of_limit_shared']:.1%}",
            f"{entry['fraction_of_limit_shared_at_own_shapes']:.1%}",
            f"{entry['fraction_of_limit_unshared']:.1%}",
            "" if name == "myna" or not ours else f"{ratio:.2f}x as fast",
        )
    Console(width=160).print(table)
    say(
        f"  the first {record['warm_up_steps']} step(s) of every run are not counted; losses "
        f"agreed within {EXACT_LOSS:g} when checked and {ENVELOPE:.0%} when timed"
    )
    for name, entry in entries.items():
        for note in entry["notes"]:
            say(f"  {name}: {note}")
    if ours and "peft" in entries:
        share = ours["peak_bytes"] / entries["peft"]["peak_bytes"]
        say(f"  myna's peak of memory is {share:.2f} of that of transformers + peft")
    if ours and bench.num_steps == bench.workload.num_steps:
        say(f"  one epoch with myna: {ours['run_seconds'] / 60:.2f} minutes after start-up")
    elif ours:
        each = ours["counted_seconds"] / (bench.num_steps - bench.warm_up)
        minutes = each * bench.workload.num_steps / 60
        say(
            f"  one epoch with myna would take {minutes:.2f} minutes: not run, extrapolated from "
            f"{bench.num_steps - bench.warm_up} of {bench.workload.num_steps} steps"
        )


def store(path: Path, record: Mapping[str, Any], name: str) -> None:
    """Merge into the results: one entry per workload, dropout and device."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored[f"{name}, dropout {record['dropout']:g}, {record['device']}"] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(stored.items())), indent=1, ensure_ascii=False) + "\n")


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    packages = ["myna", "torch", "transformers", "peft", "accelerate", "trl", "datasets"]
    for package in [*packages, "liger-kernel", "unsloth", "flash-attn"]:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name(device: str, dtype: str) -> str:
    """The machine's kind, by which results are kept apart."""
    if device == "cpu":
        return "cpu" if dtype == "bfloat16" else f"cpu, {dtype}"
    return torch.cuda.get_device_name(torch.device(device))


def _described(job: Job) -> str:
    return f"{job.dtype}, {_variant(job)}"


def _variant(job: Job) -> str:
    return f"{job.layout}, {job.adapter} adapter"


def _name(job: Job) -> str:
    return f"{job.contender} ({job.dtype}, {_variant(job)})"


def _list(values: Sequence[float], digits: int) -> str:
    return " ".join(f"{value:.{digits}g}" for value in values)


def prepare(options: argparse.Namespace, name: str, folder: Path) -> Bench:
    """Rows, weights and adapters of a workload in `folder`; weights that are there are kept."""
    workload = WORKLOADS[name]
    on_cuda = options.device.startswith("cuda")
    if on_cuda:
        workload = workload.on_cuda()
    if options.shape == "tiny":
        workload = workload.tiny()
    steps = options.steps or (CUDA_STEPS if on_cuda and name == "A" else workload.num_steps)
    steps = min(steps, workload.num_steps)
    warm_up = min(CUDA_WARM_UP_STEPS if on_cuda else WARM_UP_STEPS, steps // 2)
    if warm_up < 1:
        fail("at least two steps are needed: the first is not counted.")
    rows = rows_of(workload, options.data)
    # Shapes of one name have the same weights; rows and adapters are cheap and written again.
    kept = folder / (f"{options.shape}-" + workload.shape.model_type)
    kept = kept / str(workload.shape.sizes.hidden)
    write_model(kept / "model", workload.shape)
    for dropout in {0.0, *options.dropout}:
        write_adapter(kept / f"adapter-{dropout}", workload.shape, dropout)
    write_rows(kept, rows)
    return Bench(
        workload,
        kept,
        rows,
        steps,
        warm_up,
        options.threads,
        options.device,
        "bfloat16" if on_cuda else choose_compute("cpu", "auto").dtype,
        options.shape == "tiny",
    )


def parse() -> argparse.Namespace:
    cpu = processor()
    cores = max(1, int(min(cpu.physical_cores or cpu.allowed_cores, cpu.allowed_cores)))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--workload", nargs="+", choices=list(WORKLOADS), help="default: A")
    add("--dropout", nargs="+", type=float, default=[0.0], help="leagues (default: 0)")
    add("--contenders", nargs="+", help="default: those of the workload")
    add("--rounds", type=int, help="default: 3; 1 for L")
    add("--steps", type=int, help="only the first steps of a workload")
    add("--data", type=Path, default=ROOT.parent / "shared" / "data" / "huanhuan.json")
    add("--keep", type=Path, help="folder for the weights, to be used again")
    add("--threads", type=int, default=cores, help="default: physical cores")
    add("--device", default="cpu")
    add("--results", type=Path, default=RESULTS)
    add("--picture", nargs="?", type=Path, const=PICTURE, help="draw the results; alone: only that")
    # For tests of this program: minutes become seconds, and figures mean nothing.
    add("--shape", choices=["full", "tiny"], default="full", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if "OMP_PROC_BIND" in os.environ:
        # It binds this process to its first core, and every child inherits that one core.
        fail("OMP_PROC_BIND is set; unset it, or all contenders share one core.")
    if options.shape == "tiny" and options.results == RESULTS:
        fail("--shape tiny measures nothing: name another file by --results.")
    for name in options.workload or ([] if options.picture else ["A"]):
        with tempfile.TemporaryDirectory() as temporary:
            bench = prepare(options, name, options.keep or Path(temporary))
            names = []
            for contender in options.contenders or bench.workload.contenders:
                if reason := missing(contender, options.device):
                    say(f"{contender}: {reason}")
                else:
                    names.append(contender)
            for dropout in options.dropout:
                rounds = options.rounds or bench.workload.rounds
                store(options.results, run_league(bench, names, dropout, rounds), name)
    if options.picture:
        draw(options.results, options.picture, device=device_name(options.device, "bfloat16"))
        say(f"drawn: {options.picture}")


def ceiling_entry(asked: Path, answer: Path) -> None:
    given = json.loads(asked.read_text())
    torch.set_num_threads(given["threads"])
    result = measure_ceiling(
        Sizes(**given["sizes"]),
        given["positions"],
        given["supervised"],
        given["dtypes"],
        device=given["device"],
        seconds_each=given["seconds_each"],
    )
    answer.write_text(json.dumps(result))


ENTRIES = {"_run": run_job, "_ceiling": ceiling_entry}

if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] in ENTRIES:
        ENTRIES[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
