"""Text tables: CSV and TSV, a header and then one row of texts after the other.

Owns the delimiter, the header, quoted fields over several lines, and rows that do not fit the
header. Every value is a text; what it means is left to `formats.py`.
"""

import contextlib
import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from myna.data.byte_source import BOM, ByteSource
from myna.data.conversation import Place
from myna.data.faults import Fault
from myna.data.records import (
    CHUNK_BYTES,
    CHUNK_ROWS,
    MAX_ROW_BYTES,
    ROW_LIMIT,
    BadRow,
    Chunk,
    Record,
    Refused,
    bad_byte,
    list_columns,
    quote,
)
from myna.errors import DataError

_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
_LONE_RETURN = re.compile(r"(?<=\r)(?!\n)")
_SURROGATE = re.compile("[\udc80-\udcff]")
_NOT_STARTED = "Training has not started."


@dataclass(frozen=True, slots=True)
class TableRows:
    """A chunk of rows, cut into fields."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[int, list[str]], ...]
    """(line, fields) of each row."""
    row: int
    """Number of the first."""

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return len(self.rows)

    def records(self) -> Iterator[Record | BadRow]:
        """The rows in order, as objects of texts."""
        for row, (line, fields) in enumerate(self.rows, self.row):
            place = Place(self.path, line, row)
            if fault := self._fault(fields, place):
                yield BadRow(fault)
            else:
                yield Record(dict(zip(self.columns, fields, strict=True)), place)

    def _fault(self, fields: list[str], place: Place) -> Fault | None:
        if len(fields) != len(self.columns):
            found = "1 field" if len(fields) == 1 else f"{len(fields)} fields"
            return Fault(
                "fields",
                place,
                f"the row has {found}; expected {len(self.columns)} as in the header "
                f"({list_columns(self.columns)}).",
                'A field that holds the delimiter, a line break or a " stands in double quotes.',
            )
        for column, text in zip(self.columns, fields, strict=True):
            if "\0" in text:
                finding = f"column {quote(column)} holds NUL characters (0x00); expected text."
                return Fault("nul", place, finding, "Remove them, or restore the file.")
            if found_byte := _SURROGATE.search(text):
                content = text.encode(errors="surrogateescape")
                start = len(text[: found_byte.start()].encode())
                error = UnicodeDecodeError("utf-8", content, start, start + 1, "")
                finding, mend = bad_byte(error, None)
                return Fault("encoding", place, f"in column {quote(column)}, {finding}", mend)
        return None


def table_note(source: ByteSource, kind: str) -> str:
    """`CSV divided by a comma, columns instruction, output`."""
    delimiter = find_delimiter(source, kind)
    header = next(_Reader(source, delimiter).rows(), None)
    assert header is not None, "a file without visible bytes is refused before"
    columns = _columns(source.path, *header)
    return f"{kind} divided by {_DELIMITERS[delimiter]}, columns {list_columns(columns)}"


def find_delimiter(source: ByteSource, kind: str) -> str:
    """A tab in TSV; in CSV the one of `, ; tab |` that the first line has most of (none: comma)."""
    if kind == "TSV":
        return "\t"
    with source.opened() as stream:
        line = b""
        while not line.strip() and (read := stream.readline(CHUNK_BYTES)):
            line = read
    header = re.sub(r'"[^"]*"', "", line.removeprefix(BOM).decode(errors="replace"))
    return max(_DELIMITERS, key=header.count)


def table_chunks(source: ByteSource, delimiter: str) -> Iterator[Chunk]:
    """Chunks of the rows behind the header."""
    reader = _Reader(source, delimiter)
    rows = reader.rows()
    columns = _columns(source.path, *next(rows))
    chunk: list[tuple[int, list[str]]] = []
    number, held = 1, 0  # of the chunk's first row, of its bytes
    for line, fields in rows:
        if isinstance(fields, list):
            if len(columns) > 1 and len(fields) == 1 and not fields[0].strip():
                continue  # a line of white space only
            chunk.append((line, fields))
            held += reader.size
            if len(chunk) < CHUNK_ROWS and held < CHUNK_BYTES:
                continue
        if chunk:
            yield TableRows(source.path, columns, tuple(chunk), number)
            number, chunk, held = number + len(chunk), [], 0
        if not isinstance(fields, list):
            yield Refused(fields.fault(Place(source.path, line, number)))
            number += 1
    if chunk:
        yield TableRows(source.path, columns, tuple(chunk), number)


def _columns(path: Path, line: int, fields: "list[str] | _Broken") -> tuple[str, ...]:
    """The names of the columns. Raises DataError for a header that is none."""
    if not isinstance(fields, list):
        raise DataError(f"{fields.fault(Place(path, line, 1))}\n  {_NOT_STARTED}")
    # pandas writes its index under no name; it is called as pandas calls it when reading.
    columns = [name.strip() or f"Unnamed: {index}" for index, name in enumerate(fields)]
    if not any(name.strip() for name in fields):
        raise DataError(
            f"{path.name} line {line}: the header is empty; expected the names of the columns.\n"
            f"  {_NOT_STARTED}"
        )
    for index, name in enumerate(columns):
        if name in columns[:index]:
            raise DataError(
                f"{path.name} line {line}: two columns are named {quote(name)}; expected different "
                f"names.\n  Rename or remove one of them. {_NOT_STARTED}"
            )
        if _SURROGATE.search(name) or "\0" in name:
            shown = quote(name.encode(errors="surrogateescape").decode(errors="replace"))
            raise DataError(
                f"{path.name} line {line}: the name of column {index + 1} is no UTF-8 text "
                f"({shown}).\n  Save the file as UTF-8. {_NOT_STARTED}"
            )
    return tuple(columns)


@dataclass(frozen=True, slots=True)
class _Broken:
    """A row that the csv module cannot divide."""

    kind: str
    finding: str
    mend: str
    line: int
    """Line of the finding; the row may begin before it."""
    column: int | None = None
    ends_file: bool = False

    def fault(self, place: Place) -> Fault:
        began = f" (the row begins on line {place.line})" if place.line != self.line else ""
        return Fault(
            self.kind,
            Place(place.file, self.line, place.row),
            f"{self.finding}{began}.",
            self.mend,
            self.column,
            self.ends_file,
        )


class _TooLong(Exception):
    """A row passed the limit while it was read."""


@dataclass
class _Reader:
    """The rows of a table with the line each begins on."""

    source: ByteSource
    delimiter: str
    size: int = 0
    """Bytes of the row that was read last."""
    _lines: list[str] = field(default_factory=list)
    """The first lines of that row, to find an open quote in."""
    _num_lines: int = 0
    """All its lines."""

    def rows(self) -> Iterator[tuple[int, list[str] | _Broken]]:
        with self.source.opened() as stream:
            reader = csv.reader(self._read_lines(stream), strict=True, delimiter=self.delimiter)
            while True:
                line = reader.line_num + 1
                self.size = self._num_lines = 0
                self._lines.clear()
                try:
                    with _long_fields():
                        fields: list[str] | _Broken = next(reader)
                except StopIteration:
                    return
                except _TooLong:
                    yield line, _too_long(line)
                    return
                except csv.Error as error:
                    fields = self._broken(str(error), line)
                if fields:  # a blank line has none
                    yield line, fields
                if isinstance(fields, _Broken) and fields.ends_file:
                    return

    def _read_lines(self, stream: BinaryIO) -> Iterator[str]:
        is_first = True
        while data := stream.readline(MAX_ROW_BYTES + 1):
            if is_first:
                data, is_first = data.removeprefix(BOM), False
            # A byte that is not UTF-8 becomes half of a character, which no text has of itself.
            text = data.decode(errors="surrogateescape")
            for line in _LONE_RETURN.split(text) if "\r" in text[:-2] else [text]:
                if not line:
                    continue
                self.size += len(line)
                if self.size > MAX_ROW_BYTES:
                    raise _TooLong
                self._num_lines += 1
                if self.size <= CHUNK_BYTES:
                    self._lines.append(line)
                yield line

    def _broken(self, message: str, line: int) -> _Broken:
        """What the csv module's complaint means, and where."""
        last = line + self._num_lines - 1
        opened = _open_quote("".join(self._lines), self.delimiter)
        if opened is not None and "unexpected end" in message:
            offset, column = opened
            return _Broken(
                "open_quote",
                'a " opens a field here and none closes it',
                'Close it, and write a " inside a quoted field as "".',
                line + offset,
                column,
                ends_file=True,
            )
        return _Broken(
            "quotes",
            'a closing " is followed by more text of the field',
            'Write a " inside a quoted field as ""; or a " of an earlier line was never closed.',
            last,
            ends_file=last > line,
        )


def _too_long(line: int) -> _Broken:
    return _Broken(
        "too_long",
        f"the row is longer than {ROW_LIMIT}",
        'Divide it; or is a " never closed?',
        line,
        ends_file=True,
    )


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Let the csv module read fields up to the longest row; its limit is the whole process's."""
    before = csv.field_size_limit(MAX_ROW_BYTES + 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _open_quote(text: str, delimiter: str) -> tuple[int, int] | None:
    """(lines below the first, column) of the quote that opens a field and is not closed."""
    opened: int | None = None
    at_start = True  # of a field
    position = 0
    while position < len(text):
        character = text[position]
        if opened is not None:
            closing = text.find('"', position)
            if closing < 0:
                break
            position = closing + 1
            if text.startswith('"', position):  # a doubled one stands for itself
                position += 1
                continue
            opened = None
            at_start = False
            continue
        if character == '"' and at_start:
            opened = position
        at_start = character in (delimiter, "\n", "\r")
        position += 1
    if opened is None:
        return None
    lines = re.split(r"\r\n|\r|\n", text[:opened])
    return len(lines) - 1, len(lines[-1]) + 1
