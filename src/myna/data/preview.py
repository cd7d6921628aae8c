"""What a person sees before step 1: the fate of all rows, their lengths, one row as it is trained.

Owns the drawing, as rich renderables, and the JSON object of `myna data --json`, which other
programs read. Reads no files and decides nothing: everything is in the `Dataset`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from myna.data.dataset import Dataset
from myna.data.store import Example, Examples

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
    parts += [
        coloured_example(example, dataset.tokenizer) for example in dataset.examples[:examples]
    ]
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


def length_percentiles(examples: Examples) -> dict[str, int]:
    """p50, p90, p99 (nearest rank) and max of the tokens per example, prompt and completion."""
    lengths = np.sort(examples.lengths).tolist()
    ranks = {f"p{p}": lengths[math.ceil(p / 100 * len(lengths)) - 1] for p in (50, 90, 99)}
    return {**ranks, "max": lengths[-1]}


def length_histogram(dataset: Dataset) -> Group:
    """Percentiles, and at most ten bars of equal width from the shortest example to the longest."""
    lengths = dataset.examples.lengths
    shortest = int(lengths.min())
    width = max(1, math.ceil((int(lengths.max()) - shortest + 1) / _BINS))
    counts = np.bincount((lengths - shortest) // width, minlength=_BINS).tolist()
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


def coloured_example(example: Example, tokenizer: Any) -> Text:
    """One example: context dim, trained text bold green, and between ⟦ and ⟧ where colours fail.

    Every other token is underlined, so that tokens can be told apart. Line breaks are marked,
    special tokens stand as they are.
    """
    text = Text(
        f"{example.place}, answer {example.turn}: {len(example.prompt_ids)} tokens of context, "
        f"{len(example.completion_ids)} trained ⟦so⟧\n"
    )
    context, trained = _pieces(example, tokenizer)
    _append_pieces(text, context, "dim")
    text.append("⟦", style="bold green")
    _append_pieces(text, trained, "bold green")
    text.append("⟧", style="bold green")
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


def _bar(share: float) -> str:
    eighths = round(share * _BAR_WIDTH * 8)
    if share and not eighths:
        eighths = 1  # One row among thousands is still to be seen.
    full, part = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[part] if part else "")


def _pieces(example: Example, tokenizer: Any) -> tuple[list[str], list[str]]:
    """The texts of the tokens of context and completion; tokens within one character are joined.

    A tokenizer that cannot say where its tokens stand gives each side as one piece.
    """
    whole = example.prompt_text + example.completion_text
    border = len(example.prompt_text)
    if tokenizer.is_fast:
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        if tuple(encoded["input_ids"]) == example.prompt_ids + example.completion_ids:
            starts = sorted({0, border, *(start for start, _ in encoded["offset_mapping"])})
            ends = [*starts[1:], len(whole)]
            pieces = [(start, whole[start:end]) for start, end in zip(starts, ends, strict=True)]
            return (
                [piece for start, piece in pieces if start < border],
                [piece for start, piece in pieces if start >= border],
            )
    return [example.prompt_text], [example.completion_text]


def _append_pieces(text: Text, pieces: Sequence[str], style: str) -> None:
    length = sum(len(piece) for piece in pieces)
    position = 0
    for number, piece in enumerate(pieces):
        position += len(piece)
        if _MAX_SHOWN // 2 < position <= length - _MAX_SHOWN // 2:
            continue
        if position - len(piece) <= length - _MAX_SHOWN // 2 < position and length > _MAX_SHOWN:
            text.append(f" […{length - _MAX_SHOWN:,} characters left out…] ", style=style)
        visible = piece.replace("\t", "→").replace("\r", "␍").replace("\n", "↵\n")
        text.append(visible, style=f"{style} underline" if number % 2 else style)
