"""The picture of a data set as one page for a browser: `myna data --html`.

Owns what stands on it: what `preview.py` says on a terminal, from the same counts. Frame, look and
escaping are `web_page.py`'s.
"""

from collections.abc import Sequence

from myna.data.dataset import Dataset
from myna.data.faults import SCREENFUL
from myna.data.lengths import Bar, LengthChoice
from myna.data.oddities import Oddity
from myna.data.preview import (
    TIME_NOTE,
    answer_lines,
    row_lines,
    row_remarks,
    sharing_lines,
    span,
    token_lines,
)
from myna.data.sample import token_row_of
from myna.data.statistics import Statistics
from myna.data.web_page import (
    document,
    lines_table,
    notes,
    section,
    share_bar,
    text,
    tiles,
    token_legend,
    token_row,
)

_WIDTH, _HEIGHT, _TOP, _BOTTOM = 760, 250, 52, 34
"""Of the histogram, in its own units, and what its labels take above and below the bars."""

_STYLE = """
svg { display: block; width: 100%; min-width: 36rem; height: auto; }
svg .bar { fill: var(--accent); }
svg text { fill: var(--soft); font-size: 11px; text-anchor: middle; }
svg .count { fill: var(--ink); stroke: var(--card); stroke-width: 3px; paint-order: stroke; }
svg .mark { stroke: var(--warn); stroke-width: 1; stroke-dasharray: 3 3; }
svg .marked { fill: var(--warn); text-anchor: start; }
.odd { table-layout: fixed; }
.odd td { overflow-wrap: anywhere; }
.odd td:first-child { width: 30%; }
.odd td:nth-child(2) { width: 9.5rem; white-space: normal; }
"""


def page(dataset: Dataset, statistics: Statistics, shown: Sequence[int], *, title: str) -> str:
    """The whole page.

    Args:
        dataset: what would be trained.
        statistics: its counts.
        shown: numbers of the examples that stand on the page token by token.
        title: what the page is about, such as the names of the files.
    """
    return document(
        title,
        [
            f"<h1>{text(title)}</h1>",
            '<p class="soft">What would be trained, counted before anything is.</p>',
            _tiles(statistics),
            notes(dataset.notes),
            *section("Rows, answers, tokens", [_accounting(statistics), _shares(statistics)]),
            *section("Lengths", [_histogram(statistics), _choices(statistics)]),
            *section("Rows to look at", map(_odd, statistics.oddities)),
            *(section("Refused rows", [_refused(dataset)]) if dataset.refusals else []),
            *section("Rows, token by token", _rows(dataset, statistics, shown)),
        ],
        style=_STYLE,
    )


def _tiles(statistics: Statistics) -> str:
    accounting, sharing = statistics.accounting, statistics.sharing
    lost = sum(accounting.refused.values()) + sum(accounting.truncated.values())
    return tiles(
        [
            (f"{accounting.rows_in:,}", "rows in"),
            (f"{lost:,}", "of them refused or shortened"),
            (f"{statistics.answers:,}", "answers"),
            (f"{accounting.tokens:,}", "tokens"),
            (f"{accounting.trained_tokens / accounting.tokens:.1%}", "of the tokens are trained"),
            (f"{sharing.saved:.1%}", "saved by shared beginnings"),
        ]
    )


def _accounting(statistics: Statistics) -> str:
    return lines_table(
        [
            *row_lines(statistics.accounting),
            *answer_lines(statistics),
            *token_lines(statistics.accounting),
            *sharing_lines(statistics),
        ]
    )


def _shares(statistics: Statistics) -> str:
    accounting, sharing = statistics.accounting, statistics.sharing
    trained = accounting.trained_tokens / accounting.tokens
    return (
        share_bar("Trained tokens", trained, trained=True)
        + share_bar("Computed tokens of an epoch", 1 - sharing.saved)
        + '<p class="soft">A beginning that rows of a step share, such as a system prompt or '
        "earlier turns, is computed once.</p>"
    )


def _histogram(statistics: Statistics) -> str:
    bars = statistics.bars
    slot = _WIDTH / len(bars)
    tall = _HEIGHT - _TOP - _BOTTOM
    most = max(bar.count for bar in bars)
    drawn = []
    for level, (name, length) in enumerate(statistics.length.items()):
        if name == "max":
            continue
        left = slot * _position(bars, length)
        # Names stand to the left of a line that is near the right edge, and on levels of their own.
        anchor = ' style="text-anchor:end"' if left > _WIDTH * 0.8 else ""
        drawn.append(
            f'<line class="mark" x1="{left:.1f}" x2="{left:.1f}" y1="{4 + 12 * level}" '
            f'y2="{_HEIGHT - _BOTTOM}"/><text class="marked"{anchor} '
            f'x="{left + (-4 if anchor else 4):.1f}" y="{13 + 12 * level}">{name} {length:,}</text>'
        )
    for number, bar in enumerate(bars):
        # One row among thousands is still to be seen.
        height = max(tall * bar.count / most, 1.5) if bar.count else 0
        left, floor = number * slot, _HEIGHT - _BOTTOM
        drawn.append(
            f'<rect class="bar" x="{left + 3:.1f}" y="{floor - height:.1f}" '
            f'width="{slot - 6:.1f}" height="{height:.1f}" rx="2">'
            f"<title>{span(bar)} tokens: {bar.count:,}</title></rect>"
            f'<text class="count" x="{left + slot / 2:.1f}" y="{floor - height - 5:.1f}">'
            f"{bar.count:,}</text>"
            f'<text x="{left + slot / 2:.1f}" y="{floor + 16}">{span(bar)}</text>'
        )
    return (
        '<p class="soft">Tokens per answer with its context; the longest has '
        f'{statistics.length["max"]:,}.</p>\n<div class="card"><svg role="img" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-label="histogram of lengths">\n'
        + "\n".join(drawn)
        + "\n</svg></div>"
    )


def _position(bars: Sequence[Bar], length: int) -> float:
    """Where a length lies on the axis, in bars from the left."""
    for number, bar in enumerate(bars):
        if length <= bar.high:
            return number + (length - bar.low + 0.5) / (bar.high - bar.low + 1)
    return float(len(bars))


def _choices(statistics: Statistics) -> str:
    used = statistics.max_length
    rows = "\n".join(_choice(choice) for choice in statistics.choices)
    return (
        f"<h3>Lengths that keep all rows or 99 % of them</h3>"
        f'<p class="soft">max_length is {"not limited" if used is None else f"{used:,}"}.</p>'
        '<div class="card"><table>\n<thead><tr><th class="n">max_length</th><th class="n">rows kept'
        '</th><th class="n">share</th><th class="n">tokens of an epoch</th><th class="n">time</th>'
        f"</tr></thead>\n{rows}\n</table></div>\n"
        f'<p class="soft">{TIME_NOTE[0].upper()}{TIME_NOTE[1:]}.</p>'
    )


def _choice(choice: LengthChoice) -> str:
    cells = (
        f"{choice.max_length:,}",
        f"{choice.rows:,}",
        f"{choice.share:.1%}",
        f"{choice.tokens:,}",
        f"{choice.time:.0%}",
    )
    return "<tr>" + "".join(f'<td class="n">{cell}</td>' for cell in cells) + "</tr>"


def _odd(oddity: Oddity) -> str:
    more = f" ({oddity.count:,} in all)" if oddity.count > len(oddity.rows) else ""
    rows = "\n".join(
        f'<tr><td>{text(row.place)}</td><td class="n">{text(row.measure)}</td>'
        f"<td>{text(row.excerpt)}</td></tr>"
        for row in oddity.rows
    )
    title = oddity.reason[:1].upper() + oddity.reason[1:]
    return (
        f"<h3>{text(title + more)}</h3>\n"
        f'<div class="card"><table class="odd">\n{rows}\n</table></div>'
    )


def _refused(dataset: Dataset) -> str:
    shown = dataset.refusals[:SCREENFUL]
    rows = "\n".join(
        f"<tr><td>{text(str(fault.place))}</td><td>{text(fault.finding)}</td></tr>"
        for fault in shown
    )
    more = sum(dataset.accounting.refused.values()) - len(shown)
    rest = f'<p class="soft">And {more:,} more.</p>' if more else ""
    return f'<div class="card"><table>\n{rows}\n</table></div>{rest}'


def _rows(dataset: Dataset, statistics: Statistics, shown: Sequence[int]) -> list[str]:
    legend = token_legend(f"{len(shown):,} of {statistics.answers:,} answers.")
    return [legend, *(_row(dataset, statistics, index) for index in shown)]


def _row(dataset: Dataset, statistics: Statistics, index: int) -> str:
    row = token_row_of(dataset.examples[index], dataset.tokenizer)
    return token_row(row, row_remarks(statistics.repeats, dataset.examples, index))
