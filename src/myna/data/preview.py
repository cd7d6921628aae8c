"""What a person sees before step 1: the fate of all rows, their lengths, one row as it is trained.

Owns the drawing, as rich renderables, and the JSON object of `myna data --json`, which other
programs read. Reads no files and tokenizes nothing: everything is in the `Dataset`.
"""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from myna.data.encode import Dataset, Example

_REASONS = {
    "over_length": "longer than max_length",
    "turns_dropped": "oldest turns dropped to fit max_length",
    "text_shortened": "user text shortened in its middle to fit max_length",
}
_BINS = 10
_BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
_MAX_SHOWN = 1600
"""Characters of a prompt or an answer that are printed; the middle of a longer one is left out."""


def preview(dataset: Dataset, *, examples: int = 1) -> RenderableType:
    """Notes, accounting, lengths and the first `examples` examples, in this order."""
    parts: list[RenderableType] = [Text(f"· {note}") for note in dataset.notes]
    parts += [accounting_table(dataset), length_histogram(dataset)]
    parts += [coloured_example(example) for example in dataset.examples[:examples]]
    return Group(*parts)


def accounting_table(dataset: Dataset) -> Table:
    """Rows by what became of them, then tokens and the share that is trained."""
    accounting = dataset.accounting
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    table.add_row("rows in", f"{accounting.rows_in:,}", "")
    table.add_row("  trained whole", f"{accounting.trained:,}", "")
    for name, reasons in (("truncated", accounting.truncated), ("refused", accounting.refused)):
        for reason, count in reasons.items():
            table.add_row(f"  {name}", f"{count:,}", _REASONS.get(reason, reason))
    table.add_row("trained answers", f"{len(dataset.examples):,}", "")
    table.add_row("tokens", f"{accounting.tokens:,}", "")
    share = accounting.trained_tokens / accounting.tokens
    table.add_row("  trained", f"{accounting.trained_tokens:,}", f"{share:.1%} of the tokens")
    return table


def length_percentiles(examples: Sequence[Example]) -> dict[str, int]:
    """p50, p90, p99 (nearest rank) and max of the tokens per example, prompt and completion."""
    lengths = sorted(_lengths(examples))
    ranks = {f"p{p}": lengths[math.ceil(p / 100 * len(lengths)) - 1] for p in (50, 90, 99)}
    return {**ranks, "max": lengths[-1]}


def length_histogram(dataset: Dataset) -> Group:
    """Percentiles, and at most ten bars of equal width from the shortest example to the longest."""
    lengths = _lengths(dataset.examples)
    shortest = min(lengths)
    width = max(1, math.ceil((max(lengths) - shortest + 1) / _BINS))
    counts = [0] * _BINS
    for length in lengths:
        counts[(length - shortest) // width] += 1
    while not counts[-1]:
        counts.pop()
    percentiles = length_percentiles(dataset.examples)
    title = "tokens per answer with its context: " + "  ".join(
        f"{name} {value:,}" for name, value in percentiles.items()
    )
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    for index, count in enumerate(counts):
        low = shortest + index * width
        label = f"{low:,}" if width == 1 else f"{low:,}-{low + width - 1:,}"
        table.add_row(label, Text(_bar(count / max(counts)), style="cyan"), f"{count:,}")
    return Group(Text(title), table)


def coloured_example(example: Example) -> Text:
    """One example: context dim, trained text bold green, and between ⟦ and ⟧ where colours fail.

    Line breaks are marked, special tokens stand as they are.
    """
    text = Text()
    text.append(
        f"{example.place}, answer {example.turn}: {len(example.prompt_ids)} tokens of context, "
        f"{len(example.completion_ids)} trained ⟦so⟧\n"
    )
    text.append(_visible(example.prompt_text), style="dim")
    text.append("⟦" + _visible(example.completion_text) + "⟧", style="bold green")
    return text


def to_json(dataset: Dataset, rows: int | None = None) -> dict[str, Any]:
    """The object of `myna data --json`; with `rows` the first so many trained answers in full."""
    result = dataset.accounting.to_json()
    result["length"] = length_percentiles(dataset.examples)
    if rows is not None:
        result["rows"] = [
            {
                "prompt_text": example.prompt_text,
                "completion_text": example.completion_text,
                "prompt_ids": list(example.prompt_ids),
                "completion_ids": list(example.completion_ids),
            }
            for example in dataset.examples[:rows]
        ]
    return result


def _lengths(examples: Sequence[Example]) -> list[int]:
    return [len(example.prompt_ids) + len(example.completion_ids) for example in examples]


def _bar(share: float) -> str:
    eighths = round(share * _BAR_WIDTH * 8)
    if share and not eighths:
        eighths = 1  # One row among thousands is still to be seen.
    full, part = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[part] if part else "")


def _visible(text: str) -> str:
    if len(text) > _MAX_SHOWN:
        half = _MAX_SHOWN // 2
        left_out = len(text) - 2 * half
        text = f"{text[:half]} […{left_out:,} characters left out…] {text[-half:]}"
    return text.replace("\t", "→").replace("\r", "␍").replace("\n", "↵\n")
