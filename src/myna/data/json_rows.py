"""JSON rows: one object a line, or a list of objects, cut into chunks without reading it whole.

Owns where rows begin and end, and faults that concern more than one row (a missing comma, an open
list, a row over several lines). What a row may be is `json_values.py`; opening files `files.py`.
"""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from myna.data.byte_source import BOM, ByteSource
from myna.data.conversation import Place
from myna.data.faults import Fault
from myna.data.json_values import Passage, end_of_value, parse_row, plain_object, skip_white
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
)
from myna.errors import DataError

_WHITE = b" \t\r\n"

_UNDECIDED = 16
"""Characters before the end of a window in which an error may come from the cut: no literal, number
or escape is longer."""

_LONG_ROW = f"the row is longer than {ROW_LIMIT}; no model trains on so long a text."
_LONG_ROW_MEND = "Divide it into several rows."


@dataclass(frozen=True, slots=True)
class JsonLines:
    """A chunk of whole lines, as bytes."""

    path: Path
    data: bytes
    line: int
    """Number of the first line."""
    row: int
    """Number of the first row: blank lines are none."""
    num_rows: int
    offset: int
    """Place in the file of the first byte."""

    def records(self) -> Iterator[Record | BadRow]:
        """The rows in order; a broken line is one BadRow."""
        # Only \n ends a line: bytes.splitlines would also cut at a lone \r.
        lines = self.data.split(b"\n")
        row, offset = self.row, self.offset
        for index, line in enumerate(lines):
            if line.strip(_WHITE):
                is_cut_off = index == len(lines) - 1 and row > 1
                yield self._record(
                    line, Place(self.path, self.line + index, row), offset, is_cut_off
                )
                row += 1
            offset += len(line) + 1

    def _record(self, line: bytes, place: Place, offset: int, is_cut_off: bool) -> Record | BadRow:
        if b"\0" in line and (nul := _nul_bytes(line, place)):
            return nul
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            finding, mend = bad_byte(error, offset + error.start)
            column = len(line[: error.start].decode()) + 1
            return BadRow(Fault("encoding", place, finding, mend, column))
        if (value := plain_object(text)) is not None:
            return Record(value, place)
        passage = Passage(self.path, text, place.line, 1, "line")
        outcome, end = parse_row(passage, skip_white(text, 0), place.line, place.row)
        if end is None:
            hint = "This is the last line and it has no end: was the file cut off?"
            return _with_hint(outcome, hint) if is_cut_off else outcome
        if (rest := skip_white(text, end)) < len(text):
            return BadRow(passage.fault("Extra data", rest, place.row))
        return outcome


def _nul_bytes(line: bytes, place: Place) -> BadRow | None:
    """The fault of a line that begins or ends in NUL bytes; within a text JSON refuses them."""
    if not line.startswith(b"\0") and not line.rstrip(_WHITE).endswith(b"\0"):
        return None
    column = len(line[: line.index(b"\0")].decode(errors="replace")) + 1
    finding = f"{line.count(0):,} NUL bytes (0x00) stand in the line; expected text."
    mend = "The file was damaged, by a full disk or a power failure: restore it, or remove them."
    return BadRow(Fault("nul", place, finding, mend, column))


def _with_hint(outcome: Record | BadRow, hint: str, *, ends_file: bool = False) -> BadRow:
    assert isinstance(outcome, BadRow), "only a row that cannot be read has no end"
    fault = outcome.fault
    return BadRow(replace(fault, mend=f"{fault.mend}  {hint}".strip(), ends_file=ends_file))


def line_chunks(source: ByteSource) -> Iterator[Chunk]:
    """Chunks of a file with one object a line."""
    lines: list[bytes] = []
    line = row = 1  # of the next
    offset = size = rows = 0  # of the next; of those in `lines`
    with source.opened() as stream:
        while data := stream.readline(MAX_ROW_BYTES + 1):
            if line == 1 and data.startswith(BOM):
                data, offset = data[len(BOM) :], len(BOM)
            is_long = len(data) > MAX_ROW_BYTES
            if lines and (is_long or rows == CHUNK_ROWS or size >= CHUNK_BYTES):
                yield JsonLines(
                    source.path, b"".join(lines), line - len(lines), row - rows, rows, offset - size
                )
                lines, size, rows = [], 0, 0
            if is_long:
                place = Place(source.path, line, row)
                yield Refused(Fault("too_long", place, _LONG_ROW, _LONG_ROW_MEND))
                offset += len(data) + _skip_line(stream, data)
                line, row = line + 1, row + 1
                continue
            visible = bool(data.strip(_WHITE))
            if visible and row == 1 and (spread := _spread(source, data, line)):
                yield Refused(spread)
                return
            lines.append(data)
            line, row, offset = line + 1, row + visible, offset + len(data)
            size, rows = size + len(data), rows + visible
    if lines:
        yield JsonLines(
            source.path, b"".join(lines), line - len(lines), row - rows, rows, offset - size
        )


def _skip_line(stream: BinaryIO, begun: bytes) -> int:
    """Read over the rest of a line without holding it; its number of bytes."""
    skipped = 0
    while not begun.endswith(b"\n") and (begun := stream.readline(CHUNK_BYTES)):
        skipped += len(begun)
    return skipped


def _spread(source: ByteSource, first: bytes, line: int) -> Fault | None:
    """The fault of a file whose first row does not end on its line, but on a later one."""
    text = first.decode(errors="replace")
    passage = Passage(source.path, text.rstrip("\n"), line, 1, "line")
    start = skip_white(text, 0)
    outcome, end = parse_row(passage, start, line, 1)
    if end is not None:
        return None
    with source.opened() as stream:
        content = stream.read(MAX_ROW_BYTES).removeprefix(BOM).decode(errors="replace")
    try:
        end = end_of_value(content, skip_white(content, 0))
    except (ValueError, RecursionError):
        return None
    if skip_white(content, end) == len(content):
        hint = (
            "The file is one JSON object over several lines; expected a list of rows in [ ] or one "
            "row a line."
        )
    else:
        hint = (
            "The rows stand on several lines each; expected a list of rows in [ ] or one row a "
            "line, as `jq -c . OLD > NEW` writes them."
        )
    return _with_hint(outcome, hint, ends_file=True).fault


@dataclass(frozen=True, slots=True)
class JsonList:
    """A chunk of whole rows of a list, with the commas between them."""

    path: Path
    text: str
    line: int
    column: int
    """Place of the first character."""
    row: int
    """Number of the first row."""
    num_rows: int

    def records(self) -> Iterator[Record | BadRow]:
        """The rows in order."""
        passage = Passage(self.path, self.text, self.line, self.column, "file")
        position, row = 0, self.row
        line, counted = self.line, 0
        while True:
            line += self.text.count("\n", counted, position)
            counted = position
            outcome, end = parse_row(passage, position, line, row)
            yield outcome
            assert end is not None, "chunks are cut where rows end"
            position = skip_white(self.text, end)
            if position == len(self.text):
                return
            assert self.text[position] == ",", "chunks are cut where rows end"
            position, row = skip_white(self.text, position + 1), row + 1


def list_chunks(source: ByteSource) -> Iterator[Chunk]:
    """Chunks of a file that is one JSON list; it ends at its first fault."""
    with source.opened() as stream:
        window = _Window(stream, source.path)
        position = window.visible(0) + 1  # behind the [
        position = window.visible(position)
        row = 1  # number of the next
        start, first = position, row  # of the chunk
        closed = window.text.startswith("]", position)
        message = ""
        while not closed and not message:
            if position == len(window.text):
                message = "Unclosed list"
                break
            if window.text[position] == "]":
                message = "Trailing comma"
                break
            end = window.end_of_value(position)
            if end is None:
                if row > first:
                    yield window.chunk(start, position, first, row - first)
                yield Refused(window.broken_row(position, row))
                return
            row += 1
            if end - start >= CHUNK_BYTES or row - first == CHUNK_ROWS:
                yield window.chunk(start, end, first, row - first)
                end = window.drop(end)
                start, first = end, row
            position = window.visible(end)
            closed = window.text.startswith("]", position)
            if closed:
                break
            if not window.text.startswith(",", position):
                message = (
                    "Unclosed list" if position == len(window.text) else "Expecting ',' delimiter"
                )
                break
            position = window.visible(position + 1)
            if first == row:
                start = position
        if row > first:
            yield window.chunk(start, position, first, row - first)
        if not message:
            position = window.visible(position + 1)
            if position < len(window.text):
                message = "Text after list"
        if message:
            yield Refused(window.fault(message, position, row))


class _Window:
    """The part of a file that is looked at, as text; it moves on as rows are cut from its front."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.text = ""
        self._stream = stream
        self._path = path
        self._line = self._column = 1
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._ended = False
        self._bad_byte: tuple[str, str] | None = None

    def visible(self, position: int) -> int:
        """The first place from `position` on that is no white space, or the end of the file.

        Raises DataError for white space that would have to be held like a row.
        """
        start = position
        while True:
            position = skip_white(self.text, position)
            if position < len(self.text) or self._ended:
                return position
            if self._is_long(start):
                line, _ = self._passage().locate(start)
                raise DataError(
                    f"{self._path.name} line {line}: more than {ROW_LIMIT} of white space begin "
                    "here; expected a row.\n  Was the file damaged? Training has not started."
                )
            self._read_on()

    def end_of_value(self, position: int) -> int | None:
        """Where the value ends; None where it is broken or too long."""
        while True:
            end: int | None = None
            try:
                found = end_of_value(self.text, position)
            except json.JSONDecodeError as error:
                is_open = (
                    error.msg.startswith("Unterminated string")
                    or error.pos > len(self.text) - _UNDECIDED
                )
            except RecursionError:
                return None
            else:
                # A number may go on where the window ends; what has a closing sign does not.
                is_open = self.text[found - 1] not in '}]"' and found > len(self.text) - _UNDECIDED
                end = found
            if not is_open or self._ended:
                return end
            if self._is_long(position):
                return None
            self._read_on()

    def drop(self, position: int) -> int:
        """Forget what stands before `position`; its new number (0)."""
        passage = self._passage()
        self._line, self._column = passage.locate(position)
        self.text = self.text[position:]
        return 0

    def chunk(self, start: int, end: int, row: int, num_rows: int) -> JsonList:
        """The rows from `start` to `end`; white space and a comma behind the last may be there."""
        line, column = self._passage().locate(start)
        text = self.text[start:end].rstrip(" \t\r\n,")
        return JsonList(self._path, text, line, column, row, num_rows)

    def broken_row(self, position: int, row: int) -> Fault:
        """Why the row at `position` has no end."""
        line, _ = self._passage().locate(position)
        place = Place(self._path, line, row)
        if not self._ended and self._is_long(position):
            return Fault("too_long", place, _LONG_ROW, _LONG_ROW_MEND, ends_file=True)
        outcome, _ = parse_row(self._passage(), position, line, row)
        assert isinstance(outcome, BadRow), "a row without end is bad"
        fault = outcome.fault
        is_cut_off = fault.column is not None and self._reaches_end(position)
        if self._bad_byte and is_cut_off:
            return self._encoding_fault(row)
        if is_cut_off:
            return _with_hint(outcome, "Was the file cut off?", ends_file=True).fault
        return replace(fault, ends_file=True)

    def fault(self, message: str, position: int, row: int) -> Fault:
        """A fault of the list itself."""
        if self._bad_byte and position == len(self.text):
            return self._encoding_fault(row)
        return self._passage().fault(message, position, row, ends_file=True)

    def _encoding_fault(self, row: int) -> Fault:
        assert self._bad_byte is not None, "called for a bad byte only"
        line, column = self._passage().locate(len(self.text))
        finding, mend = self._bad_byte
        return Fault("encoding", Place(self._path, line, row), finding, mend, column, True)

    def _passage(self) -> Passage:
        return Passage(self._path, self.text, self._line, self._column, "file")

    def _is_long(self, position: int) -> bool:
        return len(self.text) - position > MAX_ROW_BYTES

    def _reaches_end(self, position: int) -> bool:
        """Whether a broken value is broken for want of the text that would follow."""
        try:
            end_of_value(self.text, position)
        except json.JSONDecodeError as error:
            return error.msg.startswith("Unterminated string") or error.pos >= len(self.text)
        except RecursionError:
            return False
        return False

    def _read_on(self) -> None:
        # A row that is not complete is parsed again with each block: blocks grow with it.
        block = self._stream.read(min(max(CHUNK_BYTES, len(self.text)), MAX_ROW_BYTES // 2))
        if self._offset == 0 and block.startswith(BOM):
            self._offset, block = len(BOM), block[len(BOM) :]
        before = len(self._decoder.getstate()[0])
        try:
            self.text += self._decoder.decode(block, final=not block)
            self._ended = not block
        except UnicodeDecodeError as error:
            self.text += error.object[: error.start].decode()
            self._bad_byte = bad_byte(error, self._offset - before + error.start)
            self._ended = True
        self._offset += len(block)
