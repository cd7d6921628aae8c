"""The picture of a data set as one page for a browser: `myna data --html`.

Owns the HTML, in which all text that comes from data files is escaped: one file, without scripts,
pictures or anything from elsewhere, dark where the reader's system is dark. What it says is what
`preview.py` says on a terminal, from the same counts.
"""

from collections.abc import Iterable, Sequence
from html import escape

from myna import __version__
from myna.data.dataset import Dataset
from myna.data.faults import SCREENFUL
from myna.data.lengths import Bar, LengthChoice
from myna.data.oddities import Oddity
from myna.data.preview import (
    TIME_NOTE,
    Line,
    answer_lines,
    cut_pieces,
    pieces,
    place_of,
    row_lines,
    row_remarks,
    sharing_lines,
    span,
    token_lines,
    visible,
)
from myna.data.statistics import Statistics
from myna.data.store import Example

MAX_SHOWN = 8000
"""Characters of a prompt or an answer on the page; the middle of a longer one is left out."""

_WIDTH, _HEIGHT, _TOP, _BOTTOM = 760, 250, 52, 34
"""Of the histogram, in its own units, and what its labels take above and below the bars."""

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #faf9f6; --card: #ffffff; --ink: #22211f; --soft: #6b6862; --line: #e2dfd8;
  --accent: #2f6f9f; --trained: #cdeccf; --trained2: #b3e0b8; --trained-ink: #123c1b;
  --context: #f0eee9; --context2: #e4e1da; --warn: #9a5b00; --warn-paper: #fff2dc;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #17181a; --card: #1f2124; --ink: #e6e4df; --soft: #9c9a94; --line: #34363a;
    --accent: #74b3e0; --trained: #1d4a2a; --trained2: #275e37; --trained-ink: #d6f5dc;
    --context: #2a2c30; --context2: #34373c; --warn: #f0b866; --warn-paper: #3a2d18;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 60rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC",
    "PingFang SC", "Microsoft YaHei", sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
h3 { font-size: .95rem; margin: 1.2rem 0 .35rem; font-weight: 600; }
p, ul { margin: .4rem 0; }
.soft { color: var(--soft); }
.notes { list-style: none; padding: 0; color: var(--soft); font-size: .9rem; }
.notes li { overflow-wrap: anywhere; padding-left: .9rem; text-indent: -.9rem; }
.notes li::before { content: "·"; padding-right: .55rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem;
  margin: 1.6rem 0 .5rem; padding: 0; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .8rem 1rem; }
.tiles b { display: block; font-size: 1.55rem; font-weight: 650; line-height: 1.15;
  font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .84rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: .9rem 1.1rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
td, th { padding: .28rem .8rem .28rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); font-weight: 400; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-size: .84rem; }
th.in { padding-left: 1.2rem; color: var(--soft); }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td:last-child { color: var(--soft); overflow-wrap: anywhere; }
.shares { display: flex; height: 1.5rem; border-radius: .35rem; overflow: hidden; margin: .35rem 0;
  background: var(--context2); }
.shares i { display: block; background: var(--accent); }
.shares i.t { background: var(--trained2); }
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
article { margin: 0 0 1rem; }
article header { font-size: .86rem; color: var(--soft); margin-bottom: .35rem; }
article header b { color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
.chip { display: inline-block; background: var(--warn-paper); color: var(--warn);
  border-radius: 1rem; padding: 0 .6rem; margin-left: .4rem; }
pre { margin: 0; max-height: 26rem; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.75 ui-monospace, "Cascadia Mono", Menlo, Consolas, "Noto Sans Mono",
    "Noto Sans Mono CJK SC", monospace; }
pre span { background: var(--context); color: var(--soft); border-radius: .2rem; padding: .1rem 0; }
pre span.x { background: var(--context2); }
pre .t { background: var(--trained); color: var(--trained-ink); }
pre .t.x { background: var(--trained2); }
pre .cut { background: none; color: var(--warn); font-style: italic; }
pre .edge { background: none; color: var(--trained-ink); font-weight: 700; }
.legend span { border-radius: .2rem; padding: .05rem .4rem; background: var(--context); }
.legend .t { background: var(--trained2); color: var(--trained-ink); }
footer { margin-top: 3rem; color: var(--soft); font-size: .84rem; }
"""


def page(dataset: Dataset, statistics: Statistics, shown: Sequence[int], *, title: str) -> str:
    """The whole page.

    Args:
        dataset: what would be trained.
        statistics: its counts.
        shown: numbers of the examples that stand on the page token by token.
        title: what the page is about, such as the names of the files.
    """
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f"<h1>{_text(title)}</h1>",
            '<p class="soft">What would be trained, counted before anything is.</p>',
            _tiles(statistics),
            _notes(dataset.notes),
            *_section("Rows, answers, tokens", [_accounting(statistics), _shares(statistics)]),
            *_section("Lengths", [_histogram(statistics), _choices(statistics)]),
            *_section("Rows to look at", map(_odd, statistics.oddities)),
            *(_section("Refused rows", [_refused(dataset)]) if dataset.refusals else []),
            *_section("Rows, token by token", _rows(dataset, statistics, shown)),
            f"<footer>myna {__version__}</footer>\n</body>\n</html>\n",
        ]
    )


def _text(text: str) -> str:
    """Text of the data for HTML: escaped, with what cannot be seen made visible."""
    # A lone surrogate has no place in a file; nor has it in a page.
    return escape(visible(text).encode("utf-8", "replace").decode())


def _section(title: str, parts: Iterable[str]) -> list[str]:
    return [f"<section>\n<h2>{title}</h2>", *parts, "</section>"]


def _tiles(statistics: Statistics) -> str:
    accounting, sharing = statistics.accounting, statistics.sharing
    lost = sum(accounting.refused.values()) + sum(accounting.truncated.values())
    tiles = [
        (f"{accounting.rows_in:,}", "rows in"),
        (f"{lost:,}", "of them refused or shortened"),
        (f"{statistics.answers:,}", "answers"),
        (f"{accounting.tokens:,}", "tokens"),
        (f"{accounting.trained_tokens / accounting.tokens:.1%}", "of the tokens are trained"),
        (f"{sharing.saved:.1%}", "saved by shared beginnings"),
    ]
    items = "\n".join(f"<li><b>{number}</b><span>{label}</span></li>" for number, label in tiles)
    return f'<ul class="tiles">\n{items}\n</ul>'


def _notes(notes: Sequence[str]) -> str:
    items = "\n".join(f"<li>{_text(note)}</li>" for note in notes)
    return f'<ul class="notes">\n{items}\n</ul>'


def _accounting(statistics: Statistics) -> str:
    lines: list[Line] = [
        *row_lines(statistics.accounting),
        *answer_lines(statistics),
        *token_lines(statistics.accounting),
        *sharing_lines(statistics),
    ]
    rows = "\n".join(
        f"<tr><th{' class=in' if not name or name.startswith(' ') else ''}>{_text(name.strip())}"
        f'</th><td class="n">{_text(number)}</td><td>{_text(remark)}</td></tr>'
        for name, number, remark in lines
    )
    return f'<div class="card"><table>\n{rows}\n</table></div>'


def _shares(statistics: Statistics) -> str:
    accounting, sharing = statistics.accounting, statistics.sharing
    trained = accounting.trained_tokens / accounting.tokens
    return (
        f"<h3>Trained tokens, {trained:.1%}</h3>"
        f'<div class="shares"><i class="t" style="width:{trained:.2%}"></i></div>'
        f"<h3>Computed tokens of an epoch, {1 - sharing.saved:.1%}</h3>"
        f'<div class="shares"><i style="width:{1 - sharing.saved:.2%}"></i></div>'
        '<p class="soft">A beginning that rows of a step share, such as a system prompt or earlier '
        "turns, is computed once.</p>"
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
        f'<tr><td>{_text(row.place)}</td><td class="n">{_text(row.measure)}</td>'
        f"<td>{_text(row.excerpt)}</td></tr>"
        for row in oddity.rows
    )
    title = oddity.reason[:1].upper() + oddity.reason[1:]
    return (
        f"<h3>{_text(title + more)}</h3>\n"
        f'<div class="card"><table class="odd">\n{rows}\n</table></div>'
    )


def _refused(dataset: Dataset) -> str:
    shown = dataset.refusals[:SCREENFUL]
    rows = "\n".join(
        f"<tr><td>{_text(str(fault.place))}</td><td>{_text(fault.finding)}</td></tr>"
        for fault in shown
    )
    more = sum(dataset.accounting.refused.values()) - len(shown)
    rest = f'<p class="soft">And {more:,} more.</p>' if more else ""
    return f'<div class="card"><table>\n{rows}\n</table></div>{rest}'


def _rows(dataset: Dataset, statistics: Statistics, shown: Sequence[int]) -> list[str]:
    legend = (
        '<p class="soft legend"><span>context</span> <span class="t">trained</span> '
        f"Each shade is a token. {len(shown):,} of {statistics.answers:,} answers.</p>"
    )
    return [legend, *(_row(dataset, statistics, index) for index in shown)]


def _row(dataset: Dataset, statistics: Statistics, index: int) -> str:
    example: Example = dataset.examples[index]
    context, trained = pieces(example, dataset.tokenizer)
    chips = "".join(
        f'<span class="chip">{_text(remark)}</span>'
        for remark in row_remarks(statistics.repeats, dataset.examples, index)
    )
    return (
        f'<article class="card"><header><b>{_text(place_of(example))}</b>, answer {example.turn}: '
        f"{len(example.prompt_ids):,} tokens of context, {len(example.completion_ids):,} trained"
        f"{chips}</header>\n<pre>{_spans(context, '')}"
        f'<span class="edge">⟦</span>{_spans(trained, "t")}<span class="edge">⟧</span></pre>'
        "</article>"
    )


def _spans(texts: Sequence[str], kind: str) -> str:
    found = []
    for number, piece in cut_pieces(texts, MAX_SHOWN):
        shade = "cut" if number is None else "x" if number % 2 else ""
        names = " ".join(filter(None, (kind, shade)))
        found.append(f'<span class="{names}">' if names else "<span>")
        found.append(f"{_text(piece)}</span>")
    return "".join(found)
