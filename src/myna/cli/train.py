"""`myna train`: one run, from settings to a finished adapter.

Owns the order of things: the directory is taken, rows are shown, the model is loaded, the loop
runs, the result is written. Each of them is another module's.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from rich.console import Console
from transformers import PreTrainedModel

from myna import __version__
from myna.cli.preparation import prepare_rows
from myna.cli.progress import TrainingDisplay
from myna.cli.remote_code import warn_of_remote_code
from myna.cli.result import draw_loss, write_adapter
from myna.cli.resumption import (
    check_same_data,
    check_same_settings,
    replans_noted,
    stored_compute,
    stored_memory_plans,
    stored_prepacking,
    write_description,
)
from myna.cli.terminal import console as terminal
from myna.config import LoraConfig, TrainConfig
from myna.config_file import ResolvedConfig
from myna.data.held_out import split_held_out
from myna.data.loader import Draws, rows_of_steps, steps_per_epoch
from myna.data.preview import preview
from myna.data.sources import source_name
from myna.device import choose_compute, failing_allocations
from myna.distributed.group import Group, join_group
from myna.errors import ConfigError
from myna.lora.adapter_file import inject_from, read_adapter
from myna.lora.fused import fuse, fuse_projections, prepack_weights, prepacking
from myna.lora.initial import check_init
from myna.lora.inject import Injected, inject
from myna.models.frozen import fuse_frozen
from myna.models.load import load_model
from myna.run_dir import RUNS, RunDir, next_free
from myna.training.checkpoint import latest_checkpoint
from myna.training.computation import FILLED_TO, choose_computation, compile_layers
from myna.training.events import EventLog
from myna.training.fit import FitResult, FitSettings, fit
from myna.training.memory import MemoryPlan, plan_memory

PADDED_ROWS = 8
"""Rows computed at once, in models that cannot be packed, where the settings do not say."""

FEW_STEPS = 50
"""Fewer steps than this seldom change how a model speaks; the run says so."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that has come to its end."""

    directory: RunDir
    result: FitResult | None
    """None where it had been finished before."""


def run(
    resolved: ResolvedConfig,
    *,
    fresh: bool = False,
    trust_remote_code: bool = False,
    console: Console = terminal,
) -> FinishedRun:
    """Train what `resolved` says; go on where the same command was interrupted before.

    Raises ConfigError where the directory holds a run with other settings or data.
    """
    config = resolved.config
    output = _output(resolved)
    directory = RunDir(next_free(output) if fresh else output)
    resolved = resolved.with_output(directory.path)
    group = join_group()
    if not group.is_first:
        console = Console(quiet=True)
    if trust_remote_code:
        warn_of_remote_code(config.model, console)
    try:
        with ExitStack() as stack:
            if group.writes(on_each_node=config.train.save_on_each_node):
                stack.enter_context(directory.locked())
            group.wait()
            if directory.config.exists():
                check_same_settings(directory, config)
            if directory.adapter.is_dir():
                console.print(f"{_short(directory.path)} is finished; nothing was changed.")
                result = None
            else:
                result = _train(
                    resolved, directory, group, console, trust_remote_code=trust_remote_code
                )
    finally:
        group.close()
    console.print(
        f"The adapter is in {_short(directory.adapter)}\n"
        f"  myna chat {_short(directory.path)}      talk to it\n"
        f"  {_short(directory.loss_plot)}      how the loss went"
    )
    return FinishedRun(directory, result)


def _output(resolved: ResolvedConfig) -> Path:
    if resolved.config.output is not None:
        return Path(resolved.config.output).expanduser().absolute()
    name = resolved.path.stem if resolved.path else source_name(resolved.config.data[0])
    return (RUNS / name).absolute()


def _short(path: Path) -> str:
    """As a person in this folder would type it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _train(
    resolved: ResolvedConfig,
    directory: RunDir,
    group: Group,
    console: Console,
    *,
    trust_remote_code: bool,
) -> FitResult:
    config = resolved.config
    writes = group.writes(on_each_node=config.train.save_on_each_node)

    check_init(config.lora.init, config.lora.rank)
    prepared = prepare_rows(config, trust_remote_code=trust_remote_code, console=console)
    if directory.data.exists():
        check_same_data(directory, prepared.hashes)
    console.print(preview(prepared.dataset, max_length=prepared.encoder.max_length))
    train_rows, held_out_rows = split_held_out(
        prepared.dataset.examples, config.held_out, config.train.seed
    )
    compute = stored_compute(directory) or choose_compute(config.device, config.dtype)
    device = torch.device(
        f"cuda:{group.local_rank}" if compute.device == "cuda" else compute.device
    )
    base = load_model(
        config.model,
        dtype=getattr(torch, compute.dtype),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    injected = _inject(base.model, config.lora, config.train.seed)
    fuse(injected.model)
    fuse_frozen(injected.model)
    compiles, on_cuda = config.train.compile, device.type == "cuda"
    if on_cuda and not compiles:
        fuse_projections(injected.model)
    computation, how = choose_computation(
        injected.model,
        micro_batch_size=config.train.micro_batch_size,
        padded_rows=min(PADDED_ROWS, config.train.batch_size),
        pad_id=prepared.loaded.special.pad_id,
        device=device,
        multiple=FILLED_TO if on_cuda and compiles else 1,
    )
    if compiles and compile_layers(injected.model, fixed_sizes=on_cuda) == 0:
        raise ConfigError(
            "train.compile is true, but this model's layers are not built as those of transformers "
            "5, and they cannot be compiled.\n  Use compile: false."
        )
    settings = _fit_settings(config.train)
    draws = Draws.of(train_rows)
    total_steps = settings.total_steps(draws.num_rows)

    notes = [*prepared.loaded.special.notes, *base.notes, *injected.warnings]
    if total_steps < FEW_STEPS:
        notes.append(f"only {total_steps} steps: more epochs may be needed to hear a difference")
    console.print(injected.table())
    console.print(injected.summary)
    console.print(f"computing on {compute.device}, {compute.reason}")
    console.print(f"rows are computed in {how}")
    for note in notes:
        console.print(f"[yellow]note:[/] {note}")
    console.print(
        f"{total_steps:,} steps of {settings.batch_size} rows "
        f"({steps_per_epoch(draws.num_rows, settings.batch_size):,} per epoch), "
        f"{len(train_rows):,} rows train, "
        f"{len(held_out_rows):,} held out{'' if held_out_rows else ' (held_out: 0)'}"
    )

    warnings: list[str] = []
    checkpoint = latest_checkpoint(directory.checkpoints, warnings.append)
    if not group.agrees(0 if checkpoint is None else checkpoint.state.step, device):
        raise ConfigError(
            f"{directory.path}: the machines of this run have different checkpoints.\n"
            "  Use a directory that all of them share, or train with save_on_each_node: true; to "
            "begin anew, use --fresh on all."
        )
    plans = [MemoryPlan(**plan) for plan in stored_memory_plans(directory)]
    if plans and plans[0].unit != computation.unit:
        warnings.append("rows are computed in another way than before; resumed, not bit-identical")
        plans = []
    measures = not group.agrees(len(plans), device) or not plans
    if measures:
        rows_by_step = rows_of_steps(
            draws,
            settings.batch_size,
            seed=settings.seed,
            first_step=1,
            last_step=total_steps,
        )
        with failing_allocations(device.type):
            first = plan_memory(
                injected.model,
                computation,
                train_rows,
                (rows for _, _, rows in rows_by_step),
                checkpointing=config.train.checkpointing,
                device=device,
                group=group,
            )
        plans = [first]
    console.print(f"memory: {plans[0]}")
    prepacked = stored_prepacking(directory)
    tokens = plans[0].largest_piece or plans[0].limit
    if prepacked is None:
        free = (plans[0].budget_bytes or 0) - (plans[0].expected_peak_bytes or 0)
        use, why = prepacking(injected.model, tokens, free)
        prepacked = {"use": not group.any(not use, device), "reason": why}
    if prepacked["use"]:
        prepack_weights(injected.model, tokens)
        console.print(prepacked["reason"])
    measured = {
        "device": compute.device,
        "dtype": compute.dtype,
        "reason": compute.reason,
        "computation": how,
        "memory": plans[0].to_json(),
        "prepacked": prepacked,
    }
    if measures and writes:
        write_description(
            directory, resolved, prepared.dataset.accounting.to_json(), prepared.hashes, measured
        )
    display = TrainingDisplay(
        console,
        total_steps=total_steps,
        first_step=1 if checkpoint is None else checkpoint.state.step + 1,
        logging_steps=config.train.logging_steps,
    )
    listeners = [display, replans_noted(directory)] if writes else [display]
    with (
        EventLog(directory.events if writes else None, *listeners) as events,
        _signals_noted(console) as stop_requested,
        failing_allocations(device.type),
        display,
    ):
        events.emit(
            "start",
            version=__version__,
            torch=torch.__version__,
            model=config.model,
            trainable=injected.trainable,
            parameters=injected.total,
            total_steps=total_steps,
            processes=group.size,
        )
        events.emit("plan", **measured)
        for message in warnings:
            events.emit("warning", message=message)
        if checkpoint is not None:
            events.emit("resume", step=checkpoint.state.step)
            console.print(f"going on after step {checkpoint.state.step}")
        result = fit(
            injected.model,
            train_rows,
            held_out_rows,
            settings,
            computation=computation,
            checkpointing=config.train.checkpointing,
            plans=plans,
            device=device,
            events=events,
            checkpoints=directory.checkpoints,
            resume=checkpoint,
            group=group,
            writes=writes,
            stop_requested=stop_requested,
        )
        if writes:
            draw_loss(directory)
            write_adapter(directory, config, prepared, injected.model, injected.initial)
        events.emit("end", step=result.step, best_step=result.best_step, best_loss=result.best_loss)
    return result


def _inject(model: PreTrainedModel, lora: LoraConfig, seed: int) -> Injected:
    if lora.start_from is None:
        return inject(
            model,
            rank=lora.rank,
            alpha=lora.resolved_alpha,
            dropout=lora.dropout,
            target_modules=lora.target_modules,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            init=lora.init,
            seed=seed,
        )
    folder = Path(lora.start_from)
    if (folder / "adapter").is_dir():  # a run directory
        folder = folder / "adapter"
    found = read_adapter(folder)
    asked = {
        name: getattr(lora, name)
        for name in ("rank", "alpha", "target_modules", "use_rslora", "use_dora", "init")
        if name in lora.model_fields_set and getattr(lora, name) is not None
    }
    has = {"rank": found.rank, "alpha": found.alpha, "init": "default"}
    has |= {"use_rslora": found.use_rslora, "use_dora": found.use_dora}
    for name, value in asked.items():
        if name == "target_modules" or value != has[name]:
            raise ConfigError(
                f"lora.{name} is {value!r}, but lora.start_from keeps the shape of its adapter"
                + (f", which has {has[name]!r}" if name in has else "")
                + f".\n  Leave lora.{name} out, or start a new adapter without lora.start_from."
            )
    return inject_from(model, folder, dropout=lora.dropout)


def _fit_settings(train: TrainConfig) -> FitSettings:
    return FitSettings(
        epochs=train.epochs,
        max_steps=train.max_steps,
        batch_size=train.batch_size,
        learning_rate=train.learning_rate,
        schedule=train.schedule,
        warmup_steps=train.warmup_steps,
        warmup_ratio=train.warmup_ratio,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        seed=train.seed,
        save_steps=train.save_steps,
        keep_checkpoints=train.keep_checkpoints,
        eval_steps=train.eval_steps,
        early_stopping_patience=train.early_stopping_patience,
        keep_best=train.keep_best,
    )


@contextmanager
def _signals_noted(console: Console) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM end the run after the current step; a second one ends it at once."""
    noted = False

    def note(number: int, _: FrameType | None) -> None:
        nonlocal noted
        if noted:
            raise KeyboardInterrupt
        noted = True
        console.print(f"{signal.Signals(number).name}: stopping after this step (again: at once)")

    before = {
        number: signal.signal(number, note)
        for number in (signal.SIGINT, signal.SIGTERM)
        # A job in the background ignores Ctrl-C, which is meant for the one in front.
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield lambda: noted
    finally:
        for number, action in before.items():
            signal.signal(number, action)
