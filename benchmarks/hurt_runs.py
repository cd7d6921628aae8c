"""Runs of `myna train` that are hurt, each in a process of its own, and what becomes of them.

Owns the job, the processes, the injuries to a whole run and what counts as survived. The job trains
a tiny model (`tiny_model.py`): packed, with dropout, an evaluation every three steps, the best
adapter kept, a checkpoint every two and epochs that end in between. A trial is the whole command in
a process forked from one that has run it before, so that everything is imported; it is hurt, then
the same command is repeated until it ends by itself, and the SHA-256 of `adapter_model.safetensors`
is compared with that of a run that nobody hurt.
"""

import errno
import gc
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from safetensors.torch import load_file

from myna.cli.resumption import stored_identity
from myna.cli.train import Options, run
from myna.config_file import load_config
from myna.errors import MynaError
from myna.run_dir import RunDir
from myna.training import checkpoint, computation, fit
from myna.training.checkpoint import CheckpointWriter, latest_checkpoint, load_best
from myna.training.events import read_events
from power_loss import Left, Recording, recorded
from tiny_model import save_tiny_model

TRAINED = "[q_proj, v_proj, down_proj]"
TIMES_KILLED = 20
"""Most kills of one run."""


class Trial(NamedTuple):
    """How one went."""

    wrong: str = ""
    """What is wrong; nothing, if the run survived."""
    where: str = ""
    """Where it was hurt, to be counted."""


@dataclass(frozen=True)
class Bench:
    """The jobs, in a folder of their own, and what unhurt runs of them end in."""

    folder: Path
    job: str
    """SHA-256 of the adapter of `job.yaml`: twelve steps."""
    short: str
    """Of `short.yaml`: five steps, three checkpoints."""
    long: str
    """Of `long.yaml`: sixty steps."""
    losses: tuple[float, ...]
    """Of all steps and evaluations of `calm.yaml`: the short one without dropout."""
    seconds: float
    """How long an unhurt run of the job takes."""
    training_seconds: float
    """The part of it from its first event on; before that is start-up."""
    operations: int
    """File operations of the short one."""

    def place(self, name: str) -> Path:
        """A directory for a run."""
        return self.folder / "runs" / name


def write_jobs(folder: Path) -> None:
    """The model, the rows and a YAML for each job."""
    save_tiny_model(folder / "model", num_hidden_layers=1)
    rows = [
        {"instruction": f"What is {n} and {n % 7}?", "input": "", "output": f"It is {n + n % 7}!"}
        for n in range(36)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = (
        f"model: {folder / 'model'}\ndata: {folder / 'rows.jsonl'}\ndtype: float32\n"
        "template: chatml\nsystem: Answer like a bird.\nheld_out: 4\n"
    )
    train = "batch_size: 6, learning_rate: 1e-3, save_steps: 2, logging_steps: 100"
    evaluated = f"{train}, eval_steps: 3, keep_best: true"
    for name, length, dropout, how in (
        ("job", "epochs: 2", 0.1, evaluated),
        ("short", "max_steps: 5", 0.1, evaluated),
        ("calm", "max_steps: 5", 0, evaluated),
        ("long", "epochs: 10", 0.1, train),
    ):
        (folder / f"{name}.yaml").write_text(
            f"{shared}lora: {{rank: 4, dropout: {dropout}, target_modules: {TRAINED}}}\n"
            f"train: {{{length}, {how}}}\n"
        )


def command(job: Path, output: Path, *settings: str) -> int:
    """`myna train` in this process, silent; its exit code."""
    said = output.parent / f"{output.name}.error"
    resolved = load_config(job, [f"output={output}", *settings])
    try:
        run(resolved, Options(), console=Console(file=io.StringIO()))
    except MynaError as error:
        said.write_text(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        said.write_text(f"{type(error).__name__}: {error}")
        return 1
    return 0


def begin(
    job: Path, output: Path, *settings: str, prepare: Callable[[], None] | None = None
) -> int:
    """The command in a process of its own; its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if prepare is not None:
            prepare()
        code = command(job, output, *settings)
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """Exit code of a process; below zero the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def said_by(output: Path) -> str:
    """What the command said when it failed."""
    said = output.parent / f"{output.name}.error"
    return said.read_text() if said.exists() else ""


def remove(output: Path) -> None:
    """The run and what it said."""
    shutil.rmtree(output, ignore_errors=True)
    (output.parent / f"{output.name}.error").unlink(missing_ok=True)


def adapter_sum(output: Path) -> str:
    """SHA-256 of the finished adapter; empty where there is none."""
    path = output / "adapter" / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def resume(job: Path, output: Path, wanted: str) -> str:
    """Repeat the command until it ends by itself; what is wrong then, or nothing."""
    code = finish(begin(job, output))
    if code:
        return f"resumption ended with {code}: {said_by(output)}"
    if adapter_sum(output) != wanted:
        return "another adapter"
    damaged = [path.name for path in (output / "checkpoints").glob("*.corrupt*")]
    return f"damaged checkpoints: {damaged}" if damaged else ""


def hurt(
    bench: Bench,
    name: str,
    job: str,
    injure: Callable[[int, Path], Trial],
    prepare: Callable[[], None] | None = None,
) -> Trial:
    """One trial in a fresh directory: begin, injure, resume.

    `injure` gets the pid and the run's directory.
    """
    output, yaml = bench.place(name), bench.folder / f"{job}.yaml"
    try:
        trial = injure(begin(yaml, output, prepare=prepare), output)
        wrong = trial.wrong or resume(yaml, output, getattr(bench, job))
        return trial._replace(wrong=wrong)
    finally:
        remove(output)


def unhurt(bench: Bench, number: int) -> Trial:
    """The same command in another directory."""
    output = bench.place(f"unhurt-{number}")
    try:
        return Trial(resume(bench.folder / "job.yaml", output, bench.job))
    finally:
        remove(output)


def wait_for_training(output: Path) -> None:
    """Until the run has its first event."""
    while not (output / "events.jsonl").exists():
        time.sleep(0.001)


def kill(bench: Bench, number: int) -> Trial:
    """SIGKILL at a random moment: of the whole run in every fourth trial, else of its training."""
    draw = random.Random(f"kill {number}")

    def injure(pid: int, output: Path) -> Trial:
        if number % 4:
            wait_for_training(output)
        time.sleep(draw.uniform(0, bench.training_seconds if number % 4 else bench.seconds))
        os.kill(pid, signal.SIGKILL)
        finish(pid)
        if (output / "adapter").is_dir():
            return Trial(where="after the adapter was written")
        if any((output / "checkpoints").glob("step-*")):
            return Trial(where="after a checkpoint")
        began = (output / "events.jsonl").exists()
        return Trial(where="before the first checkpoint" if began else "before step 1")

    return hurt(bench, f"kill-{number}", "job", injure)


def ask_to_stop(bench: Bench, number: int) -> Trial:
    """A signal at a random moment: exit 75, or 0 where the run was at its end."""
    draw = random.Random(f"signal {number}")
    asked = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[number % 3]

    def injure(pid: int, output: Path) -> Trial:
        # Before its first event a run holds nothing that a signal could spoil.
        wait_for_training(output)
        time.sleep(draw.uniform(0, bench.training_seconds))
        os.kill(pid, asked)
        code = finish(pid)
        # Once the adapter is written, a signal is whatever it is to any program.
        is_over = (output / "adapter").is_dir()
        right = is_over or code in (75, 0)
        return Trial("" if right else f"exit code {code}", f"{asked.name}, exit code {code}")

    return hurt(bench, f"signal-{number}", "job", injure)


def kill_repeatedly(bench: Bench, times: int, number: int) -> Trial:
    """One run killed so many times, each time once it has done one to four steps."""
    output = bench.place(f"repeated-{number}")
    job, events = bench.folder / "long.yaml", output / "events.jsonl"
    draw = random.Random(f"repeated {number}")

    def steps() -> int:
        return events.read_bytes().count(b'"event": "step"') if events.exists() else 0

    try:
        for time_ in range(times):
            target = steps() + draw.randint(1, 4)
            pid = begin(job, output)
            while steps() < target:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    return Trial(f"ended before kill {time_ + 1}: {said_by(output)}")
                time.sleep(0.001)
            os.kill(pid, signal.SIGKILL)
            finish(pid)
        wrong = resume(job, output, bench.long)
        return Trial(wrong, f"{steps() - 60} steps computed again in {times} kills")
    finally:
        remove(output)


def at_operation(number: int, act: Callable[[], None], root: Path) -> Callable[[], None]:
    """Have the `number`-th file operation under `root` (from 1) begin with `act`.

    Opening for writing, renaming, removing and making are seen by an audit hook; fsync has no
    event and is wrapped. A `number` of 0 only counts, into a file beside the run.
    """
    count = 0
    inside = str(root)

    def note(path: object, folder: object = None) -> None:
        nonlocal count
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        elif isinstance(folder, int) and folder >= 0:
            path = os.readlink(f"/proc/self/fd/{folder}")
        if str(path).startswith(inside):
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
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            note(arguments[0], arguments[2 if event in ("os.rename", "os.mkdir") else 1])
        elif event == "os.truncate":
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
                seen = count
                root.with_name(f"{root.name}.count").write_text(str(seen))
                leave(code)

            os._exit = told  # type: ignore[assignment]

    return prepare


def count_operations(folder: Path) -> int:
    """File operations of the short run."""
    output = folder / "runs" / "counted"
    prepare = at_operation(0, lambda: None, output)
    assert finish(begin(folder / "short.yaml", output, prepare=prepare)) == 0, said_by(output)
    counted = output.with_name("counted.count")
    number = int(counted.read_text())
    counted.unlink()
    remove(output)
    return number


def crash_point(bench: Bench, number: int) -> Trial:
    """SIGKILL at one file operation of the short run."""

    def injure(pid: int, _: Path) -> Trial:
        code = finish(pid)
        return Trial("" if code in (-signal.SIGKILL, 0) else f"ended with {code}")

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    prepare = at_operation(number, die, bench.place(f"crash-{number}"))
    return hurt(bench, f"crash-{number}", "short", injure, prepare)


def full_disk(bench: Bench, number: int) -> Trial:
    """ENOSPC at one file operation of the short run: it goes on or ends with 4 (at its start 2)."""

    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def injure(pid: int, output: Path) -> Trial:
        code = finish(pid)
        wrong = "" if code in (0, 2, 4) else f"ended with {code}: {said_by(output)}"
        return Trial(wrong, f"exit code {code}")

    prepare = at_operation(number, refuse, bench.place(f"disk-{number}"))
    return hurt(bench, f"disk-{number}", "short", injure, prepare)


def race(bench: Bench, number: int) -> Trial:
    """Two commands for one directory: one trains, the other ends with 7."""
    output = bench.place(f"race-{number}")
    job = bench.folder / "short.yaml"
    try:
        codes = sorted(map(finish, [begin(job, output), begin(job, output)]))
        # The second may also come when the first is done, and finds a finished run.
        right = codes in ([0, 7], [0, 0]) and adapter_sum(output) == bench.short
        return Trial("" if right else f"exit codes {codes}", f"exit codes {codes}")
    finally:
        remove(output)


def not_finite(bench: Bench, number: int) -> Trial:
    """NaN or infinity in one place at one step: exit 6, nothing of it on disk."""
    places = ("loss", "gradient", "adapter", "embedding")
    place, at = places[number % 4], (1, 3, 5)[number // 4 % 3]
    value = (float("nan"), float("inf"))[number // 12 % 2]
    output = bench.place(f"finite-{number}")
    where = f"{place} at step {at}"
    try:
        prepare = in_training(_poison(place, at, value))
        code = finish(begin(bench.folder / "short.yaml", output, prepare=prepare))
        if code != 6:
            return Trial(f"{where}, {value}: exit code {code}: {said_by(output)}", where)
        for file in output.rglob("*.safetensors"):
            if "nonfinite" in file.parts:
                continue  # the dump shows what the step began with
            if not all(bool(tensor.isfinite().all()) for tensor in load_file(file).values()):
                return Trial(f"{where}, {value}: {file.relative_to(output)} is not finite", where)
        dumps = list((output / "nonfinite").glob("step-*/step.json"))
        return Trial("" if len(dumps) == 1 else f"{where}: {len(dumps)} dumps", where)
    finally:
        remove(output)


def run_out_of_memory(bench: Bench, number: int) -> Trial:
    """No memory in one part of one step: the run goes on by itself, to the same losses.

    By recomputing layers in even trials, in odd ones in smaller pieces.
    """
    parts = ("forward", "backward", "update", "evaluation", "saving")
    part, at = parts[number % 5], number // 5 % 5 + 1
    output = bench.place(f"memory-{number}")
    where = f"{part}, {'smaller pieces' if number % 2 else 'layers recomputed'}"
    settings = ["train.checkpointing=none"] if number % 2 else []
    try:
        pid = begin(
            bench.folder / "calm.yaml", output, *settings, prepare=_exhaust(part, at, output)
        )
        if code := finish(pid):
            return Trial(f"{where}, {at}: exit code {code}: {said_by(output)}", where)
        if not output.with_suffix(".met").exists():
            return Trial(f"{where}, {at}: memory did not run out", where)
        found = losses(output)
        near = len(found) == len(bench.losses) and all(
            math.isclose(one, two, rel_tol=1e-5)
            for one, two in zip(found, bench.losses, strict=True)
        )
        return Trial("" if near else f"{where}, {at}: {found}, not {bench.losses}", where)
    finally:
        remove(output)
        output.with_suffix(".met").unlink(missing_ok=True)


def losses(output: Path) -> tuple[float, ...]:
    """Of all steps and evaluations, in their order."""
    events = read_events(output / "events.jsonl")
    return tuple(event["loss"] for event in events if event["event"] in ("step", "eval"))


Loss = Callable[[Any, Any], Any]
"""`summed_loss(model, piece)`."""


def in_training(change: Callable[[Loss, int, Any, Any], Any]) -> Callable[[], None]:
    """Have `change` compute the losses of pieces that the loop trains on.

    It gets what it changes, the number of the piece from 1, model and piece. Steps of these jobs
    are one piece each.
    """

    def prepare() -> None:
        calls = 0
        whole = computation.Packed.summed_loss

        def summed_loss(self: Any, model: Any, piece: Any) -> Any:
            nonlocal calls
            if not (in_fit() and model.training and torch.is_grad_enabled()):
                return whole(self, model, piece)
            calls += 1
            return change(lambda *given: whole(self, *given), calls, model, piece)

        in_fit = _noting_fit()
        computation.Packed.summed_loss = summed_loss  # type: ignore[method-assign]

    return prepare


def _noting_fit() -> Callable[[], bool]:
    """Whether the loop has begun: the trials of memory before it are not meant."""
    import myna.cli.train

    has_begun = False

    def noted(*arguments: Any, **given: Any) -> Any:
        nonlocal has_begun
        has_begun = True
        return fit.fit(*arguments, **given)

    myna.cli.train.fit = noted  # type: ignore[attr-defined]
    return lambda: has_begun


def _poison(place: str, step: int, value: float) -> Callable[[Loss, int, Any, Any], Any]:
    """Have one step meet `value` in one place, and no other one."""

    def change(whole: Loss, number: int, model: Any, piece: Any) -> Any:
        if number != step:
            return whole(model, piece)
        weight = next(p for p in model.parameters() if p.requires_grad)
        row: Any = 0, 0
        if place == "embedding":
            weight, row = model.get_input_embeddings().weight, int(piece.pack.input_ids[0])
        kept = weight.detach().clone()

        def restore(gradient: torch.Tensor | None) -> torch.Tensor | None:
            with torch.no_grad():
                weight.copy_(kept)
            return gradient

        if place in ("adapter", "embedding"):
            with torch.no_grad():
                weight[row] = value
        loss = whole(model, piece)
        if place == "adapter":
            weight.register_hook(restore)
        elif place == "embedding":
            restore(None)
        elif place == "gradient":
            weight.register_hook(lambda gradient: gradient + value)
        else:
            loss = loss * value
        return loss

    return change


def _exhaust(part: str, number: int, output: Path) -> Callable[[], None]:
    """Have memory run out once, the `number`-th time that the loop comes to `part`.

    Evaluations and checkpoints are fewer than steps: there it is the first or the second.
    """
    number = number if part in ("forward", "backward", "update") else 1 + number % 2

    def run_out() -> None:
        output.with_suffix(".met").write_text(part)
        raise (MemoryError() if part == "saving" or number % 2 else torch.OutOfMemoryError("CPU"))

    def change(whole: Loss, calls: int, model: Any, piece: Any) -> Any:
        if part == "forward" and calls == number:
            run_out()
        loss = whole(model, piece)
        if part == "backward" and calls == number:
            loss.register_hook(lambda _: run_out())
        return loss

    def prepare() -> None:
        if part in ("forward", "backward"):
            in_training(change)()
            return
        in_fit = _noting_fit()
        name, owner = {
            "update": ("step", torch.optim.AdamW),
            "evaluation": ("held_out_sums", fit),
            "saving": ("save", checkpoint),
        }[part]
        whole, calls = getattr(owner, name), 0

        def counted(*arguments: Any, **given: Any) -> Any:
            nonlocal calls
            calls += in_fit()
            if in_fit() and calls == number:
                run_out()
            return whole(*arguments, **given)

        setattr(owner, name, counted)

    return prepare


def record(folder: Path) -> Recording:
    """The short run in this process, which then has done all of it once, and what it wrote."""
    output = folder / "runs" / "recorded"
    output.mkdir(parents=True)
    whole, check = CheckpointWriter.begin, computation.check_packing
    verdicts: list[str | None] = []

    def check_once(model: Any) -> str | None:
        """A tenth of a short run, and the model is the same in all trials."""
        if not verdicts:
            verdicts.append(check(model))
        return verdicts[0]

    computation.check_packing = check_once

    def begin_and_wait(self: CheckpointWriter, *given: Any) -> None:
        """One thing after the other, or the recording would mix the two threads' operations."""
        whole(self, *given)
        assert self._thread is not None
        self._thread.join()

    CheckpointWriter.begin = begin_and_wait  # type: ignore[method-assign]
    try:
        with recorded(output) as recording:
            code = command(folder / "short.yaml", output)
    finally:
        CheckpointWriter.begin = whole  # type: ignore[method-assign]
    assert code == 0, said_by(output)
    remove(output)
    # A third of a run's time was looking for cycles among what all processes have in common.
    gc.collect()
    gc.freeze()
    return recording


def lost_by(left: Left, folder: Path, known: dict[int, int | str]) -> str:
    """What a power cut has lost that left a run so; nothing, if that is nothing.

    Checkpoints that were told to be written have to be there, with the best adapter they speak of,
    and an adapter that is there has to be whole. `known` keeps what was found in equal states.
    """
    said = left.running.get("events.jsonl") or b""
    if b'"event": "end"' in said and "adapter" not in left.files:
        return "the adapter is gone"
    for path, content in left.running.items():
        is_kept = "adapter" in left.files and path.startswith("adapter/")
        if is_kept and left.files.get(path) != content:
            return f"{path} is not whole"
    events = map(json.loads, said.splitlines())
    told = max((event["step"] for event in events if event["event"] == "checkpoint"), default=0)
    if left.key not in known:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        left.write(folder)
        known[left.key] = _newest(folder)
    found = known[left.key]
    if isinstance(found, str):
        return found
    return "" if found >= told else f"step {told} was written, and {found} is the newest there"


def _newest(folder: Path) -> int | str:
    """Step of the checkpoint that a resumption would use, or what is wrong."""
    try:
        run_id = stored_identity(RunDir(folder))
        found = latest_checkpoint(folder / "checkpoints", lambda text: None, run_id)
        if found is None:
            return 0
        if found.state.best_step is not None:
            load_best(folder / "checkpoints")
        return found.state.step
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def resume_after_power_cut(bench: Bench, left: Left, number: int) -> str:
    """Run the short job on from what was left; what is wrong, or nothing."""
    output = bench.place(f"power-{number}")
    try:
        output.mkdir()
        left.write(output)
        return resume(bench.folder / "short.yaml", output, bench.short)
    finally:
        remove(output)


def prepared(folder: Path) -> tuple[Bench, Recording]:
    """The jobs, a recording of the short one, and what unhurt runs of them end in."""
    os.environ["MYNA_CACHE"] = str(folder / "cache")
    write_jobs(folder)
    recording = record(folder)

    def end(job: str, name: str) -> str:
        output = folder / "runs" / name
        assert finish(begin(folder / f"{job}.yaml", output)) == 0, said_by(output)
        return adapter_sum(output)

    times, training = [], []
    for number in range(3):
        started = time.monotonic()
        wanted = end("job", f"whole-{number}")
        times.append(time.monotonic() - started)
        events = list(read_events(folder / "runs" / f"whole-{number}" / "events.jsonl"))
        training.append(events[-1]["time"] - events[0]["time"])
    end("calm", "calm")
    bench = Bench(
        folder,
        job=wanted,
        short=end("short", "short"),
        long=end("long", "long"),
        losses=losses(folder / "runs" / "calm"),
        seconds=statistics.median(times),
        training_seconds=statistics.median(training),
        operations=count_operations(folder),
    )
    for path in (folder / "runs").iterdir():
        shutil.rmtree(path)
    return bench, recording
