"""JSON values: one row of strict JSON, and the place of whatever is wrong with it.

Owns what is refused beyond the grammar (duplicate keys, NaN, endless numbers, depth, halves of
characters) and the words for broken JSON. Where rows begin and end is left to `json_rows.py`.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from myna.data.conversation import Place
from myna.data.faults import Fault
from myna.data.records import BadRow, Record, describe, quote

MAX_DEPTH = 100
"""Lists and objects within each other. Python's own limit moves with the stack of the caller."""

_MAX_DIGITS = 4_300
"""Python refuses longer integers: reading one takes time that grows with the square of its size."""

_WHITE = re.compile(r"[ \t\r\n]*+")
_STRING = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_STRINGS = re.compile(_STRING, re.DOTALL)
_NUMBER = r"-?(?:Infinity|[0-9]++(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?)|NaN"
_TOKENS = re.compile(_STRING + r"|[{}\[\]]|" + _NUMBER, re.DOTALL)
_ESCAPES = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_ONE_KIND_OF_BRACKET = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a file as text, and where its first character stands."""

    path: Path
    text: str
    line: int
    column: int
    unit: Literal["line", "file"]
    """What ends where the text ends."""

    def locate(self, position: int) -> tuple[int, int]:
        """Line and column, from 1, of a character of the text."""
        newline = self.text.rfind("\n", 0, position)
        if newline < 0:
            return self.line, self.column + position
        return self.line + self.text.count("\n", 0, position), position - newline

    def fault(self, message: str, position: int, row: int, *, ends_file: bool = False) -> Fault:
        """The fault of broken JSON: `message` is the json module's, or a key of `_ADVICE`."""
        # Some messages carry a place of their own or, by release of Python, a trailing colon.
        name = message.removesuffix(": ").split(": line")[0]
        expected, mend = _ADVICE.get(name, (name, ""))
        rest = self.text[position : position + 12].split("\n")[0]
        if name == "Unterminated string starting at":
            found = "a text that begins here"
        elif position >= len(self.text):
            found = f"the end of the {self.unit}"
        else:
            found = quote(rest) if rest else "the end of the line"
        finding = f"broken JSON: found {found}; expected {expected}."
        line, column = self.locate(position)
        return Fault(f"json:{name}", Place(self.path, line, row), finding, mend, column, ends_file)


def skip_white(text: str, position: int) -> int:
    """The first place from `position` on that is no white space."""
    match = _WHITE.match(text, position)
    assert match is not None, "the pattern matches the empty string"
    return match.end()


class _Refused(ValueError):
    """Grammatical, but no row. What and where is found by `_refusals`."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _Refused
    return result


def _refuse_constant(name: str) -> Any:
    raise _Refused


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _Refused
    return number


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite
)

# Numbers are not converted: it only tells where a value ends, whatever its length.
_CUTTER = json.JSONDecoder(parse_int=len, parse_float=len)


def end_of_value(text: str, position: int) -> int:
    """Where the value that begins at `position` ends; it need not be acceptable.

    Raises json.JSONDecodeError or RecursionError where nobody can tell.
    """
    return _CUTTER.raw_decode(text, position)[1]


def plain_object(text: str) -> dict[str, Any] | None:
    """The object that the text is; None where `parse_row` has to look at it, which takes longer."""
    try:
        value, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return None
    is_plain = (
        isinstance(value, dict)
        and (end == len(text) or skip_white(text, end) == len(text))
        and text.count("{") + text.count("[") <= MAX_DEPTH
        and not _SURROGATE_ESCAPE.search(text)
    )
    return value if is_plain else None


def parse_row(
    passage: Passage, position: int, line: int, row: int
) -> tuple[Record | BadRow, int | None]:
    """The row that begins at `position` on `line`, and where it ends (None: nobody can tell)."""
    text = passage.text
    try:
        value, end = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        return BadRow(passage.fault(error.msg, error.pos, row)), None
    except (ValueError, RecursionError):
        return _refused(passage, position, row), _known_end(text, position)
    place = Place(passage.path, line, row)
    if not isinstance(value, dict):
        finding = f"the row is {describe(value)}; expected an object with named fields in {{ }}."
        return BadRow(Fault(f"not_object:{type(value).__name__}", place, finding)), end
    escaped = _SURROGATE_ESCAPE.search(text, position, end)
    if _is_deep(text, position, end) or (escaped and not _is_encodable(value)):
        return _refused(passage, position, row), end
    return Record(value, place), end


def _known_end(text: str, position: int) -> int | None:
    try:
        return end_of_value(text, position)
    except (ValueError, RecursionError):
        return None


def _is_deep(text: str, position: int, end: int) -> bool:
    if text.count("{", position, end) + text.count("[", position, end) <= MAX_DEPTH:
        return False
    bare = _STRINGS.sub("", text[position:end]).encode()
    brackets = bare.translate(None, _NO_BRACKETS).translate(_ONE_KIND_OF_BRACKET)
    for _ in range(MAX_DEPTH):  # each turn takes off the innermost brackets
        brackets = brackets.replace(b"[]", b"")
        if not brackets:
            return False
    return True


def _is_encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _refused(passage: Passage, position: int, row: int) -> BadRow:
    kind, where, finding, mend = next(_refusals(passage.text, position))
    line, column = passage.locate(where)
    return BadRow(Fault(kind, Place(passage.path, line, row), finding, mend, column))


def _refusals(text: str, position: int) -> Iterator[tuple[str, int, str, str]]:
    """(kind, position, finding, mend) of what is grammatical and refused, in the text's order."""
    keys: list[set[str] | None] = []  # of the open objects; None for an open list
    for match in _TOKENS.finditer(text, position):
        token, where = match.group(), match.start()
        if token in "{[":
            keys.append(set() if token == "{" else None)
            if len(keys) > MAX_DEPTH:
                finding = f"lists or objects are nested more than {MAX_DEPTH} deep."
                yield "depth", where, finding, "Flatten the row."
        elif token in "}]":
            keys.pop()
            if not keys:
                return
        elif token[0] == '"':
            half = _lone_surrogate(token)
            if half is not None:
                yield (
                    "surrogate",
                    where + half,
                    "an escape of \\ud800 to \\udfff stands alone; it is half of a character.",
                    "Write both halves of the pair, or the character itself.",
                )
            names = keys[-1] if keys else None
            if names is not None and text.startswith(":", skip_white(text, match.end())):
                name = json.loads(token, strict=False)
                if name in names:
                    yield (
                        "duplicate_key",
                        where,
                        f"the key {quote(name[:80])} occurs twice in one object.",
                        "Keep one of them; a reader would silently take the last.",
                    )
                names.add(name)
        elif token.lstrip("-").isdigit():
            if len(token.lstrip("-")) > _MAX_DIGITS:
                finding = f"a number has more than {_MAX_DIGITS:,} digits."
                yield "number", where, finding, "Write it as a text in quotes."
        elif not math.isfinite(float(token)):
            finding = f"{token[:20]} is not JSON."
            yield "not_a_number", where, finding, "Write a number or null."


def _lone_surrogate(token: str) -> int | None:
    """Where in the token, quotes and all, an escape stands that is half of a character."""
    high: re.Match[str] | None = None  # the escape of a first half
    for escape in _ESCAPES.finditer(token):
        code = int(escape[1], 16) if escape[1] else 0
        follows = high is not None and escape.start() == high.end()
        if 0xDC00 <= code <= 0xDFFF:
            if not follows:
                return high.start() if high else escape.start()
            high = None
            continue
        if high is not None:
            return high.start()
        high = escape if 0xD800 <= code <= 0xDBFF else None
    return high.start() if high else None


_ADVICE = {
    "Expecting property name enclosed in double quotes": (
        'a key in double quotes ("key")',
        "Remove a comma that stands before }, and use double quotes only.",
    ),
    "Illegal trailing comma before end of object": (
        "another key after the comma",
        "Remove the comma before }.",
    ),
    "Illegal trailing comma before end of array": (
        "another value after the comma",
        "Remove the comma before ].",
    ),
    "Expecting ',' delimiter": (
        "a comma or the closing bracket",
        'Put a comma between fields, and write a " inside a text as \\".',
    ),
    "Expecting ':' delimiter": ("a colon after the key", 'Write fields as "key": value.'),
    "Expecting value": (
        "a value",
        "Texts stand in double quotes; a missing value is written null.",
    ),
    "Unterminated string starting at": (
        'its closing "',
        'Close the text, write a line break inside it as \\n and a " as \\".',
    ),
    "Invalid control character at": (
        "no raw line break, tab or other control character inside a text",
        "Write a line break as \\n and a tab as \\t.",
    ),
    "Invalid \\escape": (
        'one of \\" \\\\ \\/ \\b \\f \\n \\r \\t \\uXXXX',
        "Write a backslash as \\\\.",
    ),
    "Invalid \\uXXXX escape": ("four hexadecimal digits after \\u", "Write a backslash as \\\\."),
    "Extra data": ("the end of the row", "Put each row on a line of its own, or all into [ ]."),
    "Text after list": ("the end of the file after ]", "Put all rows into one [ ]."),
    "Trailing comma": ("another row after the comma", "Remove the comma before ]."),
    "Unclosed list": ("] at the end of the list", "Was the file cut off?"),
}
