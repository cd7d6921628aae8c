"""Pages for a browser: one frame and one look for all that myna writes as HTML.

Owns the document around the parts, the colours (dark where the reader's system is dark), the
escaping of text that comes from files, and what several pages show: numbers on tiles, tables of
lines, rows token by token. A page is one file without scripts, pictures or anything from elsewhere,
and its own policy forbids the browser to load any. What a page says is known to those who fill it.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape

from myna import __version__
from myna.data.preview import Line, cut_pieces, visible
from myna.data.sample import TokenRow

MAX_SHOWN = 8000
"""Characters of a prompt or an answer on a page; the middle of a longer one is left out."""

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


def document(title: str, parts: Iterable[str], *, style: str, footer: str = "") -> str:
    """The whole page.

    Args:
        title: text of the browser's tab.
        parts: what stands in the body, HTML.
        style: CSS of this page, behind that of all.
        footer: text behind the version of myna.
    """
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>",
            *parts,
            f"<footer>myna {__version__}{text(footer)}</footer>\n</body>\n</html>\n",
        ]
    )


def text(content: str) -> str:
    """Text for HTML: escaped, with what cannot be seen made visible."""
    # A lone surrogate has no place in a file; nor has it in a page.
    return escape(visible(content).encode("utf-8", "replace").decode())


def prose(content: str) -> str:
    """As `text`, with line breaks and tabs as they are."""
    return "".join(
        part if part in ("\n", "\t") else text(part) for part in re.split(r"([\n\t])", content)
    )


def section(title: str, parts: Iterable[str]) -> list[str]:
    """Parts under a heading, which is HTML as they are."""
    return [f"<section>\n<h2>{title}</h2>", *parts, "</section>"]


def card(content: str) -> str:
    """A box around HTML."""
    return f'<div class="card">{content}</div>'


def tiles(numbers: Iterable[tuple[str, str]]) -> str:
    """The numbers to see first, each with its label."""
    items = "\n".join(
        f"<li><b>{text(number)}</b><span>{text(label)}</span></li>" for number, label in numbers
    )
    return f'<ul class="tiles">\n{items}\n</ul>'


def notes(lines: Iterable[str]) -> str:
    """Remarks, one a line."""
    items = "\n".join(f"<li>{text(line)}</li>" for line in lines)
    return f'<ul class="notes">\n{items}\n</ul>'


def lines_table(lines: Iterable[Line]) -> str:
    """A table of name, number and remark; indented names stand below those before them."""
    rows = "\n".join(
        f"<tr><th{' class=in' if not name or name.startswith(' ') else ''}>{text(name.strip())}"
        f'</th><td class="n">{text(number)}</td><td>{text(remark)}</td></tr>'
        for name, number, remark in lines
    )
    return card(f"<table>\n{rows}\n</table>")


def share_bar(title: str, share: float, *, trained: bool = False) -> str:
    """A bar of which `share` is full, under its title and the percentage."""
    kind = ' class="t"' if trained else ""
    return (
        f"<h3>{text(title)}, {share:.1%}</h3>"
        f'<div class="shares"><i{kind} style="width:{share:.2%}"></i></div>'
    )


def token_legend(remark: str) -> str:
    """What the colours of `token_row` mean, and a remark."""
    return (
        '<p class="soft legend"><span>context</span> <span class="t">trained</span> '
        f"Each shade is a token. {text(remark)}</p>"
    )


def token_row(row: TokenRow, chips: Iterable[str] = ()) -> str:
    """A row token by token, what is trained in colour and between ⟦ and ⟧."""
    remarks = "".join(f'<span class="chip">{text(chip)}</span>' for chip in chips)
    return (
        f'<article class="card"><header><b>{text(row.place)}</b>, answer {row.answer}: '
        f"{row.context_tokens:,} tokens of context, {row.trained_tokens:,} trained"
        f"{remarks}</header>\n<pre>{_spans(row.context, '')}"
        f'<span class="edge">⟦</span>{_spans(row.trained, "t")}<span class="edge">⟧</span></pre>'
        "</article>"
    )


def _spans(pieces: Sequence[str], kind: str) -> str:
    found = []
    for number, piece in cut_pieces(pieces, MAX_SHOWN):
        shade = "cut" if number is None else "x" if number % 2 else ""
        names = " ".join(filter(None, (kind, shade)))
        found.append(f'<span class="{names}">' if names else "<span>")
        found.append(f"{text(piece)}</span>")
    return "".join(found)
