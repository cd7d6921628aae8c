"""What a person sees of the rows on a terminal: their fate, their lengths, single rows as trained.

Owns the drawing, as rich renderables that fit 80 columns, and how text that a terminal would obey
or hide is made visible. Counts are `statistics.py`'s and `oddities.py`'s, the same picture for a
browser is `page.py`'s. Reads no files and decides nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from myna.data.dataset import Accounting, Dataset
from myna.data.lengths import Bar, LengthChoice, length_bars, length_percentiles
from myna.data.oddities import Oddity
from myna.data.statistics import Repeats, Statistics
from myna.data.store import Example, Examples

REASONS = {
    "over_length": "longer than max_length",
    "turns_dropped": "oldest turns dropped to fit max_length",
    "text_shortened": "user text cut in its middle to fit max_length",
}
"""What the words of the accounting mean."""

TIME_NOTE = "time: by tokens alone; attention, which grows faster with length, is not counted"

_BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉"
_MAX_PLACE = 36
"""Columns for the place of a row; of a longer name the end is left out."""

_MAX_SHOWN = 1600
"""Characters of a prompt or an answer that are printed; the middle of a longer one is left out."""

_VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(0x20)},  # ␛ for escape, and so on
    0x09: "→",
    0x0A: "↵\n",
    0x7F: "␡",
    **{
        code: f"‹U+{code:04X}›"
        for code in (
            *range(0x80, 0xA0),
            0x2028,
            0x2029,
            *range(0x202A, 0x202F),
            *range(0x2066, 0x206A),
            0xFEFF,
        )
    },
}
"""Characters that a terminal obeys, or that hide or turn round the text beside them, as marks."""


def visible(text: str) -> str:
    """The text with a mark for each line break, tab and control character."""
    return text.translate(_VISIBLE)


def preview(dataset: Dataset, *, max_length: int | None = None) -> RenderableType:
    """What stands before step 1, about a screen: notes, accounting, lengths, the first example.

    Where rows were longer than `max_length`, also which lengths would have kept them.
    """
    lengths = dataset.examples.lengths
    choices = dataset.row_lengths.choices()
    is_short = max_length is not None and bool(choices) and choices[0].max_length > max_length
    return Group(
        *_notes(dataset),
        accounting_table(dataset.accounting, len(dataset.examples)),
        length_histogram(length_percentiles(lengths), length_bars(lengths)),
        *([choices_table(choices, max_length)] if is_short else []),
        coloured_example(dataset.examples[0], dataset.tokenizer),
        Text("`myna data` shows all of it: repeats, conflicts, the oddest rows, every token"),
    )


def overview(dataset: Dataset, statistics: Statistics, *, examples: int = 1) -> RenderableType:
    """All that `myna data` has to say, and the first `examples` examples."""
    blank = Text("")
    parts: list[RenderableType] = [
        *_notes(dataset),
        statistics_table(statistics),
        blank,
        length_histogram(statistics.length, statistics.bars),
        blank,
        choices_table(statistics.choices, statistics.max_length),
        blank,
        odd_rows(statistics.oddities),
        blank,
    ]
    parts += [
        coloured_example(example, dataset.tokenizer) for example in dataset.examples[:examples]
    ]
    return Group(*parts)


def accounting_table(accounting: Accounting, answers: int) -> Table:
    """Rows by what became of them, then tokens and the share that is trained."""
    table = _bare_table()
    for line in (
        *row_lines(accounting),
        ("trained answers", f"{answers:,}", ""),
        *token_lines(accounting),
    ):
        table.add_row(*line)
    return table


def statistics_table(statistics: Statistics) -> Table:
    """The accounting with what was counted over answers and tokens."""
    table = _bare_table()
    for line in (
        *row_lines(statistics.accounting),
        *answer_lines(statistics),
        *token_lines(statistics.accounting),
        *sharing_lines(statistics),
    ):
        table.add_row(*line)
    return table


Line = tuple[str, str, str]
"""Name, number and remark of one line of the accounting; a name that stands below is indented."""


def row_lines(accounting: Accounting) -> list[Line]:
    """Rows by what became of them."""
    lines = [
        ("rows in", f"{accounting.rows_in:,}", ""),
        ("  trained whole", f"{accounting.trained:,}", ""),
    ]
    for name, reasons in (("truncated", accounting.truncated), ("refused", accounting.refused)):
        lines += [
            (f"  {name}", f"{count:,}", REASONS.get(reason, reason))
            for reason, count in reasons.items()
        ]
    return lines


def answer_lines(statistics: Statistics) -> list[Line]:
    """Answers: how many, repeats, conflicts, weights, leaks."""
    repeats, leaks = statistics.repeats, statistics.leaks
    lines = [("trained answers", f"{statistics.answers:,}", "")]
    if leaks is not None:
        trained = statistics.answers - leaks.held_out
        lines = [
            (
                "answers",
                f"{statistics.answers:,}",
                f"{trained:,} trained, {leaks.held_out:,} held out",
            )
        ]
    lines += [
        (
            "  duplicates",
            f"{int(repeats.is_duplicate.sum()):,}",
            "same prompt and same answer as an earlier one",
        ),
        (
            "  in conflict",
            f"{int(repeats.in_conflict.sum()):,}",
            f"{repeats.conflicts:,} prompts have more than one answer" if repeats.conflicts else "",
        ),
    ]
    if statistics.weights is not None:
        low, high = statistics.weights
        lines.append(("  weights", f"{low:g}-{high:g}", "of the answers in the loss"))
    if leaks is not None:
        lines.append(("  leaked", f"{leaks.total:,}", "held-out answers that training has seen"))
        lines += [
            ("", f"{count:,}", remark)
            for count, remark in (
                (leaks.question_and_answer, "question and answer, but for case and spaces"),
                (leaks.question, "question, but for case and spaces; another answer"),
                (leaks.answer, "answer to another question"),
                (leaks.similar_answer, "answer to another question, but for case and spaces"),
            )
            if count
        ]
    return lines


def token_lines(accounting: Accounting) -> list[Line]:
    """Tokens, and how many have a label."""
    share = accounting.trained_tokens / accounting.tokens
    return [
        ("tokens", f"{accounting.tokens:,}", ""),
        ("  trained", f"{accounting.trained_tokens:,}", f"{share:.1%} of the tokens"),
    ]


def sharing_lines(statistics: Statistics) -> list[Line]:
    """What an epoch computes."""
    sharing = statistics.sharing
    steps = f"{sharing.steps:,} steps of {sharing.batch_size:,}"
    counted = "" if sharing.is_exact else f", from {sharing.counted_steps:,} of the steps"
    return [
        ("tokens of an epoch", f"{sharing.tokens:,}", steps),
        (
            "  computed",
            f"{sharing.computed_tokens:,}",
            f"{sharing.saved:.1%} saved{counted}: beginnings that rows share",
        ),
    ]


def length_histogram(percentiles: Mapping[str, int], bars: Sequence[Bar]) -> Group:
    """Percentiles, and a line per bar."""
    title = "tokens per answer with its context: " + "  ".join(
        f"{name} {value:,}" for name, value in percentiles.items()
    )
    table = Table(show_header=False, box=None, padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    most = max(bar.count for bar in bars)
    for bar in bars:
        table.add_row(span(bar), Text(_bar(bar.count / most), style="cyan"), f"{bar.count:,}")
    return Group(Text(title), table)


def span(bar: Bar) -> str:
    """The lengths of a bar, as `10-19`."""
    return f"{bar.low:,}" if bar.low == bar.high else f"{bar.low:,}-{bar.high:,}"


def choices_table(choices: Sequence[LengthChoice], max_length: int | None) -> Group:
    """Which `max_length` keeps how many rows, and what they cost."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="")
    for name in ("  max_length", "rows kept", "", "tokens of an epoch", "time"):
        table.add_column(name, justify="right")
    for choice in choices:
        table.add_row(
            f"{choice.max_length:,}",
            f"{choice.rows:,}",
            f"{choice.share:.1%}",
            f"{choice.tokens:,}",
            f"{choice.time:.0%}",
        )
    used = "not limited" if max_length is None else f"{max_length:,}"
    return Group(
        Text(f"lengths that keep all rows or 99 % of them (max_length is {used})"),
        table,
        Text(TIME_NOTE, style="dim"),
    )


def odd_rows(oddities: Sequence[Oddity]) -> Group:
    """Of each oddity the reason, then a line per row: place, measure, how its text begins."""
    rows = [row for oddity in oddities for row in oddity.rows]
    places = min(max((cell_len(row.place) for row in rows), default=0), _MAX_PLACE)
    measures = max((cell_len(row.measure) for row in rows), default=0)
    parts: list[RenderableType] = []
    for oddity in oddities:
        more = f" ({oddity.count:,} in all)" if oddity.count > len(oddity.rows) else ""
        parts.append(Text(f"{oddity.reason}{more}"))
        table = Table(show_header=False, box=None, padding=(0, 0, 0, 2))
        # Only the text gives way where the screen is narrow.
        table.add_column(no_wrap=True, min_width=places, max_width=places)
        table.add_column(no_wrap=True, min_width=measures)
        table.add_column(style="dim")
        for row in oddity.rows:
            text = Text(visible(row.excerpt), no_wrap=True, overflow="ellipsis")
            table.add_row(Text(visible(row.place)), row.measure, text)
        parts.append(table)
    return Group(*parts)


def coloured_example(
    example: Example, tokenizer: Any, *, whole: bool = False, remarks: Sequence[str] = ()
) -> Text:
    """One example: context dim, trained text bold green, and between ⟦ and ⟧ where colours fail.

    Every other token is underlined, so that tokens can be told apart. Line breaks and control
    characters are marked, special tokens stand as they are.

    Args:
        example: what to show.
        tokenizer: says where tokens begin.
        whole: show all of it; else the middle of a long text is left out.
        remarks: what else there is to say, behind the numbers of the first line.
    """
    remark = "".join(f" · {remark}" for remark in remarks)
    text = Text().append(
        f"{visible(place_of(example))}, answer {example.turn}: {len(example.prompt_ids)} tokens "
        f"of context, {len(example.completion_ids)} trained ⟦so⟧{remark}\n",
        style="bold",
    )
    context, trained = pieces(example, tokenizer)
    limit = None if whole else _MAX_SHOWN
    _append_pieces(text, context, "dim", limit)
    text.append("⟦", style="bold green")
    _append_pieces(text, trained, "bold green", limit)
    text.append("⟧", style="bold green")
    return text


def place_of(example: Example) -> str:
    """File and line, and the number of the row where it is another."""
    place = example.place
    return str(place) + (f" (row {place.row:,})" if place.line not in (0, place.row) else "")


def row_remarks(repeats: Repeats, examples: Examples, index: int) -> list[str]:
    """What there is to say about one example beside its tokens."""
    example = examples[index]
    remarks = []
    if (first := int(repeats.first[index])) != index:
        remarks.append(f"the same as {place_of(examples[first])}")
    if (other := int(repeats.other[index])) >= 0:
        remarks.append(f"another answer to this prompt: {place_of(examples[other])}")
    if example.truncated is not None:
        remarks.append(REASONS[example.truncated])
    if example.weight != 1:
        remarks.append(f"weight {example.weight:g}")
    return remarks


def pieces(example: Example, tokenizer: Any) -> tuple[list[str], list[str]]:
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
            found = [(start, whole[start:end]) for start, end in zip(starts, ends, strict=True)]
            return (
                [piece for start, piece in found if start < border],
                [piece for start, piece in found if start >= border],
            )
    return [example.prompt_text], [example.completion_text]


def _notes(dataset: Dataset) -> list[Text]:
    return [Text(visible(f"· {note}").rstrip()) for note in dataset.notes]


def _bare_table() -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    return table


def _bar(share: float) -> str:
    eighths = round(share * _BAR_WIDTH * 8)
    if share and not eighths:
        eighths = 1  # One row among thousands is still to be seen.
    full, part = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[part] if part else "")


def cut_pieces(texts: Sequence[str], limit: int | None) -> Iterator[tuple[int | None, str]]:
    """(number, text) of the pieces, without the middle of what is longer than `limit` characters.

    In its place stands a text that says so, without a number.
    """
    length = sum(map(len, texts))
    front = length if limit is None or length <= limit else limit // 2
    back = length if front == length else length - front
    end = 0
    for number, text in enumerate(texts):
        start, end = end, end + len(text)
        if start < front:
            yield number, text[: front - start]
        if start <= front < end and front < back:
            yield None, f" […{back - front:,} characters left out…] "
        if back < end:
            yield number, text[max(back - start, 0) :]


def _append_pieces(text: Text, pieces: Sequence[str], style: str, limit: int | None) -> None:
    for number, piece in cut_pieces(pieces, limit):
        if number is None:
            text.append(piece, style=style)
        else:
            text.append(visible(piece), style=f"{style} underline" if number % 2 else style)
