"""`myna eval`: what an adapter is worth, beside its base.

Owns which rows are judged (those that the run held out, a file, or the demo's own), the checks
before the model is loaded, the tables, and evaluation.json. Judging is `evaluation`'s.
"""

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from myna.cli import demo
from myna.cli.place import short
from myna.cli.preparation import Prepared, make_encoder, prepare_rows, sources_of
from myna.cli.remote_code import warn_of_remote_code
from myna.cli.resumption import stored_compute
from myna.cli.terminal import console as terminal
from myna.cli.terminal import error_console, harmless
from myna.config import Config
from myna.config_file import load_config
from myna.data.held_out import split_held_out
from myna.data.statistics import find_repeats
from myna.data.store import Examples
from myna.demo.metrics import demo_metrics
from myna.device import choose_compute
from myna.errors import ConfigError, DataError
from myna.evaluation.evaluate import (
    BATCH_SIZE,
    Evaluation,
    RowResult,
    evaluate,
    usual_limit,
    work,
)
from myna.evaluation.forgetting import NEUTRAL, probe
from myna.evaluation.losses import SIDES, Sides
from myna.evaluation.metrics import Metric, names_function, parse_metrics
from myna.evaluation.rows import JudgedRow, has_answers, rows_of_examples, rows_of_questions
from myna.inference.generate import Sampling
from myna.inference.speaker import Speaker, open_speaker
from myna.report.card import write_card
from myna.run_dir import RunDir, write_file

HELD_OUT = "held-out rows of the run"
"""What evaluation.json calls rows that no file was named for."""

SIDE_BY_SIDE = 3
"""Rows whose answers are shown."""

WORST = 5
"""Rows of the highest loss that are shown."""

SHOWN_CHARACTERS = 240
"""Of a text in a table; evaluation.json has all of it."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    data: str | None = None
    """Rows to judge in place of those that the run held out."""
    metrics: tuple[str, ...] = ()
    """As `parse_metric` takes them. None: the run's own, or exact match and chrF."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval."""
    tasks_folder: Path | None = None
    """Folder of task files of one's own."""
    forgetting: Path | None = None
    """A neutral text in place of the one that is shipped."""
    max_new_tokens: int | None = None
    """Longest answer. None: `usual_limit`."""
    batch_size: int | None = None
    """Rows answered at once. None: 8."""
    limit: int | None = None
    """Only so many rows, the first; also of each task."""
    force_base: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class _Chosen:
    """What is judged, and how."""

    name: str
    rows: list[JudgedRow]
    metrics: list[Metric]
    others: dict[int, str]
    """Number of a row -> where the same prompt has another answer."""
    notes: tuple[str, ...]


def run(path: Path, options: Options = Options(), *, console: Console = terminal) -> Evaluation:
    """Judge the adapter of the run in `path` beside its base, show it, and write evaluation.json.

    Raises ConfigError for what is no finished run, a run that held nothing out where no data is
    named, and a metric or task that cannot be had; DataError for rows that cannot be judged, and
    for data that changed since the run.
    """
    directory = RunDir(path)
    if not directory.config.is_file():
        raise ConfigError(
            f"{path} is not a run: it has no config.yaml.\n"
            "  Give a run directory such as runs/NAME; `myna runs` lists them."
        )
    config = load_config(directory.config).config
    is_demo = options.data is None and demo.is_demo(config)
    if options.data is None and config.held_out == 0 and not (options.tasks or is_demo):
        raise ConfigError(
            f"{path} held no rows out (held_out is 0), so there are none that it was not trained "
            "on.\n  Name rows with --data FILE, or train with held_out: 0.05."
        )
    metrics = _metrics(options, config, is_demo)
    tasks = _find_tasks(options)
    if options.trust_remote_code:
        warn_of_remote_code(config.model, error_console)
    if not is_demo:
        return _run(directory, config, options, metrics, tasks, console)
    as_in_demo = replace(
        options,
        data=str(demo.HELD_OUT),
        max_new_tokens=options.max_new_tokens or demo.SAMPLING.max_new_tokens,
        batch_size=options.batch_size or demo.BATCH_SIZE,
    )
    with demo.one_thread():
        return _run(directory, config, as_in_demo, metrics, tasks, console)


def _run(
    directory: RunDir,
    config: Config,
    options: Options,
    metrics: list[Metric],
    tasks: Any,
    console: Console,
) -> Evaluation:
    chosen = _choose(directory, config, options, metrics)
    text = options.forgetting or NEUTRAL
    neutral = _encode_text(config, text, options)
    speaker, notes = _open(directory, options)
    for note in (*speaker.notes, *notes, *(chosen.notes if chosen else ())):
        console.print("[yellow]note:[/] ", end="")
        console.print(note, markup=False, soft_wrap=True)
    found = Evaluation()
    if chosen is not None:
        limit = options.max_new_tokens or usual_limit(chosen.rows)
        sampling = Sampling(limit, temperature=0.0)
        console.print(
            f"{len(chosen.rows):,} rows ({chosen.name}), answered by {speaker.adapter} and by its "
            f"base {speaker.description}, {speaker.describe(sampling)}, at most "
            f"{limit:,} tokens",
            markup=False,
            soft_wrap=True,
        )
        with _progress(work(chosen.rows)) as advance:
            found = evaluate(
                speaker,
                chosen.rows,
                chosen.metrics,
                data=chosen.name,
                sampling=sampling,
                batch_size=options.batch_size or BATCH_SIZE,
                advance=advance,
            )
    found = replace(
        found,
        forgetting=probe(speaker.model, text, neutral, pad_id=speaker.pad_id),
        tasks=_run_tasks(speaker, tasks, options, console),
    )
    content = json.dumps(found.to_json(), ensure_ascii=False, indent=1, allow_nan=False)
    write_file(directory.evaluation, content + "\n")
    write_card(directory)
    console.print(_table(found))
    if chosen is not None:
        for table in (_side_by_side(found.rows), _worst(found.rows, chosen.others)):
            if table.row_count:
                console.print(table)
    console.print(f"All rows: {short(directory.evaluation.absolute())}", markup=False)
    return found


def _metrics(options: Options, config: Config, is_demo: bool) -> list[Metric]:
    """Those that were asked for, those of the run, or what fits most data."""
    if options.metrics:
        return parse_metrics(options.metrics)
    if is_demo:
        return demo_metrics()
    # A run directory may be somebody else's: no code is run because its settings name some.
    if own := [text for text in config.train.metrics if not names_function(text)]:
        return parse_metrics(own)
    return parse_metrics(["exact_match", *(["chrf"] if _has_sacrebleu() else [])])


def _has_sacrebleu() -> bool:
    return importlib.util.find_spec("sacrebleu") is not None


def _choose(
    directory: RunDir, config: Config, options: Options, metrics: list[Metric]
) -> _Chosen | None:
    """The rows to judge; None where only tasks were asked for and the run held nothing out."""
    trust_remote_code = options.trust_remote_code
    others: dict[int, str] = {}
    if options.data is None:
        if config.held_out == 0:
            return None
        name = HELD_OUT
        prepared = prepare_rows(config, trust_remote_code=trust_remote_code)
        _check_same_data(directory, prepared)
        _, examples = split_held_out(prepared.dataset.examples, config.held_out, config.train.seed)
        rows, others = _rows_of(examples[: options.limit], config, prepared)
    else:
        name = (
            "held-out questions of the demo" if options.data == str(demo.HELD_OUT) else options.data
        )
        config = config.model_copy(update={"data": [options.data]})
        file = Path(options.data)
        if file.is_file() and not has_answers(file):
            _, encoder = make_encoder(config, trust_remote_code=trust_remote_code)
            rows = rows_of_questions(file, encoder)[: options.limit]
        else:
            prepared = prepare_rows(config, trust_remote_code=trust_remote_code)
            rows, others = _rows_of(prepared.dataset.examples[: options.limit], config, prepared)
    notes: list[str] = []
    if not options.metrics:
        metrics, notes = _able(metrics, rows, config)
    return _Chosen(name, rows, metrics, others, tuple(notes))


def _able(
    metrics: list[Metric], rows: list[JudgedRow], config: Config
) -> tuple[list[Metric], list[str]]:
    """Of metrics that nobody asked for now, those that have something to judge; and the others."""
    asked = [row for row in rows if row.prompt_ids]
    has_all = bool(asked) and all(row.reference is not None for row in asked)
    able = [each for each in metrics if asked and (has_all or not each.needs_reference)]
    notes = [
        f"not judged by {text}: --metric runs files, the settings of a run do not"
        for text in config.train.metrics
        if names_function(text)
    ]
    notes += [
        f"not judged by {each.name}: the rows have no answers"
        for each in metrics
        if each not in able
    ]
    if has_all and not config.train.metrics and not _has_sacrebleu():
        notes.append("not judged by chrf: pip install 'myna[eval]'")
    return able, notes


def _rows_of(
    examples: Examples, config: Config, prepared: Prepared
) -> tuple[list[JudgedRow], dict[int, str]]:
    """The rows of these examples, and where the prompts of some of them have another answer."""
    sources, _ = sources_of(config)
    rows = rows_of_examples(examples, sources, prepared.encoder)
    others = enumerate(find_repeats(examples).other.tolist())
    return rows, {number: rows[other].place for number, other in others if other >= 0}


def _check_same_data(directory: RunDir, prepared: Prepared) -> None:
    """Raise DataError where the files are not those that the run split."""
    then = json.loads(directory.data.read_text(encoding="utf-8"))["sha256"]["data"]
    now = prepared.hashes["data"]
    if then != now:
        raise DataError(
            f"The data of {directory.path} is not what it was when the run began (sha256 {now[:16]}"
            f"… now, {then[:16]}… then), so it cannot be said which rows were held out.\n"
            "  Put the files back as they were, or name rows with --data FILE."
        )


def _encode_text(config: Config, text: Path, options: Options) -> Examples:
    """The forgetting probe's text, without the run's persona; what is too long is left out."""
    train = config.train.model_copy(update={"max_length": None, "over_length": "drop"})
    changes: dict[str, Any] = {"data": [str(text)], "columns": {}, "system": None, "train": train}
    changed = config.model_copy(update=changes)
    return prepare_rows(changed, trust_remote_code=options.trust_remote_code).dataset.examples


def _open(directory: RunDir, options: Options) -> tuple[Speaker, list[str]]:
    """The adapter on its base, computed as it was trained where this machine can; and notes."""
    stored, notes = stored_compute(directory), []
    device, dtype = "auto", "auto"
    if stored is not None:
        try:
            compute = choose_compute(stored.device, stored.dtype)
            device, dtype = compute.device, compute.dtype
        except ConfigError:
            notes.append(
                f"trained on {stored.device} in {stored.dtype}, which this machine has not: the "
                "losses are another format's, and differ in their last digits"
            )
    speaker = open_speaker(
        str(directory.path),
        device=device,
        dtype=dtype,
        trust_remote_code=options.trust_remote_code,
        force_base=options.force_base,
    )
    return speaker, notes


def _find_tasks(options: Options) -> Any:
    """lm-eval's list of tasks, in which those that were asked for are; None where none were."""
    if not options.tasks:
        return None
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks needs lm-eval, which is not installed.\n  pip install 'myna[lm-eval]'"
        )
    from myna.evaluation.harness import find_tasks

    return find_tasks(options.tasks, options.tasks_folder)


def _run_tasks(
    speaker: Speaker, tasks: Any, options: Options, console: Console
) -> dict[str, dict[str, Sides]]:
    if not options.tasks:
        return {}
    from myna.evaluation.harness import run_tasks

    return run_tasks(
        speaker,
        options.tasks,
        tasks,
        batch_size=options.batch_size or BATCH_SIZE,
        limit=options.limit,
        say=lambda text: console.print(text, markup=False, soft_wrap=True),
    )


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal; what is yielded moves it on."""
    with Progress(
        TextColumn("losses and answers"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=error_console,
        transient=True,
        disable=not error_console.is_terminal,
    ) as progress:
        task = progress.add_task("judging", total=total)
        yield lambda: progress.advance(task)


def _table(found: Evaluation) -> Table:
    """Base against adapter, a line for every number."""
    table = Table()
    for name, justify in (("", "left"), ("base", "right"), ("adapter", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]  # rich's own literals

    def add(label: str, sides: Sides, digits: int) -> None:
        table.add_row(Text(harmless(label)), *(f"{sides[side]:,.{digits}f}" for side in SIDES))

    if found.loss is not None and found.perplexity is not None:
        add(f"loss per trained token ({found.trained_tokens:,} tokens)", found.loss, 4)
        add("perplexity", found.perplexity, 2)
    for name, sides in found.metrics.items():
        add(name, sides, 1 if found.scale[name] == 100 else 4)
    if found.forgetting is not None:
        probe = found.forgetting
        losses: Sides = {"base": probe.base, "adapter": probe.adapter}
        add(f"forgetting: loss on {probe.text} ({probe.tokens:,} tokens)", losses, 4)
    for task, values in found.tasks.items():
        for name, sides in values.items():
            add(f"{task}: {name}", sides, 4)
    return table


def _side_by_side(rows: Sequence[RowResult]) -> Table:
    """The answers to some rows, at equal distances."""
    table = _texts("answers side by side", "question", "own answer", "base", "adapter")
    asked = [row for row in rows if row.answers]
    apart = max(1, len(asked) // SIDE_BY_SIDE)
    for found in asked[::apart][:SIDE_BY_SIDE]:
        texts = [found.row.question, found.row.reference or ""]
        texts += [found.answers[side].text for side in SIDES]
        table.add_row(*map(_cell, texts))
    return table


def _worst(rows: Sequence[RowResult], others: dict[int, str]) -> Table:
    """The rows of the highest loss: unlearned, contradictory, or beyond what was trained."""
    table = _texts(
        "rows of the highest loss", "row", "loss: base", "adapter", "question", "own answer", ""
    )
    losses = [
        (row.loss["adapter"], row.loss["base"], at) for at, row in enumerate(rows) if row.loss
    ]
    for adapter, base, at in sorted(losses, reverse=True)[:WORST]:
        remarks = [f"{others[at]} has another answer to it"] if at in others else []
        remarks += ["no better than the base"] if adapter >= base else []
        texts = [rows[at].row.place, f"{base:.3f}", f"{adapter:.3f}"]
        texts += [rows[at].row.question, rows[at].row.reference or "", "; ".join(remarks)]
        table.add_row(*map(_cell, texts))
    return table


def _texts(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in columns:
        table.add_column(column, overflow="fold")  # Chinese has no spaces to wrap at
    return table


def _cell(text: str) -> Text:
    shown = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
    return Text(harmless(shown))
