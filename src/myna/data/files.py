"""Data files: bytes on disk to JSON objects, each with the line it stands on.

Owns reading: UTF-8, JSON list or one object a line (told by content, not by suffix), strict JSON,
and the place of every fault. What the keys of an object mean is left to `formats.py`.
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.data.conversation import Place
from myna.data.faults import Fault
from myna.errors import DataError

_WHITE = re.compile(r"[ \t\r\n]*")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True, slots=True)
class Record:
    """One JSON object and its place."""

    value: dict[str, Any]
    place: Place


@dataclass(frozen=True, slots=True)
class BadRow:
    """Something in a row's place that is no usable JSON object."""

    fault: Fault


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file as it was at one moment: decoded text without byte order mark, sha256 of its bytes."""

    path: Path
    text: str
    sha256: str

    def records(self) -> Iterator[Record | BadRow]:
        """The rows in order. A broken line is one BadRow; a broken list ends at its first fault."""
        start = _skip_white(self.text, 0)
        if self.text.startswith("[", start):
            return _list_records(self.path, self.text, start)
        return _line_records(self.path, self.text)


def read_file(path: Path) -> DataFile:
    """Read a data file whole.

    Raises:
        DataError: not found (with the nearest names), unreadable, empty, not UTF-8, not JSON.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(_not_found(path)) from None
    except IsADirectoryError:
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in _SUFFIXES)
        raise DataError(
            f"{path} is a folder; expected a JSON or JSONL file.\n"
            f"  {'Files in it: ' + ', '.join(inside[:20]) if inside else 'It holds none.'}"
        ) from None
    except OSError as error:
        raise DataError(f"{path} could not be read: {error.strerror}.") from error
    text = _decode(path, content)
    start = _skip_white(text, 0)
    if start == len(text):
        size = "0 bytes" if not content else f"{len(content)} bytes, white space only"
        raise DataError(
            f"{path.name} is empty ({size}); expected a JSON list or one JSON object a line.\n"
            "  Training has not started."
        )
    if text[start] not in "[{":
        raise DataError(
            f"{path.name} line {text.count(chr(10), 0, start) + 1}: the file begins with "
            f"{_quote(text[start : start + 20])}; expected a JSON list, which begins with [, or "
            "one JSON object a line, which begins with {.\n  Training has not started."
        )
    return DataFile(path, text, hashlib.sha256(content).hexdigest())


def read_records(paths: Sequence[Path]) -> Iterator[Record | BadRow]:
    """The rows of all files, in order; see `DataFile.records`."""
    for path in paths:
        yield from read_file(path).records()


def content_hash(files: Sequence[DataFile]) -> str:
    """sha256 of the bytes of the data: of the only file, or of the digests of all in order."""
    if len(files) == 1:
        return files[0].sha256
    return hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()


def _not_found(path: Path) -> str:
    folder = path.parent
    lines = [f"{path} was not found (working directory: {Path.cwd()})."]
    if folder.is_dir():
        names = [entry.name for entry in folder.iterdir() if entry.is_file()]
        near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
        data_files = sorted(name for name in names if Path(name).suffix in _SUFFIXES)
        if near:
            lines.append(f"Did you mean {' or '.join(str(folder / name) for name in near)}?")
        elif data_files:
            lines.append(f"Data files in {folder}: {', '.join(data_files[:10])}.")
        else:
            lines.append(f"{folder} holds no .json or .jsonl file.")
    else:
        lines.append(f"The folder {folder} does not exist.")
    return "\n  ".join(lines)


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind a byte order mark.
        offset = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        line = content.count(b"\n", 0, offset) + 1
        encoding = _probable_encoding(content)
        raise DataError(
            f"{path.name} line {line}: byte 0x{content[offset]:02x} at offset {offset} is not UTF-8"
            f"{f'; the file looks like {encoding}' if encoding else ''}.\n"
            f"  Save it as UTF-8, for example: iconv -f {encoding or 'ENCODING'} -t UTF-8 "
            f"{path.name} > utf8-{path.name}\n  Training has not started."
        ) from None


def _probable_encoding(content: bytes) -> str | None:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    try:
        text = content.decode("gb18030")
    except UnicodeDecodeError:
        return None
    return "GB18030" if re.search("[\u4e00-\u9fff]", text) else None


class _Refused(ValueError):
    """Valid for the json module, but not a row: duplicate keys, NaN and the like."""

    def __init__(self, kind: str, finding: str, mend: str) -> None:
        super().__init__(finding)
        self.kind, self.finding, self.mend = kind, finding, mend


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for index, key in enumerate(keys) if key in keys[:index])
        raise _Refused(
            "duplicate_key",
            f"the key {_quote(twice)} occurs twice in one object",
            "Keep one of them; a reader would silently take the last.",
        )
    return result


def _refuse_constant(name: str) -> Any:
    raise _Refused("not_a_number", f"{name} is not JSON", "Write a number or null.")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        _refuse_constant(digits[:20])
    return number


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite
)


def _skip_white(text: str, position: int) -> int:
    match = _WHITE.match(text, position)
    assert match is not None, "the pattern matches the empty string"
    return match.end()


def _line_records(path: Path, text: str) -> Iterator[Record | BadRow]:
    # Only \n ends a line: str.splitlines would also cut at U+2028, which JSON allows in a text.
    lines = text.split("\n")
    row = 0
    for number, line in enumerate(lines, start=1):
        start = _skip_white(line, 0)
        if start == len(line):
            continue
        row += 1
        outcome, end = _parse(line, start, Place(path, number, row))
        if end is None:
            assert isinstance(outcome, BadRow), "only a row that cannot be read has no end"
            if row == 1 and _is_one_value(text):
                yield _with_hint(
                    outcome,
                    "The file is one JSON object over several lines; expected a list of rows in "
                    "[ ] or one row a line.",
                )
                return
            if number == len(lines) and row > 1:
                outcome = _with_hint(
                    outcome, "This is the last line and it has no end: was the file cut off?"
                )
        elif (rest := _skip_white(line, end)) < len(line):
            error = json.JSONDecodeError("Extra data", line, rest)
            outcome = BadRow(_json_fault(error, Place(path, number, row)))
        yield outcome


def _list_records(path: Path, text: str, start: int) -> Iterator[Record | BadRow]:
    row = 0
    line, counted = 1, 0
    position = _skip_white(text, start + 1)
    closed = text.startswith("]", position)
    while not closed:
        row += 1
        line += text.count("\n", counted, position)
        counted = position
        place = Place(path, line, row)
        message = ""
        if position == len(text):
            message = "Unclosed list"
        elif text[position] == "]":
            message = "Trailing comma"
        else:
            outcome, end = _parse(text, position, place)
            yield outcome
            if end is None:
                return
            position = _skip_white(text, end)
            closed = text.startswith("]", position)
            if not closed and not text.startswith(",", position):
                message = "Unclosed list" if position == len(text) else "Expecting ',' delimiter"
                place = Place(path, line + text.count("\n", counted, position), row + 1)
        if message:
            yield BadRow(_json_fault(json.JSONDecodeError(message, text, position), place))
            return
        if not closed:
            position = _skip_white(text, position + 1)
    rest = _skip_white(text, position + 1)
    if rest < len(text):
        error = json.JSONDecodeError("Text after list", text, rest)
        yield BadRow(_json_fault(error, Place(path, error.lineno, row + 1)))


def _parse(text: str, position: int, place: Place) -> tuple[Record | BadRow, int | None]:
    """The row that begins at `position`, and where it ends (None: nobody can tell)."""
    try:
        value, end = _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        line = place.line + text.count("\n", position, error.pos)
        return BadRow(_json_fault(error, Place(place.file, line, place.row))), None
    except _Refused as error:
        fault = Fault(error.kind, place, f"{error.finding}.", error.mend)
        return BadRow(fault), _end_of_value(text, position)
    except RecursionError:
        finding = "lists or objects are nested too deeply."
        return BadRow(Fault("depth", place, finding, "Flatten the row.")), None
    except ValueError:
        # Python refuses integers of more than 4,300 digits (their reading takes quadratic time).
        finding = "a number has more than 4,300 digits."
        return BadRow(Fault("number", place, finding, "Write it as a text in quotes.")), None
    if not isinstance(value, dict):
        finding = f"the row is {describe(value)}; expected an object with named fields in {{ }}."
        return BadRow(Fault(f"not_object:{type(value).__name__}", place, finding)), end
    if _SURROGATE_ESCAPE.search(text, position, end) and not _is_encodable(value):
        finding = "an escape of \\ud800 to \\udfff stands alone; it is half of a character."
        mend = "Write both halves of the pair, or the character itself."
        return BadRow(Fault("surrogate", place, finding, mend)), end
    return Record(value, place), end


def _end_of_value(text: str, position: int) -> int | None:
    """Where a value ends that is JSON but refused, so that the rows behind it are read too."""
    try:
        _, end = json.JSONDecoder().raw_decode(text, position)
    except (ValueError, RecursionError):
        return None
    return end


def describe(value: Any) -> str:
    """`a text`, `the number 5`, `null`: a JSON value as an error names it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {str(value)[:20]}"
    if isinstance(value, str):
        return f"the text {_quote(value[:20])}"
    return "a list" if isinstance(value, list) else "an object"


def _is_encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_one_value(text: str) -> bool:
    try:
        _, end = _DECODER.raw_decode(text, _skip_white(text, 0))
    except (ValueError, RecursionError):
        return False
    return _skip_white(text, end) == len(text)


def _with_hint(row: BadRow, hint: str) -> BadRow:
    fault = row.fault
    mend = f"{fault.mend}  {hint}" if fault.mend else hint
    return BadRow(Fault(fault.kind, fault.place, fault.finding, mend, fault.column))


_JSON_ADVICE = {
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


def _json_fault(error: json.JSONDecodeError, place: Place) -> Fault:
    # Some messages carry a place of their own or, by release of Python, a trailing colon.
    name = error.msg.removesuffix(": ").split(": line")[0]
    expected, mend = _JSON_ADVICE.get(name, (name, ""))
    rest = error.doc[error.pos : error.pos + 12].split("\n")[0]
    if name == "Unterminated string starting at":
        found = "a text that begins here"
    elif error.pos >= len(error.doc):
        found = "the end of the file" if "\n" in error.doc else "the end of the line"
    else:
        found = _quote(rest) if rest else "the end of the line"
    finding = f"broken JSON: found {found}; expected {expected}."
    return Fault(f"json:{name}", place, finding, mend, error.colno)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
