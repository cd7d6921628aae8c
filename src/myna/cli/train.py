"""`myna train`: one run, from settings to a finished adapter.

Owns the order of things: the directory is taken, rows are shown, the model is loaded, the loop
runs, the result is written. Each of them is another module's.
"""

import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from myna import __version__
from myna.cli.notify import notify
from myna.cli.place import output_of, short, show_result
from myna.cli.preparation import Prepared, prepare_rows, sources_of
from myna.cli.progress import TrainingDisplay
from myna.cli.remote_code import warn_of_remote_code
from myna.cli.report import draw_pictures
from myna.cli.result import set_adapter_aside, write_adapter
from myna.cli.resumption import (
    Change,
    changed_inputs,
    changed_settings,
    differences,
    replans_noted,
    stored_compute,
    stored_identity,
    stored_memory_plans,
    stored_prepacking,
    versions,
    write_description,
)
from myna.cli.signals import signals_noted
from myna.cli.terminal import console as terminal
from myna.config import Config, LoraConfig, TrainConfig, flatten
from myna.config_file import ResolvedConfig
from myna.data.held_out import split_held_out
from myna.data.loader import Draws, rows_of_steps, steps_per_epoch
from myna.data.preview import preview
from myna.data.sample import write_sample
from myna.data.store import Examples
from myna.device import Compute, choose_compute, environment, failing_allocations
from myna.distributed.group import Group, join_group
from myna.errors import ConfigError, Interrupted, MynaError
from myna.evaluation.evaluate import HeldOutJudge
from myna.evaluation.metrics import Metric, parse_metrics
from myna.evaluation.rows import rows_of_examples
from myna.export.origin import quantised_note
from myna.inference.speaker import Speaker
from myna.lora.adapter_file import check_origin, inject_from, read_adapter
from myna.lora.fused import fuse, fuse_projections, prepack_weights, prepacking
from myna.lora.initial import check_init
from myna.lora.inject import Injected, inject
from myna.models.frozen import fuse_frozen
from myna.models.load import fingerprint_of, load_config, load_model
from myna.report.trackers import TrackedRun, check_trackers, tracked
from myna.run_dir import RunDir, next_free
from myna.training.checkpoint import Checkpoint, State, checkpoint_bytes, latest_checkpoint
from myna.training.computation import FILLED_TO, Computation, choose_computation, compile_layers
from myna.training.events import EventLog
from myna.training.fit import FitResult, FitSettings, fit
from myna.training.memory import MemoryPlan, plan_memory

PADDED_ROWS = 8
"""Rows computed at once, in models that cannot be packed, where the settings do not say."""

FEW_STEPS = 50
"""Fewer steps than this seldom change how a model speaks; the run says so."""


@dataclass(frozen=True)
class FinishedRun:
    """A run that has come to its end, and where it lies."""

    directory: RunDir
    result: FitResult | None
    """None where it had been finished before, and after a dry run."""


@dataclass(frozen=True)
class Options:
    """What the command line says beside the settings."""

    fresh: bool = False
    """Take the next free directory."""
    dry_run: bool = False
    """End before step 1, with nothing written."""
    allow_change: tuple[str, ...] = ()
    """Settings or inputs that may differ from those that the run began with."""
    force_base: bool = False
    """Go on from an adapter on another base than the one it was trained on."""
    trust_remote_code: bool = False


def run(
    resolved: ResolvedConfig, options: Options = Options(), *, console: Console = terminal
) -> FinishedRun:
    """Train what `resolved` says; go on where the same command was interrupted before.

    Raises ConfigError where the directory holds a run with other settings or
    data that `options` does not allow to change.
    """
    output = output_of(resolved)
    directory = RunDir(next_free(output) if options.fresh else output)
    group = join_group()
    if not group.is_first:
        console = Console(quiet=True)
    job = _Job(resolved.with_output(directory.path), directory, group, console, options)
    if options.trust_remote_code:
        warn_of_remote_code(job.config.model, console)
    try:
        with ExitStack() as stack:
            if job.writes:
                stack.enter_context(directory.locked())
            group.wait()
            changes: list[Change] = []
            if directory.config.exists():
                changes = changed_settings(directory, job.config, options.allow_change)
            if directory.adapter.is_dir() and not changes:
                console.print(f"{short(directory.path)} is finished; nothing was changed.")
                result = None
            else:
                result = _train(job, changes)
    finally:
        group.close()
    if result is not None and job.writes:
        draw_pictures(directory, console)
    if not options.dry_run:
        show_result(directory, console)
    return FinishedRun(directory, result)


@dataclass(frozen=True)
class _Job:
    """What is asked for, and where it happens."""

    resolved: ResolvedConfig
    directory: RunDir
    group: Group
    console: Console
    options: Options

    @property
    def config(self) -> Config:
        """The settings."""
        return self.resolved.config

    @property
    def writes(self) -> bool:
        """Whether this process writes into the run directory."""
        each_node = self.config.train.save_on_each_node
        return self.group.writes(on_each_node=each_node) and not self.options.dry_run


def _train(job: _Job, changes: list[Change]) -> FitResult | None:
    """One run from its rows to its adapter; what ends it badly is in its events."""
    try:
        result = _train_told(job, changes)
    except (MynaError, MemoryError) as error:
        if job.writes and job.directory.events.exists():
            kind = "stop" if isinstance(error, Interrupted) else "error"
            with EventLog(job.directory.events) as events:
                events.emit(kind, message=str(error), exit_code=getattr(error, "exit_code", 1))
        _tell_somebody(job, "failed", str(error))
        raise
    _tell_somebody(job, "finished", "")
    return result


def _tell_somebody(job: _Job, outcome: str, message: str) -> None:
    if job.config.notify is None or not job.group.is_first or job.options.dry_run:
        return
    told = {"run": str(job.directory.path), "outcome": outcome, "message": message}
    if fault := notify(job.config.notify, told):
        job.console.print(f"[yellow]warning:[/] {fault}")


def _train_told(job: _Job, changes: list[Change]) -> FitResult | None:
    config, directory, console = job.config, job.directory, job.console

    check_init(config.lora.init, config.lora.rank)
    metrics = parse_metrics(config.train.metrics)
    check_trackers(config.report_to)
    remote_code = job.options.trust_remote_code
    prepared = prepare_rows(config, trust_remote_code=remote_code, console=console)
    of_base = load_config(config.model, trust_remote_code=remote_code)
    if (note := quantised_note(of_base)) is not None:
        console.print(f"[yellow]note:[/] {note}", soft_wrap=True)
    base = fingerprint_of(config.model, trust_remote_code=remote_code)
    identity = prepared.hashes | {"base": base} | versions()
    if directory.config.exists() and directory.data.exists():
        changes += changed_inputs(directory, identity, job.options.allow_change)
    console.print(preview(prepared.dataset, max_length=prepared.encoder.max_length))
    train_rows, held_out_rows = split_held_out(
        prepared.dataset.examples, config.held_out, config.train.seed
    )
    built = _build(job, prepared, base)
    settings = _fit_settings(config.train, metrics)
    draws = Draws.of(train_rows)
    total_steps = settings.total_steps(draws.num_rows)
    notes = [*prepared.loaded.special.notes, *built.notes, *built.injected.warnings]
    if total_steps < FEW_STEPS:
        notes.append(f"only {total_steps} steps: more epochs may be needed to hear a difference")
    _say_what_is_trained(console, built, notes)
    console.print(
        f"{total_steps:,} steps of {settings.batch_size} rows "
        f"({steps_per_epoch(draws.num_rows, settings.batch_size):,} per epoch), "
        f"{len(train_rows):,} rows train, "
        f"{len(held_out_rows):,} held out{'' if held_out_rows else ' (held_out: 0)'}"
    )

    warnings = [f"changed by --allow-change: {change}" for change in changes]
    checkpoint = _checkpoint(job, built.device, warnings)
    plans = _stored_plans(job, built, warnings)
    measures = not plans
    if measures:
        plans = [_planned(job, built, train_rows, draws, settings)]
    console.print(f"memory: {plans[0]}")
    judge = _judge(built, prepared, config, held_out_rows, metrics) if metrics else None
    if job.options.dry_run:
        console.print("dry run: it ends before step 1, and nothing was written")
        return None
    measured = {
        "run": stored_identity(directory) or uuid.uuid4().hex,
        "device": built.compute.device,
        "dtype": built.compute.dtype,
        "reason": built.compute.reason,
        "computation": built.how,
        "memory": plans[0].to_json(),
        "prepacked": _prepack(job, built, plans[0]),
    }
    if job.writes:
        directory.check_room(checkpoint_bytes(built.injected.model))
    if (measures or changes) and job.writes:
        accounting = prepared.dataset.accounting.to_json()
        set_adapter_aside(directory)
        write_sample(directory.sample, train_rows, prepared.dataset.tokenizer)
        write_description(directory, job.resolved, accounting, identity, measured)
    first_step = 1 if checkpoint is None else checkpoint.state.step + 1
    display = TrainingDisplay(
        console,
        total_steps=total_steps,
        first_step=first_step,
        logging_steps=config.train.logging_steps,
    )
    listeners = [display, replans_noted(directory)] if job.writes else [display]
    trackers = config.report_to if job.group.is_first else []
    run = TrackedRun(directory.path, str(measured["run"]), flatten(config), first_step)
    with (
        EventLog(directory.events if job.writes else None, *listeners) as events,
        tracked(trackers, run, events),
        signals_noted(console) as stop,
        failing_allocations(built.device.type),
        display,
    ):
        events.emit(
            "start",
            version=__version__,
            torch=torch.__version__,
            model=config.model,
            model_type=built.injected.model.config.model_type,
            trainable=built.injected.trainable,
            parameters=built.injected.total,
            total_steps=total_steps,
            processes=job.group.size,
            train_rows=len(train_rows),
            held_out_rows=len(held_out_rows),
            notes=[*prepared.dataset.notes, *notes],
            environment=environment(),
        )
        events.emit("plan", **measured)
        for message in warnings:
            events.emit("warning", message=message)
        if checkpoint is not None:
            events.emit("resume", step=checkpoint.state.step)
            console.print(f"going on after step {checkpoint.state.step}")
        result = fit(
            built.injected.model,
            train_rows,
            held_out_rows,
            settings,
            computation=built.computation,
            checkpointing=config.train.checkpointing,
            plans=plans,
            device=built.device,
            events=events,
            checkpoints=directory.checkpoints,
            resume=checkpoint,
            group=job.group,
            writes=job.writes,
            stop=stop,
            beginning=State(0, run=str(measured["run"]), environment=environment()),
            evaluate=judge,
        )
        if job.writes:
            write_adapter(
                directory,
                config,
                prepared,
                built.injected.model,
                built.injected.initial,
                base,
                built.forced,
            )
        events.emit("end", step=result.step, best_step=result.best_step, best_loss=result.best_loss)
    return result


def _say_what_is_trained(console: Console, built: "_Built", notes: Sequence[str]) -> None:
    console.print(built.injected.table())
    console.print(built.injected.summary)
    console.print(f"computing on {built.compute.device}, {built.compute.reason}")
    console.print(f"rows are computed in {built.how}")
    for note in notes:
        console.print(f"[yellow]note:[/] {note}")


def _checkpoint(job: _Job, device: torch.device, warnings: list[str]) -> Checkpoint | None:
    """The newest whole one, the same on all machines; `warnings` gets what is to be told of it."""
    directory, checkpoint = job.directory, None
    if not job.options.dry_run:
        checkpoint = latest_checkpoint(
            directory.checkpoints, warnings.append, stored_identity(directory)
        )
    if not job.group.agrees(0 if checkpoint is None else checkpoint.state.step, device):
        raise ConfigError(
            f"{directory.path}: the machines of this run have different checkpoints.\n"
            "  Use a directory that all of them share, or train with save_on_each_node: true; to "
            "begin anew, use --fresh on all."
        )
    if checkpoint is not None:
        warnings += differences(checkpoint.state.environment, environment())
    return checkpoint


def _stored_plans(job: _Job, built: "_Built", warnings: list[str]) -> list[MemoryPlan]:
    """The memory plans that the run began with; [] where it has none that all machines can use."""
    plans = [MemoryPlan(**plan) for plan in stored_memory_plans(job.directory)]
    if plans and plans[0].unit != built.computation.unit:
        warnings.append("rows are computed in another way than before; resumed, not bit-identical")
        plans = []
    return plans if job.group.agrees(len(plans), built.device) else []


@dataclass(frozen=True)
class _Built:
    """A base with its adapter, and how it is computed."""

    injected: Injected
    compute: Compute
    device: torch.device
    computation: Computation
    how: str
    notes: tuple[str, ...]
    forced: str | None
    """Fingerprint of the base that the adapter was trained on before, where that is another."""


def _build(job: _Job, prepared: Prepared, base_fingerprint: str) -> _Built:
    config = job.config
    compute = stored_compute(job.directory) or choose_compute(config.device, config.dtype)
    device = torch.device(
        f"cuda:{job.group.local_rank}" if compute.device == "cuda" else compute.device
    )
    notes: list[str] = []
    forced = None
    if config.lora.start_from is not None:
        found = read_adapter(_adapter_folder(config.lora.start_from))
        told = check_origin(found, base=base_fingerprint, force=job.options.force_base)
        if told and found.metadata is not None:
            notes += told
            forced = found.metadata.base_fingerprint
    base = load_model(
        config.model,
        dtype=getattr(torch, compute.dtype),
        device=device,
        trust_remote_code=job.options.trust_remote_code,
    )
    notes += base.notes
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
    return _Built(injected, compute, device, computation, how, tuple(notes), forced)


def _planned(
    job: _Job, built: _Built, train_rows: Examples, draws: Draws, settings: FitSettings
) -> MemoryPlan:
    """The memory plan, by trials before step 1."""
    rows_by_step = rows_of_steps(
        draws,
        settings.batch_size,
        seed=settings.seed,
        first_step=1,
        last_step=settings.total_steps(draws.num_rows),
    )
    with failing_allocations(built.device.type):
        return plan_memory(
            built.injected.model,
            built.computation,
            train_rows,
            (rows for _, _, rows in rows_by_step),
            checkpointing=job.config.train.checkpointing,
            device=built.device,
            group=job.group,
        )


def _prepack(job: _Job, built: _Built, plan: MemoryPlan) -> dict[str, Any]:
    """Prepack the weights if that is measured to be worth it, or was when the run began."""
    model = built.injected.model
    prepacked = stored_prepacking(job.directory)
    tokens = plan.largest_piece or plan.limit
    if prepacked is None:
        free = (plan.budget_bytes or 0) - (plan.expected_peak_bytes or 0)
        use, why = prepacking(model, tokens, free)
        prepacked = {"use": not job.group.any(not use, built.device), "reason": why}
    if prepacked["use"]:
        prepack_weights(model, tokens)
        job.console.print(prepacked["reason"])
    return prepacked


def _judge(
    built: _Built,
    prepared: Prepared,
    config: Config,
    held_out_rows: Examples,
    metrics: Sequence[Metric],
) -> HeldOutJudge:
    """What scores the answers of the model in training; faults of metrics show before step 1."""
    model = built.injected.model.get_base_model()
    assert isinstance(model, PreTrainedModel), "the base was one"
    speaker = Speaker(model, prepared.encoder, pad_id=prepared.loaded.special.pad_id)
    rows = rows_of_examples(held_out_rows, sources_of(config)[0], prepared.encoder)
    return HeldOutJudge(speaker, rows, metrics)


def _adapter_folder(text: str) -> Path:
    """The adapter that `lora.start_from` means: a folder of one, or a run."""
    folder = Path(text)
    return folder / "adapter" if (folder / "adapter").is_dir() else folder


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
    folder = _adapter_folder(lora.start_from)
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


def _fit_settings(train: TrainConfig, metrics: Sequence[Metric]) -> FitSettings:
    names = {text: metric.name for text, metric in zip(train.metrics, metrics, strict=True)}
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
        metrics=tuple(names.values()),
        best_by=names.get(train.best_by, "loss"),
        on_nonfinite=train.on_nonfinite,
    )
