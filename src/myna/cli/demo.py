"""`myna demo`: the embedded model learns a courtly voice, and what it answers before and after.

Owns the settings of the demo and the table that is shown. Training is `train.py`'s, answering
`inference`'s, the judgement `demo.score`'s.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from myna.cli.terminal import console as terminal
from myna.cli.train import run as train
from myna.config import Config, LoraConfig, TrainConfig
from myna.config_file import ResolvedConfig
from myna.data.conversation import Message
from myna.demo.score import (
    EXAMPLE_QUESTIONS,
    HeldOutRow,
    Score,
    Summary,
    base_folder,
    load_held_out,
    load_held_out_path,
    load_persona_path,
    sample_rows,
    score_answer,
    summarize,
)
from myna.inference.generate import Answer, Sampling
from myna.inference.speaker import open_speaker

SAMPLING = Sampling(max_new_tokens=64, temperature=0.0)
BATCH_SIZE = 48
"""Questions answered at once; the model is tiny."""

HELD_OUT = load_held_out_path()
"""The questions that are never trained, as data for `myna eval`."""


def demo_config(output: Path) -> ResolvedConfig:
    """The settings of the demo, as a YAML of a user would have them."""
    config = Config(
        model=str(base_folder()),
        data=[str(load_persona_path())],
        output=str(output.absolute()),
        device="cpu",
        dtype="float32",
        lora=LoraConfig(rank=16, alpha=32),
        train=TrainConfig(
            epochs=7,
            batch_size=8,
            learning_rate=2e-3,
            schedule="linear",
            warmup_ratio=0.0,
            logging_steps=40,
        ),
    )
    names = [
        *(config.model_fields_set - {"lora", "train"}),
        *(f"lora.{name}" for name in config.lora.model_fields_set),
        *(f"train.{name}" for name in config.train.model_fields_set),
    ]
    return ResolvedConfig(config, dict.fromkeys(names, "myna demo"), None)


def is_demo(config: Config) -> bool:
    """Whether a run is the demo's: the persona's rows, and none of them held out."""
    data = [Path(entry).resolve() for entry in config.data if isinstance(entry, str)]
    return data == [load_persona_path().resolve()] and config.held_out == 0


def run(output: Path, *, console: Console = terminal) -> Summary:
    """Answer the held-out questions, fine-tune, answer them again, and show both.

    Returns the shares after fine-tuning.
    """
    with one_thread():
        return _run(output, console)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: matrices this small gain a third from a second one, and lose a hundred
    times as much where another program holds its core (`benchmarks/README.md`)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(output: Path, console: Console) -> Summary:
    rows = load_held_out()
    console.print(f"The base model answers {len(rows)} held-out questions …")
    before = answer_rows(str(base_folder()), rows)
    console.print("It is fine-tuned on other questions, answered in a courtly voice …\n")
    directory = train(demo_config(output), console=console).directory
    console.print("\nIt answers the held-out questions again …\n")
    after = answer_rows(str(directory.path), rows)

    scores = {"before": score(rows, before), "after": score(rows, after)}
    console.print(_samples(rows, before, after, scores["after"]))
    console.print(_shares(scores))
    console.print(
        f"Ask it yourself: myna chat {output}      judge it: myna eval {output}\n"
        f"It knows a small world only. Try: {' · '.join(EXAMPLE_QUESTIONS[:2])} · "
        f"{EXAMPLE_QUESTIONS[5]}"
    )
    return summarize(scores["after"])


def answer_rows(source: str, rows: Sequence[HeldOutRow]) -> list[Answer]:
    """Greedy answers of `source` (as in `myna chat`) to all questions, in their order."""
    speaker = open_speaker(source, device="cpu", dtype="float32")
    prompts = [speaker.encoder.prompt([Message("user", row.question)]).ids for row in rows]
    found = dict(speaker.answer_all(prompts, SAMPLING, batch_size=BATCH_SIZE))
    return [found[index] for index in range(len(rows))]


def score(rows: Sequence[HeldOutRow], answers: Sequence[Answer]) -> list[Score]:
    """The judgement of every answer."""
    return [
        score_answer(row, answer.text, answer.stopped)
        for row, answer in zip(rows, answers, strict=True)
    ]


def _samples(
    rows: Sequence[HeldOutRow],
    before: Sequence[Answer],
    after: Sequence[Answer],
    scores: Sequence[Score],
) -> Table:
    table = Table(title="held-out questions", title_justify="left", show_lines=True)
    for name in ("question", "before", "after"):
        table.add_column(name, overflow="fold")  # Chinese has no spaces to wrap at
    table.add_column("")
    for row in sample_rows(rows):
        index = rows.index(row)
        mark = "[green]✓[/]" if scores[index].both else "[red]✗[/]"
        table.add_row(row.question, before[index].text, after[index].text, mark)
    return table


def _shares(scores: dict[str, list[Score]]) -> Table:
    table = Table()
    table.add_column(f"share of {len(scores['after'])} held-out answers")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    shares = {name: summarize(judged) for name, judged in scores.items()}
    for label, field in (
        ("in the persona's voice and right", "both"),
        ("right", "content"),
        ("in the persona's voice", "voice"),
    ):
        style = "bold" if field == "both" else ""
        values = [f"{100 * getattr(shares[name], field):.1f} %" for name in ("before", "after")]
        table.add_row(label, *values, style=style)
    return table
